"""SSIM by its definition, and the report of a tokenizer."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Latents
from smalti.evaluation.reconstruction import latent_statistics, reconstruction_report, ssim


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 24, 24) * 2 - 1
    assert torch.allclose(ssim(picture, picture), torch.ones(2, dtype=torch.float64))
    values = [ssim(picture, (picture + noise * torch.randn_like(picture)).clamp(-1, 1)).mean() for noise in (0.1, 0.4)]
    assert 1 > values[0] > values[1] > 0
    with pytest.raises(UserError, match="at least 11"):
        ssim(picture[..., :8], picture[..., :8])


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    torch.manual_seed(0)
    one = torch.rand(1, 3, 32, 40) * 2 - 1
    other = (one + 0.3 * torch.randn_like(one)).clamp(-1, 1)
    arrays = [((x[0] + 1) / 2).permute(1, 2, 0).double().numpy() for x in (one, other)]
    expected = metrics.structural_similarity(
        *arrays, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=2,
        full=True,
    )[1][5:-5, 5:-5]  # fmt: skip
    assert ssim(one, other).item() == pytest.approx(expected.mean(), abs=1e-6)


class Dimmer:
    """Keeps pictures, a little darker."""

    def encode(self, pixels):
        return Latents(pixels)

    def decode(self, latents):
        return latents.tensor * 0.9 - 0.1


class Pictures:
    def __init__(self):
        self.table = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return len(self.table)

    def pixels(self, indices):
        return self.table[list(indices)]


def test_the_report_of_a_tokenizer():
    pytest.importorskip("efficientnet_lite_pytorch")
    found = reconstruction_report(Dimmer(), Pictures())
    assert 20 < found["PSNR"] < 30
    assert 0.9 < found["SSIM"] < 1
    assert found["rFD-EfficientNetLite0"] > 0
    assert found["latent deviation"] == pytest.approx(3**-0.5, abs=0.02)


def test_latents_of_unequal_channels_are_told():
    latents = (
        torch.randn(50, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0])[:, None, None]
    )
    assert latent_statistics(latents)["loudest over quietest channel"] == pytest.approx(3.0, rel=0.1)
