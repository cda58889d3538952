"""A file of prompts to a folder of pictures, here or on a cluster; what was drawn before is not drawn again.

Every picture is a file of its own, named by its line and written whole, with its settings inside. So a run that was
stopped goes on, a worker's lost pictures are drawn anew by another, and none is there twice.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from smalti.core.cluster import run_all
from smalti.core.errors import UserError
from smalti.core.files import atomic_file, check_creatable
from smalti.core.seeds import generators_for
from smalti.evaluation.pipe_calls import check_arguments, read_calls
from smalti.sampling.schedulers import make_scheduler
from smalti.seams.apply import apply
from smalti.tasks.picture_files import save_picture, settings_of
from smalti.tasks.text_to_image import read_methods
from smalti.zoo.loader import load_model

BATCH = 16
LIST = "pictures.jsonl"
Piece = list[tuple[str, dict[str, Any]]]
"""Files, each with the arguments of its call; all calls of a piece go together."""


@dataclass(frozen=True)
class Request:
    """What to draw.

    Args:
        prompts: file, a prompt a line, or .jsonl with `prompt` and further arguments of the pipeline, and `seed`.
        out: folder of the pictures, 000000.png for the first line, and of their list `pictures.jsonl`.
        model: name of a shipped model, or a folder.
        seed: of the first line; the next ones count up.
        steps: sampling steps, from 1.
        guidance: scale of classifier-free guidance; the model's own if None.
        style: of lines that name none; the model's first if None.
        size: pixels, "64" or "64x96" (height x width); the model's own if empty.
        solver: euler, heun, dpm++, unipc or sde.
        methods: training-free methods, or files of plans.
        cluster: empty for this process, or ray.
        workers: of the cluster.

    Raises:
        UserError: a value is out of range.
    """

    prompts: Path
    out: Path
    model: str = "emoji"
    seed: int = 0
    steps: int = 28
    guidance: float | None = None
    style: str | None = None
    size: str = ""
    solver: str = "euler"
    methods: tuple[str, ...] = ()
    cluster: str = ""
    workers: int = 2

    def __post_init__(self):
        for name in ("steps", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be a whole number from 1")
        if self.out.suffix:
            raise UserError(f"{self.out} looks like a file; for a file of prompts --out is a folder")


def draw_all(request: Request) -> dict[str, Any]:
    """Draws what is not there yet.

    Returns:
        json: `folder`, `list`, number of `pictures`, how many of them were `drawn` now, and the `seconds`.

    Raises:
        UserError: the prompts cannot be read, an argument, style, solver or method is unknown, or a file of the
            folder is another picture or list.
    """
    out = request.out.resolve()  # workers may stand elsewhere
    check_creatable(out / LIST)
    scheduler, methods = make_scheduler(request.solver), read_methods(request.methods)  # mistakes show here, not there
    wanted = _wanted(request, out)
    listed = _list(wanted)
    _check_list(out / LIST, listed)
    settings = {"model": request.model, "steps": request.steps, "solver": request.solver, "guidance": request.guidance}
    settings |= {"methods": list(request.methods)} if request.methods else {}
    missing = [(file, call) for file, call in wanted if not _is_drawn(file, settings | call)]
    share = math.ceil(len(missing) / (2 * request.workers)) if request.cluster else BATCH
    pieces = _pieces([(str(file), call) for file, call in missing], min(BATCH, max(1, share)))
    started = time.perf_counter()
    with tqdm(total=len(missing), desc="drawing", unit="picture", disable=None) as bar:
        for index, _ in run_all(
            lambda: _drawer(request, settings, scheduler, methods), pieces, request.cluster, request.workers,
            gpus=torch.cuda.is_available(),
        ):  # fmt: skip
            bar.update(len(pieces[index]))
    with atomic_file(out / LIST) as file:
        file.write_text(listed, encoding="utf-8")
    seconds = round(time.perf_counter() - started, 3)
    return {
        "folder": str(request.out), "list": str(request.out / LIST), "pictures": len(wanted), "drawn": len(missing),
        **settings, "seconds": seconds,
    }  # fmt: skip


def _wanted(request: Request, out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file and the call of every line, checked against the model."""
    calls = read_calls(request.prompts, request.size, request.seed)
    pipe = load_model(request.model)
    check_arguments(pipe, calls)
    styles = list(pipe.config["styles"])
    chosen = request.style if request.style is not None or not styles else styles[0]
    for call in calls:
        call.setdefault("style", chosen)
        if call["style"] is not None and call["style"] not in styles:
            raise UserError(
                f"style {call['style']!r} is none of {request.model!r}; it has {', '.join(styles) or 'none'}"
            )
    digits = max(6, len(str(len(calls) - 1)))
    return [(out / f"{index:0{digits}}.png", call) for index, call in enumerate(calls)]


def _list(wanted: list[tuple[Path, dict[str, Any]]]) -> str:
    """The list of all pictures, a json object a line."""
    return "".join(json.dumps({"file": path.name, **call}, ensure_ascii=False) + "\n" for path, call in wanted)


def _check_list(file: Path, listed: str) -> None:
    """Raises `UserError` if there is a list, and it is not the beginning of this one."""
    if file.exists() and not listed.startswith(file.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{file} is the list of other pictures; choose another --out, or move it away")


def _is_drawn(file: Path, settings: dict[str, Any]) -> bool:
    """Whether the picture is there; raises `UserError` if something else is."""
    if not file.exists():
        return False
    found = settings_of(file)
    if found != settings:
        other = "no picture of ours" if found is None else f"drawn from {found.get('prompt')!r} with other settings"
        raise UserError(f"{file} is {other}; choose another --out, or move it away")
    return True


def _pieces(missing: Piece, size: int) -> list[Piece]:
    """Neighbours whose calls differ in prompt, style and seed alone, at most so many of them."""
    pieces: list[Piece] = []
    for file, call in missing:
        if not pieces or len(pieces[-1]) == size or _shared(pieces[-1][0][1]) != _shared(call):
            pieces.append([])
        pieces[-1].append((file, call))
    return pieces


def _shared(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in ("prompt", "style", "seed")}


def _drawer(request: Request, settings: dict[str, Any], scheduler: Any, methods: list[Any]) -> Callable[[Piece], int]:
    """Loads the model and gives the function that draws a piece and writes its files."""
    pipe = load_model(request.model, "cuda" if torch.cuda.is_available() else "cpu")
    pipe.register_modules(scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    if methods:
        apply(pipe, *methods)

    def draw(piece: Piece) -> int:
        calls = [call for _, call in piece]
        arguments = {"guidance_scale": request.guidance, "num_inference_steps": request.steps} | _shared(calls[0])
        images = pipe(
            [call["prompt"] for call in calls], style=[call["style"] for call in calls],
            generator=generators_for([call["seed"] for call in calls]), return_dict=False, **arguments,
        )[0]  # fmt: skip
        for (file, call), image in zip(piece, images, strict=True):
            with atomic_file(file) as temporary:
                save_picture(temporary, image, settings | call)
        return len(piece)

    return draw
