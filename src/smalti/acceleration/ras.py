"""RAS: in most steps only the tokens in focus run; the others keep the prediction of the step before.

After `start` dense steps, each step sends the image tokens of an active set through the transformer. Their rows of keys
and values are renewed in every attention, and their queries attend to the keys of all tokens, old ones among them; the
prediction of the others is that of the step before, and the solver moves the whole sample. Some steps are dense again
and renew everything (`resets`).

A token's score is `m * exp(k * D)`: m is the spread over channels of what the last step added to the sample at its
places (an Euler step adds the guided velocity times a number, which ranks alike), D how often it was left out. Of the
tokens that a step leaves out, some have the lowest scores and some the highest (`skip`); on the high side k counts as
-k, so that being left out always makes a token less likely to be left out again.

Source: Region-Adaptive Sampling for Diffusion Transformers (arXiv 2502.10389), section 3. Differences: the set comes
from the increment of the sample, which holds the guidance, whether branches are batched or called in turn: all branches
find one set without knowing of each other. Samples of a batch have sets of their own. In the published code exp(k * D)
raises the scores on both sides, so that with `skip` high, what was left out tends to be left out again. Keys are
written after their norm and rotation, by an index copy in place of a kernel that projects and scatters at once.

It is made for first-order solvers. Multistep solvers run, but mix predictions of different ages; a solver that
evaluates twice a step gets a warning, because tokens that are left out repeat the other evaluation's prediction. Noise
that a solver adds counts as spread.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from PIL import Image
from torch import Tensor

from smalti.core.errors import Refusal, UserError, unknown_name
from smalti.core.method import Moment
from smalti.core.tokens import TokenMemory, TokensCall, TokensMethod
from smalti.evaluation.sheet import to_images
from smalti.ops.token_subset import is_in

METRICS, SELECTIONS = ("std", "norm"), ("focus", "random")
ROUND = 64
"""Tokens that a ramp of the quota is rounded to, where there are as many."""


@dataclass
class Memory:
    """What RAS remembers in one run and branch.

    Args:
        step: of the last call; -1 before the first.
        sample: by tokens (B, N, p, C), at the beginning of that step.
        prediction: of that step.
        skips: how often each token was left out (B, N).
        active: tokens that run in this step, (n,) or (B, n); None = all.
        is_filled: whether the keys of all tokens are there.
        tokens: what the seam keeps.
    """

    tokens: TokenMemory
    step: int = -1
    sample: Tensor | None = None
    prediction: Tensor | None = None
    skips: Tensor | None = None
    active: Tensor | None = None
    is_filled: bool = False


@dataclass(frozen=True)
class RAS(TokensMethod):
    """Runs the tokens in focus.

    Args:
        ratio: share of the image tokens that run in a step between `start` and `end`, in (0, 1]; 1 changes nothing.
        start: dense steps at the beginning, at least 1.
        end: from this step on all are dense; None = none.
        resets: dense steps in between.
        metric: spread of a token's increment: std over channels, or its L2 norm.
        starvation: k, how strongly tokens that were left out are favoured; 0 = not.
        skip: which scores are left out: low, high, or mix:H, a share H of them high and the rest low.
        ratios: shares of the steps from `start` on in place of `ratio`, the last one for all further steps.
        ramp: (tokens, steps): so many more tokens are left out every so many steps, around the mean that `ratio` gives;
            needs `end` or a planned number of steps.
        kv_cache: off, attention sees only tokens that run.
        selection: focus, or random, what a metric has to beat.

    Raises:
        UserError: a value is out of range.
    """

    ratio: float = 0.5
    start: int = 4
    end: int | None = None
    resets: tuple[int, ...] = (12, 20)
    metric: Literal["std", "norm"] = "std"
    starvation: float = 1.0
    skip: str = "mix:0.3"
    ratios: tuple[float, ...] = ()
    ramp: tuple[int, int] = (0, 0)
    kv_cache: bool = True
    selection: Literal["focus", "random"] = "focus"

    work = "less"

    def __post_init__(self):
        if not all(0 < one <= 1 for one in (self.ratio, *self.ratios)):
            raise UserError(f"RAS got ratio={self.ratio}, ratios={self.ratios}; give shares in (0, 1]")
        if self.start < 1 or self.starvation < 0 or min(self.resets, default=0) < 0:
            raise UserError(
                f"RAS got start={self.start}, starvation={self.starvation}, resets={self.resets}; the first step is "
                "dense, so start is at least 1, and the others are not negative"
            )
        if len(self.ramp) != 2 or (self.ramp[0] and (self.ramp[1] < 1 or self.ratios)):
            raise UserError(
                f"RAS got ramp={self.ramp}; give (tokens, steps) with steps from 1, and no ratios beside it"
            )
        if self.metric not in METRICS:
            raise unknown_name("metric of RAS", self.metric, METRICS)
        if self.selection not in SELECTIONS:
            raise unknown_name("selection of RAS", self.selection, SELECTIONS)
        self.high_share()

    @classmethod
    def neutral(cls) -> Self:
        return cls(ratio=1.0)

    @classmethod
    def active(cls) -> Self:
        return cls(ratio=0.5, start=3, resets=(8,))

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (
            cls(ratio=0.25, start=3, resets=(7,), metric="norm", skip="high", starvation=0.1),
            cls(ratio=0.5, start=2, end=11, resets=(), kv_cache=False, selection="random"),
        )

    @classmethod
    def candidates(cls, steps: int, speedup: float) -> "tuple[Self, ...]":
        found = []
        for start, count in ((4, 2), (4, 0), (2, 1), (6, 2)):
            rest = steps - start - count
            # A dense step costs 1 and another its ratio, so that all together cost steps / speedup.
            ratio = (steps / speedup - start - count) / rest if rest > 2 else 0.0
            if 0.05 <= ratio < 1:
                span = (steps - start) / (count + 1)
                resets = tuple(start + round(span * number) for number in range(1, count + 1))
                found += [cls(round(ratio, 2), start, resets=resets, metric=metric) for metric in ("std", "norm")]
        return tuple(found)

    @property
    def is_neutral(self) -> bool:
        return min((self.ratio, *self.ratios)) == 1 and not self.ramp[0]

    def idle_reason(self, evaluations: int) -> str:
        return (
            f"of {evaluations} evaluations the first {self.start} are dense, and so are steps {self.resets} and those "
            f"from {self.end}; take more steps, or a smaller ratio where there are few tokens"
        )

    def init(self) -> Memory:
        return Memory(TokenMemory(self.kv_cache))

    def kept(self, state: Memory) -> int:
        tensors = [one for one in (state.sample, state.prediction, state.skips) if one is not None]
        return state.tokens.bytes + sum(one.nbytes for one in tensors)

    def high_share(self) -> float:
        """Share of the tokens that are left out for a high score."""
        name, _, number = self.skip.partition(":")
        shares = {"low": 0.0, "high": 1.0}
        try:
            share = shares[self.skip] if self.skip in shares else float(number)
        except ValueError:
            share = -1.0
        if not (self.skip in shares or name == "mix") or not 0 <= share <= 1:
            raise UserError(f"RAS got skip={self.skip!r}; give low, high, or mix:H with H in [0, 1]")
        return share

    def quota(self, moment: Moment, count: int) -> int:
        """How many of `count` tokens a step leaves out.

        Raises:
            Refusal: there is a ramp, and nobody said how many steps there are.
        """
        step, end = moment.step, self.end if self.end is not None else moment.steps
        if self.is_neutral or step < self.start or (end is not None and step >= end) or step in self.resets:
            return 0
        if self.ratios:
            return round((1 - self.ratios[min(step - self.start, len(self.ratios) - 1)]) * count)
        mean, (tokens, every) = round((1 - self.ratio) * count), self.ramp
        if not tokens:
            return min(mean, count - 1)
        if end is None:
            raise Refusal("a ramp needs end, or the number of steps; say it, with handle.run(steps=28)")
        stages = -(-(end - self.start) // every)
        exact = mean + ((step - self.start) // every - (stages - 1) / 2) * tokens
        unit = ROUND if count >= 2 * ROUND else 1
        return max(0, min(count - 1, unit * round(exact / unit)))

    def at_tokens(self, state: Memory, call: TokensCall) -> Tensor:
        if self.is_neutral:
            return call.run(None, None)
        step = call.moment.step
        if step == state.step:  # one more evaluation of the same step
            warnings.warn("RAS is made for solvers that evaluate once a step; this one repeats a step", stacklevel=2)
        else:
            self._begin(state, call)
        if state.active is None:
            is_last = self.quota(replace(call.moment, step=step + 1), call.count) > 0
            state.prediction = call.run(None, state.tokens if is_last else None)
            state.is_filled = is_last
        else:
            assert state.prediction is not None
            call.note(f"{state.active.shape[-1]} of {call.count} tokens")
            fresh = call.to_tokens(call.run(state.active, state.tokens))
            runs = is_in(state.active, call.count)[:, :, None, None]
            merged = torch.where(runs, fresh, call.to_tokens(state.prediction))
            state.prediction = call.from_tokens(merged, state.prediction)
        return state.prediction

    def _begin(self, state: Memory, call: TokensCall) -> None:
        """Chooses the tokens of the step that begins, by what the last one did to the sample."""
        sample, quota = call.to_tokens(call.sample), self.quota(call.moment, call.count)
        is_next, state.step = state.step == call.moment.step - 1, call.moment.step
        before, state.sample = state.sample, sample
        if state.skips is None:
            state.skips = sample.new_zeros(sample.shape[:2], dtype=torch.float32)
        state.active = None
        if quota and state.is_filled and is_next and before is not None:
            left = self.leave_out(sample - before, state.skips, quota, call.moment.step)
            state.skips = state.skips + left
            state.active = (~left).nonzero()[:, 1].reshape(len(left), -1)

    def leave_out(self, increment: Tensor, skips: Tensor, quota: int, step: int) -> Tensor:
        """Which tokens a step leaves out (B, N), bool; one row for all samples if they are drawn blindly.

        Args:
            increment: what the last step added to the sample, by tokens (B, N, p, C).
            skips: how often each token was left out (B, N).
            quota: how many are left out.
            step: index of the step.
        """
        if self.selection == "random":
            draws = torch.rand(1, skips.shape[1], generator=torch.Generator().manual_seed(step))
            return is_in(draws.argsort(1)[:, :quota].to(skips.device), skips.shape[1])
        scores = focus(increment, self.metric)
        return is_in(choose(scores, skips, quota, self.high_share(), self.starvation), skips.shape[1])


def walk(method: RAS, path: Tensor) -> Tensor:
    """Which tokens RAS would leave out at each step along a given path.

    Args:
        method: with its settings.
        path: the sample by tokens at the beginning of each step (S, B, N, p, C).

    Returns:
        (S, B, N), bool.
    """
    skips, left = path.new_zeros(path.shape[1:3]), torch.zeros(path.shape[:3], dtype=torch.bool, device=path.device)
    for step in range(1, len(path)):
        quota = method.quota(Moment(step, step, 0.0, len(path)), path.shape[2])
        if quota:
            left[step] = method.leave_out(path[step] - path[step - 1], skips, quota, step)
            skips = skips + left[step]
    return left


def longest_skip(left: Tensor) -> int:
    """Most steps in a row that any token of (S, B, N), bool, is left out."""
    run, longest = torch.zeros_like(left[0], dtype=torch.long), 0
    for step in left:
        run = (run + 1) * step
        longest = max(longest, int(run.max()))
    return longest


def focus(increment: Tensor, metric: str = "std") -> Tensor:
    """How much each token moves (B, N) from increments by tokens (B, N, p, C)."""
    wide = increment.float()
    if metric == "norm":
        return wide.flatten(2).norm(dim=2)
    return wide.std(-1, correction=0).mean(-1)


def draw_focus(scores: Tensor, grid: tuple[int, int], scale: int = 8) -> list[Image.Image]:
    """Grey pictures of scores (B, N) of tokens on a grid of rows and columns, the highest score white."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    grey = ((scores - low) / (high - low).clamp_min(1e-12) * 2 - 1).unflatten(1, grid)[:, None].expand(-1, 3, -1, -1)
    return to_images(grey.repeat_interleave(scale, 2).repeat_interleave(scale, 3))


def choose(scores: Tensor, skips: Tensor, quota: int, high: float, starvation: float) -> Tensor:
    """The tokens to leave out (B, quota).

    Args:
        scores: m (B, N), at least 0.
        skips: D (B, N).
        quota: how many.
        high: share of them that is taken among high scores.
        starvation: k.
    """
    many = round(high * quota)
    logs, bonus = scores.clamp_min(1e-12).log(), starvation * skips
    low = (logs + bonus).argsort(dim=1, stable=True)[:, : quota - many]
    rest = (logs - bonus).scatter(1, low, -torch.inf)
    return torch.cat([low, rest.argsort(dim=1, descending=True, stable=True)[:, :many]], 1)
