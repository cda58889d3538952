"""Tiny models with tasks whose parameters are no longer at their start."""

import torch
from torch import nn

from smalti.backbones.dit import DiT
from smalti.core.protocols import Batch, Cond
from smalti.training.diffscaler import DiffScaler
from smalti.training.task_bank import TaskBank


def dit(seed: int = 0, **settings) -> DiT:
    torch.manual_seed(seed)
    made = DiT.tiny() if not settings else DiT(**{**dict(DiT.tiny().config), **settings})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


def inputs(batch: int = 4, labels: int = 3, seed: int = 1, **extra):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(labels, (batch,), generator=generator)
    cond = Cond(label=label, pooled=torch.randn(batch, 10, generator=generator), extra=extra)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.rand(batch, generator=generator), cond


def fill(bank: TaskBank, *names: str) -> None:
    for name in names or bank.names:
        for value in bank.tasks.task_state(name).values():
            nn.init.normal_(value, std=0.3)


def bank_of(*names: str, model=None, method=None, filled: bool = True) -> TaskBank:
    bank = TaskBank.wrap(model or dit(), method or DiffScaler(rank=2))
    for name in names:
        bank.add(name)
    if filled:
        fill(bank)
    return bank


def velocity(bank, given, task):
    with torch.no_grad():
        return bank(*given, task=task)


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


class Flat:
    """Latents of one colour a source, without text."""

    def __init__(self, level: float, count: int = 8):
        self.level, self.count = level, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices, generators) -> Batch:
        x0 = torch.full((len(indices), 4, 8, 8), self.level) + 0.01 * indices[:, None, None, None]
        cond = Cond(label=torch.zeros(len(indices), dtype=torch.long), pooled=torch.zeros(len(indices), 10))
        return Batch(x0, cond, indices)
