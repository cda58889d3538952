"""Attention weights alone, as what was added to those of a model: chosen, saved, read, added and taken off again.

What a student of `training.distill` learned is the difference of its projections (to queries, keys, values, and out) to
its teacher's; everything else the two share. A difference fits siblings too: models fine-tuned from the same teacher.

Source: CLEAR (arXiv 2412.16112), section 4.4, for the zero-shot use on siblings.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.files import atomic_folder, file_hash, read_json, write_json
from smalti.seams.anatomy import read_anatomy
from smalti.zoo.loader import ZOO, provenance

FILE, CARD = "deltas.safetensors", "deltas.json"
PROJECTIONS = re.compile(r"(to_q|to_k|to_v|to_qkv|to_out(\.\d+)?)\.(weight|bias)")
"""Of the image or joint stream; a text stream's own (add_q_proj, to_add_out, `attn_text`) are never among them."""


@dataclass(frozen=True)
class Deltas:
    """What a student learned.

    Args:
        weights: differences by name of the parameter.
        extra: tensors of its method, by name.
        card: json: the method's settings and where it came from.
    """

    weights: Mapping[str, Tensor]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)


def attention_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The attention projections of the image or joint stream, weights and biases by name.

    Raises:
        UserError: the model has none that can be told by their names.
    """
    found: dict[str, nn.Parameter] = {}
    for block in read_anatomy(model).blocks:
        for one in block.attentions:
            for name, parameter in one.module.named_parameters():
                if PROJECTIONS.fullmatch(name):
                    found[f"{one.site}.{name}"] = parameter
    if not found:
        raise UserError(
            f"no projection in attention of {type(model).__name__} is named to_q, to_k, to_v, to_qkv or to_out"
        )
    return found


def deltas_of(student: nn.Module, teacher: nn.Module, extra: Mapping[str, Tensor], card: Mapping[str, Any]) -> Deltas:
    """The difference of two models that share everything but their attention projections."""
    one, other = attention_parameters(student), attention_parameters(teacher)
    return Deltas({name: one[name].detach() - other[name].detach() for name in one}, dict(extra), dict(card))


def save_deltas(deltas: Deltas, folder: Path | str) -> Path:
    """Writes deltas in bfloat16 and their card, atomically."""
    tensors = {f"weights/{name}": one.to(torch.bfloat16) for name, one in deltas.weights.items()}
    tensors |= {f"extra/{name}": one.float() for name, one in deltas.extra.items()}
    with atomic_folder(folder) as temporary:
        save_file({name: one.cpu().contiguous() for name, one in tensors.items()}, temporary / FILE)
        card = {**deltas.card, "sha256": file_hash(temporary / FILE)}
        write_json(temporary / CARD, card | provenance())
    return Path(folder)


def load_deltas(student: str | Path) -> Deltas:
    """Reads deltas from a folder, or by their name in the zoo.

    Raises:
        UserError: there are none, or the file is torn or another than the card names.
    """
    folder = ZOO / str(student) if (ZOO / str(student) / CARD).is_file() else Path(student)
    if not (folder / CARD).is_file():
        known = ", ".join(sorted(path.parent.name for path in ZOO.glob(f"*/{CARD}"))) or "none"
        raise UserError(f"no student {str(student)!r}: {CARD} is missing; give a folder of deltas, or one of: {known}")
    card = read_json(folder / CARD)
    try:
        tensors = load_file(folder / FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {folder / FILE}: {error}") from error
    if file_hash(folder / FILE) != card.get("sha256"):
        raise UserError(f"{folder / FILE} is not the file that {CARD} names; fetch or distil the student anew")
    parts = {kind: {name.removeprefix(kind): one.float() for name, one in tensors.items() if name.startswith(kind)}
             for kind in ("weights/", "extra/")}  # fmt: skip
    return Deltas(parts["weights/"], parts["extra/"], card)


@contextmanager
def merged(model: nn.Module, deltas: Deltas, factor: float = 1.0) -> Iterator[nn.Module]:
    """Adds deltas to a model for as long as the context lasts; afterwards it is bit for bit what it was.

    Raises:
        UserError: the model has other attention projections than the deltas.
    """
    own = attention_parameters(model)
    if {name: one.shape for name, one in own.items()} != {name: one.shape for name, one in deltas.weights.items()}:
        other = sorted(own.keys() ^ deltas.weights.keys()) or ["shapes"]
        raise UserError(
            f"these deltas do not fit this {type(model).__name__} ({len(other)} differ, such as {other[0]}); they fit "
            "the model that the student was distilled from, and models fine-tuned from it"
        )
    kept = {name: one.detach().clone() for name, one in own.items()}
    with torch.no_grad():
        for name, one in own.items():
            one.copy_((one.float() + factor * deltas.weights[name].to(one.device)).to(one.dtype))
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, one in own.items():
                one.copy_(kept[name])


@dataclass(frozen=True)
class Transfer:
    """Mean squared distance of velocities to a sibling's own: under the method alone, and with the deltas too."""

    alone: float
    with_deltas: float

    @property
    def helps(self) -> bool:
        """Whether deltas learned on the teacher bring the sibling's pruned attention closer to its full one."""
        return self.with_deltas < self.alone


@torch.no_grad()
def check_transfer(sibling: nn.Module, deltas: Deltas, velocity: Callable[[bool], Tensor]) -> Transfer:
    """Whether deltas serve a sibling that never saw the distillation.

    Args:
        sibling: fine-tuned from the teacher.
        deltas: of the student.
        velocity: the sibling's prediction, with the method on (True) or off.
    """
    full = velocity(False)
    alone = velocity(True)
    with merged(sibling, deltas):
        helped = velocity(True)
    return Transfer(*(float((one - full).square().mean()) for one in (alone, helped)))
