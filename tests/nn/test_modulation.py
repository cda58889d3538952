"""Modulated norms follow their formula; with a zero gate nothing is added."""

import torch
from torch.nn import functional as F

from smalti.nn.modulation import FinalNorm, Modulation, ModulationTable, gated_add, modulated_norm


def test_formulas():
    x, update = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    shift, scale, gate = torch.randn(3, 2, 1, 8).unbind(0)
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, shift, scale), expected)
    torch.testing.assert_close(gated_add(x, gate, update), x + gate * update)
    assert torch.equal(gated_add(x, torch.zeros_like(gate), update), x)
    torch.testing.assert_close(gated_add(x, gate, update, 0.5), x + 0.5 * gate * update)


def test_triples_by_sample_and_by_token():
    modulation, final = Modulation(8, sublayers=2), FinalNorm(8)
    by_sample, by_token = torch.randn(2, 8), torch.randn(2, 5, 8)
    parts = modulation.linear(by_sample).chunk(6, dim=-1)
    first, second = modulation(by_sample)
    for got, expected in zip((*first, *second), parts, strict=True):
        assert torch.equal(got, expected[:, None])
    assert all(part.shape == (2, 5, 8) for triple in modulation(by_token) for part in triple)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(final(x, by_sample[:, None].expand(2, 5, 8)), final(x, by_sample))


def test_a_table_is_added_to_what_all_blocks_share():
    one, table = Modulation(8, sublayers=3), ModulationTable(8, sublayers=3)
    activated = torch.randn(2, 8)
    for got, expected in zip(table(one.linear(activated)), one(activated), strict=True):
        for part, other in zip(got, expected, strict=True):
            assert torch.equal(part, other)  # a fresh table is zero
    torch.nn.init.normal_(table.table)
    by_token = table(one.linear(activated[:, None].expand(2, 5, 8)))
    moved = one.linear(activated) + table.table
    torch.testing.assert_close(by_token[2].gate[:, 0], moved[:, -8:])
