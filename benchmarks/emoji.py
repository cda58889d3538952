"""How well a model draws held-out emoji concepts: `smalti bench emoji --json`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.evaluation.emoji_metrics import emoji_metrics
from smalti.zoo.loader import load_model, model_card, provenance


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        model: name of a shipped model, or a folder.
        count: held-out (concept, style) pairs; all of the model's topics if there are fewer.
        steps: sampling steps.
        guidance: its default if none.
        sheet: a PNG file for the drawn pictures; none without.
    """

    model: str = "emoji"
    count: int = 400
    steps: int = 28
    guidance: float | None = None
    sheet: str | None = None


def run(settings: Settings) -> dict[str, Any]:
    """The figures, with what they were measured on."""
    started = time.perf_counter()
    pipe = load_model(settings.model)
    topics = model_card(settings.model).get("settings", {}).get("topics")
    save = None if settings.sheet is None else Path(settings.sheet)
    figures = emoji_metrics(pipe, topics, settings.count, settings.steps, settings.guidance, save)
    seconds = round(time.perf_counter() - started, 1)
    return {
        "benchmark": "emoji",
        "model": settings.model,
        "topics": topics,
        "figures": figures,
        "seconds": seconds,
        **provenance(),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    width = max(map(len, result["figures"]))
    return "\n".join(f"{name:{width}}  {value}" for name, value in result["figures"].items())
