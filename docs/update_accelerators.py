"""Writes docs/accelerators.md and its plots from results/accelerators*.json: `make docs`."""

import json
import math
from pathlib import Path
from typing import Any

from smalti.core.discovery import load_benchmark

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HEAD = """# Faster without training

Written by `make docs` from what `smalti bench accelerators` recorded. Every method that is installed is asked for
settings of a wanted speed, and measured on models that ship: times faster than the plain run in wall time, and how
far the final latents end from it. Beside them stand the plain ways: fewer steps, another solver, guidance on a part
of the interval. Which comes out ahead is left as it was found. Here each method has the first few settings that it
offers; `smalti plan` changes them further, and what that gains stands in the README.

These models are small: what they draw has 64 to 512 tokens, where attention is a small part of the work. Methods that
thin attention out cannot win here; from how many tokens on a method is faster at all stands below. How TaylorSeer
does beside diffusers' own and cache-dit's is in [peers.md](peers.md).
"""
ELSEWHERE = """## What the papers report

Full-size models with trained weights were not run for this page; these are the papers' figures, not measured by us.

| method | where | what is reported | source |
|---|---|---|---|
| TaylorSeer | FLUX.1-dev | 4.99 times fewer FLOPs, 3.53 times faster | arXiv 2503.06923 |
| confidence-gated Taylor | FLUX.1-dev, DiT, Wan 2.1 | 3.17, 2.36 and 4.14 times faster | arXiv 2508.02240 |
| RAS | Stable Diffusion 3, Lumina-Next | up to 2.36 and 2.51 times faster | arXiv 2502.10389 |
| GRAT | 8192 x 8192 pixels | attention 35.8 times faster | arXiv 2505.14687 |
| CLEAR | FLUX.1-dev, 8K | 99.5 % less attention, 6.3 times faster | arXiv 2412.16112 |
| DraftAttention | HunyuanVideo 768p, 60, 80 and 90 % sparse | 1.31, 1.58 and 1.75 times faster | arXiv 2505.14708 |
| Re-ttention | CogVideoX-2B, PixArt-Sigma, 96.9 % sparse | over 45 % less time | arXiv 2505.22918 |
| Sparse-vDiT | CogVideoX1.5, HunyuanVideo, Wan 2.1 | 1.76, 1.85 and 1.58 times faster | arXiv 2506.03065 |
| EcoDiff | SDXL, FLUX | 20 % of the parameters removed | arXiv 2412.02852 |
| LightX2V | Wan 2.1 I2V 14B, 480p, 81 frames, one H100 | 5.18 s a step, diffusers 9.77 s | its own table |
"""


def results(kind: str) -> list[dict[str, Any]]:
    """Recorded results of a benchmark."""
    files = sorted((ROOT / "results").glob(f"{kind}*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def page() -> str:
    """The page, as Markdown."""
    parts, benchmark = [HEAD], load_benchmark("accelerators")
    for result in results("accelerators"):
        where = f"{result['hardware']}, {result['date']}"
        for model in result["models"]:
            name = f"{model['model']}-{model['steps']}"
            rows = "\n".join(_row(row) for row in best_of_each(model["rows"]))
            parts.append(
                f"## `{model['model']}`, {model['steps']} steps\n\n![time and distance](accelerators-{name}.svg)\n\n"
                f"Attention is {model['attention']:.0%} of the FLOPs ({where}). Of each method the settings that none "
                "of its others beats in both:\n\n| method | times faster | distance | PSNR | times fewer FLOPs | kept "
                f"MiB | how |\n|---|---|---|---|---|---|---|\n{rows}\n"
            )
        if result.get("full"):
            rows = "\n".join(
                f"| {one['model']} {' x '.join(map(str, one['size']))} | `{one['method']}` | {one['ratio'][3]:.2f} "
                f"| {_ratio(one['ratio'])} |"
                for one in result["full"]
            )
            parts.append(
                f"## Published shapes, random weights\n\nSeconds alone ({where}).\n\n| model, frames x height x width "
                f"| method | dense, seconds | times faster |\n|---|---|---|---|\n{rows}\n"
            )
            continue
        counts = list(dict.fromkeys(count for one in result["tokens"] for count in one["ratios"]))
        rows = "\n".join(
            f"| `{one['method']}` | " + " | ".join(_ratio(one["ratios"].get(count)) for count in counts)
            + f" | {benchmark.faster_from(one['ratios'])} |"
            for one in result["tokens"]
        )  # fmt: skip
        parts.append(
            "## From how many tokens on\n\n![ratio by tokens](accelerators-tokens.svg)\n\nA random model of `emoji`'s "
            f"size (4 M parameters), 12 steps: seconds of the plain run over ours, median [95 % interval] ({where}).\n"
            f"\n| method | {' | '.join(f'{count} tokens' for count in counts)} | |\n"
            f"|---|{'---|' * (len(counts) + 1)}\n{rows}\n"
        )
    parts.append(ELSEWHERE)
    return "\n".join(parts)


def best_of_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every method the rows that no other of it beats in speed and distance; methods in the order of their best."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-row["speedup"], row["distance"])):
        front = found.setdefault(row["method"], [])
        if not front or row["distance"] < front[-1]["distance"]:
            front.append(row)
    return [row for name in sorted(found, key=lambda name: (name != "plain", name)) for row in found[name]]


def draw_models(result: dict[str, Any]) -> None:
    """Time against distance, one file a model."""
    for model in result["models"]:
        figure, axes = _figure()
        fronts: dict[str, list[dict[str, Any]]] = {}
        for row in best_of_each(model["rows"]):
            fronts.setdefault(row["method"], []).append(row)
        for index, (name, rows) in enumerate(fronts.items()):
            style = {"color": "0.4", "marker": "s"} if name == "plain" else {"color": f"C{index % 10}", "marker": "o"}
            rows = sorted(rows, key=lambda row: row["speedup"])
            axes.plot([row["speedup"] for row in rows], [row["distance"] for row in rows], label=name, **style)
        axes.set(xlabel="times faster than the plain run", ylabel="distance to the plain run", yscale="log")
        axes.set_title(f"{model['model']}, {model['steps']} steps")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        _save(figure, f"accelerators-{model['model']}-{model['steps']}.svg")


def draw_tokens(result: dict[str, Any]) -> None:
    """How much faster by number of tokens."""
    figure, axes = _figure()
    for one in result["tokens"]:
        counts = sorted(map(int, one["ratios"]))
        axes.plot(counts, [one["ratios"][str(count)][0] for count in counts], "o-", label=one["method"].split(":")[0])
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    axes.set(xlabel="image tokens", ylabel="seconds, plain over ours", xscale="log", yscale="log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    ticks = [0.25, 0.5, 1, 2, 4]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _save(figure, "accelerators-tokens.svg")


def _figure() -> tuple[Any, Any]:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "smalti"
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, name: str) -> None:
    figure.savefig(DOCS / name, format="svg", metadata={"Date": None})


def _row(row: dict[str, Any]) -> str:
    psnr = "" if math.isnan(row["psnr"]) else f"{row['psnr']:.1f}"
    return (
        f"| {row['method']} | {row['speedup']:.2f} | {row['distance']:.4f} | {psnr} | {row['flops']:.2f} "
        f"| {row['kept'] / 2**20:.1f} | `{row['way']}` |"
    )


def _ratio(found: list[float] | None) -> str:
    return "" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


if __name__ == "__main__":
    (DOCS / "accelerators.md").write_text(page(), encoding="utf-8")
    for recorded in results("accelerators"):
        draw_models(recorded)
        if recorded["tokens"]:
            draw_tokens(recorded)
