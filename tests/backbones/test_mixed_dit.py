"""A patch-mixer in front of a DiT: the DiT's weights and forward, on fewer tokens."""

import copy

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.backbones.microdit import MicroDiT
from smalti.backbones.mixed_dit import MixedDiT, with_patch_mixer
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Cond
from smalti.evaluation.flops import count_flops
from smalti.nn.patchify import patchify

KEEP = torch.tensor([[0, 3, 9], [2, 5, 15]])


def make(preset=DiT.tiny_text):
    model = with_patch_mixer(preset(), depth=1, width=8, head_dim=4).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def cond(model, keep=None):
    config = model.config
    text = torch.randn(2, 5, config["text_dim"]) if config["text_dim"] else None
    return Cond(text, torch.randn(2, 10), extra={} if keep is None else {"keep": keep})


@pytest.mark.parametrize("preset", [DiT.tiny, DiT.tiny_text])
def test_dropped_places_are_zero_and_kept_ones_know_them(preset):
    model, x, t = make(preset), torch.randn(2, 4, 8, 8), torch.rand(2)
    given = cond(model, KEEP)
    out = model(x, t, given)
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, KEEP, True)
    assert torch.equal(patchify(out, 2).abs().sum(-1) > 0, mask)
    changed = x.clone()
    changed[..., 2:4, 4:6] += 1  # place 6, kept in neither sample
    assert (model(changed, t, given) - out).abs().max() > 1e-4


def test_all_kept_is_the_whole_run():
    model, x, t = make(), torch.randn(2, 4, 8, 8), torch.rand(2)
    given = cond(model)
    kept = Cond(given.text, given.pooled, extra={"keep": torch.arange(16).expand(2, 16)})
    torch.testing.assert_close(model(x, t, kept), model(x, t, given))


def test_it_has_the_weights_of_the_dit():
    dit = DiT.tiny_text()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter)
    mixed = with_patch_mixer(dit, depth=1, width=8, head_dim=4)
    assert all(torch.equal(one, other) for one, other in zip(mixed.dit.parameters(), dit.parameters(), strict=True))


def test_a_copy_masks_by_itself():
    """As the averaged model of a training: it calls its own mixer, not that of the one it was copied from."""
    model, x, t = make(), torch.randn(2, 4, 8, 8), torch.rand(2)
    given, twin = cond(model, KEEP), copy.deepcopy(model)
    expected = model(x, t, given)
    for parameter in model.mixer.parameters():
        torch.nn.init.zeros_(parameter)
    model(x, t, cond(model))
    torch.testing.assert_close(twin(x, t, given), expected)


def test_blocks_do_less():
    model, x, t = make(), torch.randn(2, 4, 8, 8), torch.rand(2)
    whole, part = (count_flops(lambda keep=keep: model(x, t, cond(model, keep))).total for keep in (None, KEEP))
    assert part < 0.7 * whole


@pytest.mark.parametrize("preset", [MMDiT.tiny, MicroDiT.tiny, MixedDiT.tiny])
def test_other_models_are_refused_by_name(preset):
    with pytest.raises(Refusal, match=preset.__qualname__.split(".")[0]):
        with_patch_mixer(preset(), depth=1, width=8)


def test_tokens_with_times_of_their_own_are_refused():
    model = make(DiT.tiny)
    with pytest.raises(UserError, match="times of their own"):
        model(torch.randn(2, 4, 8, 8), torch.rand(2, 16), cond(model, KEEP))
