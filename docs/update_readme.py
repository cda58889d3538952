"""Writes the README's figures from results/*.json, between its markers: `make docs`."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- figures: written by make docs -->", "<!-- end of figures -->"


def figures() -> str:
    """The tables of all recorded results, as Markdown."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "results").glob("*.json"))]
    parts = []
    for result in results:
        if result["benchmark"] == "emoji":
            rows = "\n".join(f"| {name} | {value} |" for name, value in result["figures"].items())
            topics = ", ".join(result["topics"] or ["all"])
            parts.append(
                f"`smalti bench emoji`: held-out concepts of the topics {topics}, drawn from their captions "
                f"({result['hardware']}, {result['date']}).\n\n| figure | value |\n|---|---|\n{rows}\n"
            )
    parts += [_plans(result) for result in results if result["benchmark"] == "plan"]
    speeds = [result for result in results if result["benchmark"] == "mmdit_speed"]
    if speeds:
        rows = "\n".join(
            f"| {result['settings']['shape']} | {_ratio(result['training'])} | {_ratio(result['sampling'])} "
            f"| {result['hardware']} | {result['date']} |"
            for result in speeds
        )
        parts.append(
            "`smalti bench mmdit_speed`: seconds of our MMDiT over those of diffusers' `FluxTransformer2DModel` with "
            "the same weights and inputs, paired, median [95 % interval]; below 1 is faster.\n\n"
            f"| shape | training step | sampling step | hardware | date |\n|---|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


def updated(readme: str) -> str:
    """The README with current figures."""
    before, rest = readme.split(START)
    return f"{before}{START}\n{figures()}{END}{rest.split(END)[1]}"


def _plans(result: dict) -> str:
    """What the planner found beside the plain way of the same time that comes nearest, on captions it never saw."""
    rows = []
    for one in result["plans"]:
        ours, *others = one["rows"][1:]
        other = min(others, key=lambda row: row["distance"])
        rows.append(
            f"| {one['steps']} | {ours['way']} | {ours['speedup']:.2f} | {ours['distance']:.4f} "
            f"| {other['way']} | {other['speedup']:.2f} | {other['distance']:.4f} | {one['minutes']:.1f} |"
        )
    wanted = result["plans"][0]["speedup"]
    return (
        f"`smalti bench plan`: plans for {result['model']}, {wanted:g} times faster, and the nearest plain way "
        f"of the same time or a little more; distance of final latents to the plain run "
        f"({result['hardware']}, {result['date']}).\n\n"
        "| steps | the plan | times faster | distance | nearest plain way | times faster | distance | minutes |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _ratio(part: dict) -> str:
    return f"{part['median']:.3f} [{part['low']:.3f}, {part['high']:.3f}]"


if __name__ == "__main__":
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if updated(text) != text:
        path.write_text(updated(text), encoding="utf-8")
        print("README.md updated", file=sys.stderr)
