"""What is here and what is missing, for `smalti doctor`."""

import importlib.util
import os
import platform
import shutil
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from smalti import __version__
from smalti.core.errors import UserError
from smalti.core.files import check_creatable
from smalti.data.emoji import load_emoji
from smalti.data.packages import cache_folder
from smalti.tokenizers.text_encoder import MiniLMEncoder
from smalti.zoo.loader import load_model, model_names

CORE = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow")
EXTRAS = {"judges": ("efficientnet_lite_pytorch", "h5py"), "data": ("resvg_py",), "tracking": ("tensorboard",)}
OLDEST_TESTED, NEWEST_TESTED = (2, 11), (2, 15)
GIGABYTE = 10**9


def checkup() -> list[dict[str, Any]]:
    """One entry a check: name, ok, found (text), required."""
    cores = f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    checks = [_entry("smalti", True, __version__), _entry("python", True, cores)]
    checks += [_package(name) for name in CORE]
    newest = tuple(int(part) for part in torch.__version__.split(".")[:2])
    tested = "{}.{} to {}.{}".format(*OLDEST_TESTED, *NEWEST_TESTED)
    if not OLDEST_TESTED <= newest <= NEWEST_TESTED:
        checks.append(_entry("torch range", False, f"{torch.__version__}; tested from {tested}", required=False))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; models run on the CPU"
    checks.append(_entry("gpu", True, gpu))
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        found = f"not installed; run: pip install 'smalti[{extra}]'" if missing else "installed"
        checks.append(_entry(f"extra {extra}", not missing, found, required=False))
    checks.append(_try("text encoder", _text_width))
    checks.append(_try("data emoji", lambda: f"{len(load_emoji('all'))} pictures"))
    names = model_names(only_pipelines=True)
    if not names:
        checks.append(_entry("models", False, "none ships with this installation; install smalti again"))
    checks += [_try(f"model {name}", partial(_parameters, name)) for name in names]
    checks.append(_try("cache folder", lambda: f"{check_creatable(cache_folder() / 'file').parent} can be written"))
    free = shutil.disk_usage(_existing(cache_folder())).free / GIGABYTE
    checks.append(_entry("free disk", free > 1, f"{free:.1f} GB", required=False))
    npm = shutil.which("npm")
    checks.append(_entry("npm", npm is not None, npm or "missing; smalti data get needs it", required=False))
    return checks


def _package(name: str) -> dict[str, Any]:
    try:
        return _entry(name, True, version(name))
    except PackageNotFoundError:
        return _entry(name, False, f"missing; run: pip install {name}")


def _text_width() -> str:
    return f"MiniLM {MiniLMEncoder(length=8).encode(['a cat']).tokens.shape[-1]} wide"


def _parameters(name: str) -> str:
    return f"{load_model(name).transformer.num_parameters() / 1e6:.1f} M parameters"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())


def _entry(name: str, ok: bool, found: str, required: bool = True) -> dict[str, Any]:
    return {"name": name, "ok": ok, "found": found, "required": required}


def _try(name: str, look) -> dict[str, Any]:
    try:
        return _entry(name, True, look())
    except UserError as error:
        return _entry(name, False, str(error))
