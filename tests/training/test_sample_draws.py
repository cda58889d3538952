from dataclasses import replace

import pytest
import torch
from toy_training import ToySource

from smalti.training.data_order import DataOrder
from smalti.training.sample_draws import Share, draw

CPU = torch.device("cpu")


def test_shares_and_parts_cover_every_batch_once():
    order = DataOrder(ToySource(), batch=24, seed=0)
    for processes, accumulate in ((1, 1), (2, 3), (4, 2), (1, 24)):
        parts = [
            Share(rank, processes, accumulate).part(5, part, order)
            for rank in range(processes)
            for part in range(accumulate)
        ]
        positions = torch.cat([positions for _, positions in parts])
        indices = torch.cat([indices for indices, _ in parts])
        assert len(parts[0][0]) == 24 // (processes * accumulate)
        assert torch.equal(positions.sort().values, order.positions(5))
        assert torch.equal(indices[positions.argsort()], order.indices(5))


def test_a_draw_depends_on_seed_purpose_and_position_alone():
    def numbers(indices, positions, seed=0, purpose="train"):
        one = draw(ToySource(), torch.tensor(indices), torch.tensor(positions), seed, purpose, CPU)
        assert one.batch.ids.tolist() == positions
        return [torch.rand((), generator=g).item() for g in one.generators], one.batch.cond.label.tolist()

    together = numbers([5, 9, 5], [70, 71, 72])
    alone = [numbers([i], [p]) for i, p in ((5, 70), (9, 71), (5, 72))]
    assert together == ([a[0][0] for a in alone], [a[1][0] for a in alone])
    assert together[0][0] != together[0][2]  # one sample, two draws
    assert numbers([5], [70], seed=1)[0] != numbers([5], [70])[0] != numbers([5], [70], purpose="held-out")[0]


def test_a_source_that_gives_too_few_samples_is_found_out():
    class Short(ToySource):
        def batch(self, indices, generators):
            batch = super().batch(indices, generators)
            return replace(batch, x0=batch.x0[:-1])

    with pytest.raises(ValueError, match="gave 2 samples for 3"):
        draw(Short(), torch.arange(3), torch.arange(3), 0, "train", CPU)
