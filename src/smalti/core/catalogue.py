"""The systems: rows of the catalogue, pages that exist, and the state that files give them.

Nothing here imports a page or anything heavy: a page's header is read from its source, a state from recorded verdicts.
"""

import ast
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from smalti.core.discovery import ROOT, member_path, members, roots
from smalti.core.errors import UserError, unknown_name
from smalti.core.files import file_hash, read_json
from smalti.core.system import System

State = Literal["planned", "implemented", "holds", "fails", "unresolved", "stale"]
CATALOGUE = "catalogue.toml"


@dataclass(frozen=True)
class Entry:
    """One system.

    Args:
        system: its header, completed from the catalogue.
        page: its page, or None while it is planned.
        number: its place in the source list; None for one that is not in it.
    """

    system: System
    page: Path | None
    number: int | None

    @property
    def module(self) -> str:
        """The slug as a module name."""
        return self.system.slug.replace("-", "_")


def entries() -> list[Entry]:
    """All systems in the order of the source list, then those outside of it."""
    rows = {row["slug"]: row for row in _rows()}
    pages = {one.replace("_", "-"): member_path("systems", one) for one in members("systems")}
    listed = [_entry(row, pages.get(slug)) for slug, row in rows.items()]
    others = [Entry(read_header(page), page, None) for slug, page in pages.items() if slug not in rows and page]
    return listed + others


def entry(slug: str) -> Entry:
    """One system.

    Raises:
        UserError: there is none of this name; the nearest are offered.
    """
    found = {one.system.slug: one for one in entries()}
    name = slug.replace("_", "-")
    if name not in found:
        raise unknown_name("system", slug, found)
    return found[name]


