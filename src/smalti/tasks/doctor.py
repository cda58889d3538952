"""What is here and what is missing, for `smalti doctor`."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from smalti.core.errors import UserError
from smalti.core.files import check_writable
from smalti.data.emoji import load_emoji
from smalti.data.packages import cache_folder
from smalti.tokenizers.text_encoder import MiniLMEncoder
from smalti.zoo.loader import load_model, model_names

CORE = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow")
EXTRAS = {"judges": ("efficientnet_lite_pytorch", "h5py"), "data": ("resvg_py",), "tracking": ("tensorboard",)}
NEWEST_TESTED = (2, 15)
GIGABYTE = 10**9


def checkup() -> list[dict[str, Any]]:
    """One entry a check: name, ok, found (text), required."""
    checks = [_entry("python", True, f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")]
    for package in CORE:
        try:
            checks.append(_entry(package, True, version(package)))
        except PackageNotFoundError:
            checks.append(_entry(package, False, f"missing; run: pip install {package}"))
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if not (2, 11) <= (major, minor) <= NEWEST_TESTED:
        checks.append(_entry("torch range", False, f"{torch.__version__}; tested from 2.11 to 2.15", required=False))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; models run on the CPU"
    checks.append(_entry("gpu", True, gpu))
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        found = "installed" if not missing else f"not installed; run: pip install 'smalti[{extra}]'"
        checks.append(_entry(f"extra {extra}", not missing, found, required=False))
    checks.append(
        _try("text encoder", lambda: f"MiniLM {MiniLMEncoder(length=8).encode(['a cat']).tokens.shape[-1]} wide")
    )
    checks.append(_try("data emoji", lambda: f"{len(load_emoji('all'))} pictures"))
    for name in model_names():
        checks.append(
            _try(
                f"model {name}",
                lambda name=name: f"{load_model(name).transformer.num_parameters() / 1e6:.1f} M parameters",
            )
        )
    checks.append(_try("cache folder", lambda: f"{check_writable(cache_folder())} can be written"))
    free = shutil.disk_usage(cache_folder()).free / GIGABYTE
    checks.append(_entry("free disk", free > 1, f"{free:.1f} GB", required=False))
    checks.append(
        _entry(
            "npm",
            shutil.which("npm") is not None,
            shutil.which("npm") or "missing; smalti data get needs it",
            required=False,
        )
    )
    return checks


def _entry(name: str, ok: bool, found: str, required: bool = True) -> dict[str, Any]:
    return {"name": name, "ok": ok, "found": found, "required": required}


def _try(name: str, look) -> dict[str, Any]:
    try:
        return _entry(name, True, look())
    except UserError as error:
        return _entry(name, False, str(error))
