"""Where the image tokens of a model stand, as sets of tokens need it: in every stack, and in the sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.core.errors import Refusal
from smalti.core.protocols import Segment, TokenLayout
from smalti.ops.token_places import TokenPlaces, find_places
from smalti.seams.layout import Layouts


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of one call.

    Args:
        count: tokens of a sample, N.
        model: class name.
        batch: samples, B.
        is_list: whether the model takes its samples, and gives its predictions, one by one.
        places: where they lie in a sample.
        starts: by stack, for every length of a sequence that holds them, the place of the first; stacks without image
            tokens are left out.
    """

    count: int
    model: str
    batch: int
    is_list: bool
    places: TokenPlaces
    starts: Mapping[str, Mapping[int, int]]

    def prediction(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """The prediction (B, ...) for the image among a model's outputs: the first, or one for each sample.

        Raises:
            Refusal: it is not laid out like the sample.
        """
        found = [one for one in outputs[: self.batch if self.is_list else 1] if one is not None]
        prediction = torch.stack(found) if self.is_list else found[0]
        try:
            is_alike = find_places(self.count, self.places.grid, prediction) == self.places
        except ValueError:
            is_alike = False
        if not is_alike:
            raise Refusal(f"the prediction of {self.model}, {tuple(prediction.shape)}, is not laid out like its sample")
        return prediction

    def with_prediction(self, outputs: Sequence[Tensor | None], prediction: Tensor) -> tuple[Tensor | None, ...]:
        """The outputs with another prediction."""
        return (*prediction.unbind(), *outputs[self.batch :]) if self.is_list else (prediction, *outputs[1:])


def read_image_tokens(model: str, layouts: Layouts, sample: Any) -> ImageTokens:
    """The image tokens of a call.

    Args:
        model: class name.
        layouts: of its tokens.
        sample: the noisy sample, or a list of them.

    Raises:
        Refusal: they are not the same run of tokens in all stacks, or do not tell their places in the sample.
    """
    images: list[Segment] = []
    starts: dict[str, dict[int, int]] = {}
    seen = [*layouts.queries.items(), *layouts.keys.items()]
    seen += [((stack, "a stream"), rows) for stack, known in layouts.streams.items() for rows in known.rows.values()]
    for (stack, name), layout in seen:
        found = image_segment(layout, f"{name} of {stack} in {model}")
        if found is not None:
            known = layouts.streams[stack]
            if known.fault or not {"image", "joint"} & set(known.inputs.values()):
                reason = known.fault or "hold no image to choose tokens from"
                raise Refusal(f"the token streams of {stack} in {model} {reason}")
            images.append(found)
            lengths = starts.setdefault(stack, {found.length: 0})
            start = layout.span("image").start
            if lengths.setdefault(len(layout), start) != start:
                raise Refusal(f"the image tokens of {stack} in {model} stand in two places of {len(layout)} tokens")
    counts = sorted({one.length for one in images})
    if len(counts) != 1:
        held = f"hold {' and '.join(map(str, counts))} image tokens a sample" if counts else "have no image tokens"
        raise Refusal(
            f"the attentions of {model} {held}; a set of tokens needs the same ones in all (no folded frames)"
        )
    x = stacked(sample)
    try:
        places = find_places(counts[0], next((one.grid for one in images if one.grid), None), x)
    except ValueError as error:
        raise Refusal(f"the sample of {model} does not say where its tokens lie: {error}") from None
    return ImageTokens(counts[0], model, len(x), not isinstance(sample, Tensor), places, starts)


def image_segment(layout: TokenLayout, where: str) -> Segment | None:
    """The one run of image tokens in a sequence, None if there is none.

    Raises:
        Refusal: there are several.
    """
    images = [one for one in layout.segments if one.kind == "image"]
    if len(images) > 1:
        raise Refusal(f"{where} holds {len(images)} runs of image tokens; a set of tokens needs one run")
    return images[0] if images else None


def stacked(sample: Tensor | Sequence[Tensor]) -> Tensor:
    """Samples (B, ...) that a model takes as a tensor or as a list of equal ones.

    Raises:
        Refusal: the list holds several sizes.
    """
    if isinstance(sample, Tensor):
        return sample
    if len({one.shape for one in sample}) != 1:
        raise Refusal(f"got samples of {len({one.shape for one in sample})} sizes in one call; draw one size at a time")
    return torch.stack(list(sample))
