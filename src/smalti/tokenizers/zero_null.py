"""No caption as zeros: the empty prompt's embedding is replaced, in training and in sampling alike.

Networks whose caption path has no biases then see no caption at all in the unconditional branch of guidance. Wrapped
about the encoder it serves both ends: dropped captions of a training, which are the embedding of "", and the branch
without a prompt of a pipeline.

Source: MicroDiT (arXiv 2407.15811), appendix A: caption embeddings are dropped by zeroing them.
"""

from collections.abc import Sequence

import torch

from smalti.core.protocols import TextEmbedding, TextEncoder


class ZeroNull:
    """A text encoder that gives zeros, none of them masked, for an empty prompt.

    Args:
        encoder: of all other prompts.
    """

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder

    def encode(self, prompts: Sequence[str] | Sequence[Sequence[str]]) -> TextEmbedding:
        """As the encoder's; a prompt is empty if all its segments are."""
        found = self.encoder.encode(prompts)  # type: ignore[arg-type]
        empty = torch.tensor([not "".join(one) for one in prompts], device=found.mask.device)
        return TextEmbedding(
            tokens=found.tokens.masked_fill(empty[:, None, None], 0),
            pooled=found.pooled.masked_fill(empty[:, None], 0),
            mask=found.mask | empty[:, None],  # attention to nothing at all would be undefined
            segments=found.segments.masked_fill(empty[:, None], 0),
        )
