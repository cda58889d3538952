"""Canvases as samples: latents tile without bleeding, buckets hold one shape, captions are those of use."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.data.joint_captions import JointCaptioner
from smalti.data.panels import PanelSet
from smalti.ops.canvas import PanelLayout
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.text_encoder import MiniLMEncoder
from smalti.training.data_order import DataOrder
from smalti.training.panel_source import panel_source

LAYOUT = PanelLayout(1, 2)


@pytest.fixture
def parts(tiny_autoencoder):
    autoencoder = ConvAutoencoder.from_pretrained(tiny_autoencoder, torch_dtype=torch.float32).eval()
    return autoencoder, MiniLMEncoder(length=24), JointCaptioner.for_layout(LAYOUT, "[PAIR]", length=22)


@pytest.fixture
def sets():
    pixels = torch.rand(5, 2, 3, 32, 32) * 2 - 1
    return [PanelSet(one, (f"a {i}", f"b {i}"), ("s", "s"), f"set {i}") for i, one in enumerate(pixels)]


def source_of(parts, sets, folder, **settings):
    autoencoder, encoder, captioner = parts
    return panel_source(sets, LAYOUT, captioner, autoencoder, encoder, folder, **settings)


def test_a_canvas_holds_the_latents_of_its_panels_alone(parts, sets, tmp_path):
    source = source_of(parts, sets, tmp_path, num_labels=4)
    batch = source.batch(torch.tensor([3, 1]), generators_for([0, 1]))
    assert batch.x0.shape == (2, 16, 4, 8)
    alone = parts[0].encode(sets[3].panels).tensor
    assert torch.allclose(batch.x0[0], torch.cat([alone[0], alone[1]], -1), atol=2e-3)  # float16 on disk
    assert batch.cond.label.tolist() == [4, 4]  # the style is never told
    other = [*sets[:3], PanelSet(torch.stack([sets[3].panels[0], -sets[3].panels[1]]), *["ab"] * 2), sets[4]]
    changed = source_of(parts, other, tmp_path).batch(torch.tensor([3]), generators_for([0])).x0
    assert torch.equal(changed[..., :4], batch.x0[:1, ..., :4])  # nothing of the right panel reaches the left one
    assert not torch.allclose(changed[..., 4:], batch.x0[:1, ..., 4:], atol=0.1)


def test_the_text_is_that_of_the_captioner_and_is_dropped_now_and_then(parts, sets, tmp_path):
    _, encoder, captioner = parts
    source = source_of(parts, sets, tmp_path, text_dropout=0.0)
    batch = source.batch(torch.arange(5), generators_for(range(5)))
    expected = encoder.encode([captioner(one.captions, one.summary) for one in sets])
    assert torch.allclose(batch.cond.text, expected.tokens, atol=1e-2)
    source = source_of(parts, sets, tmp_path)
    rows = torch.arange(5).repeat(80)
    empty = encoder.encode([""]).tokens[0]
    text = source.batch(rows, generators_for(range(400))).cond.text
    dropped = sum(torch.allclose(one, empty, atol=1e-2) for one in text)
    assert 6 <= dropped <= 40  # 0.05 of 400


def test_canvases_of_several_sizes_lie_in_buckets_of_one_shape(parts, sets, tmp_path):
    source = source_of(parts, sets, tmp_path, sizes=[(32, 32), (48, 48), (32, 48)])
    assert len(source) == 15
    order, seen = DataOrder(source, 4, seed=0), set()
    for step in range(12):
        x0 = source.batch(order.indices(step), generators_for(range(4))).x0
        seen.add(tuple(x0.shape[2:]))
    assert seen == {(4, 8), (6, 12), (4, 12)}
    with pytest.raises(UserError, match="borders of tokens"):
        source_of(parts, sets, tmp_path, sizes=[(36, 36)])


def test_mistakes_are_named(parts, sets, tmp_path):
    with pytest.raises(UserError, match="sets of 2 panels"):
        source_of(parts, [], tmp_path)
    triple = PanelSet(torch.zeros(3, 3, 32, 32), ("a",) * 3, ("s",) * 3)
    with pytest.raises(UserError, match="sets of 2 panels"):
        source_of(parts, [triple], tmp_path)
