"""Captions with markers, every marked part read alone.

An encoder of sentences lets every word know all others, so in "[LEFT] an apple [RIGHT] a dog" the tokens of the apple
know of the dog, and a model that must draw them apart finds little to tell them by. Here each part, its marker first,
is encoded by itself; the tokens follow each other in one sequence, `segments` says whose they are, and the pooled
vector is the mean of the parts'. A text without markers is read as always.

Source: split budgets for long joint captions; regional prompts are read in the same way, GLIGEN (arXiv 2301.07093),
section 4.1.
"""

import hashlib
from collections.abc import Sequence

import torch

from smalti.core.errors import UserError
from smalti.core.protocols import TextEmbedding, TextEncoder
from smalti.tokenizers.text_encoder import check_prompts


class MarkedTextEncoder:
    """Another encoder's embeddings of the parts of a text.

    Args:
        encoder: reads one part; best one that caches.
        markers: that begin a part, in the order in which they stand.
        length: tokens of all parts together; each may have an equal share.

    Raises:
        UserError: there are fewer than two markers, or a part would have fewer than 4 tokens.
    """

    def __init__(self, encoder: TextEncoder, markers: Sequence[str], length: int):
        if len(markers) < 2 or length // len(markers) < 4:
            raise UserError(f"got {len(markers)} markers for {length} tokens; give at least 2, and 4 tokens for each")
        self.encoder, self.markers, self.length = encoder, tuple(markers), length
        named = f"{getattr(encoder, 'fingerprint', '')} {length} {' '.join(markers)}"
        self.fingerprint = hashlib.sha256(named.encode()).hexdigest()[:16]

    def parts(self, text: str) -> list[str]:
        """The parts of a text, each with its marker first; what stands before the first marker is left out.

        Example:
            >>> MarkedTextEncoder(encoder, ("[LEFT]", "[RIGHT]"), 24).parts("[PAIR] [LEFT] an apple [RIGHT] a dog")
            ['[LEFT] an apple', '[RIGHT] a dog']
        """
        starts = [text.find(marker) for marker in self.markers]
        if -1 in starts or starts != sorted(starts):
            return [text]
        return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)])]

    def encode(self, prompts: list[str] | list[list[str]]) -> TextEmbedding:
        """As the encoder's, with M = `length`; a prompt that is a list has its segments for parts.

        Raises:
            UserError: there is no prompt, or one is not text.
        """
        rows = check_prompts(prompts)
        split = [self.parts(row[0]) if len(row) == 1 else row for row in rows]
        read = self.encoder.encode([part for parts in split for part in parts])
        joined, first = [], 0
        for parts in split:
            joined.append(self._joined(read[torch.arange(first, first + len(parts))]))
            first += len(parts)
        return TextEmbedding.cat(joined)

    def _joined(self, parts: TextEmbedding) -> TextEmbedding:
        """Embeddings of the P parts of one text as one."""
        share = self.length // len(parts.tokens)
        tokens = parts.tokens.new_zeros(1, self.length, parts.tokens.shape[-1])
        segments = torch.full((1, self.length), -1, device=tokens.device)
        place = 0
        for part in range(len(parts.tokens)):
            own = parts.tokens[part][parts.mask[part]][:share]
            tokens[0, place : place + len(own)] = own
            segments[0, place : place + len(own)] = part
            place += len(own)
        return TextEmbedding(tokens, parts.pooled.mean(0, keepdim=True), segments >= 0, segments)
