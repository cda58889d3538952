"""A plan says what it is for, refuses anything else, and is a json file that methods come out of again."""

import pytest
import torch

import smalti
from smalti.acceleration.grat import GRAT
from smalti.acceleration.plan import Plan, model_of, scheduler_of
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import Refusal, UserError
from smalti.core.seeds import generators_for
from smalti.sampling.schedulers import make_scheduler
from smalti.seams.find import make_method, words_of
from smalti.zoo.loader import load_model


@pytest.fixture(scope="module")
def pipe(tiny_models):
    pipe = load_model(tiny_models["text"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan_for(pipe, **changes):
    settings = {
        "model": model_of(pipe), "steps": 12, "drawn": 12, "scheduler": scheduler_of(pipe), "sample": (16, 8, 8),
        "way": "taylorseer:full_at=[0,1,4,8], 12 steps", "methods": ("taylorseer:full_at=[0,1,4,8]",),
        "target": {"speedup": 2.0}, "is_met": True, "measured": {"speedup": 2.1, "distance": 0.01},
    }  # fmt: skip
    return Plan(**settings | changes)


def draw(pipe, steps=12, **more):
    return pipe("a dog", num_inference_steps=steps, generator=generators_for((3,)), output_type="latent", **more).images


@pytest.mark.parametrize(
    "method", [TaylorSeer(), TaylorSeer(full_at=(0, 2, 5), lite=True), GRAT((1, 2, 2), "block:1+cross"), GRAT()]
)
def test_a_method_survives_its_words(method):
    assert make_method(words_of(method)) == method


def test_a_plan_acts_as_its_methods_and_comes_back_from_its_file(pipe, tmp_path):
    plan = plan_for(pipe)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    with smalti.apply(pipe, Plan.load(tmp_path / "plan.json")) as handle:
        ours = draw(pipe)
    assert handle.report().methods[0].events
    with smalti.apply(pipe, TaylorSeer(full_at=(0, 1, 4, 8))):
        assert torch.equal(ours, draw(pipe))


def test_a_plan_for_something_else_is_refused(pipe):
    for change, reason in (
        ({"model": "FluxTransformer2DModel"}, "made for model Flux"),
        ({"scheduler": "DDIMScheduler 0"}, "made for scheduler DDIM"),
        ({"methods": (), "way": "9 steps, dpm++"}, "no method to apply, .* draw with 9 steps, dpm"),
    ):
        with pytest.raises(Refusal, match=reason):
            smalti.apply(pipe, plan_for(pipe, **change))
    with smalti.apply(pipe, plan_for(pipe)) as handle:
        with pytest.raises(Refusal, match="made for steps 12, and here it is 9"):
            draw(pipe, 9)
        with pytest.raises(Refusal, match=r"samples of shape \[16, 8, 8\], and here it is \[16, 8, 16\]"):
            draw(pipe, width=128)
        draw(pipe)
        handle.remove()
    pipe.register_modules(scheduler=make_scheduler("heun"))
    with pytest.raises(Refusal, match="scheduler"):
        smalti.apply(pipe, plan_for(pipe, scheduler=scheduler_of(load_model("emoji"))))
    pipe.register_modules(scheduler=make_scheduler("euler"))


def test_other_versions_are_said_and_torn_files_refused(pipe, tmp_path):
    with pytest.warns(UserWarning, match="times may differ"):
        smalti.apply(pipe, plan_for(pipe, versions={"smalti": "0", "torch": "1"})).remove()
    (tmp_path / "torn.json").write_text('{"format": 1, "steps": 3}')
    with pytest.raises(UserError, match="damaged plan"):
        Plan.load(tmp_path / "torn.json")
    (tmp_path / "other.json").write_text('{"slug": 1}')
    with pytest.raises(UserError, match="no plan"):
        Plan.load(tmp_path / "other.json")
