"""Writes docs/systems.md and the README's table of systems from the catalogue, the pages and results/claims."""

import sys
from pathlib import Path
from typing import Any

from smalti.core import catalogue

ROOT = Path(__file__).parents[1]
START, END = "<!-- systems: written by make docs -->", "<!-- end of systems -->"


def page() -> str:
    """docs/systems.md: what is implemented in full, then the list of all."""
    entries = catalogue.entries()
    parts = ["# Systems", "", "Written by `make docs` from the catalogue, the pages and the recorded verdicts.", ""]
    for one in entries:
        if one.page is not None:
            parts += _section(one, catalogue.as_json(one))
    parts += ["## All systems", "", "| system | what it is | stage | state |", "|---|---|---|---|"]
    for one in entries:
        row = catalogue.row(one)
        parts.append(f"| {row['name']} (`{row['slug']}`) | {row['summary']} | {row['stage']} | {row['state']} |")
    return "\n".join(parts) + "\n"


def table() -> str:
    """The README's part: implemented systems with their last verdict, and how many are planned."""
    rows = ["| system | what it is | last claim | measured |", "|---|---|---|---|"]
    entries = catalogue.entries()
    for one in entries:
        if one.page is None:
            continue
        records = [r for name, r in catalogue.verdicts(one.system.slug).items() if ".full." not in name]
        found = _short(records[0]["verdict"]) if records else "not yet run"
        rows.append(f"| `{one.system.slug}` | {one.system.summary} | {catalogue.state(one)} | {found} |")
    planned = sum(one.page is None for one in entries)
    return "\n".join([*rows, "", f"{planned} more are planned; [docs/systems.md](docs/systems.md) lists them."]) + "\n"


def updated(readme: str) -> str:
    """The README with the current table."""
    before, rest = readme.split(START)
    return f"{before}{START}\n{table()}{END}{rest.split(END)[1]}"


def _section(one: catalogue.Entry, facts: dict[str, Any]) -> list[str]:
    example = ROOT / "examples" / f"{one.module}.py"
    lines = [
        f"## {facts['name']}",
        "",
        f"*{facts['paper']['title']}*, arXiv {facts['paper']['arxiv']}. {facts['state']}.",
    ]
    lines += ["", facts["purpose"], ""]
    if example.is_file():
        lines += [f"[`examples/{example.name}`](../examples/{example.name})", "", "```python"]
        lines += [example.read_text(encoding="utf-8").strip(), "```", ""]
    for name, record in facts["verdicts"].items():
        verdict = record["verdict"]
        stale = " (stale: measured on other code)" if record["stale"] else ""
        found = (
            f"**{name}: {verdict['outcome']}**{stale}, {record['hardware']}, {record['date']}: {verdict['measured']}"
        )
        lines += [f"{found}; rule `{verdict['rule']}`. {_numbers(verdict)}. {verdict['notes']}", ""]
        lines += ["| check | value | rule | |", "|---|---|---|---|"]
        for check in verdict["checks"]:
            mark = {True: "holds", False: "fails", None: ""}[check["holds"]]
            lines.append(f"| {check['name']} | {_shown(check['value'])} | {check['rule']} | {mark} |")
        lines.append("")
    return lines


def _short(verdict: dict[str, Any]) -> str:
    """Ours beside the comparators that the rule names, or beside the two nearest."""
    others = verdict["comparators"]
    named = [name for name in others if name in verdict["rule"]]
    nearest = sorted(others, key=lambda name: abs(others[name] - verdict["ours"]))[:2]
    return _numbers(verdict | {"comparators": {name: others[name] for name in named or nearest}})


def _numbers(verdict: dict[str, Any]) -> str:
    numbers = {"ours": verdict["ours"], **verdict["comparators"]}
    return ", ".join(f"{name} {_shown(value)}" for name, value in numbers.items())


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


if __name__ == "__main__":
    for path, text in (
        (ROOT / "docs" / "systems.md", page()),
        (ROOT / "README.md", updated((ROOT / "README.md").read_text())),
    ):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path.name} updated", file=sys.stderr)
