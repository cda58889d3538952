import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.control.channel_concat import ChannelConcat, InpaintChannels, SemanticMapChannels
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.flow_matching import FlowMatching

X, T = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
EXTRA = {
    "masked": torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1)),
    "edit_mask": (torch.arange(8)[:, None] < 4).float().expand(2, 1, 8, 6),
    "segments": torch.randint(5, (2, 32, 24), generator=torch.Generator().manual_seed(2)),
}


def filled(model):
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():  # training starts from zero there
                weight.normal_(0, 0.3)
    return model


def dit():
    return filled(DiT.tiny())


def cond(**extra):
    return Cond(label=torch.tensor([0, 2]), pooled=torch.zeros(2, 10), extra=extra)


def conditions():
    return [InpaintChannels(4), SemanticMapChannels(5, channels=3, halvings=2)]


def test_a_widened_model_draws_as_before_and_then_learns_from_its_conditions():
    model = dit()
    before = model(X, T, cond())
    wide = ChannelConcat(model, conditions())
    assert wide.denoiser.x_embedder.in_features == (4 + 5 + 3) * 4  # nine channels of inpainting, three of the map
    torch.testing.assert_close(wide(X, T, cond(**EXTRA)), before, rtol=1e-4, atol=1e-5)
    batch = Batch(X, cond(**EXTRA), torch.arange(2))
    optimizer = torch.optim.Adam(wide.parameters(), 1e-2)
    for _ in range(2):  # the map's own weights have a gradient once the new columns are not zero
        optimizer.zero_grad()
        FlowMatching().loss(wide, batch, TrainState(), generators_for([0, 1])).loss.backward()
        optimizer.step()
    assert wide.conditions[1].mix.weight.grad.abs().sum() > 0
    changed = {**EXTRA, "segments": (EXTRA["segments"] + 1) % 5}
    assert (wide(X, T, cond(**changed)) - wide(X, T, cond(**EXTRA))).abs().max() > 1e-4
    changed = {**EXTRA, "edit_mask": 1 - EXTRA["edit_mask"]}
    assert (wide(X, T, cond(**changed)) - wide(X, T, cond(**EXTRA))).abs().max() > 1e-4


def test_inpainting_has_nine_channels_with_the_mask_in_minus_one_to_one():
    one = InpaintChannels(4)
    made = one(cond(**EXTRA), (8, 6))
    assert one.channels == 5
    assert torch.equal(made[:, :4], EXTRA["masked"])
    assert torch.equal(made[:, 4:], 2 * EXTRA["edit_mask"] - 1)
    fine = EXTRA["edit_mask"].repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(one(cond(**{**EXTRA, "edit_mask": fine}), (8, 6)), made)


def test_a_map_is_shares_of_classes_mixed():
    one = SemanticMapChannels(5, channels=5, halvings=2)
    with torch.no_grad():
        one.mix.weight.copy_(torch.eye(5)[..., None, None])
        one.mix.bias.zero_()
    made = one(cond(**EXTRA), (8, 6))
    cells = EXTRA["segments"].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)  # (B, 8, 6, 16)
    for number in range(5):
        torch.testing.assert_close(made[:, number], (cells == number).float().mean(-1))
    torch.testing.assert_close(made.sum(1), torch.ones(2, 8, 6))


def test_a_widened_model_is_saved_and_loaded_by_its_configuration(tmp_path):
    wide = ChannelConcat(dit(), [InpaintChannels(4)])
    torch.nn.init.normal_(wide.denoiser.x_embedder.weight)
    wide.denoiser.save_pretrained(tmp_path / "dit")
    again = DiT.from_pretrained(tmp_path / "dit")
    given = torch.randn(2, 9, 8, 6)
    assert torch.equal(again(given, T, cond()), wide.denoiser(given, T, cond()))


def test_any_backbone_with_an_input_projection_will_do():
    model = filled(MMDiT.tiny())
    text = Cond(torch.randn(2, 3, 12), torch.randn(2, 10))
    before = model(X, T, text)
    wide = ChannelConcat(model, [InpaintChannels(4)])
    given = Cond(text.text, text.pooled, extra=EXTRA)
    torch.testing.assert_close(wide(X, T, given), before, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_in_one_line():
    wide = ChannelConcat(dit(), conditions())
    with pytest.raises(UserError, match="'masked'"):
        wide(X, T, cond())
    with pytest.raises(UserError, match="masked latents"):
        wide(X, T, cond(**{**EXTRA, "masked": X[:, :3]}))
    with pytest.raises(UserError, match=r"\(B, 32, 24\)"):
        wide(X, T, cond(**{**EXTRA, "segments": EXTRA["segments"][:, :16]}))
    with pytest.raises(UserError, match="from 0 to 4"):
        wide(X, T, cond(**{**EXTRA, "segments": EXTRA["segments"] + 1}))
    with pytest.raises(UserError, match="at least one condition"):
        ChannelConcat(dit(), [])
    with pytest.raises(UserError, match="pos_embed"):
        ChannelConcat(dit(), conditions(), projection="pos_embed")
