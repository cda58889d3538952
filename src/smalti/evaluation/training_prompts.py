"""The prompts on which settings are chosen: captions that a model was trained on, never those of a claim."""

from smalti.data.emoji import load_emoji
from smalti.evaluation.emoji_metrics import spread
from smalti.evaluation.held_out_prompts import Prompts
from smalti.zoo.loader import model_card


def training_prompts(model: str, count: int, first: int = 0, every: int = 1, first_seed: int = 1000) -> Prompts:
    """Evenly spread captions of the training of a model of the zoo, or a part of them.

    Args:
        model: name in the zoo.
        count: of captions that are spread.
        first, every: of these the first to be taken, and one in so many.
        first_seed: of the first caption; the others follow.
    """
    settings = model_card(model).get("settings", {})
    items = load_emoji("train", settings.get("styles"), settings.get("topics")).items
    chosen = [items[index] for index in spread(len(items), count)][first::every]
    seeds = tuple(range(first_seed, first_seed + count))[first::every]
    return Prompts(tuple(item.label for item in chosen), tuple(item.style for item in chosen), seeds)
