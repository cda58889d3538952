import pytest
import torch

from smalti.core.errors import UserError
from smalti.nn.vit_decoder import SHAPES, ViTDecoder


def decoder(**changes):
    torch.manual_seed(0)
    return ViTDecoder(**{"in_channels": 12, "patch_size": 4, "depth": 1, "width": 8, "heads": 2} | changes)


def test_a_latent_paints_its_patch_in_its_place():
    model = decoder(depth=0)  # without attention a token reaches its own patch alone
    z = torch.randn(1, 12, 3, 2)
    changed = z.clone()
    changed[:, :, 1, 0] += 1.0
    differs = (model(changed) - model(z)).abs().sum(1)[0] > 1e-6
    assert differs[4:8, :4].all()
    assert differs.sum() == 16


def test_positions_and_the_token_of_the_whole_matter():
    model, z = decoder(), torch.ones(1, 12, 2, 2)
    out = model(z)
    assert not torch.allclose(out[..., :4, :4], out[..., 4:, 4:], atol=1e-4)
    with torch.no_grad():
        model.whole += 10 * torch.randn_like(model.whole)
    assert not torch.allclose(model(z), out, atol=1e-4)


def test_colours_are_those_of_the_encoder():
    plain, coloured = decoder(), decoder(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    coloured.load_state_dict(plain.state_dict())
    z = torch.randn(1, 12, 2, 2)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    torch.testing.assert_close((coloured(z) + 1) / 2, plain(z) * std + mean)


def test_the_family():
    for shape in SHAPES.values():
        with torch.device("meta"):
            model = ViTDecoder(8, 2, **shape)
        assert len(model.blocks) == shape["depth"]
    assert 395e6 < sum(one.numel() for one in model.parameters()) < 455e6  # xl: 28 x 1152 with an MLP of 4096
    with pytest.raises(UserError, match="cannot be built"):
        decoder(width=6)


def test_it_may_begin_as_the_best_linear_map():
    model, z = decoder(width=16, depth=2), torch.randn(64, 12, 2, 2)
    weight = torch.randn(48, 12, 1, 1) * 0.1
    pixels = torch.nn.functional.pixel_shuffle(torch.nn.functional.conv2d(z, weight), 4)
    before = (model(z) - pixels).square().mean()
    model.start_linear(z, pixels)
    after = (model(z) - pixels).square().mean()
    assert after < 0.3 * pixels.var() < before
