"""Encoder and decoder look where they may, learn a small task, and take every order."""

import pytest
import torch

from smalti.backbones.text_transformer import MaskedLanguageModel, TextShape, Translator, text_rope
from smalti.core.errors import UserError
from smalti.nn.block_attention import BlockContext

PAD, START, END = 0, 1, 2


def awake(model, std=0.3):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def shape(**changes):
    return TextShape(**{"vocabulary": 12, "width": 16, "depth": 2, "heads": 2, **changes})


def texts(batch=2, length=6):
    return torch.randint(3, 12, (batch, length)), torch.ones(batch, length, dtype=torch.bool)


@pytest.mark.parametrize("order", ["standard", "macaron", "reversed", "parallel"])
@pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
def test_every_weight_has_a_gradient(order, norm):
    model = awake(Translator(shape(order=order, norm=norm)))
    model(*texts(), *texts(length=4)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["sine", "learned", "rotary"])
def test_padding_is_as_if_it_were_not_there(kind):
    model = awake(MaskedLanguageModel(shape(positions=kind, length=8, order="macaron")))
    tokens, mask = texts(length=8)
    mask[:, 5:] = False
    torch.testing.assert_close(model(tokens, mask)[:, :5], model(tokens[:, :5], mask[:, :5]), rtol=1e-4, atol=1e-4)
    other = tokens.clone()
    other[:, 2] = 1
    assert not torch.allclose(model(other, mask)[:, 4], model(tokens, mask)[:, 4])  # both sides are seen


@pytest.mark.parametrize("order", ["standard", "macaron"])
def test_a_decoder_sees_no_later_token_and_no_padding_of_its_source(order):
    model = awake(Translator(shape(order=order)))
    (source, source_mask), (target, mask) = texts(), texts(length=5)
    source_mask[:, 4:] = False
    out = model(source, source_mask, target, mask)
    later, padded, first = target.clone(), source.clone(), source.clone()
    later[:, 3:], padded[:, 4:], first[:, 0] = 3, 3, (source[:, 0] + 1) % 12
    torch.testing.assert_close(model(source, source_mask, later, mask)[:, :3], out[:, :3])
    torch.testing.assert_close(model(padded, source_mask, target, mask), out)
    assert not torch.allclose(model(first, source_mask, target, mask), out, atol=1e-3)


def test_a_macaron_decoder_has_both_attentions_between_its_halves():
    block = Translator(shape(order="macaron")).decoder.blocks[0]
    assert [names for names, _ in block.entries] == [("ffn_a",), ("attn",), ("cross",), ("ffn_b",)]
    assert len(block.norms) == 4


def test_places_matter():
    for kind in ("sine", "learned", "rotary"):
        model = awake(MaskedLanguageModel(shape(positions=kind, length=6)))
        tokens, mask = texts()
        turned = model(tokens.flip(1), mask).flip(1)
        assert not torch.allclose(turned, model(tokens, mask), atol=1e-2)


@pytest.mark.parametrize("order", ["standard", "macaron"])
def test_learns_to_turn_a_text_round(order):
    torch.manual_seed(0)
    model = Translator(shape(width=32, depth=1, order=order))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(400):
        source, mask = texts(32, 4)
        target = torch.cat([torch.full((32, 1), START), source.flip(1), torch.full((32, 1), END)], 1)
        logits = model(source, mask, target[:, :-1], torch.ones(32, 5, dtype=torch.bool))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source, mask = texts(16, 4)
    got = model.eval().translate(source, mask, START, END, limit=7)
    assert got.shape[1] <= 7
    right = (got[:, :5] == torch.cat([source.flip(1), torch.full((16, 1), END)], 1)).all(1)
    assert right.float().mean() > 0.8


def test_rotary_positions_know_distances_alone():
    block = awake(MaskedLanguageModel(shape(positions="rotary"))).encoder.blocks[0]
    x, rope = torch.randn(1, 5, 16), text_rope(9, 8, torch.device("cpu"))
    near, far = (block(x, BlockContext(rope=rope[start : start + 5])) for start in (0, 4))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(near, block(x, BlockContext()), atol=1e-2)


def test_what_follows_an_end_is_end():
    model = awake(Translator(shape()))
    got = model.translate(*texts(8), START, END, limit=12)
    for row in got.tolist():
        if END in row:
            assert set(row[row.index(END) :]) == {END}


def test_refuses_by_name():
    with pytest.raises(UserError, match="twice the heads, 8"):
        shape(width=20, heads=4)
    with pytest.raises(UserError, match="positions 'none'"):
        shape(positions="none")
    with pytest.raises(UserError, match="leave cross out"):
        shape(order=[("attn", 1), ("cross", 1)])
    with pytest.raises(UserError, match="takes 4"):
        MaskedLanguageModel(shape(positions="learned", length=4))(*texts())
