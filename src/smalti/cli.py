"""The command line. Results go to the output stream, progress and warnings to the error stream.

Exit status: 0 done, 1 a claim does not hold, 2 the user's input is at fault (one line says what and what to do).
Everything heavy is imported inside the commands, so that `smalti --help` answers at once.
"""

import errno
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from smalti.core.errors import UserError

app = typer.Typer(
    help="The toolkit for diffusion transformers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Data sets: list them, or get one.", invoke_without_command=True)
app.add_typer(data_app, name="data")

# Typer carries its own copy of click and names only this one of its errors; the base is what bad usage raises.
_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; dots reach inside.")]

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Runs the command line and turns a user's mistake into one line and status 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")  # a user can act on our own warnings alone
    warnings.filterwarnings("default", module="smalti")
    warnings.showwarning = lambda message, *rest: print(f"smalti: {message}", file=sys.stderr)
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except _USAGE_ERROR as error:
        _fail(f"{error.format_message().rstrip('.')}; see smalti --help")
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        _fail(f"cannot write {error.filename or 'a file'}: {error.strerror}; free some space or choose another place")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"smalti{'' if rank == '0' else f' (process {rank})'}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _print(content: Any, as_json: bool, text: str) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False) if as_json else text)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="Name of a shipped model, or a folder.")] = "emoji",
    out: Annotated[
        Path, typer.Option(help="PNG file; of several pictures it is the sheet, they lie beside it.")
    ] = Path("out/picture.png"),
    seed: Annotated[int, typer.Option(help="Of the first picture of each prompt; the next ones count up.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 28,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none. Default: the model's.")] = None,
    count: Annotated[int, typer.Option(help="Pictures a prompt.")] = 1,
    style: Annotated[str | None, typer.Option(help="Drawing style (or label) of the model; 'all' draws each.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: one number or HEIGHTxWIDTH.")] = None,
    solver: Annotated[str, typer.Option(help="euler, heun, dpm++, unipc or sde.")] = "euler",
    methods: Annotated[
        list[str],
        typer.Option("--apply", metavar="SLUG[:KEY=VALUE,...]|PLAN", help="A method, or the file of a plan."),
    ] = [],  # noqa: B006 (typer copies it)
    file: Annotated[
        Path | None, typer.Option("--prompts", help="A prompt a line, or .jsonl; --out is then a folder.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="ray: the file's prompts are shared among workers.")] = "",
    workers: Annotated[int, typer.Option(help="Of the cluster.")] = 2,
    as_json: Json = False,
) -> None:
    """Draw pictures from prompts."""
    from smalti.tasks import generate_many, text_to_image

    if file is not None:
        if prompts or count != 1:
            raise UserError(
                "got --prompts FILE and prompts or --count beside it; every line of the file is one picture"
            )
        folder = out if out != Path("out/picture.png") else Path("out/pictures")
        asked = generate_many.Request(
            file, folder, model, seed, steps, guidance, style, size or "", solver, tuple(methods), cluster, workers
        )
        done = generate_many.draw_all(asked)
        text = f"{done['folder']}  {done['pictures']} pictures, {done['drawn']} of them drawn now; {done['list']}"
        _print(done, as_json, text)
        return
    if cluster:
        raise UserError("a cluster draws a file of prompts; give --prompts FILE")
    request = text_to_image.Request(
        tuple(prompts or ()), model, out, seed, steps, guidance, count, style, size, solver, tuple(methods)
    )
    result = text_to_image.draw(request)
    lines = [f"{p['file']}  {p['prompt']!r}, {p['style'] or 'no style'}, seed {p['seed']}" for p in result["pictures"]]
    if result["sheet"]:
        lines.append(f"{result['sheet']}  sheet of all")
    _print(result, as_json, "\n".join(lines))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Name of a shipped model, or the folder of any diffusers pipeline.")],
    speedup: Annotated[float | None, typer.Option(help="So many times faster, as near as possible.")] = None,
    psnr: Annotated[float | None, typer.Option(help="So near in dB, as fast as possible.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Yours, a line each or .jsonl; else held-out captions.")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps of the plain run.")] = 28,
    size: Annotated[str, typer.Option(help="Pixels: one number or HEIGHTxWIDTH; the pipeline's own if empty.")] = "",
    batch: Annotated[int, typer.Option(help="Prompts in a call.")] = 1,
    budget: Annotated[float, typer.Option(metavar="MINUTES", help="Of searching; the verdict comes on top.")] = 10.0,
    max_memory: Annotated[float | None, typer.Option(metavar="GIB", help="That methods may keep.")] = None,
    out: Annotated[Path, typer.Option(help="The plan's json file; a search that was stopped goes on.")] = Path(
        "out/plan.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="PNG file of time against distance.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cluster: Annotated[str, typer.Option(help="ray: ways are tried first by workers.")] = "",
    workers: Annotated[int, typer.Option(help="Of the cluster.")] = 2,
    as_json: Json = False,
) -> None:
    """Choose methods that meet a target on a pipeline, and show what they cost."""
    from smalti.tasks import plan_pipeline

    request = plan_pipeline.Request(
        model, speedup, psnr, prompts, steps, size, batch, budget, max_memory, out, plot, device, cluster, workers
    )
    found = plan_pipeline.make(request)
    _print({**asdict(found), "file": str(out)}, as_json, plan_pipeline.text(found, out))


@app.command()
def train(
    recipe: Annotated[str | None, typer.Option(help="A recipe of the package, such as emoji.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of pictures of one's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that the training writes.")] = Path("runs/train"),
    preset: Annotated[str, typer.Option(help="Preset of the recipe: cpu or gpu.")] = "cpu",
    size: Annotated[int | None, typer.Option(help="Picture size in pixels, 64 to 512 (with --data).")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of any diffusers autoencoder (with --data).")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for everything, 10m or 2h: chooses the rest (--data).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of --budget and stop.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    settings: Settings = [],  # noqa: B006 (typer copies it)
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the training in --out stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model from nothing."""
    from smalti.tasks import training
    from smalti.training.messages import is_main

    request = training.Request(
        recipe, data, out, preset, size, tokenizer, list(settings), resume, budget, dry_run, device
    )
    content, text = training.run(request)
    if is_main():
        _print(content, as_json, text)


@app.command()
def models(as_json: Json = False) -> None:
    """List the shipped models and what is known of them."""
    from smalti.zoo.loader import model_card, model_names

    cards = {name: model_card(name) for name in model_names()}
    lines = []
    for name, card in cards.items():
        facts = ", ".join(
            f"{key} {value}" for key, value in card.get("metrics", {}).items() if not isinstance(value, dict)
        )
        lines.append(
            f"{name}  recipe {card['recipe']}, {card['date']}, {card['hardware']}" + (f"\n    {facts}" if facts else "")
        )
    _print(cards, as_json, "\n".join(lines or ["no model ships with this installation"]))


@data_app.callback()
def data(context: typer.Context, as_json: Json = False) -> None:
    """List the data sets."""
    if context.invoked_subcommand is None:
        from smalti.data.catalog import datasets

        found = datasets()
        rows = [
            f"{one.name:14} {'ready' if one.is_ready else 'to get':7} {one.summary} ({one.licence})" for one in found
        ]
        _print([one.as_json() for one in found], as_json, "\n".join(rows))


@data_app.command("get")
def data_get(name: str, as_json: Json = False) -> None:
    """Fetch and prepare a data set; its licences lie beside it."""
    from smalti.data.catalog import get

    path = get(name, progress=True)
    _print({"name": name, "path": str(path)}, as_json, str(path))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="A benchmark; what it measures may follow.", show_default=False)
    ] = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    as_json: Json = False,
    wants_help: Annotated[
        bool, typer.Option("--help", "-h", help="Show this, or the settings of a benchmark.")
    ] = False,
) -> None:
    """Run a benchmark and print its figures. All of its settings are options too: --steps 8 is --set steps=8.

    Of your own pipeline: smalti bench pipe FOLDER --prompts FILE --apply taylorseer:interval=4
    """
    import inspect

    from smalti.core.discovery import benchmarks, load_benchmark
    from smalti.core.settings import override

    if name is None and not wants_help:
        raise UserError(f"name the benchmark: {', '.join(benchmarks())}")
    if name is None:
        print(f"{context.get_help()}\nBenchmarks: {', '.join(benchmarks())}")
        return
    module = load_benchmark(name)
    if wants_help:
        print(f"{inspect.getdoc(module)}\n\n{inspect.getdoc(module.Settings)}")
        return
    pairs = _bench_pairs(module, context.args)
    result = module.run(override(module.Settings(), [*pairs, *settings]))
    _print(result, as_json, module.table(result))


def _bench_pairs(module: Any, words: list[str]) -> list[str]:
    """`--key value`, and the word that a benchmark with an `ARGUMENT` takes without a key, as settings.

    A setting that is a list takes its option several times; one that is yes or no may stand alone.
    """
    from smalti.core.errors import unknown_name

    defaults = vars(module.Settings())
    given: dict[str, list[str]] = {}
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "=", word)
        key = option[2:].replace("-", "_") or getattr(module, "ARGUMENT", "")
        if key not in defaults:
            raise unknown_name("option", option or word, [f"--{one.replace('_', '-')}" for one in defaults])
        if not equals:
            value = "true" if isinstance(defaults[key], bool) else next(rest, None)
        if value is None:
            raise UserError(f"option {option} has no value; write {option} VALUE")
        if key in given and not isinstance(defaults[key], tuple):
            raise UserError(f"{key} was given twice: {given[key][0]!r} and {value!r}; give one")
        given.setdefault(key, []).append(value)
    is_list, is_text = ({key for key in given if isinstance(defaults[key], kind)} for kind in (tuple, str))
    return [
        f"{key}={json.dumps(values) if key in is_list else json.dumps(values[0]) if key in is_text else values[0]}"
        for key, values in given.items()
    ]


@app.command()
def systems(
    slug: Annotated[str | None, typer.Argument(help="One system; all without.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the systems with their state, or tell all of one."""
    from smalti.core import catalogue

    if slug is None:
        rows = [catalogue.row(one) for one in catalogue.entries()]
        _print(rows, as_json, catalogue.by_stage(rows))
        return
    one = catalogue.as_json(catalogue.entry(slug))
    _print(one, as_json, catalogue.as_text(one))


@app.command()
def where(slug: str, as_json: Json = False) -> None:
    """Print the files of a system: page, mechanism, tests, example, results."""
    from smalti.core import catalogue

    found = catalogue.where(catalogue.entry(slug))
    _print(found, as_json, "\n".join(f"{kind:10} {path}" for kind, paths in found.items() for path in paths))


@app.command()
def claim(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="SLUG...", show_default=False)] = None,
    full: Annotated[bool, typer.Option("--full", help="The claim at full size, on a GPU.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Write the verdict into results/claims.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Of all systems that have a page.")] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Of all systems, those whose verdict is missing or stale.")
    ] = False,
    budget: Annotated[float, typer.Option(help="Factor on the work; 2 for a second run.")] = 1.0,
    train: Annotated[bool, typer.Option("--train", help="Train anew what ships as a variant.")] = False,
    as_json: Json = False,
) -> None:
    """Run the claims of systems; status 1 if one does not hold."""
    from smalti.core import catalogue
    from smalti.evaluation import claims

    chosen = list(slugs or [])
    if stale:
        chosen += [one.system.slug for one in catalogue.entries() if catalogue.state(one) in ("implemented", "stale")]
    if every:
        chosen += [one.system.slug for one in catalogue.entries() if one.page is not None]
    if not chosen and not stale:
        raise UserError("name the systems whose claims to run, or give --stale or --all; smalti systems lists them")
    for slug in chosen:
        catalogue.entry(slug)
    records = []
    for slug in chosen:
        result = claims.run_claim(slug, full, budget, train)
        if result is None:
            print(f"smalti: {slug} has no {'full' if full else 'small'} claim", file=sys.stderr)
            continue
        records.append(result)
        if record:
            print(f"recorded {claims.save_record(result)}", file=sys.stderr)
    _print(records, as_json, claims.table(records))
    if any(claims.outcome(one) != "holds" for one in records):
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation: versions, devices, extras, models, data, disk."""
    from smalti.tasks.doctor import checkup

    checks = checkup()
    lines = [f"{'ok ' if check['ok'] else 'NO '} {check['name']:22} {check['found']}" for check in checks]
    _print(checks, as_json, "\n".join(lines))
    if not all(check["ok"] for check in checks if check["required"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
