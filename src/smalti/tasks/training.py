"""A training from the command line: a recipe of the package, or a folder of pictures, guided by a budget if wanted."""

import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from smalti.core.discovery import ROOT, load_member, members
from smalti.core.errors import UserError, unknown_name
from smalti.core.files import read_json
from smalti.core.settings import override
from smalti.training.messages import say

FOLDER_RECIPE = "folder"
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Request:
    """What to train.

    Args:
        recipe: of the package; None = the folder's.
        data: a folder of pictures; None = the recipe's own.
        out: folder of the training.
        preset: of the recipe, cpu or gpu.
        size: pixels of a square picture, with data.
        tokenizer: folder of an autoencoder, with data.
        settings: key=value pairs on top.
        resume: go on with a training that was stopped.
        budget: time for everything, with data; it chooses the model and its training.
        dry_run: print what the budget would choose, and stop.
        device: auto, cpu or cuda.

    Raises:
        UserError: options that do not go together, or an unknown name.
    """

    recipe: str | None = None
    data: Path | None = None
    out: Path = Path("runs/train")
    preset: str = "cpu"
    size: int | None = None
    tokenizer: Path | None = None
    settings: list[str] = field(default_factory=list)
    resume: bool = False
    budget: str | None = None
    dry_run: bool = False
    device: str = "auto"

    def __post_init__(self):
        if (self.recipe is None) == (self.data is None):
            raise UserError("give either --recipe NAME or --data FOLDER")
        if self.recipe is not None and (self.size is not None or self.tokenizer is not None or self.budget is not None):
            raise UserError("--size, --tokenizer and --budget go with --data; a recipe has its own")
        if self.dry_run and self.budget is None:
            raise UserError("--dry-run prints the plan of a budget; add --budget 10m, say")
        if self.budget is not None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("a budget is planned and trained by one process; start it without a launcher")
        if self.device not in DEVICES:
            raise unknown_name("device", self.device, DEVICES)


def run(request: Request) -> tuple[dict[str, Any], str]:
    """Trains, or plans: what is to be printed, as json and as text.

    Raises:
        UserError: an unknown recipe, preset or setting, a folder that cannot be used, a device that is not there.
    """
    _choose_device(request.device)
    module = load_member("recipes", FOLDER_RECIPE) if request.recipe is None else recipe_module(request.recipe)
    if request.preset not in module.PRESETS:
        raise unknown_name("preset", request.preset, module.PRESETS)
    chosen = module.PRESETS[request.preset]
    if request.data is not None:
        tokenizer = None if request.tokenizer is None else str(request.tokenizer)
        chosen = replace(chosen, data=str(request.data), tokenizer=tokenizer, size=request.size or chosen.size)
    if request.budget is None:
        folder = module.train(override(chosen, request.settings), request.out, request.resume)
    else:
        guided = load_member("recipes", "folder_guided")
        chosen = override(replace(chosen, transformer={}), request.settings)
        budget = guided.read_budget(request.budget)
        if request.dry_run:
            plan = guided.plan(chosen, budget, say)
            return plan.as_json(), str(plan)
        folder = guided.train(chosen, request.out, budget, request.resume, say)
    return {"model": str(folder)}, f"{folder}\n{how_to_draw(folder)}".rstrip()


def _choose_device(device: str) -> None:
    """Hides the GPUs, or asks for one; before anything has looked for them."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device cuda was asked for, and torch sees none; use --device auto")


def recipe_module(name: str) -> Any:
    """The module of a recipe: a member of its stage that defines presets, seen without importing all of them.

    Raises:
        UserError: there is none of this name; the nearest are offered.
    """
    sources = {one: (ROOT / "recipes" / f"{one}.py").read_text(encoding="utf-8") for one in members("recipes")}
    known = [one.replace("_", "-") for one, text in sources.items() if "\nPRESETS" in text and one != FOLDER_RECIPE]
    if name.replace("_", "-") not in known:
        raise unknown_name("recipe", name, known)
    return load_member("recipes", name)


def how_to_draw(folder: Path) -> str:
    """The command that draws with a new model; nothing if it draws no pictures."""
    if not (folder / "model_index.json").is_file():
        return ""
    index = read_json(folder / "model_index.json")
    prompt = '"A PROMPT" ' if index["text_encoder"] else ""
    style = f" --style {shlex.quote(index['styles'][0])}" if index["styles"] else ""
    return f"smalti generate {prompt}--model {shlex.quote(str(folder))}{style}"
