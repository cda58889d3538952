"""Canvases as training samples: latents of every panel, cached once, in buckets of one canvas shape.

Each panel is encoded alone and the latents are tiled, so that no pixel of one panel reaches the latents of another.
With several resolutions every set is a sample at each of them; canvases of equal shape form a bucket, and a batch
never mixes buckets. Captions are dropped with a small chance, for guidance.

Source: In-Context LoRA (arXiv 2410.23775), section 4.1; captions dropped with 0.05 as in its published settings.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.core.protocols import TextEncoder
from smalti.data.joint_captions import JointCaptioner
from smalti.data.latent_cache import LatentCache, build_cache, cache_key
from smalti.data.panels import PanelSet
from smalti.ops.canvas import PanelLayout
from smalti.training.latent_source import LatentSource, embed_captions
from smalti.zoo.loader import weights_hash

DROPPED = 0.05


def panel_source(
    sets: Sequence[PanelSet],
    layout: PanelLayout,
    captioner: JointCaptioner,
    autoencoder: Any,
    encoder: TextEncoder,
    cache: Path | str,
    *,
    names: Sequence[dict[str, str]] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    num_labels: int = 0,
    multiple: int = 1,
    text_dropout: float = DROPPED,
) -> LatentSource:
    """Samples of a training on canvases; the label of every one is "none".

    Args:
        sets: sets of P panels.
        layout: of P panels.
        captioner: of their captions, the same as in use.
        autoencoder: pixels <-> latents.
        encoder: of text, best one that caches.
        cache: folder of latents.
        names: for each set, by placeholder.
        sizes: heights and widths of panels in pixels, one bucket each; None = as they are.
        num_labels: of the model.
        multiple: side of its patch.
        text_dropout: how often a caption is dropped.

    Raises:
        UserError: there is no set, panels do not fit the layout, or a size lies not on tokens.
    """
    if not sets or any(len(one.panels) != layout.count for one in sets):
        raise UserError(f"got {len(sets)} sets for a layout of {layout}; give sets of {layout.count} panels")
    named = [{}] * len(sets) if names is None else list(names)
    captions = [[captioner(one.captions, one.summary, name)] for one, name in zip(sets, named, strict=True)]
    samples = [
        (one, size)
        for size in (sizes or [None])
        for one in range(len(sets))
    ]  # fmt: skip
    shapes = [size or tuple(sets[one].panels.shape[-2:]) for one, size in samples]
    table = canvas_latents([(sets[one], size) for one, size in samples], layout, autoencoder, cache, multiple)
    groups = [
        torch.tensor([i for i, shape in enumerate(shapes) if shape == wanted]) for wanted in dict.fromkeys(shapes)
    ]
    return LatentSource(
        views=[table],
        captions=embed_captions([captions[one] for one, _ in samples], encoder),
        labels=torch.full((len(samples),), num_labels) if num_labels else None,
        dropped_label=num_labels,
        groups=groups,
        text_dropout=text_dropout,
    )


def canvas_latents(
    samples: Sequence[tuple[PanelSet, tuple[int, int] | None]],
    layout: PanelLayout,
    autoencoder: Any,
    cache: Path | str,
    multiple: int = 1,
) -> LatentCache:
    """Latents (C, H, W) of the canvases of sets at given panel sizes, made once and kept."""
    factor = autoencoder.config["factor"]
    panels = [_resized(one.panels, size) for one, size in samples]
    for one in panels:
        layout.boxes(*layout.size(*one.shape[-2:]), multiple * factor)
    digest = hashlib.sha256()
    for one in panels:
        digest.update(repr(tuple(one.shape)).encode() + one.contiguous().numpy().tobytes())
    key = cache_key("panels", weights_hash(autoencoder), str(layout), digest.hexdigest())

    def encode(indices: Tensor) -> Tensor:
        chosen = [panels[index] for index in indices.tolist()]
        latents = autoencoder.encode(torch.cat(chosen)).tensor.unflatten(0, (len(chosen), layout.count))
        return layout.assemble(list(latents.unbind(1)), multiple)

    groups = [tuple(one.shape) for one in panels]
    return build_cache(cache, key, len(panels), encode, groups=groups, batch=32)


def _resized(panels: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None or tuple(panels.shape[-2:]) == size:
        return panels
    return F.interpolate(panels, size, mode="bicubic", antialias=True).clamp(-1, 1)
