"""Rewards: one number a picture, larger is better, from nothing but what ships.

A reward is any function of pixels (B, 3, H, W) in [-1, 1] and the prompts of these pictures, so one's own needs no
class. Statistics are differentiable; the judge's are not. Colourfulness as in Hasler and Suesstrunk (2003), section 7,
on the scale of [0, 1]: spread of the opponent colours plus 0.3 times the length of their mean.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.evaluation.emoji_metrics import judge_text, load_judge
from smalti.evaluation.features import EfficientNetLite0

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""`(pixels (B, 3, H, W), prompts) -> (B,)`"""


def luma(pixels: Tensor) -> Tensor:
    """Grey values (B, H, W) in [0, 1]."""
    weights = pixels.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("bchw,c->bhw", (pixels + 1) / 2, weights)


def brightness(pixels: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Mean grey value."""
    return luma(pixels).mean((1, 2))


def darkness(pixels: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """1 - brightness."""
    return 1 - brightness(pixels)


def contrast(pixels: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Standard deviation of the grey values."""
    return luma(pixels).flatten(1).std(1)


def edges(pixels: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Mean difference of neighbouring grey values: density and sharpness of edges."""
    grey = luma(pixels)
    return grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))


def flatness(pixels: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Minus the density of edges."""
    return -edges(pixels)


def colourfulness(pixels: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Spread and mean of the opponent colours red - green and yellow - blue."""
    red, green, blue = ((pixels + 1) / 2).flatten(2).unbind(1)  # (B, H*W) each
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    return opponents.std(2).norm(dim=0) + 0.3 * opponents.mean(2).norm(dim=0)


class JudgeReward:
    """How well a picture fits its prompt, says the judge that ships (trained on emoji alone).

    Args:
        captions: what competes with a prompt; the reward is then the probability of the prompt among all of them.
            None = the reward is the similarity, from -1 to 1.

    Example:
        >>> JudgeReward()(torch.zeros(1, 3, 64, 64), ["a green apple"]).shape
        torch.Size([1])
    """

    def __init__(self, captions: Sequence[str] | None = None):
        self.captions = None if captions is None else tuple(dict.fromkeys(captions))
        self.judge, self.extract = load_judge(), EfficientNetLite0()
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(pixels) != len(prompts):
            raise UserError(f"got {len(pixels)} pictures and {len(prompts)} prompts; give a prompt for each picture")
        features, own = self.extract(pixels), self._text(prompts)
        if self.captions is None:
            return (self.judge.embed_pictures(features) * self.judge.embed_text(own)).sum(-1)
        scores = self.judge(features, self._text(self.captions))  # (B, K)
        right = self.judge(features, own[:, None])[:, 0]
        same = torch.tensor([[one == prompt for one in self.captions] for prompt in prompts])
        others = scores.masked_fill(same, -torch.inf)
        return (right - torch.cat([right[:, None], others], 1).logsumexp(1)).exp()

    def _text(self, captions: Sequence[str]) -> Tensor:
        missing = [one for one in dict.fromkeys(captions) if one not in self._known]
        if missing:
            self._known |= dict(zip(missing, judge_text(missing), strict=True))
        return torch.stack([self._known[one] for one in captions])


def harmonic(*rewards: Reward) -> Reward:
    """Harmonic mean of positive rewards: all have to be good."""

    def mean(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        values = torch.stack([reward(pixels, prompts) for reward in rewards])
        if not (values > 0).all():
            raise UserError(f"a harmonic mean needs positive rewards, got {float(values.min()):.4g}; shift them")
        return len(rewards) / (1 / values).sum(0)

    return mean


def with_floor(reward: Reward, other: Reward, floor: float, penalty: float = 1.0) -> Reward:
    """The reward of pictures for which another one reaches its floor; less by what is missing, times the penalty."""

    def limited(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return reward(pixels, prompts) - penalty * (floor - other(pixels, prompts)).clamp_min(0)

    return limited
