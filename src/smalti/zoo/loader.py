"""Models of the zoo and models a user trained: one folder each, read and written whole.

A folder is what `DiffusionPipeline.save_pretrained` writes (config.json and safetensors a component) and `smalti.json`:
recipe, settings, their hash, hash of the data, metrics, date, hardware. Only classes of smalti and diffusers are built.
"""

import datetime
import hashlib
import importlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from smalti import __version__
from smalti.core.errors import UserError, unknown_name
from smalti.core.files import atomic_folder, read_json, write_json
from smalti.sampling.pipeline import TextToImagePipeline

ZOO = Path(__file__).parent
CARD = "smalti.json"
COMPONENTS = ("transformer", "autoencoder", "scheduler")


def model_names() -> list[str]:
    """Names of the shipped models, sorted."""
    return sorted(path.parent.name for path in ZOO.glob(f"*/{CARD}"))


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped model by its name, or of any model by its path.

    Raises:
        UserError: there is neither; the nearest shipped names are offered.
    """
    if str(name) in model_names():
        return ZOO / str(name)
    path = Path(name)
    for folder in (path, path / "model"):  # a training writes its result into `model`
        if (folder / "model_index.json").is_file():
            return folder
    if path.is_dir():
        raise UserError(
            f"no model in {path}: model_index.json is missing; give the folder that a training or save_pretrained wrote"
        )
    raise unknown_name("model", str(name), model_names())


def model_card(name: str | Path) -> dict[str, Any]:
    """What is known of a model: recipe, metrics, date, hardware; empty if it was not written by smalti."""
    path = model_folder(name) / CARD
    return read_json(path) if path.is_file() else {}


def load_model(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TextToImagePipeline:
    """Reads a pipeline whole or not at all.

    Args:
        name: a name of the zoo or a folder.
        device: where the model goes.
        dtype: of its weights in memory.

    Raises:
        UserError: unknown name, torn file, weights with missing or extra keys, or classes that are not ours.
    """
    folder = model_folder(name)
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != TextToImagePipeline.__name__:
        raise UserError(f"{folder} holds a {index.get('_class_name')}; a {TextToImagePipeline.__name__} is needed here")
    parts = {
        part: _load_component(folder / part, *index[part], dtype) for part in COMPONENTS if index.get(part, [None])[0]
    }
    settings = {key: value for key, value in index.items() if not key.startswith("_") and key not in COMPONENTS}
    try:
        return TextToImagePipeline(**parts, **settings).to(device)
    except TypeError as error:
        raise UserError(f"{folder}/model_index.json does not fit this version of smalti: {error}") from error


def _load_component(folder: Path, library: str, class_name: str, dtype: torch.dtype) -> Any:
    if library != "diffusers" and not library.startswith("smalti."):
        raise UserError(
            f"{folder} wants the class {library}.{class_name}; only classes of smalti and diffusers are built"
        )
    try:
        kind = getattr(importlib.import_module(library), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{folder} wants the class {library}.{class_name}, which is not installed") from error
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no model in {folder}: config.json is missing")
    model = kind.from_config(kind.load_config(folder))
    _check_weights(folder, set(model.state_dict()))
    return kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).eval()


def _check_weights(folder: Path, expected: set[str]) -> None:
    """Refuses weights that are torn or whose names differ from the model's."""
    found: set[str] = set()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no weights in {folder}: a .safetensors file is missing")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                found.update(weights.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {file}: {error}; it is torn or no safetensors file") from error
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        named = [
            f"{len(keys)} {what} (such as {keys[0]})" for keys, what in ((missing, "missing"), (extra, "extra")) if keys
        ]
        raise UserError(f"{folder} does not fit its config: weights {' and '.join(named)}")


def save_model(
    pipe: TextToImagePipeline, folder: Path | str, card: dict[str, Any], dtype: torch.dtype | None = None
) -> Path:
    """Writes a pipeline and its card atomically.

    Args:
        pipe: what to write; its own weights stay as they are.
        folder: takes the place of what is there.
        card: json for `smalti.json`; date, hardware and versions are added.
        dtype: of the weights in the files; that of the pipeline if None.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
        if dtype is not None:
            for part in ("transformer", "autoencoder"):
                _cast_weights(temporary / part, dtype)
        write_json(temporary / CARD, card | provenance())
    return folder


def _cast_weights(folder: Path, dtype: torch.dtype) -> None:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata()
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata=metadata)


def provenance() -> dict[str, Any]:
    """Date, hardware and versions of whatever is being made now."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"smalti": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def settings_hash(settings: Any) -> str:
    """16 hexadecimal digits of json-able settings, independent of the order of keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
