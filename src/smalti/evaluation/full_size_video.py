"""Shapes of published video and picture models of diffusers with random weights: for seconds and memory on a GPU.

Sizes are those of the published configurations: Wan 2.1 T2V 1.3B and 14B (arXiv 2503.20314), LTX-Video 2B (arXiv
2501.00103), CogVideoX 2B and 5B (arXiv 2408.06072), PixArt-Sigma XL (arXiv 2403.04692).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from smalti.core.errors import unknown_name

Size = tuple[int, int, int]
"""Frames, height and width in pixels."""


@dataclass(frozen=True)
class Shape:
    """A published model.

    Args:
        kind: diffusers' class.
        config: its arguments.
        parameters: of the published weights.
        text: (tokens, channels) of the prompt.
        latents: shape of the sample without its batch, from frames, height and width in pixels.
        tokens: number of image tokens of such a size.
        further: arguments of a call, from the size.
    """

    kind: type[nn.Module]
    config: Mapping[str, Any]
    parameters: int
    text: tuple[int, int]
    latents: Callable[[int, int, int], tuple[int, ...]]
    tokens: Callable[[int, int, int], int]
    further: Callable[[int, int, int], dict[str, Any]] = lambda frames, height, width: {}

    def build(self, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """The model with random weights, in evaluation mode."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return self.kind(**self.config).eval()
        finally:
            torch.set_default_dtype(before)


def _wan(dim: int, layers: int, ffn: int, parameters: int) -> Shape:
    config = {"num_attention_heads": dim // 128, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": ffn}
    return Shape(
        WanTransformer3DModel, config | {"patch_size": (1, 2, 2), "text_dim": 4096}, parameters, (512, 4096),
        lambda frames, height, width: (16, (frames - 1) // 4 + 1, height // 8, width // 8),
        lambda frames, height, width: ((frames - 1) // 4 + 1) * (height // 16) * (width // 16),
    )  # fmt: skip


def _cogvideox(heads: int, layers: int, parameters: int) -> Shape:
    config = {"num_attention_heads": heads, "attention_head_dim": 64, "num_layers": layers, "patch_size": 2}
    return Shape(
        CogVideoXTransformer3DModel, config, parameters, (226, 4096),
        lambda frames, height, width: ((frames - 1) // 4 + 1, 16, height // 8, width // 8),
        lambda frames, height, width: ((frames - 1) // 4 + 1) * (height // 16) * (width // 16),
    )  # fmt: skip


SHAPES: dict[str, Shape] = {
    "wan-1.3b": _wan(1536, 30, 8960, 1_418_996_800),
    "wan-14b": _wan(5120, 40, 13824, 14_288_491_584),
    "ltx-2b": Shape(
        LTXVideoTransformer3DModel, {"num_layers": 28}, 1_923_385_472, (128, 4096),
        lambda frames, height, width: (((frames - 1) // 8 + 1) * (height // 32) * (width // 32), 128),
        lambda frames, height, width: ((frames - 1) // 8 + 1) * (height // 32) * (width // 32),
        lambda frames, height, width: {
            "num_frames": (frames - 1) // 8 + 1, "height": height // 32, "width": width // 32,
            "encoder_attention_mask": None,
        },
    ),
    "cogvideox-2b": _cogvideox(30, 30, 1_693_787_712),
    "pixart-sigma": Shape(
        PixArtTransformer2DModel,
        {"num_layers": 28, "sample_size": 128, "out_channels": 8, "interpolation_scale": 2, "caption_channels": 4096,
         "use_additional_conditions": False},
        610_856_096, (300, 4096), lambda frames, height, width: (4, height // 8, width // 8),
        lambda frames, height, width: (height // 16) * (width // 16),
        lambda frames, height, width: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
}  # fmt: skip
"""By name."""


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model of `SHAPES`; diffusers does not say for all of them which repeat."""
    return model.get_submodule("blocks" if hasattr(model, "blocks") else "transformer_blocks")  # type: ignore[return-value]


def full_size_run(
    name: str, size: Size, steps: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model of `SHAPES`, its blocks compiled, and an Euler loop of so many steps on one branch.

    Args:
        name: of the model.
        size: frames, height and width in pixels; one frame for pictures.
        steps: of the loop.
        device: of the model.
        dtype: of the model.
    """
    if name not in SHAPES:
        raise unknown_name("full-size model", name, SHAPES)
    torch.manual_seed(0)
    shape = SHAPES[name]
    model, given = shape.build(device, dtype), {"device": device, "dtype": dtype}
    text, noise = torch.randn(1, *shape.text, **given), torch.randn(1, *shape.latents(*size), **given)
    if device.type == "cuda":
        for block in blocks_of(model):
            block.compile()

    @torch.no_grad()
    def run() -> Tensor:
        x = noise
        for step in range(steps):
            t = torch.full((1,), 1000 * (1 - step / steps), device=device)
            out = model(x, encoder_hidden_states=text, timestep=t, return_dict=False, **shape.further(*size))[0]
            x = x - out[:, : x.shape[1]] / steps
        return x

    return model, run
