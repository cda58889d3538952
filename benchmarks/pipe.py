"""Methods on a pipeline of one's own, with one's own prompts: what they save and what they change in the pictures.

    smalti bench pipe FOLDER --prompts FILE --apply taylorseer:interval=4 --apply taylorseer+grat

FOLDER is any diffusers pipeline on disk, a folder that `smalti train` wrote, or the name of a shipped model. FILE holds
a prompt a line, or ends in .jsonl and holds objects: `prompt` and further arguments of the pipeline's call. Every
--apply is a candidate; methods joined by `+` act together. Beside them stand the plain run, and plain runs of fewer
steps that cost at least as many FLOPs as a candidate. All draw each prompt in turn, from the same seed.

PSNR and VGG distance are those to the plain run's pictures; PSNR ends at 58.9 dB, where rounding to 8 bits hides the
rest. FLOPs are those of the first picture, with its text encoder and autoencoder.
"""

import math
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
import torch
from PIL import Image
from tqdm import tqdm

from smalti.core.errors import UserError
from smalti.core.files import atomic_file, check_creatable
from smalti.core.method import Method
from smalti.core.seeds import generators_for
from smalti.evaluation.flops import count_flops
from smalti.evaluation.pipe_calls import check_arguments, read_calls
from smalti.evaluation.sheet import from_images, sheet
from smalti.evaluation.timing import bootstrap_interval, seconds
from smalti.evaluation.vgg import VGG16
from smalti.seams.apply import apply, denoisers
from smalti.seams.find import make_method
from smalti.zoo.loader import provenance
from smalti.zoo.pipelines import device_of, load_pipeline

