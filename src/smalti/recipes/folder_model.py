"""The model of the folder recipe: which transformer, how large its patch, and the pipeline around it."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError, unknown_name
from smalti.data.folder import FolderSet
from smalti.recipes.folder_autoencoder import Autoencoder
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.tokenizers.text_encoder import MiniLMEncoder

GRID = 16
DIT_DEPTH = 6
FIXED = ("self", "in_channels", "text_dim", "pooled_dim", "num_labels", "guidance_embeds", "learn_sigma")
"""Arguments of the transformers that follow from the pictures or from the objective."""


def patch_size(settings: Mapping[str, Any], size: int, autoencoder: Autoencoder) -> int:
    """Side of a patch in latents: as set, or the smallest power of two that gives at most 16 x 16 tokens."""
    if "patch_size" not in settings:
        return 2 ** max(0, math.ceil(math.log2(size / autoencoder.factor / GRID)))
    patch = settings["patch_size"]
    if not isinstance(patch, int) or patch < 1:
        raise UserError(f"transformer.patch_size is {patch!r}; it must be a whole number from 1")
    return patch


def build_transformer(
    settings: Mapping[str, Any], size: int, autoencoder: Autoencoder, pictures: FolderSet
) -> MMDiT | DiT:
    """The untrained transformer for what the pictures are conditioned on; `settings` win over what is derived.

    Raises:
        UserError: a setting is unknown (the nearest names are offered) or does not fit.
    """
    patch = patch_size(settings, size, autoencoder)
    derived: dict[str, Any] = {"in_channels": autoencoder.latent_channels, "patch_size": patch}
    if pictures.captions is not None:
        kind, width = MMDiT, MiniLMEncoder().width
        derived |= {"text_dim": width, "pooled_dim": width}
    else:
        kind = DiT
        derived |= {"num_labels": len(pictures.label_names), "depth": DIT_DEPTH}
        derived |= {"base_size": max(1, size // (autoencoder.factor * patch))}
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in FIXED]
    for name in settings:
        if name not in known:
            raise unknown_name(f"setting of the transformer ({kind.__name__})", name, known)
    try:
        return kind(**{**derived, **settings})
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"the settings {dict(settings)} make no {kind.__name__}: {error}") from error


def build_pipeline(
    transformer: MMDiT | DiT,
    autoencoder: Autoencoder,
    pictures: FolderSet,
    *,
    size: int,
    text_length: int,
    guidance: float,
) -> TextToImagePipeline:
    """The pipeline around a transformer of `build_transformer`; without captions and labels nothing guides."""
    has_text = pictures.captions is not None
    return TextToImagePipeline(
        transformer=transformer,
        autoencoder=autoencoder,
        scheduler=make_scheduler("euler"),
        text_encoder="minilm" if has_text else None,
        text_length=text_length,
        styles=list(pictures.label_names),
        size=size,
        default_guidance=guidance if has_text or pictures.label_names else 1.0,
    )
