"""Where the tokens of a sample lie in it: a sample, or a prediction of its shape, laid out by tokens and put back.

A token of a picture or clip is a patch of p places (pixels of the latent), each with C channels; packed tokens and
tokens of sound are cut along their one axis. Tokens stand in the order frames, rows, columns.
"""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from smalti.ops.token_order import Grid


@dataclass(frozen=True)
class TokenPlaces:
    """N tokens in samples of one kind; made by `find_places`.

    Args:
        count: N.
        grid: (frames, rows, columns) of the tokens; None for tokens along one axis.
        axis: of the channels in pictures and clips, of the tokens where they lie along one.
    """

    count: int
    grid: Grid | None
    axis: int

    def to_tokens(self, x: Tensor) -> Tensor:
        """A sample (B, ...) as (B, N, p, C)."""
        if self.grid is None:
            return rearrange(x if self.axis == 2 else x.transpose(1, 2), "b c (n p) -> b n p c", n=self.count)
        x = x.movedim(self.axis, -1)
        f, h, w = self.grid
        x = x if x.ndim == 5 else x[:, None]
        return rearrange(x, "b (f pf) (h ph) (w pw) c -> b (f h w) (pf ph pw) c", f=f, h=h, w=w)

    def from_tokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The inverse, to the shape of `like` but for its channels."""
        if self.grid is None:
            x = rearrange(tokens, "b n p c -> b c (n p)")
            return x if self.axis == 2 else x.transpose(1, 2)
        f, h, w = self.grid
        height, width = like.movedim(self.axis, -1).shape[-3:-1]
        x = rearrange(
            tokens, "b (f h w) (pf ph pw) c -> b (f pf) (h ph) (w pw) c", f=f, h=h, w=w, ph=height // h, pw=width // w
        )
        return (x if like.ndim == 5 else x[:, 0]).movedim(-1, self.axis)


def find_places(count: int, grid: Grid | None, x: Tensor) -> TokenPlaces:
    """Where so many tokens lie in samples like x: (B, N, C), (B, C, N * p), (B, C, H, W), or a clip of five axes.

    Raises:
        ValueError: they do not fit the shape, or fit it in two ways.
    """
    found: list[TokenPlaces] = []
    if x.ndim == 3:
        found = [TokenPlaces(count, None, axis) for axis in (1, 2) if x.shape[axis] == count]
        if not found and x.shape[2] % count == 0:
            found = [TokenPlaces(count, None, 2)]
    elif grid is not None and x.ndim in (4, 5):
        axes = {axis: _patch(grid, x, axis) for axis in ((1,) if x.ndim == 4 else (1, 2, 4))}
        patches = {axis: patch for axis, patch in axes.items() if patch is not None}
        # Patches seldom span frames: channels are not to be taken for frames because their number divides.
        found = [TokenPlaces(count, grid, axis) for axis, patch in patches.items() if patch == min(patches.values())]
    if len(found) != 1:
        ways = "fit in two ways" if found else "do not fit"
        raise ValueError(f"{count} tokens{f' on the grid {grid}' if grid else ''} {ways} into {tuple(x.shape)}")
    return found[0]


def _patch(grid: Grid, x: Tensor, axis: int) -> int | None:
    """How many frames a patch spans if the channels lie along this axis; None if the grid does not fit."""
    sizes = [1, *x.shape[1:]] if x.ndim == 4 else list(x.shape[1:])
    del sizes[axis if x.ndim == 4 else axis - 1]
    (frames, height, width), (f, h, w) = sizes, grid
    fits = frames % f == 0 and height % h == 0 and width % w == 0 and height // h == width // w
    return frames // f if fits else None
