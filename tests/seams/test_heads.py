import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import GRIDS, all_families, build

from smalti.core.errors import Refusal, UserError
from smalti.seams.heads import read_address, read_heads, strengths, write_address


@pytest.mark.parametrize(("text", "address"), [("L1H10", (1, 10)), ("L0", (0, None))])
def test_addresses_are_written_as_in_the_paper(text, address):
    assert read_address(text) == address
    assert write_address(address) == text


@pytest.mark.parametrize("text", ["H1", "l1h2", "L1H", "L1H2 ", ""])
def test_other_words_are_no_heads(text):
    with pytest.raises(UserError, match="write L1H10"):
        read_address(text)


def test_a_head_of_its_own_has_its_own_strength_within_its_layer():
    found = strengths({(1, None): 0.5, (1, 2): 1.0, (0, 1): 0.3}, 1, 4)
    assert found.tolist() == [0.5, 0.5, 1.0, 0.5]
    assert strengths({(1, 0): 1.0}, 0, 4) is None
    assert strengths({(0, 0): 0.0}, 0, 4) is None
    with pytest.raises(Refusal, match="layer 0 has 4 heads, H0 to H3"):
        strengths({(0, 4): 1.0}, 0, 4)


@torch.no_grad()
def heads_of(name):
    family = all_families()[name]
    model = build(family)
    return model, read_heads(model, lambda: model(**family.inputs(0, 1, GRIDS["small"])))


def test_all_heads_of_all_stacks_are_read():
    _, heads = heads_of("flux")
    assert heads == tuple((layer, head) for layer in range(4) for head in range(2))


def test_heads_that_share_values_count_by_their_queries():
    model, heads = heads_of("lumina2")
    config = model.config
    assert config.num_kv_heads < config.num_attention_heads
    assert {head for _, head in heads} == set(range(config.num_attention_heads))


def test_linear_attention_has_no_heads_to_name():
    with pytest.raises(Refusal):
        heads_of("sana")
