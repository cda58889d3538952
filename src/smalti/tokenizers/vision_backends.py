"""Teachers by name or from a folder: our own small transformers, those of the transformers library, and timm's.

A backend is chosen by the exact `model_type` in the folder's config.json; what precedes the patch tokens (class token,
registers) is counted from that config and cut off, and a last norm that the class leaves out is applied. Positions off
the native grid are resampled by the model's own `interpolate_pos_encoding`. Colours are normalised as the folder's
preprocessor_config.json says, or, without that file, as the family was trained.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from smalti.core.errors import UserError, unknown_name
from smalti.core.files import read_json
from smalti.tokenizers.vision_encoder import FeatureTeacher, VisionTransformer

SHIPPED = Path(__file__).parents[1] / "zoo"
SHIPPED_NAMES = ("vit-caption", "vit-self")
UNTRAINED_NAMES = ("random", "random-dinov2-b")
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"

Colours = tuple[tuple[float, ...], tuple[float, ...]]
HALF: Colours = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Backend:
    """How a family of the transformers library is read and called.

    Args:
        class_name: of the library.
        prefix: how many tokens of its output precede the patches.
        colours: mean and deviation that it was trained with; None where members of the family differ.
        arguments: of its construction.
        resamples: whether its call takes `interpolate_pos_encoding`.
        norm: name of the last norm where the class does not apply it to patch tokens.
        ordered: whether it would hide and shuffle patches unless an order is given.
    """

    class_name: str
    prefix: Callable[[Any], int]
    colours: Colours | None
    arguments: tuple[tuple[str, Any], ...] = ()
    resamples: bool = True
    norm: str | None = None
    ordered: bool = False


def _class_token(config: Any) -> int:
    return 1


def _class_token_and_registers(config: Any) -> int:
    return 1 + config.num_register_tokens


def _nothing(config: Any) -> int:
    return 0


_NO_POOLER = (("add_pooling_layer", False),)
_CLIP = Backend("CLIPVisionModel", _class_token, CLIP, norm="post_layernorm")
_SIGLIP = Backend("SiglipVisionModel", _nothing, HALF)
BACKENDS = {
    "dinov2": Backend("Dinov2Model", _class_token, IMAGENET, resamples=False),
    "dinov2_with_registers": Backend(
        "Dinov2WithRegistersModel", _class_token_and_registers, IMAGENET, resamples=False
    ),
    "dinov3_vit": Backend("DINOv3ViTModel", _class_token_and_registers, IMAGENET, resamples=False),
    "vit": Backend("ViTModel", _class_token, None, _NO_POOLER),  # DINO v1 too
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit_mae": Backend("ViTMAEModel", _class_token, IMAGENET, ordered=True),
    "ijepa": Backend("IJepaModel", _nothing, IMAGENET, _NO_POOLER),
}  # fmt: skip
"""Families by the exact `model_type` of their config."""


def load_teacher(name: str | Path, tokens: tuple[int, int] | None = None) -> FeatureTeacher:
    """A frozen teacher.

    Args:
        name: `vit-caption` or `vit-self` (they ship), `random` (their shape, untrained: a control), `random-dinov2-b`
            (the shape of DINOv2-B, untrained: for timing), or a folder with a vision model of the transformers
            library, of timm, or of ours.
        tokens: rows and columns of the tokens that are wanted; pictures are resized to so many patches. None keeps the
            picture's size, to the nearest patch.

    Raises:
        UserError: there is no such name or folder, the family is unknown, or its weights are not whole.

    Example:
        >>> load_teacher("random", tokens=(4, 4))(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 16, 192])
    """
    if str(name) == "random":
        return OwnTeacher(VisionTransformer.untrained(), tokens)
    if str(name) == "random-dinov2-b":
        return TransformersTeacher(_untrained_dinov2_b(), BACKENDS["dinov2"], IMAGENET, tokens)
    folder = SHIPPED / str(name) if str(name) in SHIPPED_NAMES else Path(name)
    if (folder / "model" / CONFIG).is_file():  # a training writes its result into `model`
        folder = folder / "model"
    if not (folder / CONFIG).is_file():
        if folder.is_dir():
            raise UserError(f"no vision model in {folder}: {CONFIG} is missing")
        raise unknown_name("teacher", str(name), (*SHIPPED_NAMES, *UNTRAINED_NAMES))
    config = read_json(folder / CONFIG)
    config = config if isinstance(config, dict) else {}
    if config.get("_class_name") == VisionTransformer.__name__:
        return OwnTeacher(_read(folder, VisionTransformer), tokens)
    if "architecture" in config and "pretrained_cfg" in config:
        return TimmTeacher(folder, config, tokens)
    family = str(config.get("model_type"))
    if family not in BACKENDS:
        raise unknown_name(f"family of vision models (model_type in {folder / CONFIG})", family, BACKENDS)
    backend = BACKENDS[family]
    model = _read(folder, getattr(transformers, backend.class_name), **dict(backend.arguments))
    return TransformersTeacher(model, backend, _colours(folder, family, backend), tokens)


class OwnTeacher(FeatureTeacher):
    """A `VisionTransformer` as a teacher.

    Args:
        encoder: the model.
        tokens: see `FeatureTeacher`.
    """

    def __init__(self, encoder: VisionTransformer, tokens: tuple[int, int] | None = None):
        super().__init__(encoder.width, encoder.patch_size, *HALF, tokens)
        self.encoder = encoder
        self.eval().requires_grad_(False)

    def features(self, encoder_input: Tensor) -> Tensor:
        return self.encoder(encoder_input)


class TransformersTeacher(FeatureTeacher):
    """A vision model of the transformers library as a teacher.

    Args:
        model: of the backend's class.
        backend: how it is called.
        colours: mean and deviation of its pictures.
        tokens: see `FeatureTeacher`.
    """

    def __init__(self, model: nn.Module, backend: Backend, colours: Colours, tokens: tuple[int, int] | None = None):
        config: Any = model.config
        super().__init__(config.hidden_size, _side(config.patch_size, "patch_size"), *colours, tokens)
        self.model, self.backend, self.prefix = model, backend, backend.prefix(config)
        if backend.ordered:
            config.mask_ratio = 0.0
        self.eval().requires_grad_(False)

    def features(self, encoder_input: Tensor) -> Tensor:
        given: dict[str, Any] = {"interpolate_pos_encoding": True} if self.backend.resamples else {}
        if self.backend.ordered:
            patches = encoder_input[0, 0].numel() // self.patch_size**2
            places = torch.arange(patches, device=encoder_input.device, dtype=torch.float32)
            given["noise"] = places.expand(len(encoder_input), -1)  # patches are sorted by it, then all are kept
        dtype = next(self.model.parameters()).dtype
        states = self.model(pixel_values=encoder_input.to(dtype), **given).last_hidden_state[:, self.prefix :]
        return states if self.backend.norm is None else self.model.get_submodule(self.backend.norm)(states)


class TimmTeacher(FeatureTeacher):
    """A vision transformer of timm, such as MoCo v3's, from a folder as timm writes for the hub.

    Args:
        folder: with config.json and model.safetensors.
        config: what config.json holds.
        tokens: see `FeatureTeacher`.

    Raises:
        UserError: timm is not installed, or the model is no vision transformer with patch tokens.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tokens: tuple[int, int] | None = None):
        if importlib.util.find_spec("timm") is None:
            raise UserError(
                f"the teacher in {folder} is a model of timm, which is not installed; run: pip install timm"
            )
        timm: Any = importlib.import_module("timm")  # optional
        name, trained = str(config["architecture"]), config["pretrained_cfg"]
        try:
            model = timm.create_model(
                name, checkpoint_path=str(folder / "model.safetensors"), num_classes=0, dynamic_img_size=True
            )
        except (RuntimeError, TypeError, OSError) as error:
            raise UserError(f"timm cannot build {name} of {folder} as a vision transformer: {error}") from error
        super().__init__(
            model.num_features,
            _side(model.patch_embed.patch_size, "patch_size"),
            trained["mean"],
            trained["std"],
            tokens,
        )
        self.model = model
        self.eval().requires_grad_(False)

    def features(self, encoder_input: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return self.model.forward_features(encoder_input.to(dtype))[:, self.model.num_prefix_tokens :]


def _side(value: Any, what: str) -> int:
    """A side that a config gives as one number, or as two equal ones."""
    sides = {int(one) for one in value} if isinstance(value, list | tuple) else {int(value)}
    if len(sides) != 1:
        raise UserError(f"{what} of the vision model is {value!r}; only square patches are read")
    return sides.pop()


def _colours(folder: Path, family: str, backend: Backend) -> Colours:
    """Mean and deviation that the folder states, else those of the family."""
    if (folder / PREPROCESSOR).is_file():
        stated = read_json(folder / PREPROCESSOR)
        try:
            mean, std = (tuple(map(float, stated[key])) for key in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / PREPROCESSOR} does not state image_mean and image_std ({error})") from error
        return mean, std
    if backend.colours is None:
        raise UserError(
            f"models of family {family!r} differ in how colours are normalised, and {PREPROCESSOR} is missing in "
            f"{folder}; put it there with image_mean and image_std"
        )
    return backend.colours


def _read(folder: Path, kind: Any, **arguments: Any) -> Any:
    """A model in float32 whose weights are all in the folder; further ones (heads, decoders) are left there."""
    if issubclass(kind, VisionTransformer):
        arguments |= {"torch_dtype": torch.float32}
    else:
        arguments |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}  # they are counted below
    try:
        with _quiet_transformers():
            read: Any = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **arguments
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"cannot read the vision model in {folder}: {str(error).splitlines()[0]}") from error
    model, loading = read
    missing = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if missing:
        raise UserError(
            f"the weights in {folder} are not those of a {kind.__name__}: {len(missing)} are missing or of another "
            f"shape, such as {missing[0]}"
        )
    return model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without progress bar and without the report of weights that were left unread."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _untrained_dinov2_b() -> nn.Module:
    """DINOv2-B with drawn weights: 12 blocks of width 768, patch 14, native grid 37 x 37."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, patch_size=14)).eval()
