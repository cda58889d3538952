import threading
from itertools import pairwise

import pytest
import torch
from small_models import SMALL, MeanValues, ReuseOdd, SkipBlock, WatchCores, WatchSteps, flux, ours, wan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import smalti
from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import NeverEngaged, Refusal, UserError


@pytest.mark.parametrize("name", SMALL)
def test_layouts_are_read_without_knowing_the_model(name):
    small, watch = SMALL[name](), WatchCores()
    base = small.loop()
    with smalti.apply(small.model, watch):
        assert torch.equal(small.loop(), base)
    joint = [("text", 5, None), ("image", 24, (1, 4, 6))]
    video = [("image", 72, (3, 4, 6))]
    for call in watch.seen:
        segments = [(one.kind, one.length, one.grid) for one in call.layout.segments]
        keys = [one.kind for one in call.key_layout.segments]
        is_cross = call.site.name == "attn2"
        assert segments == (video if name == "wan" else joint)
        assert keys == (["text"] if is_cross else [one[0] for one in segments])
        assert call.q.shape[-2] == len(call.layout)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", [MeanValues, SkipBlock, ReuseOdd])
def test_every_seam_is_exact_when_neutral_acts_when_active_and_leaves_nothing_behind(name, method):
    small = SMALL[name]()
    base = small.loop()
    before = {key: set(vars(module)) for key, module in small.model.named_modules()}
    with smalti.apply(small.model, method.neutral()):
        assert torch.equal(small.loop(), base)
    with smalti.apply(small.model, method.active()) as handle:
        changed = small.loop()
        assert torch.equal(small.loop(), changed)
    assert (changed - base).abs().max() > 1e-4
    assert sum(handle.report().methods[0].events.values()) > 0
    assert torch.equal(small.loop(), base)
    assert {key: set(vars(module)) for key, module in small.model.named_modules()} == before
    assert nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_a_skipped_block_is_left_out_exactly():
    """The same as a model whose second blocks add nothing."""
    small = flux()
    with smalti.apply(small.model, SkipBlock()) as handle:
        skipped = small.loop()
    for stack in (small.model.transformer_blocks, small.model.single_transformer_blocks):
        block = stack[1]
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    assert torch.equal(small.loop(), skipped)
    assert handle.report().methods[0].events == {"skipped": 18}


def test_streams_have_names():
    small, watch = wan(), SkipBlock()
    with smalti.apply(small.model, watch):
        small.loop(1)
    assert watch.seen == [(f"blocks.{i}", {"image": (1, 72, 24)}) for i in (0, 1)]


@pytest.mark.parametrize("name", SMALL)
def test_skipped_sublayers_do_not_run(name):
    """What is left of a skipped evaluation are embedders, modulation and the output."""
    small = SMALL[name]()

    def products(steps):
        with FlopCounterMode(display=False) as counter:
            small.loop(steps)
        return counter.get_total_flops()

    one, two = products(1), products(2)
    with smalti.apply(small.model, ReuseOdd()):
        half = products(2)
    assert two == 2 * one
    assert one < half < 1.25 * one


@pytest.mark.parametrize("name", SMALL)
def test_each_branch_forecasts_from_its_own_past(name):
    small = SMALL[name]()
    with smalti.apply(small.model, TaylorSeer(interval=3, warmup=2)) as handle:
        apart = small.loop(texts=small.texts)
    assert handle.report().calls == 18
    watch = WatchSteps()
    with smalti.apply(small.model, watch):
        small.loop(texts=small.texts)
    assert [(one.evaluation, one.branch) for one in watch.seen] == [(i, b) for i in range(9) for b in ("0", "1")]
    swapped = (small.texts[1], small.texts[0])
    with smalti.apply(small.model, TaylorSeer(interval=3, warmup=2)):
        again = small.loop(texts=swapped, guidance=-2.0)
    assert torch.allclose(apart, again, atol=1e-4)


def test_second_order_solvers_count_evaluations():
    small, watch = flux(), WatchSteps()
    with smalti.apply(small.model, watch):
        small.heun(5)
        small.heun(5)
    evaluations = [one.evaluation for one in watch.seen]
    assert evaluations == [*range(9), *range(9)]
    assert [one.step for one in watch.seen][:9] == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_new_run_begins_by_itself():
    small, watch = flux(), WatchSteps()
    with smalti.apply(small.model, watch) as handle:
        small.loop(4)
        small.loop(4)
        small.loop(1)
        small.loop(1)
        small.loop(4, x=torch.randn(2, 24, 4))
    assert [one.evaluation for one in watch.seen] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0, 0, 1, 2, 3]
    assert handle.report().runs == 5


@pytest.mark.parametrize("lite", [False, True])
def test_nothing_leaks_between_runs_and_shapes(lite):
    method = TaylorSeer(interval=3, warmup=2, lite=lite)
    small, other = flux(), torch.randn(2, 24, 4)
    with smalti.apply(small.model, method):
        fresh = small.loop()
        twice = small.loop(x=other)
        assert torch.equal(small.loop(), fresh)
    with smalti.apply(small.model, method):
        assert torch.equal(small.loop(x=other), twice)


