"""Emoji as a text-to-picture data set: 1,914 emoji in up to four drawing styles, 64 px with alpha, split by concept.

The prepared set ships with the package and works offline; `smalti.data.emoji_prepare` makes it anew from its sources.
Letters: N pictures, S the side in pixels, F frames of a clip (see `data.clips`), B a batch.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.core.files import file_hash
from smalti.data.emoji_prepare import PERMISSIVE, prepared_path

STYLES = PERMISSIVE
SPLITS = ("train", "held-out", "all")


@dataclass(frozen=True)
class EmojiItem:
    """One picture's description.

    Args:
        key: code points in lower-case hexadecimal, joined by `-`.
        label: the name, such as "grinning face".
        tags: keywords.
        group: such as "smileys-emotion".
        subgroup: such as "face-smiling".
        style: drawing style.
        held_out: whether its concept belongs to the held-out tenth.
        concept: key of the concept that near duplicates share (persons of any gender, directions, skin tones).
    """

    key: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    style: str
    held_out: bool
    concept: str


TOPICS: dict[str, Callable[[EmojiItem], bool]] = {
    "smileys": lambda item: item.group == "smileys-emotion" and item.subgroup.startswith("face-"),
    "animals": lambda item: item.subgroup.startswith("animal-") or item.subgroup in ("cat-face", "monkey-face"),
    "food": lambda item: item.group == "food-drink" and item.subgroup != "dishware",
    "hearts": lambda item: item.subgroup == "heart" and "heart" in item.label,
    "clocks": lambda item: item.group == "travel-places" and item.subgroup == "time",
    "weather": lambda item: item.subgroup == "sky-weather",
}
"""Named subsets, small enough for a training on a CPU."""


@dataclass(frozen=True, eq=False)
class EmojiSet:
    """Pictures and their descriptions.

    Args:
        items: one description a picture.
        images: RGBA pictures (N, S, S, 4), or clips (N, F, S, S, 4), uint8.
        hash: SHA-256 of the prepared file that they come from.
    """

    items: tuple[EmojiItem, ...]
    images: np.ndarray
    hash: str

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, indices: Sequence[int] | Tensor | np.ndarray | slice = slice(None)) -> Tensor:
        """Pictures on white, (B, 3, S, S), or clips, (B, 3, F, S, S); float32 in [-1, 1]."""
        chosen = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        return on_white(torch.from_numpy(np.ascontiguousarray(self.images[chosen])))

    def select(
        self,
        split: str = "all",
        styles: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        subgroups: Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
        topics: Sequence[str] | None = None,
    ) -> "EmojiSet":
        """The pictures that meet every condition given.

        Args:
            split: "train", "held-out" or "all".
            styles: drawing styles.
            groups: groups of emojibase.
            subgroups: subgroups of emojibase.
            keys: emoji keys.
            topics: names in `TOPICS`; an item of any of them is taken.

        Raises:
            UserError: a name is unknown, or nothing is left.
        """
        chosen = choose(self.items, split, topics, style=styles, group=groups, subgroup=subgroups, key=keys)
        if len(chosen) == len(self):
            return self
        return replace(self, items=tuple(self.items[i] for i in chosen), images=self.images[chosen])


def on_white(rgba: Tensor) -> Tensor:
    """RGBA (B, ..., 4) uint8 composed on white: (B, 3, ...) float32 in [-1, 1]."""
    rgba = rgba.movedim(-1, 1).float() / 255
    color, alpha = rgba[:, :3], rgba[:, 3:]
    return (color * alpha + (1 - alpha)) * 2 - 1


def load_emoji(
    split: str = "train",
    styles: Sequence[str] | None = None,
    topics: Sequence[str] | None = None,
    variant: str | None = None,
) -> EmojiSet:
    """Reads a prepared set; all 7,243 pictures of the shipped one take about a second.

    Args:
        split: "train", "held-out" or "all"; split by concept, so the two sides share none.
        styles: drawing styles; None takes all that the set has.
        topics: names in `TOPICS`; None takes everything.
        variant: another prepared set, such as "emoji-tones", "emoji-128" or "openmoji"; None is the shipped one.

    Returns:
        Items ordered by style, then in emojibase's order.

    Raises:
        UserError: a name is unknown, or the variant has not been prepared yet.

    Example:
        >>> load_emoji("held-out", styles=["noto"], topics=["clocks"]).images.shape
        (3, 64, 64, 4)
    """
    name = variant or "emoji"
    path = prepared_path(name)
    if not path.is_file():
        raise UserError(f"the emoji set {name!r} is not prepared; run: smalti data get {name}")
    with _open(path) as archive:
        index = json.loads(archive.read("emoji.json"))
        items = items_of(index)
        chosen = choose(items, split, topics, style=styles)
        images = _read_images(archive, index, items, chosen)
    return EmojiSet(tuple(items[i] for i in chosen), images, file_hash(path))


def captions(item: EmojiItem) -> list[str]:
    """Several phrasings of what the picture shows, none of which names the style; the first is the plain label.

    Example:
        >>> captions(load_emoji("all", styles=["noto"]).select(keys=["1f34f"]).items[0])[:2]
        ['green apple', 'a green apple']
    """
    label_words = set(re.findall(r"\w+", item.label.lower()))
    tags = [tag for tag in item.tags if not tag.isdigit()]
    tags.sort(key=lambda tag: hashlib.sha256(f"{item.key}:{tag}".encode()).digest())
    further = [tag for tag in tags if tag.lower() not in label_words]
    phrase = _phrase(item.label)
    found = [item.label, phrase]
    if further:
        found.append(f"{item.label}, {', '.join(further[:2])}")
        found.append(f"{phrase}, {', '.join(further[-3:])}")
    if len(tags) > 2 and len(further) < len(tags):  # keywords alone must name the thing
        named = [tag for tag in tags if tag.lower() in label_words]
        found.append(", ".join(dict.fromkeys([*named[:2], *tags[:4]])))
    return list(dict.fromkeys(found))


def _phrase(label: str) -> str:
    """The label as one would say it: with an article where it is one countable thing."""
    kind, _, rest = label.partition(": ")
    if rest:
        return (
            f"the flag of {rest}"
            if kind == "flag"
            else _phrase(f"{kind} {rest}" if kind == "keycap" else f"{kind}, {rest}")
        )
    if re.search(r"o’clock$|-thirty$", label):
        return f"a clock showing {label}"
    head = re.split(r",| (?:with|of|in|on|at|from|and|behind|without|over|under) ", label)[0]
    plural = re.search(r"[^su’']s$", head) or re.match(r"(two|three|no|people|men|women|person) ", head + " ")
    if (plural and not head.startswith("person")) or not label[0].isalpha():
        return label
    vowel = re.match(
        r"(?!uni|use|eur|one|ufo|u-)[aeiou]|OK|ON|x-ray|hour(?!s)", label if label[:2].isupper() else label.lower()
    )
    return f"{'an' if vowel else 'a'} {label}"


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"the prepared set {path} is damaged ({error}); remove it and prepare it again") from error


def items_of(index: dict) -> list[EmojiItem]:
    """The items of a prepared set, from the index that lies in it."""
    held_out = set(index["held_out"])
    known = {row[0]: row for row in index["emoji"]}
    found = []
    for style, keys in index["styles"].items():
        for key in keys:
            _, concept, label, tags, group, subgroup = known[key]
            found.append(EmojiItem(key, label, tuple(tags), group, subgroup, style, concept in held_out, concept))
    return found


def choose(
    items: Sequence[EmojiItem], split: str, topics: Sequence[str] | None, **wanted: Sequence[str] | None
) -> list[int]:
    """Indices of the items that meet every condition; each name must be known."""
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    wanted = {attribute: [names] if isinstance(names, str) else names for attribute, names in wanted.items()}
    topics = [topics] if isinstance(topics, str) else topics
    for topic in topics or ():
        if topic not in TOPICS:
            raise unknown_name("topic", topic, TOPICS)
    for attribute, names in wanted.items():
        known = {getattr(item, attribute) for item in items}
        for name in names or ():
            if name not in known:
                raise unknown_name(attribute, name, known)

    def fits(item: EmojiItem) -> bool:
        return (
            (split == "all" or item.held_out == (split == "held-out"))
            and (topics is None or any(TOPICS[topic](item) for topic in topics))
            and all(names is None or getattr(item, attribute) in names for attribute, names in wanted.items())
        )

    found = [i for i, item in enumerate(items) if fits(item)]
    if not found:
        given = {"split": split, "topics": topics, **wanted}
        shown = ", ".join(f"{name} {value!r}" for name, value in given.items() if value is not None)
        raise UserError(f"no emoji has {shown}; loosen one of these conditions")
    return found


def _read_images(archive: zipfile.ZipFile, index: dict, items: list[EmojiItem], chosen: list[int]) -> np.ndarray:
    """Decodes the sheets that hold a chosen item; (N, S, S, 4) uint8."""
    side, sheet = index["size"], index["sheet"]
    images = np.empty((len(chosen), side, side, 4), np.uint8)
    first = {style: next(i for i, item in enumerate(items) if item.style == style) for style in index["styles"]}
    opened: tuple[str, np.ndarray] = ("", images)
    for row, i in enumerate(chosen):
        style = items[i].style
        number, place = divmod(i - first[style], sheet)
        name = f"{style}/{number:03d}.webp"
        if opened[0] != name:
            with Image.open(io.BytesIO(archive.read(name))) as file:
                opened = name, np.asarray(file.convert("RGBA"))
        images[row] = opened[1][place * side : (place + 1) * side]
    return images
