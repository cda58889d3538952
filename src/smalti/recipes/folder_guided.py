"""A model from a folder within a time: looks, measures, chooses, says what is to be expected, and trains.

Nothing is asked. The plan goes into the training's folder with its settings, so a training that was stopped goes on as
it was planned.
"""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.data.folder import load_folder
from smalti.data.look import Look, look
from smalti.evaluation.emoji_metrics import spread
from smalti.recipes import folder
from smalti.recipes.folder import FolderRecipe, check_places
from smalti.recipes.folder_autoencoder import base_autoencoder
from smalti.recipes.folder_guide import HEAD, TUNED_WIDTH, Choice, choose, forecast, recipe_for, shift_of
from smalti.recipes.folder_model import patch_size
from smalti.recipes.folder_trial import MOST, STEP_OVER_PASS, autoencoder_steps, measure, prepare, trial
from smalti.training.run_folder import MARKER, check_run

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
VIEWS = 4
"""Further views of a picture that is seen moved."""
TRIAL_SHARE, TRIAL_MOST, AUTOENCODER_SHARE, KEPT = 0.05, 40.0, 0.15, 0.02
"""Of the budget: a trial, at most so many seconds; a training of the autoencoder; what is left for surprises."""


@dataclass(frozen=True)
class Plan:
    """What will be done, and what is expected of it.

    Args:
        look: at the pictures.
        device: cpu or cuda.
        choice: of the model and its training.
        weights: of the model.
        psnr: of the autoencoder on these pictures, in dB.
        autoencoder_steps: of its training; 0 = none.
        measured: seconds that looking and measuring took.
        besides: seconds that everything but the training itself will take.
        loss: training loss that is expected at the end, and the one at the end of the trial.
    """

    look: Look
    device: str
    choice: Choice
    weights: int
    psnr: float
    autoencoder_steps: int
    measured: float
    besides: float
    loss: tuple[float, float]

    def as_json(self) -> dict[str, Any]:
        """The plan in json types."""
        shapes = {f"{width}x{height}": count for (height, width), count in self.look.shapes.items()}
        return {**asdict(self), "look": {**asdict(self.look), "shapes": shapes}}

    def __str__(self) -> str:
        one, epochs = self.choice, self.choice.images / self.look.pictures
        autoencoder = (
            f"trained further for {self.autoencoder_steps} steps" if self.autoencoder_steps else "taken as it is"
        )
        lines = {
            "pictures": str(self.look),
            "autoencoder": f"{self.psnr:.1f} dB on these pictures, {autoencoder}",
            "model": f"width {one.width}, {self.weights / 1e6:.1f} M weights, on {self.device}",
            "training": f"{one.steps} steps of {one.batch} = {one.images} pictures, each {epochs:.0f} times; peak rate "
            f"{one.rate:.2g} at width {TUNED_WIDTH}, carried over by muP"
            + (f"; also seen moved by {one.shift} pixels" if one.shift else ""),
            "time": f"{text_of(self.measured)} until now, {text_of(one.seconds)} of training, "
            f"{text_of(self.besides)} besides",
            "expected": f"loss {self.loss[0]:.3f} at the end ({self.loss[1]:.3f} after the trial)",
        }
        return "\n".join(f"{name:12} {text}" for name, text in lines.items())


