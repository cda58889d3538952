"""Any pipeline by a name or a folder: ours, or one of diffusers on disk; no download, no foreign code."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from smalti.core.errors import UserError, unknown_name
from smalti.core.files import read_json
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.zoo.loader import INDEX, load_model, model_folder

LIBRARIES = ("diffusers", "transformers")
DEVICES = ("auto", "cpu", "cuda")


def load_pipeline(name: str, device: torch.device) -> Any:
    """A pipeline of ours or of diffusers; nothing but their classes and those of transformers is built.

    Args:
        name: of a shipped model, or a folder.
        device: where it goes; on a GPU a diffusers pipeline has bfloat16 weights.

    Raises:
        UserError: there is no pipeline, or it holds what is not loaded here.
    """
    folder = model_folder(name)
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind in (None, TextToImagePipeline.__name__):
        pipe: Any = load_model(name, device)
    else:
        for part, entry in index.items():
            is_foreign = isinstance(entry, list) and entry[:1] != [None] and entry[0] not in LIBRARIES
            if is_foreign or (part == "_class_name" and not isinstance(entry, str)):
                raise UserError(f"{part} of {folder} is {entry!r}; only parts of {' and '.join(LIBRARIES)} are loaded")
        try:
            pipe = DiffusionPipeline.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            ).to(device)
        except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            raise UserError(f"the {kind} in {folder} cannot be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def device_of(name: str) -> torch.device:
    """The device that a word names: cpu, cuda, or auto for cuda where there is one."""
    if name not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("got device cuda, but torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
