"""Given panels: kept to the last bit on every solver, whatever the pipeline; the rest is drawn around them."""

from itertools import pairwise

import pytest
import torch

import smalti
from smalti.control.known_panels import Given, KnownPanels, given_panels
from smalti.core.errors import Refusal, UserError
from smalti.core.method import Moment, StepCall
from smalti.ops.canvas import PanelLayout
from smalti.sampling.schedulers import make_scheduler
from smalti.zoo.loader import load_model

LAYOUT = PanelLayout(1, 2)


@pytest.fixture
def pipe(tiny_models):
    pipe = load_model(tiny_models["text"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, *methods, seed=0, **settings):
    settings = {"num_inference_steps": 4, "height": 32, "width": 64, "output_type": "latent", **settings}
    generator = torch.Generator().manual_seed(seed)
    if not methods:
        return pipe("a cat", generator=generator, **settings).images
    with smalti.apply(pipe, *methods):
        return pipe("a cat", generator=generator, **settings).images


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_given_panel_ends_as_it_was_given_and_the_other_sees_it(pipe, solver, guidance):
    pipe.register_modules(scheduler=make_scheduler(solver))
    left = torch.randn(1, 16, 4, 4)
    plain = draw(pipe, guidance_scale=guidance)
    drawn = draw(pipe, KnownPanels(given_panels(LAYOUT, {0: left})), guidance_scale=guidance)
    assert torch.allclose(drawn[..., :4], left, atol=1e-4)
    assert not torch.allclose(drawn[..., 4:], plain[..., 4:], atol=1e-3)
    other = draw(pipe, KnownPanels(given_panels(LAYOUT, {0: -left})), guidance_scale=guidance)
    assert not torch.allclose(drawn[..., 4:], other[..., 4:], atol=1e-3)


def test_the_given_part_is_noised_by_the_same_noise_in_every_step(pipe):
    left, noise, seen = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 8), []

    def watch(pipe, step, timestep, tensors):
        seen.append((float(timestep) / 1000, tensors["latents"]))

    steps = [1.0, 0.75, 0.5, 0.25, 0.0]
    draw(pipe, KnownPanels(given_panels(LAYOUT, {0: left})), latents=noise, shift=1.0, callback_on_step_end=watch)
    for (t, latents), s in zip(seen, steps[1:], strict=True):
        assert t > s
        assert torch.allclose(latents[..., :4], (1 - s) * left + s * noise[..., :4], atol=1e-4)


def test_guidance_that_acts_for_a_while_changes_nothing_of_the_given(pipe):
    left = torch.randn(1, 16, 4, 4)
    drawn = draw(
        pipe, KnownPanels(given_panels(LAYOUT, {1: left})), guidance_scale=3.0, guidance_interval=(0.3, 0.8),
    )  # fmt: skip
    assert torch.allclose(drawn[..., 4:], left, atol=1e-4)


def test_every_sample_has_its_own_given_panel(pipe):
    left = torch.randn(2, 16, 4, 4)
    drawn = draw(pipe, KnownPanels(given_panels(LAYOUT, {0: left})), num_images_per_prompt=2)
    assert torch.allclose(drawn[..., :4], left, atol=1e-4)


def test_a_panel_is_drawn_the_same_alone_and_in_a_batch(pipe):
    known = KnownPanels(given_panels(LAYOUT, {0: torch.randn(1, 16, 4, 4)}), resample=1)
    noise = torch.randn(2, 16, 4, 8)
    both = draw(pipe, known, latents=noise, num_images_per_prompt=2)
    assert torch.allclose(both[1:], draw(pipe, known, latents=noise[1:]), atol=1e-4)


def test_packed_latents_are_given_as_the_pipeline_packs_them():
    given = given_panels(LAYOUT, {0: torch.ones(1, 2, 2, 2)})

    def pack(x):  # tokens of 2 x 2 patches, as Flux has them
        return x.unflatten(3, (2, 2)).permute(0, 3, 1, 2, 4).flatten(2)

    packed = given.packed(pack)
    assert packed.values.shape == packed.mask.shape == (1, 2, 8)
    assert packed.mask[0].tolist() == [[True] * 8, [False] * 8]


def loop(method, x0, noise, estimate, steps=20):
    """Euler by hand for a model whose estimate of the clean sample is known: only the given values of x0 are seen."""
    state, x, notes = method.init(), noise.clone(), []
    times = torch.linspace(1, 0, steps + 1).tolist()
    for step, (t, s) in enumerate(pairwise(times)):
        sample, held = x, t

        def run(other=None, sample=sample, t=held):
            y = sample if other is None else other
            return ((y - estimate(y, t)) / t,)

        call = StepCall(Moment(step, step, t), x, run, notes.append)
        x = x + (s - t) * method.at_step(state, call)[0]
    return x, notes


def test_looking_again_brings_the_drawn_part_nearer_to_what_the_given_one_asks_for():
    """Two numbers with correlation 0.95, of which one is given: the best estimate of the other is known."""
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    x0 = torch.randn(20_000, 2) @ torch.linalg.cholesky(covariance).T

    def estimate(y, t):
        marginal = (1 - t) ** 2 * covariance + t**2 * torch.eye(2)
        return (1 - t) * y @ torch.linalg.inv(marginal) @ covariance

    errors = []
    for rounds in (0, 2):
        # Fresh noise is shared by all rows of a call, so the pairs lie along the other axis here.
        method = KnownPanels(Given(x0.T[None], torch.tensor([[True], [False]])), resample=rounds)
        noise = torch.randn(1, 2, 20_000)
        drawn, notes = loop(method, x0, noise, lambda y, t: estimate(y[0].T, t).T[None])
        assert torch.allclose(drawn[0, 0], x0[:, 0], atol=1e-4)
        assert notes.count("looked again") == 20 * rounds
        errors.append(float((drawn[0, 1] - 0.95 * x0[:, 0]).square().mean()))
    assert errors[1] < 0.4 * errors[0]


def test_a_model_that_predicts_no_velocity_is_refused():
    method = KnownPanels(Given(torch.zeros(1, 2, 4), torch.tensor([[True], [False]])))
    state, x = method.init(), torch.randn(1, 2, 4)
    method.at_step(state, StepCall(Moment(0, 0, 999.0), x, lambda: (torch.zeros_like(x),), print))
    with pytest.raises(Refusal, match="left its way"):
        method.at_step(state, StepCall(Moment(1, 1, 900.0), x + 0.5, lambda: (torch.zeros_like(x),), print))
    with pytest.raises(Refusal, match="beside a velocity"):
        method.at_step(method.init(), StepCall(Moment(0, 0, 1.0), x, lambda: (torch.zeros(1, 4, 4),), print))


def test_mistakes_are_named(pipe):
    with pytest.raises(UserError, match="at least one and leave"):
        given_panels(LAYOUT, {})
    with pytest.raises(UserError, match="whole number of rounds"):
        KnownPanels(resample=-1)
    with pytest.raises(Refusal, match="whole canvas"):
        draw(pipe, KnownPanels(given_panels(LAYOUT, {0: torch.randn(1, 16, 8, 8)})))
    assert str(KnownPanels(given_panels(LAYOUT, {0: torch.zeros(1, 2, 2, 2)}))) == (
        "KnownPanels(given=<50% of (1, 2, 2, 4)>)"
    )