ARGUMENT = "folder"
SHEET_ROWS = 8
SHEET_SIDE = 192
ROUNDING = (1 / 255) ** 2 / 12
"""Mean squared error of rounding to 8 bits, pixels in [0, 1]."""
POLL = 0.005


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        folder: of a pipeline, or the name of a shipped model.
        prompts: file of prompts, a line each, or .jsonl.
        apply: candidates, each a method such as taylorseer:interval=4, or several joined by `+`.
        steps: sampling steps.
        size: pixels, one number or HEIGHTxWIDTH; the pipeline's own if empty.
        out: PNG file of the pictures side by side.
        seed: of the first prompt; the next ones count up.
        device: cpu, cuda, or auto for cuda where there is one.
    """

    folder: str = ""
    prompts: str = ""
    apply: tuple[str, ...] = ()
    steps: int = 28
    size: str = ""
    out: str = "out/pipe.png"
    seed: int = 0
    device: str = "auto"


@dataclass
class Candidate:
    """One way to draw, and what was measured of it: one entry a prompt.

    Args:
        name: of its row.
        methods: that act together; none is the plain pipeline.
        steps: sampling steps.
        flops: of the first picture, text encoder and autoencoder included.
        seconds: of each picture.
        peaks: bytes of memory at most while each was drawn.
        pictures: a list of frames each.
        psnr: of each picture to the plain one, in dB.
        distances: VGG distance of each picture to the plain one.
        report: of the methods, on the first picture.
    """

    name: str
    methods: tuple[Method, ...]
    steps: int
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    pictures: list[list[Image.Image]] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    report: dict[str, Any] | None = None


def run(settings: Settings) -> dict[str, Any]:
    """Draws everything, writes the sheet, and returns the rows.

    Raises:
        UserError: something asked for does not exist or does not fit, or a method cannot act on this pipeline.
    """
    named = _candidates(settings)
    calls = _calls(settings)
    check_creatable(settings.out)
    network = VGG16.pretrained()
    device = device_of(settings.device)
    pipe = load_pipeline(settings.folder, device)
    check_arguments(pipe, calls)
    ways = _counted(pipe, named, calls[0], settings.steps)
    for index, call in enumerate(tqdm(calls, desc="drawing", unit="prompt", file=sys.stderr, leave=False)):
        for way in ways if index % 2 == 0 else ways[::-1]:  # what drifts hits all alike
            _draw(pipe, way, call, device)
    network = network.to(device)
    for way in ways:
        _compare(way, ways[0], network)
    _save_sheet(Path(settings.out), ways, calls)
    return {
        "benchmark": "pipe",
        "settings": asdict(settings),
        "pipeline": type(pipe).__name__,
        "denoisers": [type(one).__name__ for one in denoisers(pipe)],
        "prompts": len(calls),
        "sheet": settings.out,
        "memory": "CUDA memory allocated" if device.type == "cuda" else "resident set of the process",
        "rows": [_row(way, ways[0]) for way in ways],
        **provenance(),
    }


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    width = max(len(row["name"]) for row in result["rows"])
    lines = [f"{result['pipeline']} ({', '.join(result['denoisers'])}), {result['prompts']} prompts"]
    lines.append(f"{'':{width}}  steps  seconds  plain / this{'':9}TFLOP  memory  PSNR dB  VGG distance")
    for row in result["rows"]:
        ratio = row["ratio"]
        speed = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        lines.append(
            f"{row['name']:{width}}  {row['steps']:5}  {row['seconds']:7.3f}  {speed:18}{row['flops'] / 1e12:8.3f}"
            f"  {row['peak_bytes'] / 2**30:5.2f}G  {row['psnr']:7.2f}  {row['vgg_distance']:12.4f}"
        )
    return "\n".join([*lines, f"{result['sheet']}  pictures side by side"])


def _candidates(settings: Settings) -> list[tuple[str, tuple[Method, ...]]]:
    """Name and methods of every --apply."""
    if not settings.apply:
        raise UserError("got no method to compare; give at least one, such as --apply taylorseer:interval=4")
    return [(words, tuple(make_method(one) for one in re.split(r"\+(?=[A-Za-z])", words))) for words in settings.apply]


def _calls(settings: Settings) -> list[dict[str, Any]]:
    """The arguments of the pipeline's call for each prompt."""
    if not settings.folder:
        raise UserError("no pipeline was given; write: smalti bench pipe FOLDER --prompts FILE --apply METHOD")
    if not settings.prompts:
        raise UserError("no prompts were given; write --prompts FILE, a file with a prompt a line")
    if settings.steps < 1:
        raise UserError(f"steps is {settings.steps}; it must be a whole number from 1")
    return read_calls(settings.prompts, settings.size, settings.seed)


