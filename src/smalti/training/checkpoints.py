"""Checkpoints that are whole or absent.

A checkpoint is a folder `step-00001234` of safetensors and json; nothing is pickled. It is written beside its place,
synced, and renamed; its `manifest.json`, written last, lists sizes and SHA-256 of all other files, so that a torn one
is known for what it is and an older one is taken instead.
"""

import errno
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import atomic_folder, file_hash, read_json, write_json
from smalti.training.messages import say

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        step: number of finished steps.
        tensors: named tensors by file: `{"model": {...}}` is stored as model.safetensors.
        state: everything else, as json.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Writes a checkpoint into `folder` and then removes all but the newest `keep_last`.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: it cannot be written, for instance because the disk is full; older checkpoints are untouched.
    """
    path = folder / f"step-{checkpoint.step:08d}"
    with atomic_folder(path) as temporary:
        try:
            for name, tensors in checkpoint.tensors.items():
                flat = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(flat, temporary / f"{name}.safetensors")
        except SafetensorError as error:  # carries the text of the system's error, but is no OSError
            raise OSError(errno.EIO, str(error)) from error
        write_json(temporary / STATE, {"step": checkpoint.step, **checkpoint.state})
        files = {
            file.name: {"size": file.stat().st_size, "sha256": file_hash(file)} for file in sorted(temporary.iterdir())
        }
        write_json(temporary / MANIFEST, {"format": FORMAT, "step": checkpoint.step, "files": files})
    # What lies ahead of the newest was passed over as torn when the run was resumed.
    kept = [old for old in steps(folder) if old <= path][-keep_last:]
    for old in steps(folder):
        if old not in kept:
            _remove(old)
    return path


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint that `latest` found whole; tensors are on the CPU.

    Raises:
        UserError: another version wrote it.
    """
    written = read_json(path / MANIFEST).get("format")
    if written != FORMAT:
        raise UserError(
            f"{path} has format {written!r}, this version reads {FORMAT}; resume with the version that wrote it"
        )
    state = read_json(path / STATE)
    tensors = {file.stem: load_file(file, device="cpu") for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(state.pop("step"), tensors, state)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint; a torn one is passed over with a warning that names the one that is used."""
    torn = []
    for path in reversed(steps(folder)):
        reason = fault(path)
        if reason is None:
            if torn:
                say(f"warning: {'; '.join(torn)}; going on from {path.name}")
            return path
        torn.append(f"checkpoint {path.name} is torn ({reason})")
    if torn:
        say(f"warning: {'; '.join(torn)}; no whole checkpoint is left, starting from step 0")
    return None


def steps(folder: Path) -> list[Path]:
    """All checkpoints of a folder, oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-" + "[0-9]" * 8) if path.is_dir())


def step_of(path: Path) -> int:
    """The number of finished steps that a checkpoint's name gives."""
    return int(path.name.removeprefix("step-"))


def fault(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None if it is."""
    if not (path / MANIFEST).is_file():
        return "no manifest"
    try:
        files = read_json(path / MANIFEST)["files"]
        for name, facts in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['size']}"
            if file_hash(file) != facts["sha256"]:
                return f"{name} does not match its checksum"
    except (UserError, KeyError, TypeError, AttributeError, OSError):
        return "manifest cannot be read"
    return None if STATE in files else f"{STATE} is missing"


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed save or removal has left; call it only while no other process saves here."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    # Renamed first: a removal that is killed half-way leaves nothing that looks like a checkpoint.
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
