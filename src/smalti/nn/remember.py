"""Remembers tensors that depend on sizes alone, such as positions, so that a sampler makes them once."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def remember(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keeps the last 32 results of a function of hashable arguments that makes one constant tensor.

    While torch traces or transforms (compile, jvp, vmap, fake tensors), the function runs as it is: its results belong
    to the trace and would be dead afterwards.
    """

    @lru_cache(maxsize=32)
    def make(*args, **kwargs) -> Tensor:
        with torch.inference_mode(False):  # made in inference mode, it could not be saved for a later backward
            return function(*args, **kwargs)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return function(*args, **kwargs) if _is_traced() else make(*args, **kwargs)

    return call


def _is_traced() -> bool:
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0
