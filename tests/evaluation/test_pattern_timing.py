import torch

from smalti.evaluation.pattern_timing import largest_error, mix_ratio, mode_times
from smalti.ops.head_patterns import MODES, Patterns

CPU, GRID, NARROW = torch.device("cpu"), (8, 8, 16), Patterns()


def test_every_mode_has_its_seconds_and_leaving_keys_out_saves_some():
    times = mode_times(NARROW, GRID, 16, CPU, heads=4, repeats=5)
    assert set(times) == set(MODES)
    assert times["full"] == 1
    assert times["skip"] < 0.5 * times["stripes"]
    assert max(times["stripes"], times["diagonal"]) < 1


def test_a_mix_is_timed_against_plain_attention():
    grid, mix = (8, 16, 16), ("diagonal", "stripes", "skip", "skip")
    sparse, full = (mix_ratio(one, NARROW, grid, 16, CPU, 32, repeats=5) for one in (mix, ("full",) * 4))
    assert sparse.median > 1.5 * full.median


def test_the_fast_ways_are_their_masks():
    assert 0 < largest_error(NARROW, (3, 4, 6), 5, CPU) < 1e-5