def read_budget(text: str) -> float:
    """Seconds of a time such as 90s, 10m, 2h or 1h30m.

    Raises:
        UserError: it is no such time.
    """
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        raise UserError(f"got the budget {text!r}; write a time such as 90s, 10m, 2h or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text))


def text_of(seconds: float) -> str:
    """Such as 8m20s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if minutes or hours else "") + f"{rest}s"


def plan(recipe: FolderRecipe, budget: float, say: Callable[[str], None]) -> Plan:
    """Looks at the folder, measures the machine and chooses; writes nothing that stays.

    Args:
        recipe: of the folder; settings of its transformer are kept.
        budget: seconds for everything, this included.
        say: told what is being done.

    Raises:
        UserError: the folder cannot be used, the width is set already, or the budget is too small.
    """
    fixed = [name for name in ("heads", "head_dim") if name in recipe.transformer]
    if fixed:
        raise UserError(f"a budget chooses the width, and transformer.{fixed[0]} sets it; leave one of them out")
    begun = time.monotonic()
    base = base_autoencoder(recipe.tokenizer)
    multiple = base.factor * patch_size(recipe.transformer, recipe.size, base)
    pictures = load_folder(recipe.data, recipe.size, multiple, progress=True)
    reading = time.monotonic() - begun
    seen = look(pictures, spread(len(pictures), MOST))
    say(str(seen))
    with tempfile.TemporaryDirectory(prefix="smalti-guide-") as temporary:
        prepared = prepare(recipe, pictures, base, Path(temporary) / "latents")
        ae_steps = autoencoder_steps(recipe, prepared, AUTOENCODER_SHARE * budget)
        ae_seconds = ae_steps * recipe.autoencoder_training.batch * STEP_OVER_PASS * prepared.pass_seconds
        besides = reading + prepared.share * prepared.seconds + ae_seconds + KEPT * budget
        lasts = min(TRIAL_MOST, TRIAL_SHARE * budget)

        def left() -> float:
            return begun + budget - time.monotonic()

        machine = measure(recipe, prepared, base, left() - lasts - besides, besides, say)
        first = choose(machine, left() - lasts)
        say(f"trying width {first.width} for {lasts:.0f} s")
        has_text = pictures.captions is not None
        curve = trial(
            recipe_for(recipe, first, machine.device, has_text), prepared, base, lasts, Path(temporary) / "trial"
        )
    shift = recipe.shift or shift_of(len(pictures), first.images, recipe.size)
    besides = machine.besides + (VIEWS * prepared.share * prepared.seconds if shift else 0.0)
    machine = replace(machine, seconds={first.width: curve.seconds}, besides=besides)
    choice = replace(choose(machine, left()), shift=shift)
    return Plan(
        look=seen,
        device=machine.device,
        choice=choice,
        weights=machine.weights[choice.width],
        psnr=prepared.psnr,
        autoencoder_steps=ae_steps,
        measured=time.monotonic() - begun,
        besides=machine.besides + machine.drawn * curve.seconds,
        loss=(forecast(curve.images, curve.losses, choice.images), curve.losses[-1]),
    )


def with_plan(recipe: FolderRecipe, found: Plan) -> FolderRecipe:
    """The recipe as planned."""
    chosen = recipe_for(recipe, found.choice, found.device, found.look.words is not None)
    if found.autoencoder_steps:
        training = replace(chosen.autoencoder_training, steps=found.autoencoder_steps)
        chosen = replace(chosen, autoencoder_training=replace(training, warmup=min(training.warmup, training.steps)))
    return chosen


def resumed(recipe: FolderRecipe, out: Path, budget: float) -> FolderRecipe:
    """The recipe of a guided training that was stopped, with so many seconds for the rest of it."""
    settings = read_json(out / MARKER)["settings"]
    training, transformer = settings["training"], settings["transformer"]
    choice = Choice(
        transformer["heads"] * HEAD, training["batch"], training["steps"], training["learning_rate"], budget,
        settings["shift"],
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = recipe_for(recipe, choice, device, "num_double" in transformer)
    steps = settings["autoencoder_training"]["steps"]
    own = replace(recipe.autoencoder_training, steps=steps, warmup=min(recipe.autoencoder_training.warmup, steps))
    return replace(chosen, autoencoder_training=own)


def train(recipe: FolderRecipe, out: Path, budget: float, resume: bool, say: Callable[[str], None]) -> Path:
    """Plans and trains; the path of the model.

    Args:
        recipe: of the folder.
        out: folder of the training.
        budget: seconds for everything.
        resume: go on with a training that was stopped; it keeps its plan.
        say: told what is being done, and the plan.
    """
    check_places(recipe.data, out)
    check_run(out, resume)
    if resume and (out / MARKER).is_file():
        return folder.train(resumed(recipe, out, budget), out, resume)
    found = plan(recipe, budget, say)
    for line in str(found).splitlines():
        say(line)
    return folder.train(with_plan(recipe, found), out, resume)
