import pytest
import torch

from smalti.ops.block_scores import (
    distance_scores,
    draft_scores,
    frame_or_place_scores,
    group_means,
    keep_blocks,
    kept_share,
    random_scores,
    true_scores,
)
from smalti.ops.token_order import group_order

GRIDS = [((2, 4, 6), (1, 2, 3)), ((3, 5, 7), (2, 2, 4)), ((1, 45, 40), (1, 8, 16))]


@pytest.mark.parametrize(("grid", "group"), GRIDS)
def test_means_are_of_real_tokens_in_the_order_of_the_groups(grid, group):
    order = group_order(grid, group)
    x = torch.randn(2, 3, len(order.inverse), 5)
    real = order.is_real.unflatten(0, (order.count, order.length))
    grouped = order.gather(x) * real[..., None]
    expected = grouped.sum(-2) / real.sum(1)[:, None]
    assert torch.allclose(group_means(x, order), expected, atol=1e-5)


def test_the_draft_is_of_averages_not_of_largest():
    order = group_order((1, 2, 4), (1, 2, 2))
    x = torch.zeros(1, 1, 8, 1)
    x[0, 0, 0] = 4.0
    assert group_means(x, order).flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("grid", "group"), GRIDS)
def test_a_one_hot_map_points_to_the_groups_that_were_asked_for(grid, group):
    """The place of a block in the map and the tokens of the group are the same, also where groups are ragged."""
    order = group_order(grid, group)
    code = torch.eye(order.count)
    wanted = torch.randperm(order.count, generator=torch.Generator().manual_seed(0))
    of_token = order.inverse // order.length
    q, k = 1000 * code[wanted][of_token], code[of_token]
    table = keep_blocks(draft_scores(q[None, None], k[None, None], order), 1 - 1 / order.count, "row")
    own = torch.eye(order.count, dtype=torch.bool)
    assert torch.equal(draft_scores(q[None, None], k[None, None], order)[0, 0].argmax(-1), wanted)
    assert torch.equal(table[0, 0], own)  # one block a row: its own
    both = keep_blocks(draft_scores(q[None, None], k[None, None], order), 1 - 2 / order.count, "row")[0, 0]
    assert both[torch.arange(order.count), wanted].all()
    assert both.diagonal().all()


def test_true_scores_are_the_attention_summed(monkeypatch):
    order = group_order((1, 5, 4), (1, 2, 2))
    q, k = (torch.randn(2, 3, 25, 8) for _ in range(2))
    mask = torch.ones(2, 1, 1, 25, dtype=torch.bool)
    mask[1, ..., 23:] = False
    shares = ((q @ k.transpose(-1, -2)) * 0.4).masked_fill(~mask, -torch.inf).softmax(-1)[:, :, 3:23, 3:23]
    group = order.inverse // order.length
    expected = torch.zeros(2, 3, 6, 6)
    for query in range(20):
        for key in range(20):
            expected[:, :, group[query], group[key]] += shares[:, :, query, key]
    assert torch.allclose(true_scores(q, k, order, 3, mask, 0.4), expected, atol=1e-5)
    monkeypatch.setattr("smalti.ops.block_scores.ROWS", 7)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert torch.allclose(true_scores(q, k, order, 3, bias, 0.4), expected, atol=1e-5)


def scores(seed=0):
    return (3 * torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.93])
def test_one_threshold_a_head_keeps_the_best_of_the_whole_map(sparsity):
    given = scores()
    given[0, 0, 4] = 1e-6  # a row that the threshold would leave empty
    table = keep_blocks(given, sparsity, "head")
    number = round((1 - sparsity) * 400)
    assert (table.sum((2, 3)) == number).all()
    assert table.float().mean() == pytest.approx(kept_share(20, sparsity, "head"))
    assert table.diagonal(dim1=-2, dim2=-1).all()
    assert table[0, 0, 4].sum() == 1
    own = torch.eye(20, dtype=torch.bool)
    for kept, one in zip(table.flatten(0, 1), given.flatten(0, 1), strict=True):
        assert one[kept & ~own].min() >= one[~kept & ~own].max()
    assert len(table.sum(-1).unique()) > 1


def test_rows_keep_equally_many():
    given = scores()
    table = keep_blocks(given, 0.75, "row")
    assert (table.sum(-1) == 5).all()
    assert kept_share(20, 0.75, "row") == 0.25
    assert table.diagonal(dim1=-2, dim2=-1).all()
    without_own = given.masked_fill(torch.eye(20, dtype=torch.bool), -1)
    best = torch.zeros_like(table).scatter(-1, without_own.topk(4).indices, True)
    assert torch.equal(table, best | torch.eye(20, dtype=torch.bool))


def test_mass_keeps_what_holds_its_share_and_not_one_block_more():
    given = scores()
    table = keep_blocks(given, 0.3, "mass")
    held = (given * table).sum(-1)
    assert (held >= 0.7 - 1e-6).all()
    own = torch.eye(20, dtype=torch.bool)
    least = given.masked_fill(~table | own, torch.inf).amin(-1)
    assert (held - least < 0.7).all()
    assert kept_share(20, 0.3, "mass") is None


def test_everything_and_next_to_nothing():
    for rule in ("head", "row"):
        assert keep_blocks(scores(), 0.0, rule).all()
        assert torch.equal(keep_blocks(scores(), 0.99, rule)[1, 2], torch.eye(20, dtype=torch.bool))


def test_windows_frames_and_places():
    order = group_order((3, 4, 5), (1, 1, 1))
    window = keep_blocks(distance_scores(order), 1 - 5 / 60, "row")[0, 0].reshape(3, 4, 5, 3, 4, 5)
    middle = window[1, 1, 2].nonzero() - torch.tensor([1, 1, 2])
    assert (middle.abs().sum(1) <= 1).all()
    true = torch.zeros(1, 2, 60, 60)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5))
    true[0, 0] = (places[:, None, 0] == places[None, :, 0]).float()  # looks along its frame
    true[0, 1] = (places[:, None, 1:] == places[None, :, 1:]).all(-1).float()  # along its place
    for sparsity, head in ((1 - 20 / 60, 0), (1 - 3 / 60, 1)):
        table = keep_blocks(frame_or_place_scores(true, order, sparsity), sparsity, "row")
        assert torch.equal(table[0, head], true[0, head].bool())


def test_chance_is_the_same_for_the_same_seed():
    order = group_order((1, 4, 4), (1, 2, 2))
    assert torch.equal(random_scores(order, 3, 1), random_scores(order, 3, 1))
    assert not torch.equal(random_scores(order, 3, 1), random_scores(order, 3, 2))
