"""What a model of the folder recipe draws, and how near that lies to its training pictures."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from smalti.core.errors import UserError
from smalti.data.folder import FolderSet
from smalti.evaluation.copies import copy_report
from smalti.evaluation.emoji_metrics import spread
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.sheet import from_images, sheet
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline

SHEET_SIDE = 128
MOST = 1000
DRAWN = 32


def draw_like(pipe: TextToImagePipeline, pictures: FolderSet, indices: Sequence[int]) -> list[Image.Image]:
    """Pictures drawn from the captions or labels of these pictures, always from the same seeds."""
    prompts = [pictures.captions[index] for index in indices] if pictures.captions else [""] * len(indices)
    styles = [pictures.label_names[pictures.labels[index]] for index in indices] if pictures.labels else None
    with warnings.catch_warnings(action="ignore"):  # captions that are cut have been reported
        return draw_pictures(pipe, prompts, styles, range(len(indices)))


def sample_sheet(pipe: TextToImagePipeline, pictures: FolderSet, indices: Sequence[int]) -> Image.Image:
    """A sheet of what is drawn like these pictures, with their captions or labels."""
    images = draw_like(pipe, pictures, indices)
    labels = pictures.captions or [pictures.label_names[label] for label in pictures.labels or ()]
    shown = [labels[index] for index in indices] if labels else ()
    return sheet(images, shown, scale=max(1, SHEET_SIDE // images[0].height))


class Memorising(NamedTuple):
    """Figures by name, and a sentence on them; no figures if they cannot be had."""

    figures: dict[str, float]
    sentence: str


def memorising(pipe: TextToImagePipeline, pictures: FolderSet, indices: Sequence[int]) -> Memorising:
    """How near the model's pictures lie to the training pictures, as median distances of EfficientNet-Lite0 features.

    Args:
        pipe: the trained model.
        pictures: the folder.
        indices: of the pictures that it was trained on.
    """
    if len(indices) < 2:
        return Memorising({}, "whether the model memorises cannot be told from one picture")
    extract = EfficientNetLite0()
    try:
        train = extract.of_batches(pictures.pixels([indices[i]]) for i in spread(len(indices), MOST))
    except UserError as error:
        return Memorising({}, f"not checked for memorising: {error}")
    images = draw_like(pipe, pictures, [indices[i] for i in spread(len(indices), DRAWN)])
    report = copy_report(extract(from_images(images)), train)
    sentence = (
        f"the model's pictures lie {report.median_to_train:.2f} from the nearest training picture (median), "
        f"training pictures {report.median_between_train:.2f} from their nearest other"
    )
    if report.is_memorised:
        sentence = f"the model memorises, more pictures would help: {sentence}"
    figures = {
        "to nearest training picture": report.median_to_train,
        "training picture to nearest other": report.median_between_train,
        "between two training pictures": report.median_train_pair,
        "copied": report.share,
    }
    return Memorising({name: round(figure, 4) for name, figure in figures.items()}, sentence)
