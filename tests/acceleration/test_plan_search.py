import pytest
import torch

from smalti.acceleration.plan_search import find_plan
from smalti.core.errors import UserError
from smalti.evaluation.pattern_losses import HeadLosses
from smalti.ops.head_patterns import Patterns

MODES = ("skip", "diagonal", "multi-diagonal")
GRID, PATTERNS = (8, 8, 8), Patterns(0.25, 0.5, 0.125)
PRICE = torch.tensor([0, 0.25, 0.5])


def losses(errors, energy=None, samples=2):
    """Of one attention: errors (T, h, 3)."""
    errors = torch.tensor(errors, dtype=torch.float64)
    energy = torch.ones(errors.shape[:2], dtype=torch.float64) if energy is None else torch.tensor(energy).double()
    steps = tuple(range(len(errors)))
    return HeadLosses("MMDiT", GRID, PATTERNS, MODES, len(errors), steps, samples, {"a": errors}, {"a": energy})


def modes(plan, group=0):
    return plan.groups[group].sites[0].modes


def random_losses(heads=12, steps=4):
    generator = torch.Generator().manual_seed(0)
    return losses(torch.rand(steps, heads, 3, generator=generator).tolist())


def test_the_rule_is_threshold_first_then_the_smallest_loss():
    """Full has no loss of its own: a head whose best is below eps is sparse, be full as good as it may."""
    found = losses([[[0.9, 0.1, 0.05], [0.9, 0.1, 0.2], [0.2, 0.3, 0.1], [2.0, 3.0, 2.0]]])
    plan = find_plan(found, eps=1.0, weight=0.5)  # with the prices 0, 0.125 and 0.25
    assert modes(plan) == ("diagonal", "diagonal", "skip", "full")
    assert plan.groups[0].sites[0].losses == pytest.approx((0.225, 0.225, 0.2, 2.0))
    assert modes(find_plan(found, eps=0.21, weight=0.5)) == ("full", "full", "skip", "full")
    assert modes(find_plan(found, eps=1.0, weight=0.01))[0] == "multi-diagonal"


def test_at_weight_zero_and_at_eps_zero_all_heads_are_full():
    assert find_plan(random_losses(), eps=0.0).is_full
    assert find_plan(random_losses(), eps=1.0, weight=0.0).is_full


def test_more_eps_is_sparser():
    found = [find_plan(random_losses(), eps=eps).density() for eps in (0, 0.1, 0.2, 0.4, 0.6, 1.5)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1
    assert found[-1] < 0.5


@pytest.mark.parametrize("starts", [(0.0,), (0.0, 0.25), (0.25, 0.75)])
@pytest.mark.parametrize("target", [0.45, 0.5, 0.8])
def test_a_target_is_met_from_below_within_a_head(target, starts):
    plan = find_plan(random_losses(), target=target, starts=starts)
    assert target - 1 / 12 < plan.density() <= target + 1e-9
    assert find_plan(random_losses(), eps=plan.eps, starts=starts).groups == plan.groups


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(UserError, match="sparsest plan costs"):
        find_plan(losses([[[9.0, 0.1, 0.1]]]), target=0.2)


def test_raw_errors_depend_on_the_scale_of_values_and_normalised_ones_do_not():
    found = losses([[[0.9, 0.1, 0.3]] * 3], [[1.0, 1.0, 1.0]])
    large = losses([[[90.0, 10.0, 30.0]] * 3], [[100.0, 100.0, 100.0]])
    for scale in ("attention", "head"):
        assert find_plan(found, eps=0.5, scale=scale).groups == find_plan(large, eps=0.5, scale=scale).groups
    assert not find_plan(found, eps=0.5, scale="raw").is_full
    assert find_plan(large, eps=0.5, scale="raw").is_full


def test_a_small_head_may_be_skipped_only_if_it_is_measured_beside_the_others():
    found = losses([[[0.1, 0.2, 0.2], [1.9, 1.0, 1.0]]], [[0.1, 1.9]])
    assert modes(find_plan(found, eps=0.2)) == ("skip", "full")
    assert modes(find_plan(found, eps=0.2, scale="head")) == ("full", "full")


def test_a_plan_is_of_the_mean_over_steps_and_groups_show_what_a_mean_hides():
    found = losses([[[5, 0.9, 5]], [[5, 0.1, 5]], [[5, 0.1, 5]], [[5, 0.1, 5]]])
    assert modes(find_plan(found, eps=0.5)) == ("diagonal",)  # mean 0.3
    plan = find_plan(found, eps=0.5, starts=(0.0, 0.25))
    assert (modes(plan, 0), modes(plan, 1)) == (("full",), ("diagonal",))
    with pytest.raises(UserError, match="no recorded step"):
        find_plan(found, eps=0.5, starts=(0.0, 0.9))


def test_measured_costs_take_the_place_of_blocks():
    found = losses([[[5, 0.1, 0.1]]])
    assert modes(find_plan(found, eps=1.0)) == ("diagonal",)
    assert modes(find_plan(found, eps=1.0, costs={"diagonal": 0.9, "multi-diagonal": 0.3})) == ("multi-diagonal",)


@pytest.mark.parametrize(
    "settings", [{}, {"eps": 1.0, "target": 0.5}, {"eps": 1.0, "weight": -1}, {"eps": 1.0, "scale": "b"}]
)
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        find_plan(random_losses(), **settings)
    assert "\n" not in str(error.value)
