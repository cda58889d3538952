"""Runs claims and records their verdicts.

A record holds the verdict, what it was measured on, and hashes of everything it rests on: it is stale as soon as one of
them changes. The rule's own commit is the last one that touched the page before the run.
"""

import subprocess
import time
from pathlib import Path
from typing import Any

from smalti.core.catalogue import ROOT, entry, fingerprint, results_folder
from smalti.core.discovery import load_member
from smalti.core.errors import UserError
from smalti.core.files import read_json, write_json
from smalti.core.system import Verdict
from smalti.evaluation.claim_context import ClaimContext, choose_device
from smalti.zoo.loader import provenance


def run_claim(slug: str, is_full: bool = False, budget: float = 1.0, train: bool = False) -> dict[str, Any] | None:
    """Runs the small or the full claim of a system.

    Returns:
        The record in json types, or None if the system has no full claim.

    Raises:
        UserError: the system is unknown or only planned, or a full claim is asked for without a GPU.
    """
    one = entry(slug)
    if one.page is None:
        raise UserError(f"{one.system.slug} is planned: it has no claim yet; smalti systems lists those that have one")
    page = load_member("systems", one.module)
    claim = getattr(page, "full" if is_full else "small", None)
    if claim is None:
        return None
    ctx = ClaimContext(one.system.slug, choose_device(is_full), budget=budget, train=train)
    before = fingerprint(one)
    started = time.perf_counter()
    verdict: Verdict | None = claim(ctx)
    if verdict is None:
        return None
    return {
        "slug": one.system.slug,
        "kind": "full" if is_full else "small",
        "budget": budget,
        "verdict": verdict.as_json(),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": ctx.hardware,
        **provenance(),
        **_commits(one.page),
        "fingerprint": before,
    }


def record_path(record: dict[str, Any]) -> Path:
    """The file of a record.

    Raises:
        UserError: this is no checkout, so there is nowhere to record.
    """
    folder = ROOT.parents[1] / "results" / "claims"
    if results_folder() is None or not folder.is_dir():
        raise UserError("verdicts are recorded in a checkout of smalti, and this is an installed package")
    full = ".full" if record["kind"] == "full" else ""
    return folder / f"{record['slug']}{full}.{record['machine']}.json"


def save_record(record: dict[str, Any]) -> Path:
    """Writes a record; one at more than the default budget stands beside the first run, under "second"."""
    path = record_path(record)
    if record["budget"] > 1:
        if not path.is_file():
            raise UserError(f"{path.name} holds no run at the default budget; record that first")
        record = {**read_json(path), "second": record}
    write_json(path, record)
    return path


def outcome(record: dict[str, Any]) -> str:
    """The outcome that counts: of a second run, if there was one."""
    return record.get("second", record)["verdict"]["outcome"]


def table(records: list[dict[str, Any]]) -> str:
    """Verdicts as text."""
    lines = []
    for record in records:
        verdict = record["verdict"]
        lines.append(
            f"{record['slug']}: {verdict['outcome'].upper()} ({record['seconds']:.0f} s, {record['hardware']})"
        )
        lines.append(f"  {verdict['measured']} [{verdict['unit']}]; rule: {verdict['rule']}")
        numbers = {"ours": verdict["ours"], **verdict["comparators"]}
        lines.append("  " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        for check in verdict["checks"]:
            mark = {True: "ok", False: "NO", None: "  "}[check["holds"]]
            value = check["value"] if isinstance(check["value"], str) else f"{check['value']:.4g}"
            lines.append(f"  {mark} {check['name']}: {value}" + (f" ({check['rule']})" if check["rule"] else ""))
        lines += [f"  {verdict['notes']}"] if verdict["notes"] else []
    return "\n".join(lines)


def _commits(page: Path) -> dict[str, Any]:
    """The commit now, the one that last touched the page, and whether anything differs from it; None outside git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--", str(page), str(ROOT))
    return {
        "commit": git("rev-parse", "HEAD"),
        "rule_commit": git("log", "-1", "--format=%H", "--", str(page)) or None,
        "is_dirty": None if dirty is None else bool(dirty),
    }
