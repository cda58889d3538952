"""Training step and sampling step of our MMDiT against diffusers' Flux of the same shape and weights.

Both run in one process on the same inputs. First their outputs and gradients must agree; then pairs are timed in turn
and the median of the ratios ours / theirs is reported with its bootstrap 95 % interval.

    smalti bench mmdit_speed --set shape=emoji --set threads=1 --json
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from smalti.backbones.flux_weights import flux_to_mmdit
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Cond
from smalti.evaluation.timing import Ratio, paired_ratio
from smalti.nn.patchify import patchify
from smalti.nn.rope import grid_labels
from smalti.zoo.loader import provenance

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Shape:
    """A model and its inputs; `side` is the picture's side in tokens."""

    channels: int
    num_double: int
    num_single: int
    heads: int
    head_dim: int
    axes: tuple[int, int, int]
    text_dim: int
    pooled_dim: int
    side: int
    text_length: int
    train_batch: int
    sample_batch: int
    guidance: bool = False
    checkpointing: bool = False


SHAPES = {
    "tiny": Shape(4, 1, 1, 2, 8, (2, 2, 4), 12, 10, 3, 5, 2, 2),
    "emoji": Shape(16, 1, 4, 6, 32, (8, 12, 12), 384, 384, 8, 16, 64, 2),
    "mid": Shape(16, 2, 4, 8, 64, (16, 24, 24), 768, 768, 16, 64, 4, 2),
    "flux-slice": Shape(64, 3, 6, 24, 128, (16, 56, 56), 4096, 768, 64, 512, 1, 1, guidance=True),
    "flux-dev": Shape(64, 19, 38, 24, 128, (16, 56, 56), 4096, 768, 64, 512, 1, 1, guidance=True, checkpointing=True),
}


