import math

import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation.inpainting import inpaint_report
from smalti.evaluation.vgg import VGG16


def test_errors_are_measured_where_something_was_hidden():
    real, mask = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[0, :, :4], mask[1, :, :, :2] = 1, 1
    drawn = real.clone()
    drawn[0, :, :4], drawn[1, :, :, :2] = 0.2, 1.0
    report = inpaint_report(drawn, real, mask)
    assert report.inside == pytest.approx((0.04 + 1) / 2)
    assert report.psnr == pytest.approx((-10 * math.log10(0.01) - 10 * math.log10(0.25)) / 2)
    assert report.outside == 0
    assert math.isnan(report.perceptual)
    drawn[0, 0, 7, 7] = 0.5
    assert inpaint_report(drawn, real, mask).outside == 0.5
    assert inpaint_report(drawn, real, mask).inside == report.inside


def test_a_network_sees_the_whole_picture():
    torch.manual_seed(0)
    network = VGG16()
    real = torch.rand(2, 1, 32, 32) * 2 - 1
    mask = torch.ones(2, 1, 32, 32)
    same, other = (inpaint_report(one, real, mask, network).perceptual for one in (real, -real))
    assert same == pytest.approx(0, abs=1e-6)
    assert other > 1e-3


def test_what_cannot_be_measured_is_refused():
    real = torch.zeros(2, 1, 8, 8)
    with pytest.raises(UserError, match="hides nothing"):
        inpaint_report(real, real, torch.zeros(2, 1, 8, 8))
    with pytest.raises(UserError, match="masks"):
        inpaint_report(real, real, torch.ones(2, 1, 4, 4))
