from dataclasses import dataclass

import pytest
import torch
from torch import nn

from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond, SolverState
from smalti.core.seeds import generators_for
from smalti.sampling.checkpointed import sample_checkpointed
from smalti.sampling.guidance import Guidance
from smalti.sampling.loop import sample
from smalti.sampling.schedulers import make_scheduler, solver_for
from smalti.sampling.shift import uniform_schedule
from smalti.sampling.solvers import SDE, Euler, Heun


def model_and_start(seed=0):
    torch.manual_seed(seed)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    conds = [Cond(text=torch.randn(2, 3, 12), pooled=torch.randn(2, 10), label=torch.tensor([0, 1])) for _ in range(2)]
    return model, torch.randn(2, 4, 8, 8), *conds


def solvers(schedule):
    named = {name: solver_for(make_scheduler(name), schedule) for name in ("euler", "heun", "dpm++", "unipc", "sde")}
    return named | {"our euler": Euler(), "our heun": Heun(), "our sde": SDE()}


@pytest.mark.parametrize("name", list(solvers([1.0, 0.5, 0.0])))
def test_gradients_are_those_of_the_full_graph(name):
    """Weights and start, four steps, guidance inside, the same noise."""
    model, noise, cond, uncond = model_and_start()
    schedule = uniform_schedule(4, 1.5)
    settings = {"cond": cond, "uncond": uncond, "guidance": Guidance(3.0)}
    weights, results = list(model.parameters()), []
    for checkpointed in (False, True):
        solver, start = solvers(schedule)[name], noise.clone().requires_grad_()
        generator = generators_for([5, 6])
        if checkpointed:
            final = sample_checkpointed(model, start, schedule, solver, weights, generator=generator, **settings)
        else:
            final = sample(model, start, schedule, solver, generator=generator, progress=False, **settings).x
        final.square().mean().backward()
        results.append((final.detach(), start.grad, *(one.grad.clone() for one in weights)))
        model.zero_grad()
    for full, ours in zip(*results, strict=True):
        assert torch.allclose(ours, full, atol=1e-4 * max(1.0, full.abs().max().item()), rtol=1e-4)
    assert results[0][2].abs().max() > 1e-6


def test_gradients_go_through_guidance_and_pass_on_to_what_weights_are_made_of():
    model, noise, cond, uncond = model_and_start()
    logit = torch.zeros(4, 1, 1, requires_grad=True)
    found = {}
    for scale in (1.0, 3.0):
        for checkpointed in (False, True):
            weight = torch.sigmoid(logit)

            def denoiser(x, t, cond, weight=weight):
                return model(x, t, cond) * weight

            settings = {"cond": cond, "uncond": uncond, "guidance": Guidance(scale)}
            if checkpointed:
                final = sample_checkpointed(denoiser, noise, [1.0, 0.6, 0.3, 0.0], Euler(), [weight], **settings)
            else:
                final = sample(denoiser, noise, [1.0, 0.6, 0.3, 0.0], Euler(), progress=False, **settings).x
            (found[scale, checkpointed],) = torch.autograd.grad(final.square().mean(), logit)
        assert torch.allclose(found[scale, True], found[scale, False], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[1.0, True], found[3.0, True], rtol=1e-2)


@dataclass(frozen=True)
class Jolted:
    """A solver whose noise multiplies the velocity; that which is only added does not matter to gradients."""

    needs_noise: bool = True

    def step(self, state, denoiser, t, s, noise=None):
        factor = 1 if noise is None else 1 + noise
        return SolverState(state.x + (s - t) * denoiser(state.x, t) * factor)


def test_noise_is_replayed():
    model, noise, cond, _ = model_and_start()
    weights, schedule, found = list(model.parameters()), uniform_schedule(4), []
    for run in (sample_checkpointed, None):
        generator = generators_for([5, 6])
        if run is None:
            settings = {"cond": cond, "generator": generator, "progress": False}
            final = sample(model, noise, schedule, Jolted(), **settings).x
        else:
            final = run(model, noise, schedule, Jolted(), weights, cond=cond, generator=generator)
        found.append(torch.autograd.grad(final.square().mean(), weights, allow_unused=True))
    for ours, full in zip(*found, strict=True):
        assert (ours is None) == (full is None)
        assert ours is None or torch.allclose(ours, full, rtol=1e-3, atol=1e-5)


def largest_saved(run):
    """The most bytes that graphs held at one time, by hooks on what they save."""
    held = {"now": 0, "most": 0}

    class Saved:
        def __init__(self, tensor):
            self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
            held["now"] += self.bytes
            held["most"] = max(held["most"], held["now"])

        def __del__(self):
            held["now"] -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return held["most"]


def test_memory_does_not_grow_with_the_number_of_steps():
    model, noise, cond, _ = model_and_start()
    weights, most = list(model.parameters()), {}
    for steps in (2, 8):
        schedule = uniform_schedule(steps)
        for name, run in (("ours", sample_checkpointed), ("full", None)):

            def backward(run=run, schedule=schedule):
                if run is None:
                    final = sample(model, noise, schedule, Euler(), cond=cond, progress=False).x
                else:
                    final = run(model, noise, schedule, Euler(), weights, cond=cond)
                final.square().mean().backward()

            most[name, steps] = largest_saved(backward)
    assert most["full", 8] > 3 * most["full", 2]
    assert most["ours", 8] < 1.05 * most["ours", 2]
    assert most["ours", 8] < most["full", 2]


def test_what_a_denoiser_draws_anew_makes_the_gradient_that_of_its_second_draw():
    torch.manual_seed(0)
    weight, calls = torch.ones((), requires_grad=True), []

    def denoiser(x, t, cond):
        calls.append(torch.rand(()))
        return weight * calls[-1] * torch.ones_like(x)

    final = sample_checkpointed(denoiser, torch.zeros(1, 1), [1.0, 0.0], Euler(), [weight])
    (gradient,) = torch.autograd.grad(final.sum(), weight)
    assert len(calls) == 2
    assert final.item() == pytest.approx(-calls[0].item())
    assert gradient.item() == pytest.approx(-calls[1].item())
