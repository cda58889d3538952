"""Randomness by name: every sample has its own generator, so it does not depend on the batch it is drawn in.

All draws are made on the CPU in float32 and moved, so that a seed means the same on every device.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.protocols import Generators

SEED_LIMIT = 2**63


def check_seed(seed: int) -> int:
    """The seed itself; raises `UserError` unless 0 <= seed < 2**63."""
    if not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise UserError(f"seed {seed!r} is out of range; choose a whole number from 0 to {SEED_LIMIT - 1}")
    return seed


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on all parts and their order, and on nothing else."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SEED_LIMIT


def generators_for(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each seed."""
    return [torch.Generator().manual_seed(check_seed(seed)) for seed in seeds]


def randn(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise of `shape` (B, ...), drawn sample by sample if there are several generators.

    Raises:
        ValueError: the number of generators is not B.
    """
    return _draw(torch.randn, shape, generator, device)


def rand(shape: Sequence[int], generator: Generators, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers in [0, 1), as `randn`."""
    return _draw(torch.rand, shape, generator, device)


def _draw(function, shape: Sequence[int], generator: Generators, device) -> Tensor:
    if isinstance(generator, torch.Generator):
        return function(tuple(shape), generator=generator).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"got {len(generator)} generators for a batch of {shape[0]}")
    return torch.stack([function(tuple(shape[1:]), generator=one) for one in generator]).to(device)
