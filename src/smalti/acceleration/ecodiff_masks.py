"""Masks of units as functions of logits, and what is paid for keeping units.

With a logit l for each unit and u uniform in (0, 1), the hard-concrete mask is

    s = sigmoid((log u - log(1 - u) + l) / beta),    mask = clip(s * (eta - gamma) + gamma, 0, 1),

0 or 1 with some probability each and in between otherwise, with a gradient. `sigmoid` has no noise, `binary` is what
counts in the end; its gradient is that of the sigmoid. A price is the mean over the units of one layer: `l0` the
probability that a mask is not 0, `squashed-l1` and `l2` of a sigmoid that stays away from its flat ends.

Source: EcoDiff (arXiv 2412.02852), section 3; hard-concrete (arXiv 1712.01312), equations 10 to 12.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BETA, ETA, GAMMA = 0.83, 1.1, -0.1
EDGE = 1e-6


def hard_concrete(logits: Tensor, uniform: Tensor) -> Tensor:
    """The mask of logits and numbers in (0, 1) of the same shape."""
    u = uniform.clamp(EDGE, 1 - EDGE)
    s = torch.sigmoid((u.log() - (1 - u).log() + logits) / BETA)
    return (s * (ETA - GAMMA) + GAMMA).clamp(0, 1)


def sigmoid(logits: Tensor, uniform: Tensor) -> Tensor:
    """A mask without noise."""
    return torch.sigmoid(logits)


def binary(logits: Tensor, uniform: Tensor) -> Tensor:
    """1 where the logit is above 0, else 0; the gradient is that of the sigmoid."""
    soft = torch.sigmoid(logits)
    return (logits > 0).to(soft) + (soft - soft.detach())


def l0(logits: Tensor) -> Tensor:
    """Mean probability that a hard-concrete mask is above 0."""
    return torch.sigmoid(logits - BETA * math.log(-GAMMA / ETA)).mean()


def squashed_l1(logits: Tensor) -> Tensor:
    """Mean of `sigmoid(0.4 l + 1)`, whose slope does not vanish at the logits that training begins with."""
    return torch.sigmoid(0.4 * logits + 1).mean()


def l2(logits: Tensor) -> Tensor:
    """Mean of the square of the same."""
    return torch.sigmoid(0.4 * logits + 1).square().mean()


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hard-concrete": hard_concrete,
    "sigmoid": sigmoid,
    "binary": binary,
}
PRICES: dict[str, Callable[[Tensor], Tensor]] = {"squashed-l1": squashed_l1, "l0": l0, "l2": l2}
