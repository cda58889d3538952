from smalti.evaluation.held_out_prompts import held_out_prompts
from smalti.evaluation.training_prompts import training_prompts


def test_halves_share_nothing_with_each_other_and_with_the_claims():
    whole = training_prompts("emoji-1k", 16)
    halves = [training_prompts("emoji-1k", 16, first, 2) for first in (0, 1)]
    assert [len(half) for half in halves] == [8, 8]
    assert {*halves[0].seeds} | {*halves[1].seeds} == {*whole.seeds} == {*range(1000, 1016)}
    assert not {*halves[0].texts} & {*halves[1].texts}
    claimed = held_out_prompts("emoji-1k", 32)
    assert not {*whole.texts} & {*claimed.texts}
    assert not {*whole.seeds} & {*claimed.seeds}
