"""Orders are read as they stand, refused by name, and can be made equal in parameters."""

import pytest

from smalti.backbones.block import TransformerBlock
from smalti.backbones.block_order import (
    ORDERS,
    build_equal,
    count_ffn,
    count_parameters,
    entries_of,
    equal_ffn_ratio,
    names_of,
    read_order,
    with_cross,
)
from smalti.core.errors import UserError


def test_names_stand_for_lists():
    assert read_order("macaron") == (("ffn", 0.5), ("attn", 1.0), ("ffn", 0.5))
    assert read_order("standard") == read_order("lie-trotter") == read_order([["attn", 1], ["ffn", 1]])
    assert read_order("reversed") == tuple(reversed(read_order("standard")))


def test_a_sublayer_that_comes_twice_counts():
    assert names_of("macaron") == ("ffn_a", "attn", "ffn_b")
    assert names_of("standard") == ("attn", "ffn")
    assert names_of("parallel") == ("attn", "ffn")
    assert [entry.names for entry in entries_of([("attn", 1), ("ffn+ffn", 0.5)])] == [("attn",), ("ffn_a", "ffn_b")]
    assert count_ffn("macaron") == 2


def test_cross_attention_stands_behind_self_attention():
    assert [name for name, _ in with_cross("macaron")] == ["ffn", "attn", "cross", "ffn"]
    assert [name for name, _ in with_cross("standard")] == ["attn", "cross", "ffn"]


@pytest.mark.parametrize("modulation", ["own", "shared", "none"])
def test_equal_parameters(modulation):
    def build(ratio, order="macaron"):
        return TransformerBlock(96, 4, ratio, order, modulation=modulation)

    target = count_parameters(build(4.0, "standard"))
    plain = count_parameters(build(4.0))
    ratio = equal_ffn_ratio(target, build, 96, "macaron")
    assert plain > target
    assert abs(count_parameters(build(ratio)) - target) <= 2 * 96 + 1  # half a neuron in both halves
    assert ratio < 4
    if modulation == "own":  # 3 D^2 more of adaLN are taken from 8 D^2 of feed-forward layers
        assert plain - target == 3 * 96**2 + 3 * 96 + 96
        assert ratio == pytest.approx(2.5, abs=0.05)
    else:
        assert ratio == pytest.approx(4.0, abs=0.06)


def test_builds_equal_modules():
    def build(ratio, order):
        return TransformerBlock(32, 2, ratio, order)

    blocks = [build_equal(build, 32, order, 3.0) for order in ("standard", "lie-trotter", "macaron", "parallel")]
    sizes = [count_parameters(block) for block in blocks]
    assert blocks[0].ffn.proj_in.out_features == blocks[1].ffn.proj_in.out_features == 96
    assert sizes == pytest.approx([sizes[0]] * 4, abs=2 * 32 + 1)


def test_refuses_by_name():
    with pytest.raises(UserError, match=r"'macron'.*macaron"):
        read_order("macron")
    with pytest.raises(UserError, match="unknown sublayer 'mlp'"):
        read_order([("mlp", 1.0)])
    with pytest.raises(UserError, match="without entries"):
        read_order([])
    with pytest.raises(UserError, match="factor of ffn is 0"):
        read_order([("attn", 1.0), ("ffn", 0)])
    with pytest.raises(UserError, match="shared modulation"):
        equal_ffn_ratio(1000, lambda r: TransformerBlock(96, 4, r, "macaron"), 96, "macaron")
    assert set(ORDERS) >= {"standard", "lie-trotter", "macaron", "reversed", "parallel"}
