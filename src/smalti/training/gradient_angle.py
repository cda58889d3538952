"""Whether two losses pull at the same weights in the same direction: the cosine of their gradients.

Above 0 a step on either helps the other; below 0 it harms. Source: HASTE (arXiv 2505.16792), section 3, whose curve of
this cosine falls from positive to negative as a training goes on.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_cosine(one: Tensor, other: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Cosine () of the gradients of two losses () at all parameters together, in float32; both graphs are kept.

    A parameter that a loss does not reach counts as 0 there; where a loss reaches none the cosine is 0.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = []
    for loss in (one, other):
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        gradients.append(torch.cat([one.flatten().float() for one in flat]))
    return torch.nn.functional.cosine_similarity(*gradients, dim=0)