def _counted(
    pipe: Any, named: list[tuple[str, tuple[Method, ...]]], call: dict[str, Any], steps: int
) -> list[Candidate]:
    """All ways to draw, with the FLOPs of the first prompt: plain, the candidates, then fewer steps of equal cost.

    FLOPs are linear in the steps, so two plain runs tell how many cost as much as a candidate.
    """
    ways = [Candidate("plain", (), steps), *(Candidate(name, methods, steps) for name, methods in named)]
    bar = tqdm(total=len(ways), desc="counting FLOPs", unit="run", file=sys.stderr, leave=False)
    for way in ways:
        with _applied(pipe, way) as handle:
            way.flops = count_flops(lambda way=way: _call(pipe, call, way)).total
        way.report = None if handle is None else handle.report().as_json()
        bar.update()
    half = Candidate("half", (), max(1, steps // 2))
    if half.steps < steps:
        half.flops = count_flops(lambda: _call(pipe, call, half)).total
        slope = (ways[0].flops - half.flops) / (steps - half.steps)
        fixed = ways[0].flops - slope * steps
        costs = {math.ceil(round((way.flops - fixed) / slope, 6)) for way in ways[1:]}
        fewer = [Candidate(f"{count} steps", (), count) for count in sorted(costs) if 1 <= count < steps]
        for way in fewer:
            way.flops = fixed + slope * way.steps
        ways += fewer
    bar.close()
    return ways


@contextmanager
def _applied(pipe: Any, way: Candidate) -> Iterator[Any]:
    with ExitStack() as stack:
        yield stack.enter_context(apply(pipe, *way.methods)) if way.methods else None


def _draw(pipe: Any, way: Candidate, call: dict[str, Any], device: torch.device) -> None:
    """One picture: its pixels, seconds and peak memory."""
    with _applied(pipe, way), _peak_memory(device) as peak:
        way.seconds.append(seconds(lambda: way.pictures.append(_call(pipe, call, way))))
    way.peaks.append(peak[0])


def _call(pipe: Any, call: dict[str, Any], way: Candidate) -> list[Image.Image]:
    """The frames of one call; a picture is one frame."""
    arguments = {name: value for name, value in call.items() if name != "seed"}
    (generator,) = generators_for([call["seed"]])
    try:
        with torch.no_grad():
            result = pipe(**arguments, num_inference_steps=way.steps, generator=generator)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError) or way.methods:
            raise
        raise UserError(f"{type(pipe).__name__} refused {arguments}: {error}") from error
    drawn = getattr(result, "images", None)
    drawn = getattr(result, "frames", [None])[0] if drawn is None else drawn
    if drawn is None:
        raise UserError(f"{type(pipe).__name__} gives neither images nor frames; pictures are compared here")
    return [one if isinstance(one, Image.Image) else _image(one) for one in drawn]


def _image(array: Any) -> Image.Image:
    """A frame (H, W, 3) in [0, 1]."""
    return Image.fromarray((array * 255).round().clip(0, 255).astype("uint8"))


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list that holds the peak in bytes once the block has ended."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated()
        return
    process, is_over = psutil.Process(), threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(POLL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


@torch.no_grad()
def _compare(way: Candidate, plain: Candidate, network: VGG16) -> None:
    """PSNR and VGG distance of every picture, of a clip the mean over its frames."""
    for ours, theirs in zip(way.pictures, plain.pictures, strict=True):
        frames = []
        for one, other in zip(ours, theirs, strict=True):  # frame by frame, so that long clips fit
            pixels = [from_images([picture]).to(network.mean.device) for picture in (one, other)]
            error = float(((pixels[0] - pixels[1]) / 2).square().mean())
            frames.append((-10 * math.log10(max(error, ROUNDING)), float(network(*pixels))))
        way.psnr.append(fmean(psnr for psnr, _ in frames))
        way.distances.append(fmean(distance for _, distance in frames))


def _row(way: Candidate, plain: Candidate) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(plain.seconds, way.seconds, strict=True)]
    low, high = bootstrap_interval(ratios)
    return {
        "name": way.name,
        "methods": [str(method) for method in way.methods],
        "steps": way.steps,
        "seconds": fmean(way.seconds),
        "ratio": {"median": median(ratios), "low": low, "high": high, "pairs": len(ratios)},
        "flops": way.flops,
        "peak_bytes": max(way.peaks),
        "psnr": fmean(way.psnr),
        "vgg_distance": fmean(way.distances),
        "report": way.report,
    }


def _save_sheet(out: Path, ways: Sequence[Candidate], calls: list[dict[str, Any]]) -> None:
    """A row a prompt, a column a way; of a clip its middle frame."""
    shown = range(min(len(calls), SHEET_ROWS))
    frames = [[way.pictures[row][len(way.pictures[row]) // 2] for way in ways] for row in shown]
    size = frames[0][0].size
    pictures = [one if one.size == size else one.resize(size) for row in frames for one in row]
    labels = [
        f"{way.name}, {way.psnr[row]:.1f} dB" if way is not ways[0] else f"{calls[row].get('prompt', 'plain')}"
        for row in shown
        for way in ways
    ]
    scale = max(1, SHEET_SIDE // size[1])
    with atomic_file(out) as temporary:
        sheet(pictures, labels, columns=len(ways), scale=scale).save(temporary, format="PNG")
