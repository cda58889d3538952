"""Models of the zoo and models a user trained: one folder each, read and written whole.

A folder is what `DiffusionPipeline.save_pretrained` writes (config.json and safetensors a component) and `smalti.json`:
recipe, settings, their hash, hash of the data, metrics, date, hardware. Only classes of smalti and diffusers are built.
"""

import datetime
import errno
import hashlib
import importlib
import json
import platform
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin, SchedulerMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smalti import __version__
from smalti.core.errors import UserError, unknown_name
from smalti.core.files import atomic_folder, read_json, write_json
from smalti.sampling.pipeline import TextToImagePipeline

ZOO = Path(__file__).parent
CARD = "smalti.json"
INDEX = "model_index.json"
COMPONENTS = {"transformer": ModelMixin, "autoencoder": ModelMixin, "scheduler": SchedulerMixin}
BUILD_ERRORS = (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError)

Model = TypeVar("Model", bound=ModelMixin)


def model_names(only_pipelines: bool = False) -> list[str]:
    """Names of the shipped models, sorted; judges are models that draw nothing, hence no pipelines."""
    names = sorted(path.parent.name for path in ZOO.glob(f"*/{CARD}"))
    return [name for name in names if not only_pipelines or (ZOO / name / INDEX).is_file()]


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped model by its name, or of any pipeline by its path.

    Raises:
        UserError: there is neither; the nearest shipped names are offered.
    """
    if str(name) in model_names():
        return ZOO / str(name)
    path = Path(name)
    for folder in (path, path / "model"):  # a training writes its result into `model`
        if (folder / INDEX).is_file():
            return folder
    if path.is_dir():
        raise UserError(f"no model in {path}: {INDEX} is missing; give the folder that a training has written")
    raise unknown_name("model", str(name), model_names(only_pipelines=True))


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
    if not (folder / INDEX).is_file():
        raise UserError(f"model {str(name)!r} draws nothing; choose one of: {', '.join(model_names(True)) or 'none'}")
    index = read_json(folder / INDEX)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != TextToImagePipeline.__name__:
        raise UserError(f"{folder} holds a {kind or 'foreign model'}; a {TextToImagePipeline.__name__} is needed here")
    parts = {}
    for part, base in COMPONENTS.items():
        found = _named_class(index.get(part), base, f"the {part} of {folder}")
        is_model = issubclass(found, ModelMixin)
        parts[part] = load_part(folder / part, found, dtype) if is_model else _scheduler(folder / part, found)
    settings = {key: value for key, value in index.items() if not key.startswith("_") and key not in COMPONENTS}
    try:
        return TextToImagePipeline(**parts, **settings).to(device)
    except BUILD_ERRORS as error:
        raise UserError(f"{folder / INDEX} does not fit this version of smalti: {error}") from error


def _named_class(entry: Any, base: type, what: str) -> Any:
    """The class that an index names as [library, class]; nothing but smalti and diffusers is ever imported."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(one, str) for one in entry)):
        raise UserError(f"{what} is {entry!r} in {INDEX}; it must be [library, class]")
    library, name = entry
    is_ours = library.startswith("smalti.") and all(part.isidentifier() for part in library.split("."))
    if not is_ours and (library, base) != ("diffusers", SchedulerMixin):
        raise UserError(f"{what} is a {library}.{name}; only models of smalti and schedulers of diffusers are built")
    try:
        found = getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what} is a {library}.{name}, which this installation does not have") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{what} is a {library}.{name}, which is no {base.__name__}")
    return found


def _scheduler(folder: Path, kind: Any) -> Any:
    config = read_json(folder / "scheduler_config.json")
    if not isinstance(config, dict) or config.get("_class_name") != kind.__name__:
        raise UserError(f"{folder / 'scheduler_config.json'} is not the config of a {kind.__name__}")
    try:
        return kind.from_config(config)
    except BUILD_ERRORS as error:
        raise UserError(f"{folder} does not describe a {kind.__name__}: {error}") from error


def load_part(folder: Path, kind: type[Model], dtype: torch.dtype = torch.float32) -> Model:
    """A model of this class from its config and safetensors, in evaluation mode.

    Raises:
        UserError: a file is missing or torn, or weights and config do not fit each other.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("_class_name") != kind.__name__:
        raise UserError(f"{folder / 'config.json'} is not the config of a {kind.__name__}")
    try:
        model: Any = kind.from_config(config)  # type: ignore[attr-defined]  # all our models are ConfigMixins too
    except BUILD_ERRORS as error:
        raise UserError(f"{folder / 'config.json'} does not describe a {kind.__name__}: {error}") from error
    model.load_state_dict(_read_weights(folder, model.state_dict()))
    torch.nn.Module.to(model, dtype)  # diffusers' own `to` warns of modules to be kept in float32
    return model.eval()


def _read_weights(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights in a folder; refuses those that are torn, or differ from what is expected in names or shapes."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            found |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {file}: {error}; it is torn or no safetensors file") from error
    if not found:
        raise UserError(f"no weights in {folder}: a .safetensors file is missing")
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(key for key in expected.keys() & found if expected[key].shape != found[key].shape),
    }
    named = [f"{len(keys)} {fault} (such as {keys[0]})" for fault, keys in faults.items() if keys]
    if named:
        raise UserError(f"the weights in {folder} do not fit its config: {', '.join(named)}")
    return found


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
    with _whole_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
        if dtype is not None:
            for part, model in (("transformer", pipe.transformer), ("autoencoder", pipe.autoencoder)):
                cast_weights(temporary / part, dtype, keep={name for name, _ in model.named_buffers()})
        write_json(temporary / CARD, card | provenance())
    return Path(folder)


def save_part(model: ModelMixin, folder: Path) -> Path:
    """Writes a model that `load_part` reads, atomically."""
    with _whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
    return folder


@contextmanager
def _whole_folder(folder: Path | str) -> Iterator[Path]:
    """An `atomic_folder` that takes the errors of safetensors for those of the system, whose text they carry."""
    with atomic_folder(folder) as temporary:
        try:
            yield temporary
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error


def cast_weights(folder: Path, dtype: torch.dtype, keep: Container[str] = ()) -> None:
    """Rewrites the safetensors of a folder in another dtype, but for those named in `keep` (latent statistics)."""
    for file in folder.glob("*.safetensors"):
        tensors = {
            key: value.to(dtype) if value.is_floating_point() and key not in keep else value
            for key, value in load_file(file).items()
        }
        cast = file.with_suffix(".cast")  # another file, because the tensors may be mapped from this one
        save_file(tensors, cast, metadata={"format": "pt"})
        cast.replace(file)


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


def weights_hash(model: torch.nn.Module) -> str:
    """16 hexadecimal digits of a model's configuration, weights and buffers, wherever it was read from."""
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
