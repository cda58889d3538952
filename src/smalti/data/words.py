"""Names and keywords of all emoji as short texts of characters, split by concept like the pictures: works offline.

A line is `name: keyword, keyword, ...`, its keywords in an order that every draw decides anew; a pair has the keywords
as its source and the name as its target. Letters become lower case, rare characters one token. `Lines` and `Pairs` are
sources of samples for the trainer; texts are padded to the longest of their batch. Letters: M tokens of the source.

Source: names and keywords are those of emojibase (MIT), in the prepared set of `smalti.data.emoji`.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.core.errors import unknown_name
from smalti.core.protocols import Batch, Cond
from smalti.data.emoji import SPLITS
from smalti.data.emoji_prepare import prepared_path

PAD, MASK, START, END, UNKNOWN = range(5)
ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789,:-’()!&."
ORDINARY = (UNKNOWN + 1, UNKNOWN + 1 + len(ALPHABET))
"""First and one-past-last token that stands for a character."""
VOCABULARY = ORDINARY[1]


@dataclass(frozen=True)
class Words:
    """What one emoji is called: its name and its keywords, which are sorted."""

    name: str
    keywords: tuple[str, ...]


def load_words(split: str = "train") -> tuple[Words, ...]:
    """Reads names and keywords of the shipped set, one entry an emoji, in emojibase's order.

    Args:
        split: "train", "held-out" or "all"; split by concept, so the two sides share none.

    Raises:
        UserError: the split is unknown.

    Example:
        >>> load_words("all")[0].name
        'grinning face'
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    with zipfile.ZipFile(prepared_path("emoji")) as archive:
        index = json.loads(archive.read("emoji.json"))
    held_out = set(index["held_out"])
    return tuple(
        Words(label.lower(), tuple(tag.lower() for tag in tags))
        for _, concept, label, tags, _, _ in index["emoji"]
        if split == "all" or (concept in held_out) == (split == "held-out")
    )


def encode(text: str) -> list[int]:
    """The tokens of a text, one a character.

    Example:
        >>> decode(encode("Red Heart"))
        'red heart'
    """
    places = (ALPHABET.find(character) for character in text.lower())
    return [ORDINARY[0] + place if place >= 0 else UNKNOWN for place in places]


def decode(tokens: Sequence[int]) -> str:
    """The text of tokens; ends at an end token, leaves padding and start out, shows the rest as `_` and `?`."""
    shown = {PAD: "", START: "", MASK: "_", UNKNOWN: "?"}
    found = []
    for token in tokens:
        if token == END:
            break
        found.append(shown[token] if token in shown else ALPHABET[token - ORDINARY[0]])
    return "".join(found)


def pad(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, N) long, padded to the longest, and where they are real (B, N) bool."""
    length = max(map(len, texts))
    tokens = torch.tensor([[*text, *[PAD] * (length - len(text))] for text in texts])
    return tokens, tokens != PAD


@dataclass(frozen=True)
class Lines:
    """Lines `name: keyword, keyword, ...`, a `SampleSource`: x0 (B, N) long, cond.mask where they are real.

    Args:
        words: of the emoji.
        limit: most characters of a line; keywords that do not fit are left out.
    """

    words: Sequence[Words]
    limit: int = 64

    def __len__(self) -> int:
        return len(self.words)

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The lines `indices` (B,); one generator for each decides the order of its keywords."""
        texts = [encode(self.line(index, one)) for index, one in zip(indices.tolist(), generators, strict=True)]
        tokens, mask = pad(texts)
        return Batch(tokens, Cond(mask=mask), indices)

    def line(self, index: int, generator: torch.Generator) -> str:
        """One line, its keywords shuffled."""
        words = self.words[index]
        line = words.name[: self.limit]
        for place, keyword in enumerate(shuffled(words.keywords, generator)):
            longer = f"{line}{', ' if place else ': '}{keyword}"
            if len(longer) > self.limit:
                break
            line = longer
        return line


@dataclass(frozen=True)
class Pairs:
    """Keywords and the name that they belong to, a `SampleSource`.

    x0 is the name (B, N) long from start to end token, cond.mask where it is real; cond.extra has the keywords as
    source (B, M) long and source_mask.

    Args:
        words: of the emoji; those without keywords must be left out.
    """

    words: Sequence[Words]

    def __len__(self) -> int:
        return len(self.words)

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The pairs `indices` (B,); one generator for each decides the order of the keywords."""
        chosen = [self.words[index] for index in indices.tolist()]
        target, mask = pad([[START, *encode(one.name), END] for one in chosen])
        keywords = [shuffled(one.keywords, generator) for one, generator in zip(chosen, generators, strict=True)]
        source, source_mask = pad([encode(", ".join(some)) for some in keywords])
        return Batch(target, Cond(mask=mask, extra={"source": source, "source_mask": source_mask}), indices)


def shuffled(keywords: tuple[str, ...], generator: torch.Generator) -> list[str]:
    """The keywords in a random order."""
    return [keywords[place] for place in torch.randperm(len(keywords), generator=generator).tolist()]
