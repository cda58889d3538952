"""A plan for a pipeline by name or folder: prompts are read, the search runs, file and plot are written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.acceleration.plan import Plan
from smalti.acceleration.planner import plan
from smalti.core.errors import UserError
from smalti.core.files import atomic_file, check_creatable
from smalti.data.packages import cache_folder
from smalti.evaluation.held_out_prompts import held_out_prompts
from smalti.evaluation.pipe_calls import check_arguments, read_calls, read_size
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.zoo.loader import model_names
from smalti.zoo.pipelines import device_of, load_pipeline

PROMPTS = 64


@dataclass(frozen=True)
class Request:
    """What to plan.

    Args:
        model: name of a shipped model, or the folder of any diffusers pipeline.
        speedup: times faster, or
        psnr: dB to the plain run's pictures.
        prompts: file, a prompt a line or .jsonl; for a shipped model 64 held-out captions if None.
        steps: of the plain run, from 2.
        size: pixels, "64" or "64x96"; the pipeline's own if empty.
        batch: prompts in a call, from 1.
        minutes: of searching.
        max_memory: GiB that methods may keep; None = any.
        out: json file of the plan; measurements are kept beside it until it is written.
        plot: PNG file; None = no plot.
        device: auto, cpu or cuda.
        cluster: where ways are tried first: empty for this process, or ray.
        workers: of the cluster.

    Raises:
        UserError: a value is out of range.
    """

    model: str
    speedup: float | None = None
    psnr: float | None = None
    prompts: Path | None = None
    steps: int = 28
    size: str = ""
    batch: int = 1
    minutes: float = 10.0
    max_memory: float | None = None
    out: Path = Path("out/plan.json")
    plot: Path | None = None
    device: str = "auto"
    cluster: str = ""
    workers: int = 2

    def __post_init__(self):
        for name, low in (("steps", 2), ("batch", 1), ("workers", 1)):
            if getattr(self, name) < low:
                raise UserError(f"{name} is {getattr(self, name)}; it must be a whole number from {low}")
        if not self.minutes > 0:
            raise UserError(f"the budget is {self.minutes} minutes; give a number above 0")


def make(request: Request) -> Plan:
    """Searches, and writes plan and plot.

    Raises:
        UserError: something asked for is not possible.
    """
    check_creatable(request.out)
    if request.plot is not None:
        check_creatable(request.plot)
    calls = _calls(request)
    pipe = open_pipeline(request.model, request.device)
    check_arguments(pipe, calls)
    kept = request.out.with_suffix(".search.json")
    found = plan(
        pipe, calls, request.speedup, request.psnr, steps=request.steps, batch=request.batch,
        max_memory=request.max_memory, minutes=request.minutes, keep=kept, progress=True,
        cluster=request.cluster, workers=request.workers,
    )  # fmt: skip
    found.save(request.out)
    kept.unlink(missing_ok=True)
    if request.plot is not None:
        draw_front(found, request.plot)
    return found


def open_pipeline(model: str, device: str = "auto") -> Any:
    """A pipeline whose texts are encoded once only, so that drawing is what is timed."""
    pipe = load_pipeline(model, device_of(device))
    if isinstance(pipe, TextToImagePipeline) and pipe.config["text_encoder"] == "minilm":
        pipe.use_text_encoder(EmbeddingCache(MiniLMEncoder(length=pipe.config["text_length"]), cache_folder() / "text"))
    return pipe


def text(found: Plan, out: Path) -> str:
    """A plan for people."""
    [(name, value)] = found.target.items()
    unit = "times faster" if name == "speedup" else "dB"
    lines = [found.way, _figures("held-out prompts", found.measured)]
    if not found.is_met:
        lines.append(f"the target of {value:g} {unit} is not met; this is the best that was found")
    lines += ["plain ways of about the same time:", *(_figures(str(one["way"]), one) for one in found.alternatives)]
    lines += ["time against distance:", *(_figures(str(one["way"]), one) for one in found.front)]
    return "\n".join([*lines, *found.notes, f"{out}  use it with --apply {out}, or smalti.apply(pipe, Plan.load(...))"])


def _figures(name: str, measured: Any) -> str:
    parts = [f"{measured['speedup']:5.2f} times faster", f"distance {measured['distance']:.4f}"]
    parts += [f"{measured['psnr']:.1f} dB"] if "psnr" in measured else []
    return f"  {', '.join(parts)}  {name}"


def draw_front(found: Plan, path: Path) -> None:
    """Time against distance of the front, the plain ways, and the chosen one."""
    try:
        from matplotlib.figure import Figure  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("a plot needs matplotlib, which is not installed; run: pip install 'smalti[plots]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points, mark in (("front", found.front, "o-"), ("plain ways", found.alternatives, "s")):
        axes.plot([1 / one["speedup"] for one in points], [one["distance"] for one in points], mark, label=name)
    axes.plot(1 / found.measured["speedup"], found.measured["distance"], "*", markersize=14, label="the plan")
    axes.set(xlabel="time, plain run = 1", ylabel="distance to the plain run", yscale="log", title=found.model)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _calls(request: Request) -> list[dict[str, Any]]:
    if request.prompts is not None:
        return read_calls(request.prompts, request.size)
    if request.model not in model_names(only_pipelines=True):
        raise UserError("no prompts were given; write --prompts FILE, a file with a prompt a line, at least 4 a call")
    return [{**call, **read_size(request.size)} for call in held_out_calls(request.model)]


def held_out_calls(model: str, count: int = PROMPTS) -> list[dict[str, Any]]:
    """Captions that a shipped model has never seen, with style and seed, in an order in which both halves have all
    styles."""
    prompts = held_out_prompts(model, count)
    rows = zip(prompts.texts, prompts.styles, prompts.seeds, strict=True)
    calls = [{"prompt": text, "style": style, "seed": seed} for text, style, seed in rows]
    return [*calls[::2], *calls[1::2]]