def test_lanes_keep_apart_what_interleaves():
    small, method = flux(), TaylorSeer(interval=3, warmup=2)
    with smalti.apply(small.model, method):
        alone = small.loop(6)
    x, y = small.sample, small.sample + 1
    times = torch.linspace(1, 0, 7).tolist()
    with smalti.apply(small.model, method) as handle, torch.no_grad():
        for t, s in pairwise(times):
            x = x + (s - t) * small.call(x, t, small.texts[0])
            with handle.lane("other"):
                y = y + (s - t) * small.call(y, t, small.texts[0])
    assert torch.equal(x, alone)


def test_named_branches_and_runs_win():
    small, watch = flux(), WatchSteps()
    with smalti.apply(small.model, watch) as handle, torch.no_grad():
        with handle.run(steps=2):
            with handle.branch("cond"):
                small.call(small.sample, 0.5, small.texts[0])
            with handle.branch("uncond"):
                small.call(small.sample, 0.5, small.texts[0])
        with handle.run(), small.model.cache_context("pipe's"):
            small.call(small.sample, 0.5, small.texts[0])
    assert [(one.branch, one.evaluation, one.steps) for one in watch.seen] == [
        ("cond", 0, 2), ("uncond", 0, 2), ("pipe's", 0, None),
    ]  # fmt: skip


def test_two_threads_on_one_model_and_on_two():
    first, second, method = flux(), wan(), TaylorSeer(interval=3, warmup=2)
    expected, results = {}, {}
    jobs = {"a": (first, first.sample), "b": (first, first.sample + 1), "c": (second, second.sample)}
    for small in (first, second):
        with smalti.apply(small.model, method, MeanValues()):
            expected |= {key: one.loop(12, x) for key, (one, x) in jobs.items() if one is small}

    def draw(key):
        results[key] = jobs[key][0].loop(12, jobs[key][1])

    with smalti.apply(first.model, method, MeanValues()), smalti.apply(second.model, method, MeanValues()):
        threads = [threading.Thread(target=draw, args=(key,)) for key in jobs]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert all(torch.equal(expected[key], results[key]) for key in jobs)


def test_two_methods_act_together_and_order_is_theirs():
    small = flux()
    with smalti.apply(small.model, MeanValues(), TaylorSeer(interval=3, warmup=2)) as handle:
        both = small.loop()
    with smalti.apply(small.model, MeanValues()):
        one = small.loop()
    assert not torch.equal(both, one)
    events = [method.events for method in handle.report().methods]
    assert events[0] == {"mean": 4 * 4}  # full evaluations 0, 1, 4, 7
    assert events[1] == {"forecast": 5 * 8}


def test_two_methods_that_decide_the_same_are_refused():
    with pytest.raises(Refusal, match=r"ReuseOdd.* and TaylorSeer.* cannot act together: both decide sublayer outputs"):
        smalti.apply(flux().model, ReuseOdd(), TaylorSeer())


def test_a_second_apply_is_refused_until_the_first_is_removed():
    small = flux()
    handle = smalti.apply(small.model, TaylorSeer())
    with pytest.raises(Refusal, match="already carries TaylorSeer"):
        smalti.apply(small.model, WatchSteps())
    handle.remove()
    handle.remove()
    smalti.apply(small.model, WatchSteps()).remove()


def test_what_never_engaged_raises_and_says_why():
    small = flux()
    handle = smalti.apply(small.model, TaylorSeer(warmup=9))
    small.loop()
    with pytest.raises(NeverEngaged, match=r"TaylorSeer\(warmup=9\) never engaged: of 9 evaluations the first 9"):
        handle.remove()
    with smalti.apply(small.model, TaylorSeer(interval=1)):
        small.loop()
    with smalti.apply(small.model, TaylorSeer()):
        pass  # the model never ran


def test_gradients_are_refused_by_name():
    small = flux()
    with smalti.apply(small.model, TaylorSeer()), pytest.raises(Refusal, match=r"TaylorSeer\(\) takes no gradients"):
        small.call(small.sample, 0.5, small.texts[0])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear(2, 2), "Linear is no denoiser"),
        ("flux", "give a diffusers pipeline or a transformer"),
    ],
)
def test_foreign_targets_are_refused(target, message):
    with pytest.raises(UserError, match=message):
        smalti.apply(target, TaylorSeer())


def test_no_method_and_what_is_no_method_are_refused():
    with pytest.raises(UserError, match="got no method"):
        smalti.apply(flux().model)
    with pytest.raises(UserError, match="no method; give an object"):
        smalti.apply(flux().model, "taylorseer")


def test_a_failing_call_leaves_no_frame_behind():
    small = flux()
    with smalti.apply(small.model, TaylorSeer(interval=3, warmup=2)):
        expected = small.loop()
        with pytest.raises((RuntimeError, TypeError)), torch.no_grad():
            small.call(torch.randn(1, 24, 5), 0.5, small.texts[0])
        assert torch.equal(small.loop(), expected)


def test_a_wrapper_that_came_later_stays():
    """As with offloading hooks, which replace forward on the instance."""
    small = ours()
    base = small.loop()
    handle = smalti.apply(small.model, TaylorSeer(interval=3, warmup=2))
    inner, calls = small.model.forward, []
    small.model.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    small.loop()
    handle.remove()
    assert torch.equal(small.loop(), base)
    assert len(calls) == 18
