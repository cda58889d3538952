"""That a shipped model was made with the settings that its recipe has today."""

from dataclasses import asdict
from typing import Any

from smalti.training.config import TrainConfig


def assert_made_by(card: dict[str, Any], recipe: Any) -> None:
    """Settings that decide no weights may differ; one that is newer than the model must be at its default."""
    made, today = dict(card["settings"]), asdict(recipe)
    assert TrainConfig(**made.pop("training")).identity() == recipe.training.identity()
    today.pop("training")
    assert made == today
