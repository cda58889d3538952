import json
from dataclasses import replace

import pytest

from smalti.acceleration.head_plan import HeadPlan, SiteModes, StepGroup, agreement, shuffled_plan
from smalti.core.errors import Refusal, UserError
from smalti.core.method import Moment, Reading, Site
from smalti.ops.head_patterns import Patterns

EARLY = SiteModes("blocks.0.attn", ("full", "full", "stripes"), (1.0, 0.9, 0.25), ((), (), (3, 5)))
LATE = SiteModes("blocks.0.attn", ("skip", "diagonal", "stripes"))
PLAN = HeadPlan(
    (StepGroup(0.0, (EARLY,)), StepGroup(0.25, (LATE,))), ("full",), Patterns(0.5, 0.25, 0.125), "MMDiT", (4, 8, 8), 0.3
)
READING = Reading("MMDiT", (Site("blocks", 0, "", "block", 0), Site("blocks", 0, "attn", "attention", 0)))


def moment(step, steps=8):
    return Moment(step, step, 0.5, steps)


def test_a_file_gives_back_the_plan(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == PLAN
    assert hash(HeadPlan.load(tmp_path / "plan.json")) == hash(PLAN)
    assert json.loads((tmp_path / "plan.json").read_text())["groups"][0]["sites"][0]["losses"] == [1.0, 0.9, 0.25]


@pytest.mark.parametrize("change", [
    {"kind": "other"}, {"groups": [{"start": 0}]}, {"rest": ["dense"]}, {"groups": 3}, {"surplus": 1}, {"grid": [1]},
    {"patterns": {"diagonal": 2}}, {"groups": [{"start": 1, "sites": []}]},
])  # fmt: skip
def test_another_or_a_torn_file_is_refused_in_one_line(change, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError) as error:
        HeadPlan.load(tmp_path / "plan.json")
    assert "\n" not in str(error.value)


def test_groups_of_steps_have_their_own_modes():
    assert [PLAN.at(moment(step), "blocks.0.attn", 3) for step in (0, 1, 2, 7)] == [EARLY, EARLY, LATE, LATE]
    with pytest.raises(Refusal, match="a share of the steps"):
        PLAN.at(moment(0, None), "blocks.0.attn", 3)
    late = HeadPlan((StepGroup(0.25, (LATE,)),), ("skip",), PLAN.patterns, grid=PLAN.grid)
    assert [late.at(moment(step), "blocks.0.attn", 3).modes for step in (1, 2)] == [("full",) * 3, LATE.modes]
    assert late.density() == pytest.approx(0.25 + 0.75 * 0.625 / 3)
    one = HeadPlan((StepGroup(0.0, (LATE,)),))
    assert one.at(moment(0, None), "blocks.0.attn", 3) == LATE


def test_what_a_plan_does_not_name_takes_its_rest_in_turn():
    assert PLAN.at(moment(0), "blocks.1.attn", 2).modes == ("full", "full")
    assert HeadPlan(rest=("skip", "full")).at(moment(0), "any", 3).modes == ("skip", "full", "skip")


def test_a_plan_is_for_its_model_and_its_heads():
    PLAN.check(READING)
    HeadPlan(rest=("skip",)).check(READING)
    with pytest.raises(Refusal, match="made for MMDiT, not for DiT"):
        PLAN.check(replace(READING, model="DiT"))
    with pytest.raises(Refusal, match="does not have"):
        replace(PLAN, groups=(StepGroup(0.0, (replace(EARLY, site="blocks.7.attn"),)),)).check(READING)
    with pytest.raises(Refusal, match="3 heads"):
        PLAN.at(moment(0), "blocks.0.attn", 6)


def test_the_density_weighs_groups_by_their_steps():
    early, late = (1 + 1 + 0.125) / 3, (0 + 0.5 + 0.125) / 3
    assert PLAN.density() == pytest.approx(0.25 * early + 0.75 * late)
    assert PLAN.density((8, 8, 8)) == pytest.approx(PLAN.density())  # shares, not tokens
    with pytest.raises(UserError, match="names attentions"):
        HeadPlan(rest=("skip",)).density()


def test_the_table_has_a_row_an_attention_and_a_letter_a_head():
    assert PLAN.table().splitlines() == [
        "from 0% of the steps", "blocks.0.attn  F F s", "from 25% of the steps", "blocks.0.attn  - d s",
    ]  # fmt: skip


def test_agreement_is_the_share_of_heads_with_one_mode():
    assert agreement(PLAN, PLAN) == 1
    other = replace(PLAN, groups=(PLAN.groups[0], StepGroup(0.25, (replace(LATE, modes=("skip", "skip", "full")),))))
    assert agreement(PLAN, other) == pytest.approx(4 / 6)
    with pytest.raises(UserError, match="other heads"):
        agreement(PLAN, HeadPlan(PLAN.groups[:1]))


def test_shuffled_modes_are_as_many_and_elsewhere():
    sites = tuple(SiteModes(f"blocks.{i}.attn", ("full", "skip", "stripes", "diagonal") * 2) for i in range(3))
    plan = HeadPlan((StepGroup(0.0, sites),), grid=(4, 8, 8))
    shuffled = shuffled_plan(plan, 0)
    assert shuffled.density() == pytest.approx(plan.density())
    assert shuffled == shuffled_plan(plan, 0) != shuffled_plan(plan, 1)
    assert agreement(plan, shuffled) < 0.6


def test_a_plan_is_full_if_every_head_is():
    assert HeadPlan().is_full
    assert not HeadPlan(rest=("full", "skip")).is_full
    assert not PLAN.is_full
    assert HeadPlan((StepGroup(0.0, (SiteModes("a", ("full",)),)),)).is_full
