"""Prompts to pictures on disk: checks first, then the work, then whole files."""

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from smalti.core.errors import UserError, unknown_name
from smalti.core.files import atomic_file, check_writable
from smalti.core.seeds import check_seed, generators_for
from smalti.evaluation.sheet import sheet
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.zoo.loader import load_model

BATCH = 16
PNG_KEY = "smalti"


@dataclass(frozen=True)
class Request:
    """What to draw.

    Args:
        prompts: at least one for a model of text; none for one without.
        model: name of a shipped model, or a folder.
        out: the picture's PNG file; of several pictures the sheet's, they lie beside it with a number.
        seed: of the first picture of each prompt, 0 to 2**63 - 1; the next ones count up.
        steps: sampling steps, from 1.
        guidance: scale of classifier-free guidance; the model's own if None.
        count: pictures a prompt, from 1.
        style: drawing style or label; "all" draws each; the model's first if None.
        size: pixels, "64" or "64x96" (height x width); the model's own if None.
        solver: euler, heun, dpm++ or sde.

    Raises:
        UserError: a value is out of range.
    """

    prompts: tuple[str, ...]
    model: str = "emoji"
    out: Path = Path("out/picture.png")
    seed: int = 0
    steps: int = 28
    guidance: float | None = None
    count: int = 1
    style: str | None = None
    size: str | None = None
    solver: str = "euler"

    def __post_init__(self):
        check_seed(self.seed)
        check_seed(self.seed + max(self.count, 1) - 1)
        for name, value in (("steps", self.steps), ("count", self.count)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be a whole number from 1")
        if self.out.suffix.lower() != ".png":
            raise UserError(f"output file {str(self.out)!r} does not end in .png; pictures are written as PNG")
        if self.out.is_dir():
            raise UserError(
                f"output file {str(self.out)!r} is a folder; name a file in it, such as {self.out / 'a.png'}"
            )


@dataclass(frozen=True)
class _Picture:
    prompt: str
    style: str | None
    seed: int

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.prompt, self.style) if part) or f"seed {self.seed}"


def draw(request: Request) -> dict[str, Any]:
    """Draws and writes everything that was asked for.

    Returns:
        json: `pictures` (file, prompt, style, seed each), `sheet` (file or None), the settings and the seconds.

    Raises:
        UserError: unknown model or style, no prompt, a size that does not fit, a place that cannot be written.
    """
    check_writable(request.out.parent)
    pipe = load_model(request.model)
    if request.solver != "euler":
        pipe.scheduler = make_scheduler(request.solver)
    height, width = _size(request.size)
    wanted = _pictures(request, pipe)
    pipe.set_progress_bar_config(disable=None, leave=False)
    started = time.perf_counter()
    images: list[Image.Image] = []
    with warnings.catch_warnings():
        warnings.simplefilter("once")
        for start in range(0, len(wanted), BATCH):
            part = wanted[start : start + BATCH]
            images += pipe(
                [picture.prompt for picture in part],
                style=[picture.style for picture in part] if part[0].style is not None else None,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                height=height,
                width=width,
                generator=generators_for([picture.seed for picture in part]),
            ).images
    seconds = time.perf_counter() - started
    settings = {"model": request.model, "steps": request.steps, "solver": request.solver}
    settings |= {"guidance": pipe.config.default_guidance if request.guidance is None else request.guidance}
    settings |= {"size": list(images[0].size[::-1])}
    files = _write(request.out, wanted, images, settings)
    pictures = [
        {"file": str(f), "prompt": p.prompt, "style": p.style, "seed": p.seed}
        for f, p in zip(files, wanted, strict=True)
    ]
    is_sheet = len(images) > 1
    return {
        "pictures": pictures,
        "sheet": str(request.out) if is_sheet else None,
        **settings,
        "seconds": round(seconds, 3),
    }


def _pictures(request: Request, pipe: TextToImagePipeline) -> list[_Picture]:
    """Every picture in order: prompts, then styles, then seeds."""
    styles = list(pipe.config.styles or ())
    prompts = request.prompts
    if pipe.config.text_encoder is None:
        if prompts:
            raise UserError(
                f"model {request.model!r} takes no prompt; leave it out" + (", choose a --style" if styles else "")
            )
        prompts = ("",)
    elif not prompts:
        raise UserError('no prompt was given; write for instance: smalti generate "a green apple"')
    if request.style is None:
        chosen: list[str | None] = [styles[0]] if styles else [None]
    elif not styles:
        raise UserError(f"model {request.model!r} has no styles; leave --style out")
    elif request.style == "all":
        chosen = [*styles]
    elif request.style in styles:
        chosen = [request.style]
    else:
        raise unknown_name("style", request.style, [*styles, "all"])
    seeds = range(request.seed, request.seed + request.count)
    return [_Picture(prompt, style, seed) for prompt in prompts for style in chosen for seed in seeds]


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"size {text!r} is not understood; write pixels such as 64, or height x width such as 64x96")
    return int(parts[0]), int(parts[-1])


def _write(out: Path, wanted: list[_Picture], images: list[Image.Image], settings: dict[str, Any]) -> list[Path]:
    """The picture itself, or the sheet and each picture beside it; returns the files of the single pictures."""
    if len(images) == 1:
        _save(out, images[0], {**settings, **vars(wanted[0])})
        return [out]
    digits = max(2, len(str(len(images))))
    files = [out.with_name(f"{out.stem}-{index + 1:0{digits}}.png") for index in range(len(images))]
    for file, picture, image in zip(files, wanted, images, strict=True):
        _save(file, image, {**settings, **vars(picture)})
    _save(out, sheet(images, [picture.label for picture in wanted]), settings)
    return files


def _save(path: Path, image: Image.Image, settings: dict[str, Any]) -> None:
    """A PNG with its settings in its metadata; the same settings give the same bytes."""
    metadata = PngInfo()
    metadata.add_text(PNG_KEY, json.dumps(settings, ensure_ascii=True))
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=metadata)