def read_header(page: Path) -> System:
    """`SYSTEM` of a page, without running it.

    Raises:
        UserError: the page has none, or it is not written in literals.
    """
    for node in ast.parse(page.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _names(node) == ["SYSTEM"]:
            try:
                values = {one.arg: ast.literal_eval(one.value) for one in node.value.keywords if one.arg}
                return System(**values)
            except (ValueError, TypeError) as error:
                raise UserError(f"{page}: SYSTEM must be written in literals and known fields ({error})") from error
    raise UserError(f"{page} has no SYSTEM = System(...); every system page has one")


def purpose(page: Path) -> str:
    """The docstring of a page."""
    return ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or ""


def results_folder() -> Path | None:
    """Where verdicts are recorded: beside the package in a wheel, at the top of a checkout."""
    folders = [ROOT / "results" / "claims", ROOT.parents[1] / "results" / "claims"]
    return next((folder for folder in folders if folder.is_dir()), None)


def verdicts(slug: str) -> dict[str, dict[str, Any]]:
    """The recorded verdicts of a system by file name: `<slug>.cpu`, `<slug>.full.h200`."""
    folder = results_folder()
    paths = sorted(folder.glob(f"{slug}.*.json")) if folder is not None else []
    return {path.stem: read_json(path) for path in paths}


def state(one: Entry) -> State:
    """What files say of a system; of several small verdicts the worst counts."""
    if one.page is None:
        return "planned"
    small = [record for name, record in verdicts(one.system.slug).items() if ".full." not in name]
    if not small:
        return "implemented"
    if any(is_stale(one, record) for record in small):
        return "stale"
    outcomes = [record.get("second", record)["verdict"]["outcome"] for record in small]
    return next(outcome for outcome in ("fails", "unresolved", "holds") if outcome in outcomes)


def is_stale(one: Entry, record: dict[str, Any]) -> bool:
    """Whether the page, what it uses, its models or its data changed since a verdict was recorded."""
    return record["fingerprint"] != fingerprint(one)


def fingerprint(one: Entry) -> dict[str, str]:
    """Hashes of everything a claim rests on, by path inside the package."""
    if one.page is None:
        raise UserError(f"{one.system.slug} is planned: it has no page yet")
    files = [one.page, *(source for source in map(source_of, one.system.uses) if source)]
    for model in one.system.models:
        files += sorted(path for path in (ROOT / "zoo" / model).rglob("*") if path.is_file())
    for name in one.system.data:
        files += sorted((ROOT / "data" / "prepared").glob(f"{name}.*"))
    return {_relative(path): _hash(path, path.stat().st_mtime_ns) for path in files}


def source_of(dotted: str) -> Path | None:
    """The file of a dotted name such as "acceleration.taylorseer.TaylorSeer"; None if there is none."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        for root in roots():
            path = root.joinpath(*parts[:count]).with_suffix(".py")
            if path.is_file():
                return path
    return None


def where(one: Entry) -> dict[str, list[str]]:
    """Paths of everything that belongs to a system; files that do not exist are left out."""
    uses = [path for path in map(source_of, one.system.uses) if path is not None]
    top = ROOT.parents[1]
    own = [path.relative_to(ROOT) for path in uses if path.is_relative_to(ROOT)]
    tests = [top / "tests" / path.with_name(f"test_{path.name}") for path in own]
    folder = results_folder()
    results = sorted(folder.glob(f"{one.system.slug}.*.json")) if folder is not None else []
    paths = {
        "page": [one.page],
        "mechanism": uses,
        "tests": [*tests, top / "tests" / "systems" / f"test_{one.module}.py"],
        "example": [top / "examples" / f"{one.module}.py"],
        "results": results,
    }
    return {kind: [str(path) for path in some if path is not None and path.is_file()] for kind, some in paths.items()}


@cache
def _rows() -> tuple[dict[str, Any], ...]:
    return tuple(tomllib.loads((ROOT / "systems" / CATALOGUE).read_text(encoding="utf-8"))["system"])


def _entry(row: dict[str, Any], page: Path | None) -> Entry:
    facts = {key: row[key] for key in ("name", "summary", "title", "arxiv", "home") if key in row}
    header = System(slug=row["slug"], uses=()) if page is None else read_header(page)
    return Entry(replace(header, **facts), page, row["number"])


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _relative(path: Path) -> str:
    root = next(root for root in roots() if path.is_relative_to(root))
    return str(path.relative_to(root))


@cache
def _hash(path: Path, changed: int) -> str:
    return file_hash(path)[:16]


def row(one: Entry) -> dict[str, Any]:
    """What is told of a system in a list."""
    facts = {"number": one.number, "slug": one.system.slug, "name": one.system.name, "summary": one.system.summary}
    return {**facts, "stage": one.system.home, "state": state(one)}


def as_json(one: Entry) -> dict[str, Any]:
    """All that is known of a system."""
    records = verdicts(one.system.slug)
    return {
        **row(one),
        "paper": {"title": one.system.title, "arxiv": one.system.arxiv},
        "purpose": "" if one.page is None else purpose(one.page),
        "uses": list(one.system.uses),
        "where": where(one),
        "verdicts": {name: {**record, "stale": is_stale(one, record)} for name, record in records.items()},
    }


def by_stage(rows: list[dict[str, Any]]) -> str:
    """The list as text, one paragraph a stage."""
    stages: dict[str, list[str]] = {}
    width = max(len(row["slug"]) for row in rows)
    for row in rows:
        line = f"  {row['state']:12} {row['slug']:{width}}  {row['summary']}"
        stages.setdefault(row["stage"], []).append(line)
    return "\n\n".join("\n".join([stage, *lines]) for stage, lines in stages.items())


def as_text(one: dict[str, Any]) -> str:
    """A system as text."""
    paper = f"{one['paper']['title']} (arXiv {one['paper']['arxiv']})"
    lines = [f"{one['name']}: {one['summary']}", paper, f"{one['stage']}, {one['state']}"]
    lines += ["", one["purpose"]] if one["purpose"] else []
    lines += [""] + [f"{kind:10} {path}" for kind, paths in one["where"].items() for path in paths]
    for name, record in one["verdicts"].items():
        verdict = record["verdict"]
        stale = ", stale: it was measured on other code" if record["stale"] else ""
        numbers = {"ours": verdict["ours"], **verdict["comparators"]}
        lines += ["", f"{name}: {verdict['outcome']}{stale} ({record['hardware']}, {record['date']})"]
        lines += [f"  {verdict['measured']}; {verdict['rule']}"]
        lines += ["  " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())]
    return "\n".join(lines)
