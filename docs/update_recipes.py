"""Writes docs/recipes.md and its plots from results/recipes*.json: `make docs`."""

import json
from pathlib import Path
from typing import Any

from smalti.core.discovery import load_benchmark

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HEAD = """# What helps a small training

Written by `make docs` from what `smalti bench recipes` recorded. Each published aid is a switch of one training
(`smalti.recipes.aids.Aids`): here each alone, then those together that helped on emoji, with the same data, backbone
(DiT 6 x 96, 64 tokens), number of pictures and seeds. Rate, batch and EMA were tuned with as many trials for the plain
training as for the aids together. An aid that does not help at this size is shown as such; most were made for models a
hundred times larger and trainings a thousand times longer.
"""
MEANING = {
    "emoji": "FD is the Fréchet distance (EfficientNet-Lite0) to real pictures of held-out concepts; *right* is how "
    "often the judge ranks the caption first of 20; *probe* is the emoji group read off the hidden states.",
    "digits": "FD is the Fréchet distance in the features of a digit classifier; *right* is how often that classifier "
    "reads the class that was asked for; *probe* is the class read off the hidden states.",
}


def results() -> list[dict[str, Any]]:
    """Recorded results of the benchmark."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "results").glob("recipes*.json"))]


def page() -> str:
    """The page, as Markdown."""
    parts = [HEAD]
    for result in results():
        for one in result["data"]:
            if one["rows"]:
                parts.append(_data(one, result))
        if not result["is_whole"]:
            parts.append("Not all trainings were run yet: `smalti bench recipes` goes on where it stopped.\n")
    return "\n".join(parts)


def _data(one: dict[str, Any], result: dict[str, Any]) -> str:
    hours_to = load_benchmark("recipes").hours_to
    name, plain = one["data"], one["rows"][0]
    settings, goal = plain["setup"], plain["mean"]["distance"]
    lines = [
        f"## `{name}`\n",
        f"![distance by pictures seen](recipes-{name}.svg)\n",
        f"{settings['images']:,} pictures, batch {settings['batch']}, rate {settings['rate']:g}, EMA "
        f"{settings['ema']:g}, means of {len(plain['figures'])} seeds ({result['hardware']}, {result['date']}). "
        f"{MEANING[name]}\n",
        "| training | FD | FD, lowest to highest | right | probe | pictures a second | hours to the plain FD |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in one["rows"]:
        mean, hours = row["mean"], hours_to(row, goal)
        found = sorted(figures["distance"] for figures in row["figures"])
        reached = "never" if hours is None else f"{hours:.4f}"
        lines.append(
            f"| {row['name']} | {mean['distance']:.1f} | {found[0]:.1f} to {found[-1]:.1f} | {mean['right']:.3f} "
            f"| {mean['probe']:.3f} | {mean['images per second']:.0f} | {reached} |"
        )
    half = one.get("half")
    if half:
        lines.append(
            f"\nOn seeds that chose nothing, the aids together end at {half['ours']:.1f} with half of the pictures, "
            f"the plain training with all of them at {half['theirs']:.1f}: that they need no more than half "
            f"**{half['outcome']}** (95 % interval of the difference {half['low']:.1f} to {half['high']:.1f})."
        )
    return "\n".join(lines) + "\n"


def draw(one: dict[str, Any]) -> None:
    """Distance by pictures seen, one line a training."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "smalti"
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    for index, row in enumerate(one["rows"]):
        mean, images = row["mean"], row["setup"]["images"]
        points = [(1 / 4, mean["distance at 1/4"]), (1 / 2, mean["distance at 2/4"]), (1, mean["distance"])]
        color, width = ("0.3", 2.5) if row["name"] == "plain" else (f"C{index % 10}", 1.2)
        seen, values = [share * images for share, _ in points], [value for _, value in points]
        axes.plot(seen, values, "o-", label=row["name"], color=color, linewidth=width)
    axes.set(xlabel="pictures seen", ylabel="Fréchet distance", yscale="log")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(DOCS / f"recipes-{one['data']}.svg", format="svg", metadata={"Date": None})


if __name__ == "__main__":
    (DOCS / "recipes.md").write_text(page(), encoding="utf-8")
    for recorded in results():
        for data in recorded["data"]:
            if data["rows"]:
                draw(data)
