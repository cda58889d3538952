"""Whether a guided training keeps its word: `smalti bench guided_start --json`.

A folder of emoji with captions is trained on within a budget. Measured: the time it took, its last loss beside the one
that was forecast, and held-out loss and Fréchet distance at the end beside those at a quarter of the training. The
distance is that of pictures drawn from captions of the folder to the pictures themselves.
"""

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smalti.data.emoji import load_emoji
from smalti.data.folder import FolderSet, load_folder
from smalti.evaluation.emoji_metrics import spread
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.frechet import METRIC, frechet_distance
from smalti.evaluation.sheet import from_images, to_images
from smalti.recipes import folder
from smalti.recipes.folder_autoencoder import base_autoencoder
from smalti.recipes.folder_guided import plan, read_budget, with_plan
from smalti.recipes.folder_samples import draw_like
from smalti.training import checkpoints
from smalti.training.messages import say
from smalti.training.progress import read_log
from smalti.zoo.loader import load_model, model_card, provenance


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        pictures: of the folder.
        style: of the emoji.
        budget: such as 10m.
        drawn: pictures of the distance.
    """

    pictures: int = 500
    style: str = "noto"
    budget: str = "10m"
    drawn: int = 200


def run(settings: Settings) -> dict[str, Any]:
    """The figures, with what they were measured on."""
    with tempfile.TemporaryDirectory(prefix="smalti-bench-") as temporary:
        data, out = Path(temporary) / "pictures", Path(temporary) / "run"
        write_pictures(data, settings)
        recipe = replace(folder.PRESETS["cpu"], data=str(data), transformer={})
        started, budget = time.monotonic(), read_budget(settings.budget)
        found = plan(recipe, budget, say)
        say(str(found))
        chosen = with_plan(recipe, found)
        chosen = replace(chosen, training=replace(chosen.training, keep_last=100))
        folder.train(chosen, out, False)
        seconds = time.monotonic() - started
        return {"benchmark": "guided_start", "settings": asdict(settings), **provenance(),
                "plan": found.as_json(), **_figures(chosen, out, seconds, budget, found.loss[0], settings)}  # fmt: skip


def write_pictures(data: Path, settings: Settings) -> None:
    """Emoji of the training split with their captions, as a user's folder would hold them."""
    emoji = load_emoji("train", styles=[settings.style])
    rows = spread(len(emoji), settings.pictures)
    data.mkdir()
    for number, (image, row) in enumerate(zip(to_images(emoji.pixels(rows)), rows, strict=True)):
        image.save(data / f"{number:04}.png")
        (data / f"{number:04}.txt").write_text(emoji.items[row].label, encoding="utf-8")


def _figures(
    recipe: folder.FolderRecipe, out: Path, seconds: float, budget: float, expected: float, settings: Settings
) -> dict[str, Any]:
    lines = read_log(out / "transformer" / "log.jsonl")
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    kept = checkpoints.steps(out / "transformer" / "checkpoints")
    quarter = min(kept, key=lambda path: abs(checkpoints.step_of(path) - recipe.training.steps / 4))
    step = checkpoints.step_of(quarter)
    pipe = load_model(out / "model")
    pictures = load_folder(recipe.data, recipe.size, 8)
    distances = {"end": _distance(pipe, pictures, settings.drawn)}
    then = folder.start_transformer(recipe, base_autoencoder(None), pictures)
    then.model.load_state_dict(dict(checkpoints.load(quarter).tensors["ema"]))
    pipe.register_modules(transformer=then.plain(then.model).eval())
    distances["quarter"] = _distance(pipe, pictures, settings.drawn)
    card = model_card(str(out / "model"))
    last = [line.get("objective", line["loss"]) for line in lines if "loss" in line][-10:]
    return {
        "seconds": seconds,
        "share of the budget": seconds / budget,
        "loss": sum(last) / len(last),
        "forecast": expected,
        "held-out loss": {"quarter": losses[min(losses, key=lambda one: abs(one - step))], "end": min(losses.values())},
        METRIC: distances,
        "memorising": card["metrics"],
    }


@torch.no_grad()
def _distance(pipe: Any, pictures: FolderSet, count: int) -> float:
    rows, extract = spread(len(pictures), count), EfficientNetLite0()
    drawn: list[Image.Image] = draw_like(pipe, pictures, rows)
    return frechet_distance(extract(from_images(drawn)), extract(pictures.pixels(rows)))


def table(result: dict[str, Any]) -> str:
    """The figures beside what is asked of them."""
    held_out, distance = result["held-out loss"], result[METRIC]
    rows = [
        ("time over budget", f"{result['share of the budget']:.3f}", "0.9 to 1.1"),
        ("loss over forecast", f"{result['loss'] / result['forecast']:.3f}", "0.8 to 1.2"),
        ("held-out loss, end", f"{held_out['end']:.4f}", f"< {held_out['quarter']:.4f} at a quarter"),
        ("distance, end", f"{distance['end']:.1f}", f"< {distance['quarter']:.1f} at a quarter"),
    ]
    return "\n".join(f"{name:20} {value:>8}  asked: {asked}" for name, value, asked in rows)
