import math

import pytest
import torch
from torch import nn

from smalti.core.protocols import Batch, Cond
from smalti.core.time import expand_time
from smalti.evaluation.latent_bound import BoundReport, bound_report, stretch
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder


def test_the_stretch_of_a_linear_map_is_its_largest_singular_value():
    torch.manual_seed(3)
    layer = nn.Linear(6, 9)
    expected = float(torch.linalg.svdvals(layer.weight.detach())[0])
    assert stretch(layer, torch.randn(4, 6), rounds=30) == pytest.approx(expected, rel=1e-2)
    assert stretch(layer, torch.randn(4, 6), rounds=1) < expected


def test_both_parts_are_measured():
    model = ConvAutoencoder(4, 4, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    pixels = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, size=(16, 16), mode="bilinear")
    model.start_from_patches(pixels)
    model.measure_statistics([pixels])
    model.eval()
    x0 = model.encode(pixels).tensor
    batch = Batch(x0, Cond(), torch.arange(8))

    def field(error):
        return lambda x, t, cond: (x - x0[: len(x)]) / expand_time(t, x).clamp_min(1e-4) + error

    reports = [bound_report(model, field(error), pixels, batch, floor=0.0, samples=4) for error in (0.0, 0.5)]
    assert reports[0].reconstruction == reports[1].reconstruction > 0
    assert reports[1].matching - reports[0].matching == pytest.approx(0.25 * 64, abs=2)
    assert reports[0].field_gain == pytest.approx(10, rel=0.05)  # 1 / t at the earliest time
    assert reports[0].decoder_gain > 0
    assert reports[1].decades > reports[0].decades
    assert "reconstruction" in str(reports[0])
    with torch.no_grad():
        model.to_patch.weight.zero_()
    assert bound_report(model, field(0.0), pixels, batch, samples=4).reconstruction > reports[0].reconstruction


def test_the_bracket_by_hand():
    report = BoundReport(reconstruction=2.0, matching=0.5, decoder_gain=3.0, field_gain=1.0)
    assert report.decades == pytest.approx(math.log10(2 + 9 * math.exp(3) * 0.5))
