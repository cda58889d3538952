"""From what a user asks for (prompts, styles or labels, sizes) to what a denoiser takes.

The unconditional branch of a text model is the empty prompt in the same style; that of a model of labels alone is the
label "none", whose index is the number of labels.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.protocols import Cond, TextEncoder

Label = str | int | None


class Request(NamedTuple):
    """One entry a picture: prompts (None = none) and labels (a name, an index, None = any)."""

    prompts: list
    labels: list[Label]


class Conditions(NamedTuple):
    """Conditioning of both branches; `uncond` is None if the model takes no condition."""

    cond: Cond
    uncond: Cond | None


def expand_request(prompt, style, pictures_per_prompt: int) -> Request:
    """Pairs prompts with styles, one of either serving all of the other, and repeats each pair.

    Raises:
        UserError: a list is empty, the lengths differ, or fewer than one picture a prompt is asked for.
    """
    if isinstance(pictures_per_prompt, bool) or not isinstance(pictures_per_prompt, int) or pictures_per_prompt < 1:
        raise UserError(f"got {pictures_per_prompt!r} pictures a prompt; choose a whole number of at least 1")
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    labels = list(style) if isinstance(style, list | tuple) else [style]
    if not prompts or not labels:
        raise UserError(f"got an empty list of {'styles' if prompts else 'prompts'}; give at least one")
    count = max(len(prompts), len(labels))
    if {len(prompts), len(labels)} - {1, count}:
        raise UserError(f"got {len(prompts)} prompts and {len(labels)} styles; give one style, or one for each prompt")
    prompts = prompts if len(prompts) == count else prompts * count
    labels = labels if len(labels) == count else labels * count
    return Request(
        [one for one in prompts for _ in range(pictures_per_prompt)],
        [one for one in labels for _ in range(pictures_per_prompt)],
    )


def text_conditions(request: Request, encoder: TextEncoder, names: Sequence[str], count: int) -> Conditions:
    """Conditions of a text model.

    Args:
        request: prompts are strings or lists of segments, labels are styles.
        encoder: encodes each different prompt once.
        names: styles by index.
        count: number of styles the model knows; 0 = it takes none.
    """
    keys = [tuple(one) if isinstance(one, list | tuple) else one for one in request.prompts]
    if None in keys:
        raise UserError("this model draws from prompts; give one, '' for the empty prompt")
    different = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    text = encoder.encode([list(key) if isinstance(key, tuple) else key for key in different])
    text = text[torch.tensor([different[key] for key in keys], device=text.tokens.device)]
    empty = encoder.encode([""])[torch.zeros(len(keys), dtype=torch.long, device=text.tokens.device)]
    label = label_indices(request.labels, names, count)
    label = None if label is None else label.to(text.tokens.device)
    return Conditions(
        Cond(text.tokens, text.pooled, text.mask, label),
        Cond(empty.tokens, empty.pooled, empty.mask, label),
    )


def label_conditions(request: Request, names: Sequence[str], count: int) -> Conditions:
    """Conditions of a model of labels, which may stand where prompts or where styles do, or of one without any.

    Raises:
        UserError: a label is given twice, is unknown, or the model takes none.
    """
    labels: list[Label] = []
    for prompt, label in zip(request.prompts, request.labels):
        has_prompt = prompt is not None and prompt != ""
        if has_prompt and label is not None:
            raise UserError(f"got the label {label!r} and the prompt {prompt!r}; this model takes no text, give one")
        labels.append(prompt if has_prompt else label)
    indices = label_indices(labels, names, count)
    if indices is None:
        return Conditions(Cond(), None)
    return Conditions(Cond(label=indices), Cond(label=torch.full_like(indices, count)))


def label_indices(labels: Sequence[Label], names: Sequence[str], count: int) -> Tensor | None:
    """Indices (B,) long of labels given by name or index; None stands for "none"; None at all if there are no labels.

    Raises:
        UserError: a name is unknown, an index is out of range, or the model takes no labels.
    """
    if not count:
        given = next((label for label in labels if label is not None), None)
        if given is not None:
            raise UserError(f"this model takes no style or label, got {given!r}; leave it out")
        return None
    indices = []
    for label in labels:
        if isinstance(label, str):
            if label not in names:
                raise unknown_name("style" if names else "label (give an index)", label, names)
            indices.append(list(names).index(label))
        elif label is None:
            indices.append(count)
        elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count:
            indices.append(label)
        else:
            raise UserError(f"got the label {label!r}; give a name or an index from 0 to {count - 1}")
    return torch.tensor(indices)


def check_size(sides: Mapping[str, int], multiple: int) -> None:
    """Raises `UserError` unless height and width (by name) are multiples of factor * patch."""
    for side, value in sides.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < multiple or value % multiple:
            below = max(1, int(value) // multiple) * multiple if isinstance(value, int) else multiple
            raise UserError(
                f"{side} of {value!r} px does not fit the model; choose a multiple of {multiple}, "
                f"such as {below} or {below + multiple}"
            )
