"""Pictures drawn under perturbed heads or skipped layers, and what there is to say of them.

How well each fits its prompt (the judge's cosine), how far all of them are from the real pictures of these concepts
(Fréchet distance, comparable at this count alone), and how colourful they are: strong guidance shows itself there
first, as saturation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from smalti.control.damaged_pass import DamagedPass
from smalti.control.head_hunt import drawer
from smalti.control.head_sets import HeadSet
from smalti.control.headhunter_softpag import PerturbedHeads
from smalti.data.emoji import load_emoji
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.held_out_prompts import Prompts
from smalti.evaluation.paired import Comparison, compare
from smalti.evaluation.rewards import JudgeReward, Reward, colourfulness
from smalti.seams.apply import apply


class Scores(NamedTuple):
    """Of the pictures of all prompts.

    Args:
        fits: the judge's cosine of each picture and its prompt.
        distance: Fréchet distance to the real pictures.
        colour: mean colourfulness.
    """

    fits: list[float]
    distance: float
    colour: float


@dataclass(frozen=True)
class HeadTrial:
    """Draws and scores.

    Args:
        pipe: one of ours.
        judge: of pictures and prompts.
        prompts: what is drawn.
        steps: sampling steps.
        scale: w of every damaged pass.
        say: is told what is drawn.
    """

    pipe: Any
    judge: JudgeReward
    prompts: Prompts
    steps: int
    scale: float
    say: Callable[[str], None] = field(repr=False)

    def draw(
        self,
        damage: HeadSet | DamagedPass | None = None,
        prompts: Prompts | None = None,
        guidance: float = 1.0,
        steps: int | None = None,
    ) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1].

        Args:
            damage: heads, or a method with its own settings; None = the plain run.
            prompts, steps: others than those of the trial.
            guidance: scale of classifier-free guidance.
        """
        prompts, steps = prompts or self.prompts, steps or self.steps
        self.say(f"{damage or 'plain'}, guidance {guidance:g}, {steps} steps, {len(prompts)} pictures")
        if damage is None:
            return drawer(self.pipe, steps, guidance)(prompts)
        is_method = isinstance(damage, DamagedPass)
        method = damage if is_method else PerturbedHeads(damage, scale=self.scale, guidance=guidance)
        with apply(self.pipe, method):
            return drawer(self.pipe, steps, guidance)(prompts)

    def score(self, damage: HeadSet | DamagedPass | None = None, **settings: Any) -> Scores:
        """What there is to say of the pictures of all prompts, drawn as in `draw`."""
        pixels = self.draw(damage, **settings)
        return Scores(
            self.judge(pixels, self.prompts.texts).tolist(),
            frechet_distance(self._extract(pixels), self._real),
            float(colourfulness(pixels).mean()),
        )

    def raised(
        self, sets: Mapping[str, HeadSet], goals: Mapping[str, Reward], prompts: Prompts
    ) -> dict[str, Comparison]:
        """By how much sets of heads that were found for a goal raise it; one of several names " + " all that it is for.

        Args:
            sets: by the goals, such as "dark" or "dark + sharp".
            goals: what each goal counts.
            prompts: what is drawn.
        """
        before, found = self.draw(prompts=prompts), {}
        for name, heads in sets.items():
            pictures = self.draw(heads, prompts)
            for goal in name.split(" + "):
                after, without = (goals[goal](one, prompts.texts).tolist() for one in (pictures, before))
                found[f"{name}: {goal}"] = compare(after, without, below=False)
        return found

    def changes(self, heads: HeadSet, strengths: Sequence[float], prompts: Prompts) -> list[float]:
        """Mean squared change of the pixels by these heads, softened to each strength."""
        before = self.draw(prompts=prompts)
        return [float((self.draw(heads.weighted(u), prompts) - before).square().mean()) for u in strengths]

    @cached_property
    def _extract(self) -> EfficientNetLite0:
        return EfficientNetLite0()

    @cached_property
    def _real(self) -> Tensor:
        """Features of the real pictures, in the order of the prompts."""
        pictures = load_emoji("held-out", styles=sorted(set(self.prompts.styles)))
        places = {(item.label, item.style): index for index, item in enumerate(pictures.items)}
        rows = [places[one] for one in zip(self.prompts.texts, self.prompts.styles, strict=True)]
        return self._extract(pictures.pixels(rows))
