"""Prompts to pictures on disk: checks first, then the work, then whole files."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smalti.acceleration.plan import Plan
from smalti.core.errors import UserError, unknown_name
from smalti.core.files import atomic_file, check_creatable
from smalti.core.method import Method
from smalti.core.seeds import check_seed, generators_for
from smalti.evaluation.pipe_calls import read_size
from smalti.evaluation.sheet import sheet
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.sampling.schedulers import make_scheduler
from smalti.seams.apply import apply
from smalti.seams.find import make_method
from smalti.tasks.picture_files import Drawn, first_picture, save_picture
from smalti.zoo.loader import load_model

BATCH = 16
SHEET_SIDE = 128


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
        solver: euler, heun, dpm++, unipc or sde.
        methods: training-free methods that act while drawing, such as "taylorseer:interval=4", or files of plans.

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
    methods: tuple[str, ...] = ()

    def __post_init__(self):
        for name, value in (("steps", self.steps), ("count", self.count)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be a whole number from 1")
        check_seed(self.seed)
        check_seed(self.seed + self.count - 1)
        if self.out.suffix.lower() != ".png":
            raise UserError(f"output file {str(self.out)!r} does not end in .png; pictures are written as PNG")
        for prompt in self.prompts:
            if not prompt.strip():
                raise UserError(f"prompt {prompt!r} is empty; write what to draw")


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
    check_creatable(request.out)
    sides = read_size(request.size or "")
    methods = read_methods(request.methods)
    scheduler = make_scheduler(request.solver)
    pipe = load_model(request.model, "cuda" if torch.cuda.is_available() else "cpu")
    pipe.register_modules(scheduler=scheduler)
    wanted = _pictures(request, pipe)
    files = _files(request.out, len(wanted))
    for file in files:
        check_creatable(file)
    pipe.set_progress_bar_config(disable=None)
    started = time.perf_counter()
    with ExitStack() as stack:
        handle = stack.enter_context(apply(pipe, *methods)) if methods else None
        images = _draw(pipe, request, wanted, sides)
    seconds = time.perf_counter() - started
    first = first_picture(images[0])
    settings = {
        "model": request.model,
        "steps": request.steps,
        "solver": request.solver,
        "guidance": pipe.config["default_guidance"] if request.guidance is None else request.guidance,
        "size": [first.height, first.width],
        **({"methods": [str(method) for method in methods]} if methods else {}),
    }
    _write(request.out, files, wanted, images, settings)
    return {
        "pictures": [{"file": str(file), **asdict(picture)} for file, picture in zip(files, wanted, strict=True)],
        "sheet": str(request.out) if len(images) > 1 else None,
        **settings,
        "seconds": round(seconds, 3),
        **({} if handle is None else {"report": handle.report().as_json()}),
    }


def read_methods(words: Sequence[str]) -> list[Method | Plan]:
    """What --apply names: methods, or files of plans."""
    return [Plan.load(one) if one.endswith(".json") else make_method(one) for one in words]


def _draw(pipe: TextToImagePipeline, request: Request, wanted: list[_Picture], sides: dict[str, Any]) -> list[Drawn]:
    images: list[Drawn] = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        images += pipe(
            [picture.prompt for picture in part],
            style=[picture.style for picture in part],
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            **sides,
            generator=generators_for([picture.seed for picture in part]),
            return_dict=False,
        )[0]
    return images


def _pictures(request: Request, pipe: TextToImagePipeline) -> list[_Picture]:
    """Every picture in order: prompts, then styles, then seeds."""
    styles = list(pipe.config["styles"])
    prompts = request.prompts
    if pipe.config["text_encoder"] is None:
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
    elif request.style in styles:
        chosen = [request.style]
    elif request.style == "all":
        chosen = [*styles]
    else:
        raise unknown_name("style", request.style, [*styles, "all"])
    seeds = range(request.seed, request.seed + request.count)
    return [_Picture(prompt, style, seed) for prompt in prompts for style in chosen for seed in seeds]


def _files(out: Path, count: int) -> list[Path]:
    """The file of each picture: `out` itself for a single one, else numbered ones beside it."""
    if count == 1:
        return [out]
    digits = max(2, len(str(count)))
    return [out.with_name(f"{out.stem}-{index + 1:0{digits}}.png") for index in range(count)]


def _write(out: Path, files: list[Path], wanted: list[_Picture], images: list[Drawn], settings: dict[str, Any]) -> None:
    """All files or none: each is complete beside its place before the first takes it."""
    with ExitStack() as whole:
        for file, picture, image in zip(files, wanted, images, strict=True):
            save_picture(whole.enter_context(atomic_file(file)), image, settings | asdict(picture))
        if len(images) > 1:
            firsts = [first_picture(image) for image in images]
            scale = max(1, SHEET_SIDE // firsts[0].height)
            labelled = sheet(firsts, [picture.label for picture in wanted], scale=scale)
            save_picture(whole.enter_context(atomic_file(out)), labelled, settings)
