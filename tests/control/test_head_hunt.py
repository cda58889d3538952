import itertools

import pytest
import torch

import smalti
from smalti.control.head_atlas import head_atlas
from smalti.control.head_hunt import hunt_heads
from smalti.control.headhunter_softpag import PerturbedHeads
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.evaluation.held_out_prompts import Prompts
from smalti.evaluation.prompt_split import pick
from smalti.evaluation.rewards import brightness, darkness

HEADS = [(layer, head) for layer in range(3) for head in range(2)]
METHOD = PerturbedHeads(scale=2.0)


def prompts(count):
    return Prompts(("a",) * count, ("b",) * count, tuple(range(count)))


@pytest.fixture
def draw(model):
    """Three steps from noise that depends on the seed; three of four channels are the picture."""

    @torch.no_grad()
    def draw(some):
        draws = [torch.randn(5, 12, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in some.seeds]
        x = torch.stack([one[0, :4] for one in draws])
        cond = Cond(
            text=torch.stack([one[1, :, :5, 0].T for one in draws]),
            pooled=torch.stack([one[2, :10, 0, 0] for one in draws]),
        )
        for t in (0.9, 0.6, 0.3):
            x = x - 0.3 * model(x, torch.full((len(x),), t), cond)
        return x[:, :3].tanh()

    return draw


def reward_of(model, draw, heads, some):
    """One picture at a time, without the search."""
    values = []
    for index in range(len(some)):
        with smalti.apply(model, PerturbedHeads(dict.fromkeys(heads, 1.0), scale=2.0, guidance=1.0)):
            values.append(float(darkness(draw(pick(some, [index])))))
    return sum(values) / len(values)


def test_the_search_is_greedy_with_the_set_included(model, draw):
    some = prompts(3)
    found = hunt_heads(model, darkness, some, 2, 2, METHOD, halving=False, batch=5, draw=draw, progress=False)
    chosen = []
    for scores in found.rounds:
        expected = {head: reward_of(model, draw, [*chosen, head], some) for head in HEADS if head not in chosen}
        assert scores == pytest.approx(expected, abs=1e-4)
        chosen += sorted(expected, key=lambda head: -expected[head])[:2]
    assert set(found.heads.heads) == set(chosen)
    assert found.reached == pytest.approx(reward_of(model, draw, chosen, some), abs=1e-4)
    assert found.plain == pytest.approx(float(darkness(draw(some)).mean()), abs=1e-5)
    assert found.generations == (6 + 4 + 1) * 3
    assert (found.heads.kind, found.heads.target, found.heads.model) == ("identity", "joint", "MMDiT")


def test_halving_draws_less_and_the_winner_has_seen_all_pairs(model, draw):
    some = prompts(8)
    seen = []

    def reward(pixels, texts):
        seen.append(len(pixels))
        return darkness(pixels)

    halved = hunt_heads(model, reward, some, 1, 1, METHOD, draw=draw, progress=False)
    assert halved.generations == 6 * 2 + 3 * 2 + 2 * 4 + 8
    (winner,) = halved.heads.heads
    assert halved.rounds[0][winner] == pytest.approx(reward_of(model, draw, [winner], some), abs=1e-4)
    assert sum(seen) == halved.generations + len(some)


def test_opposite_goals_choose_other_heads(model, draw):
    some = prompts(2)
    dark, bright = (
        hunt_heads(model, one, some, 1, 2, METHOD, draw=draw, progress=False) for one in (darkness, brightness)
    )
    assert set(dark.heads.heads) != set(bright.heads.heads)
    with smalti.apply(model, PerturbedHeads(dark.heads, scale=2.0, guidance=1.0)):
        darker = darkness(draw(some)).mean()
    with smalti.apply(model, PerturbedHeads(bright.heads, scale=2.0, guidance=1.0)):
        assert darkness(draw(some)).mean() < darker


def test_what_cannot_be_searched_is_refused(model, draw):
    for rounds, k, count in ((0, 1, 2), (1, 7, 2), (1, 1, 1)):
        with pytest.raises(UserError, match="at least 1 round"):
            hunt_heads(model, darkness, prompts(count), rounds, k, METHOD, draw=draw, progress=False)


def test_an_atlas_shows_every_head_and_what_it_does(model, draw):
    atlas = head_atlas(model, prompts(2), METHOD, draw=draw)
    assert list(atlas.pictures) == HEADS
    head = atlas.ranked("brightness", 1)[0]
    change = brightness(atlas.pictures[head]) - brightness(draw(prompts(2)))
    assert atlas.effects[head]["brightness"] == pytest.approx(float(change.mean()), abs=1e-6)
    assert all(one["structure"] > 0 and one["colour"] > 0 for one in atlas.effects.values())
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(atlas.pictures.values(), 2))
    sheet = atlas.sheet()
    assert sheet.width < sheet.height  # two columns, seven rows
