import json
import os
import subprocess
import sys

import pytest

from smalti.core import catalogue
from smalti.core.errors import UserError
from smalti.core.system import Check, Verdict

TOY_PAGE = '''"""A toy. It shows. It claims."""
from smalti.acceleration.toy import Toy
from smalti.core.system import System, Verdict
SYSTEM = System(slug="toy", uses=("acceleration.toy.Toy",), name="Toy", summary="does little", home="acceleration")
def small(ctx):
    return Verdict("length", "m", 1.0, {"other": 2.0}, "ours < other", "holds" if ctx.budget == 1 else "fails")
'''
TOY = '''"""A toy."""
from dataclasses import dataclass
from smalti.core.method import CoreMethod
@dataclass(frozen=True)
class Toy(CoreMethod):
    factor: float = 1.0
    @classmethod
    def neutral(cls): return cls()
    @classmethod
    def active(cls): return cls(0.5)
    @property
    def is_neutral(self): return self.factor == 1
    def at_core(self, state, call):
        call.note("scaled")
        return call.attend(call.q, call.k, call.v, call.mask) * self.factor
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder of one's own with a page and a mechanism."""
    for folder, text in (("systems", TOY_PAGE), ("acceleration", TOY)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "toy.py").write_text(text)
    monkeypatch.setenv("SMALTI_PATH", str(tmp_path))
    yield tmp_path
    for name in ("smalti.systems.toy", "smalti.acceleration.toy"):
        sys.modules.pop(name, None)


def smalti(*words):
    done = subprocess.run([sys.executable, "-m", "smalti.cli", *words], capture_output=True, text=True, env=os.environ)
    return done.returncode, done.stdout, done.stderr


def test_the_catalogue_has_92_systems_in_known_stages():
    entries = catalogue.entries()
    assert len(entries) == 92
    assert [one.number for one in entries] == list(range(1, 93))
    assert len({one.system.slug for one in entries}) == 92
    assert all(one.system.summary and one.system.title for one in entries)


def test_states_come_from_files(tmp_path, monkeypatch):
    one = catalogue.entry("taylorseer")
    record = {"verdict": {"outcome": "holds"}, "fingerprint": catalogue.fingerprint(one)}
    monkeypatch.setattr(catalogue, "results_folder", lambda: tmp_path)
    assert catalogue.state(catalogue.entry("meanaudio")) == "planned"
    assert catalogue.state(one) == "implemented"
    path = tmp_path / "taylorseer.cpu.json"
    for outcome in ("holds", "fails", "unresolved"):
        path.write_text(json.dumps({**record, "verdict": {"outcome": outcome}}))
        assert catalogue.state(one) == outcome
    path.write_text(json.dumps({**record, "fingerprint": {}}))
    assert catalogue.state(one) == "stale"
    (tmp_path / "taylorseer.full.h200.json").write_text(json.dumps(record))
    assert catalogue.state(one) == "stale"


def test_a_second_run_at_twice_the_budget_counts(tmp_path, monkeypatch):
    one = catalogue.entry("taylorseer")
    first = {"verdict": {"outcome": "fails"}, "fingerprint": catalogue.fingerprint(one)}
    monkeypatch.setattr(catalogue, "results_folder", lambda: tmp_path)
    (tmp_path / "taylorseer.cpu.json").write_text(
        json.dumps({**first, "second": {**first, "verdict": {"outcome": "holds"}}})
    )
    assert catalogue.state(one) == "holds"


def test_a_verdict_survives_json():
    verdict = Verdict("a", "m", 1.0, {"b": 2.0}, "ours < b", "holds", (0.1, 0.2), (1, 2), (Check("c", 1.0, "<", True),))
    assert Verdict.from_json(json.loads(json.dumps(verdict.as_json()))) == verdict
    with pytest.raises(ValueError, match="outcome"):
        Verdict("a", "m", 1.0, {}, "", "perhaps")  # type: ignore[arg-type]


def test_a_system_of_ones_own_appears_everywhere_without_a_changed_file(toy):
    status, out, _ = smalti("systems", "--json")
    rows = {row["slug"]: row for row in json.loads(out)}
    assert (status, len(rows), rows["toy"]["state"], rows["toy"]["number"]) == (0, 93, "implemented", None)
    status, out, _ = smalti("where", "toy", "--json")
    assert json.loads(out)["mechanism"] == [str(toy / "acceleration" / "toy.py")]
    status, out, _ = smalti("claim", "toy", "--json")
    assert (status, json.loads(out)[0]["verdict"]["outcome"]) == (0, "holds")
    assert smalti("claim", "toy", "--budget", "2")[0] == 1
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "tests/seams/test_contract.py"],
        capture_output=True, text=True, env=os.environ, cwd=catalogue.ROOT.parents[1],
    )  # fmt: skip
    assert "test_contract[Toy-flux]" in collected.stdout
    code = "import runpy; print(runpy.run_path('docs/update_systems.py')['table']())"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=catalogue.ROOT.parents[1]
    )
    assert "`toy` | does little | implemented" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("systems", "tailorseer"), "did you mean 'taylorseer'"),
        (("where", "nothing-at-all"), "unknown system"),
        (("claim", "meanaudio"), "is planned"),
        (("claim",), "name the systems"),
        (("claim", "taylorseer", "--full"), "needs a CUDA GPU"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, message):
    status, out, error = smalti(*words)
    assert (status, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_listing_is_light():
    code = (
        "import sys; sys.argv = ['smalti', 'systems']\nfrom smalti.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False")


def test_a_page_without_a_header_is_named(tmp_path):
    page = tmp_path / "empty.py"
    page.write_text('"""Nothing."""')
    with pytest.raises(UserError, match=r"empty\.py has no SYSTEM"):
        catalogue.read_header(page)
