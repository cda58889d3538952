import pytest
import torch

from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.nn.patchify import patchify
from smalti.objectives.masked_autoencoding import MaskedAutoencoder, MaskedAutoencoding, normalised_patches
from smalti.tokenizers.vision_encoder import VisionTransformer


def model() -> MaskedAutoencoder:
    encoder = VisionTransformer.untrained(depth=1, heads=2, head_dim=8, base_size=4)
    torch.manual_seed(0)
    return MaskedAutoencoder(encoder, 16, 4, 192, decoder_width=16, decoder_depth=1, decoder_heads=2)


def batch(count=4) -> Batch:
    pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(pixels, Cond(), torch.arange(count))


def test_targets_are_normalised_in_each_patch_and_flat_ones_stay_flat():
    pixels = batch().x0.clone()
    pixels[0, :, :8, :8] = 0.3
    pixels[1, :, :8, :8] = 0.3 + 1e-3 * torch.randn(3, 8, 8)
    target = normalised_patches(pixels, 8, floor=1e-2)
    assert target.mean(-1).abs().max() < 1e-4
    assert target[0, 0].abs().max() < 1e-4
    assert target[1, 0].std() < 0.02  # noise is not blown up
    assert torch.allclose(target[2].var(-1, correction=0), torch.ones(16), atol=0.1)
    plain = patchify(pixels, 8)[2, 5]
    wanted = (plain - plain.mean()) / (plain.var(correction=0) + 1e-6).sqrt()
    assert torch.allclose(normalised_patches(pixels, 8, 1e-6)[2, 5], wanted, atol=1e-5)


def test_the_loss_is_taken_over_hidden_patches_alone():
    seen = {}

    def predicts_zero_where_visible(pixels, visible):
        seen["visible"] = visible
        out = normalised_patches(pixels, 8, 1e-2) + 2.0  # wrong by 2 where hidden
        return out.scatter(1, visible[..., None].expand(-1, -1, 192), 1e6)

    objective = MaskedAutoencoding(8, hidden=0.75)
    result = objective.loss(predicts_zero_where_visible, batch(), TrainState(), generators_for(range(4)))
    assert result.loss.item() == pytest.approx(4.0, rel=1e-4)
    assert seen["visible"].shape == (4, 4)
    assert not torch.equal(seen["visible"][0], seen["visible"][1])


def test_hidden_pixels_never_reach_the_encoder():
    trained, pixels = model(), batch().x0
    visible = torch.tensor([[0, 3, 5, 14]]).expand(4, -1)
    changed = pixels.clone()
    changed[..., 8:16, 16:24] = 1.0  # patch 6
    assert torch.equal(trained(pixels, visible), trained(changed, visible))
    changed[..., 8:16, 8:16] = 1.0  # patch 5
    assert not torch.equal(trained(pixels, visible), trained(changed, visible))


def test_visible_tokens_go_back_to_their_places():
    """The order in which the visible patches are given does not matter."""
    trained, pixels = model(), batch().x0
    one, other = torch.tensor([[0, 3, 5, 14]]).expand(4, -1), torch.tensor([[14, 0, 5, 3]]).expand(4, -1)
    assert torch.allclose(trained(pixels, one), trained(pixels, other), atol=1e-5)


def test_hidden_patches_are_told_apart_by_their_places():
    visible = torch.tensor([[0, 3, 5, 14]])
    painted = model()(batch().x0[:1], visible)[0]
    assert torch.pdist(painted).min() > 1e-2


def test_it_learns_to_paint_what_is_hidden():
    """Stripes whose phase is told by any visible patch."""
    columns = torch.arange(32.0)
    waves = torch.stack([torch.sin(columns * 0.8 + phase) for phase in (0.0, 1.5, 3.0, 4.5)])
    pixels = waves[:, None, None].expand(4, 3, 32, 32).clone()
    stripes = Batch(pixels, Cond(), torch.arange(4))
    trained, objective = model().train(), MaskedAutoencoding(8)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    losses = []
    for step in range(150):
        result = objective.loss(trained, stripes, TrainState(step), generators_for(range(step * 4, step * 4 + 4)))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses[-1] < 0.3 < 0.8 < losses[0]