class Pair:
    """Both models with the same weights, and the same inputs for each."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.shape, self.device, self.dtype = shape, device, dtype
        self.theirs = _random_flux(shape, device, dtype)
        self.ours: MMDiT = flux_to_mmdit(self.theirs)
        if shape.checkpointing:
            self.theirs.enable_gradient_checkpointing()
            self.ours.enable_gradient_checkpointing()

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Cond]:
        """x (B, C, side, side), t (B,) and the conditioning."""
        shape, place = self.shape, {"device": self.device, "dtype": self.dtype}
        cond = Cond(
            text=torch.randn(batch, shape.text_length, shape.text_dim, **place),
            pooled=torch.randn(batch, shape.pooled_dim, **place),
            guidance=torch.full((batch,), 3.5, **place) if shape.guidance else None,
        )
        t = torch.linspace(0.1, 0.9, batch, **place)
        return torch.randn(batch, shape.channels, shape.side, shape.side, **place), t, cond

    def calls(self, batch: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """Forward of ours and of theirs, both (B, N, C)."""
        x, t, cond = self.inputs(batch)
        labels = grid_labels(self.shape.text_length, self.shape.side, self.shape.side, self.device)
        tokens = patchify(x, 1).contiguous()
        arguments = {
            "hidden_states": tokens,
            "encoder_hidden_states": cond.text,
            "pooled_projections": cond.pooled,
            "timestep": t,
            "guidance": cond.guidance,
            "txt_ids": labels[: self.shape.text_length],
            "img_ids": labels[self.shape.text_length :],
            "return_dict": False,
        }
        return lambda: patchify(self.ours(x, t, cond), 1), lambda: self.theirs(**arguments)[0]

    def check(self) -> dict[str, float]:
        """Largest differences of output and one gradient, relative to the largest value; raises if one is too large."""
        ours, theirs = self.calls(1)
        with torch.no_grad():
            output = _difference(ours(), theirs())
        gradient = _difference(
            *(self._gradient(model, call) for model, call in ((self.ours, ours), (self.theirs, theirs)))
        )
        limit = TOLERANCE[self.dtype]
        if not max(output, gradient) <= limit:
            raise RuntimeError(f"outputs differ by {output:.1e}, gradients by {gradient:.1e}; more than {limit:.0e}")
        return {"output_difference": output, "gradient_difference": gradient, "limit": limit}

    def _gradient(self, model: torch.nn.Module, call: Callable[[], Tensor]) -> Tensor:
        """Gradient of the first layer's weight, which has passed every block backwards."""
        call().float().square().mean().backward()
        gradient = model.get_parameter("x_embedder.weight").grad
        assert gradient is not None
        model.zero_grad(set_to_none=True)
        return gradient


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        shape: one of `SHAPES`.
        device: cpu or cuda; on cuda weights are bfloat16, on the CPU float32.
        threads: of the CPU.
        repeats: timed pairs.
        warmup: pairs before them.
        compiled: compile both models.
    """

    shape: str = "emoji"
    device: str = "cpu"
    threads: int = 1
    repeats: int = 30
    warmup: int = 3
    compiled: bool = False


def run(settings: Settings) -> dict[str, Any]:
    """Measures both steps; `training` and `sampling` of the result hold the ratios ours / theirs.

    Raises:
        UserError: unknown shape, or no such device.
    """
    if settings.shape not in SHAPES:
        raise unknown_name("shape", settings.shape, SHAPES)
    if settings.device not in ("cpu", "cuda"):
        raise unknown_name("device", settings.device, ("cpu", "cuda"))
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("got device cuda, but torch sees no CUDA device; use device=cpu")
    torch.set_num_threads(settings.threads)
    shape = SHAPES[settings.shape]
    pair = Pair(shape, torch.device(settings.device), torch.float32 if settings.device == "cpu" else torch.bfloat16)
    equality = pair.check()
    if settings.compiled:
        pair.ours.compile(dynamic=False)
        pair.theirs.compile(dynamic=False)
    ours, theirs = pair.calls(shape.train_batch)
    training = paired_ratio(
        _training(pair.ours, ours), _training(pair.theirs, theirs), settings.repeats, settings.warmup
    )
    ours, theirs = pair.calls(shape.sample_batch)
    sampling = paired_ratio(torch.no_grad()(ours), torch.no_grad()(theirs), settings.repeats, settings.warmup)
    return {
        "benchmark": "mmdit_speed",
        "settings": asdict(settings),
        "shape": asdict(shape),
        "parameters": sum(p.numel() for p in pair.ours.parameters()),
        "equality": equality,
        "training": _report(training),
        "sampling": _report(sampling),
        "cores": os.cpu_count(),
        "diffusers": diffusers.__version__,
        **provenance(),
    }


def table(result: dict[str, Any]) -> str:
    """The two ratios as text."""
    lines = []
    for name in ("training", "sampling"):
        part = result[name]
        verdict = "reaches 1" if part["reaches_one"] else "stays above 1"
        lines.append(
            f"{name:9} ours / diffusers' {part['median']:.3f} [{part['low']:.3f}, {part['high']:.3f}], {verdict}"
        )
    return "\n".join(lines)


def _training(model: torch.nn.Module, call: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        call().float().square().mean().backward()
        model.zero_grad(set_to_none=True)  # two gradients at a time would not fit beside two large models

    return step


def _random_flux(shape: Shape, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made where and as it is used: in float32 first, a large model would not fit
    try:
        with device:
            flux = FluxTransformer2DModel(
                in_channels=shape.channels,
                num_layers=shape.num_double,
                num_single_layers=shape.num_single,
                attention_head_dim=shape.head_dim,
                num_attention_heads=shape.heads,
                joint_attention_dim=shape.text_dim,
                pooled_projection_dim=shape.pooled_dim,
                guidance_embeds=shape.guidance,
                axes_dims_rope=shape.axes,
            )
    finally:
        torch.set_default_dtype(default)
    return flux.eval()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def _report(ratio: Ratio) -> dict[str, Any]:
    return {**asdict(ratio), "reaches_one": ratio.reaches_one}
