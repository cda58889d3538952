"""HeadHunter: a greedy search for the attention heads whose perturbation serves a goal.

    S = {};  each round: score every head h outside S by the mean reward of pictures drawn with S + {h} perturbed,
             add the k best to S

Heads that are weak alone can matter together, so every round measures them with those found before. All is drawn
without classifier-free guidance. Many heads share a batch, each with rows of its own. Successive halving scores all
heads on two pairs first, the better half on twice as many, and so on: what is drawn once is never drawn again.

Rewards on few pairs overfit: measure a set that was found on prompts and seeds of its own.

Source: Fine-Grained Perturbation Guidance via Attention Head Selection (arXiv 2506.10978), algorithm 1. The search by
successive halving is ours (the paper scores every head on all pairs).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import smalti
from smalti.control.head_sets import HeadSet
from smalti.control.headhunter_softpag import PerturbedHeads
from smalti.core.errors import UserError
from smalti.core.protocols import Latents
from smalti.evaluation.held_out_prompts import Prompts, draw_latents
from smalti.evaluation.prompt_split import pick
from smalti.evaluation.rewards import Reward
from smalti.seams.apply import denoisers
from smalti.seams.heads import Address, read_heads

Draw = Callable[[Prompts], Tensor]
"""Pixels (B, 3, H, W) in [-1, 1] of prompts, drawn by the pipeline in one batch without classifier-free guidance."""


@dataclass(frozen=True)
class Hunt:
    """What a search found.

    Args:
        heads: the set.
        rounds: of every round the mean reward of each head with those found before, on the pairs it was tried on.
        plain: mean reward without perturbation.
        reached: mean reward of the set, on all pairs of the search.
        generations: pictures drawn with perturbation.
    """

    heads: HeadSet
    rounds: tuple[Mapping[Address, float], ...]
    plain: float
    reached: float
    generations: int


def hunt_heads(
    pipe: Any,
    reward: Reward,
    prompts: Prompts,
    rounds: int = 1,
    k: int = 6,
    method: PerturbedHeads | None = None,
    halving: bool = True,
    steps: int = 15,
    batch: int = 32,
    pool: Sequence[Address] | None = None,
    draw: Draw | None = None,
    progress: bool = True,
) -> Hunt:
    """Searches the heads of a pipeline.

    Args:
        pipe: one of ours, or any other with `draw`.
        reward: `(pixels, prompts) -> (B,)`, see `evaluation.rewards`.
        prompts: the pairs of prompt and seed, evenly mixed: halving begins with the first two.
        rounds: R in the paper; 1 for quality, 5 for a style.
        k: heads added a round; 24 for quality and 3 for a style in the paper, of 576.
        method: everything but the heads: scale, kind, target, start, end.
        halving: whether weak heads leave early; else every head sees every pair.
        steps: sampling steps.
        batch: pictures drawn at once.
        pool: heads to choose from; None = all.
        draw: how the pipeline draws; None = as our pipelines do.
        progress: whether a bar may be shown.

    Raises:
        UserError: a number is out of range.
    """
    draw = draw or drawer(pipe, steps)
    heads = tuple(pool) if pool is not None else read_heads(pipe, lambda: draw(prompts.first(1)))
    if rounds < 1 or k < 1 or rounds * k > len(heads) or len(prompts) < 2:
        raise UserError(
            f"got {rounds} rounds of {k} heads and {len(prompts)} pairs for {len(heads)} heads; "
            "give at least 1 round, 2 pairs, and at most as many heads as there are"
        )
    base = replace(method or PerturbedHeads(), heads=None, guidance=1.0, rows="all")
    search = _Search(pipe, reward, prompts, base, draw, batch)
    found: dict[Address, float] = {}
    scores: list[Mapping[Address, float]] = []
    total = sum(search.cost(len(heads) - k * done, k, halving) for done in range(rounds))
    with tqdm(total=total, unit="picture", disable=not progress) as bar:
        for _ in range(rounds):
            tried = search.round(found, [head for head in heads if head not in found], k, halving, bar)
            most = max(len(values) for values in tried.values())
            mean = {head: sum(values) / len(values) for head, values in tried.items()}
            last = [head for head in tried if len(tried[head]) == most]
            found |= dict.fromkeys(sorted(last, key=lambda head: -mean[head])[:k], 1.0)
            scores.append(mean)
    plain = reward(draw(prompts), prompts.texts).mean()
    reached = search.rewards([found], prompts)[0]
    names = {"name": getattr(reward, "__name__", type(reward).__name__), "model": type(denoisers(pipe)[0]).__name__}
    facts = {"plain": float(plain), "reached": sum(reached) / len(reached), "scale": base.scale, "pairs": len(prompts)}
    heads_found = HeadSet(found, base.kind, base.target, **names, facts=facts)
    return Hunt(heads_found, tuple(scores), facts["plain"], facts["reached"], search.generations)


def drawer(pipe: Any, steps: int, guidance: float = 1.0) -> Draw:
    """How one of our pipelines draws pixels; without classifier-free guidance if not said."""

    @torch.no_grad()
    def draw(prompts: Prompts) -> Tensor:
        return pipe.autoencoder.decode(Latents(draw_latents(pipe, prompts, steps, guidance_scale=guidance)))

    return draw


@dataclass
class _Search:
    pipe: Any
    reward: Reward
    prompts: Prompts
    method: PerturbedHeads
    draw: Draw
    batch: int
    generations: int = 0

    def cost(self, heads: int, k: int, halving: bool) -> int:
        """Pictures of a round with so many heads to try."""
        total, done = 0, 0
        for count, alive in self.stages(heads, k, halving):
            total, done = total + alive * (count - done), count
        return total

    def stages(self, heads: int, k: int, halving: bool) -> list[tuple[int, int]]:
        """(pairs seen by then, heads still in) of every stage."""
        count, alive, stages = (2, heads, []) if halving else (len(self.prompts), heads, [])
        while count < len(self.prompts):
            stages.append((count, alive))
            count, alive = 2 * count, min(alive, max(2 * k, -(-alive // 2)))
        return [*stages, (len(self.prompts), alive)]

    def round(
        self, found: Mapping[Address, float], heads: list[Address], k: int, halving: bool, bar: tqdm
    ) -> dict[Address, list[float]]:
        """Rewards of every head together with those found, on the pairs that it was tried on."""
        tried: dict[Address, list[float]] = {head: [] for head in heads}
        done, alive = 0, heads
        for count, still in self.stages(len(heads), k, halving):
            alive = sorted(alive, key=lambda head: -sum(tried[head]))[:still]
            part = pick(self.prompts, range(done, count))
            values = self.rewards([{**found, head: 1.0} for head in alive], part, bar)
            for head, some in zip(alive, values, strict=True):
                tried[head] += some
            done = count
        return tried

    def rewards(
        self, sets: Sequence[Mapping[Address, float]], prompts: Prompts, bar: tqdm | None = None
    ) -> list[list[float]]:
        """Rewards of every set on all prompts; several sets share a batch."""
        jobs = [(index, pair) for index in range(len(sets)) for pair in range(len(prompts))]
        rewards: list[list[float]] = [[] for _ in sets]
        for start in range(0, len(jobs), self.batch):
            some = jobs[start : start + self.batch]
            rows = pick(prompts, [pair for _, pair in some])
            heads = [sets[index] for index, _ in some]
            with smalti.apply(self.pipe, replace(self.method, heads=heads)):
                values = self.reward(self.draw(rows), rows.texts)
            for (index, _), value in zip(some, values.tolist(), strict=True):
                rewards[index].append(value)
            self.generations += len(some)
            if bar is not None:
                bar.update(len(some))
        return rewards
