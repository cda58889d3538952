"""Runs, steps and branches are told from the calls alone, also where several things move or have different lengths."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from small_models import WatchSteps, flux
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import build, readable_families

import smalti
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.seams.run import planned_steps

TIMES = torch.linspace(1, 0, 7).tolist()


def test_sound_that_moves_beside_a_video_makes_no_branches_and_text_does():
    family = readable_families()["ltx2"]
    model, watch = build(family), WatchSteps()
    texts = [family.inputs(seed, 1, (4, 6)) for seed in (0, 5)]
    video, sound = texts[0]["hidden_states"], texts[0]["audio_hidden_states"]
    with smalti.apply(model, watch, TaylorSeer(3, warmup=2)) as handle, torch.no_grad():
        for _ in range(2):
            for t, s in pairwise(TIMES):
                given = {"hidden_states": video, "audio_hidden_states": sound, "timestep": torch.full((1,), 1000 * t)}
                outputs = [model(**{**arguments, **given}, return_dict=False) for arguments in texts]
                video = video + (s - t) * outputs[0][0]
                sound = sound + (s - t) * outputs[1][1]
    assert [(one.evaluation, one.branch) for one in watch.seen] == 2 * [(i, b) for i in range(6) for b in ("0", "1")]
    assert handle.report().runs == 2


def test_a_branch_that_begins_later_is_a_branch():
    """As guidance that sets in after some steps."""
    small, watch = flux(), WatchSteps()
    with smalti.apply(small.model, watch), torch.no_grad():
        for step, t in enumerate(TIMES[:-1]):
            for text in reversed(small.texts[: 1 if step < 2 else 2]):
                small.call(small.sample + t, t, text)
    later = [(i, b) for i in range(2, 6) for b in ("1", "0")]
    assert [(one.evaluation, one.branch) for one in watch.seen] == [(0, "0"), (1, "0"), *later]


class Pair(DiffusionPipeline):
    """Guidance by a second transformer that sees fewer tokens."""

    def __init__(self, transformer: nn.Module, unconditional_transformer: nn.Module, scheduler):
        super().__init__()
        self.register_modules(
            transformer=transformer, unconditional_transformer=unconditional_transformer, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(self, large, small):
        x = large.sample
        for t, s in pairwise(TIMES):
            full = large.call(x, t, large.texts[0])
            part = small.call(x[:, :12], t, small.texts[1])
            x = x + (s - t) * torch.cat([2 * full[:, :12] - part, full[:, 12:]], 1)
        return x


def test_two_transformers_may_see_different_lengths():
    large, small, watch = flux((4, 6)), flux((2, 6)), WatchSteps()
    pipe = Pair(large.model, small.model, FlowMatchEulerDiscreteScheduler())
    plain = pipe(large, small)
    with smalti.apply(pipe, TaylorSeer(1)):
        assert torch.equal(pipe(large, small), plain)
    with smalti.apply(pipe, TaylorSeer(3, warmup=2), watch) as handle:
        fast = pipe(large, small)
        assert torch.equal(pipe(large, small), fast)
    assert not torch.equal(fast, plain)
    assert handle.report().runs == 2
    assert [one.evaluation for one in watch.seen] == 2 * [i for i in range(6) for _ in (0, 1)]


@pytest.mark.parametrize(
    ("scheduler", "taken", "steps"),
    [(FlowMatchEulerDiscreteScheduler, 8, 8), (FlowMatchEulerDiscreteScheduler, 5, 5),
     (FlowMatchHeunDiscreteScheduler, 15, 8), (FlowMatchHeunDiscreteScheduler, 9, 5)],
)  # fmt: skip
def test_planned_steps_are_what_the_scheduler_will_take(scheduler, taken, steps):
    pipe = Pair(None, None, scheduler())
    assert planned_steps(pipe, 8) == 8
    pipe.scheduler.set_timesteps(8)
    pipe._num_timesteps = taken
    assert planned_steps(pipe, None) == steps
