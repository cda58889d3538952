"""What a method receives that decides which image tokens run.

Like the methods of `core.method`, it is a frozen dataclass whose memory is a separate object. Shapes: B batch, N image
tokens, n of them that run, h heads, L tokens of a sequence, d head_dim.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from smalti.core.method import BlockMethod, CoreMethod, Method, Moment, Note, SublayerMethod


@dataclass(frozen=True)
class KeyValues:
    """Keys and values (B, h, L, d) of all tokens that an attention sees, and the model's mask for them."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


@dataclass
class TokenMemory:
    """What calls that run some tokens need from the last one that ran all; a method holds it in its state.

    Args:
        keeps_keys: whether attention goes on seeing tokens that do not run, by the keys and values of their last run.
        kept: by attention; rows of tokens that run are renewed.
        handed_on: blocks, by their place in the call, whose streams the next block takes as they are.
    """

    keeps_keys: bool = True
    kept: dict[str, KeyValues] = field(default_factory=dict)
    handed_on: set[int] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        """Of the kept keys and values."""
        return sum(one.nbytes for pair in self.kept.values() for one in (pair.k, pair.v))


@dataclass(frozen=True)
class TokensCall:
    """The whole denoiser call, as one that can run some image tokens; text always runs whole.

    Args:
        moment: where in the run.
        sample: the noisy sample (B, ...).
        count: number of image tokens N.
        run: `run(active, memory)` computes the prediction (B, ...). With None it runs all tokens, and fills the memory
            if one is given; else only the tokens at the places of `active` in ascending order, (n,) or (B, n), with the
            memory that was filled. What the prediction holds at other places means nothing.
        to_tokens: a sample or prediction by tokens, (B, N, p, C) with C channels at each of p places.
        from_tokens: the inverse: `from_tokens(tokens, like)`.
        note: counts an event.
    """

    moment: Moment
    sample: Tensor
    count: int
    run: Callable[[Tensor | None, TokenMemory | None], Tensor]
    to_tokens: Callable[[Tensor], Tensor]
    from_tokens: Callable[[Tensor, Tensor], Tensor]
    note: Note


class TokensMethod(Method):
    """Acts on the whole denoiser call by what image tokens it runs."""

    owns = frozenset({"which tokens run"})

    @abstractmethod
    def at_tokens(self, state: Any, call: TokensCall) -> Tensor:
        """The prediction (B, ...): `call.run(None, None)`, or one that is put together from several calls."""

    def refuses(self, other: Method) -> str | None:
        """Beside what acts on whole calls alone: other methods would see fewer tokens than were read."""
        if isinstance(other, (BlockMethod, SublayerMethod, CoreMethod)):
            return f"{type(self).__name__} changes how many tokens blocks see from step to step"
        return super().refuses(other)
