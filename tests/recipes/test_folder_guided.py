"""From a folder and a time to a model, with a tiny autoencoder and small widths."""

import json
from types import SimpleNamespace

import pytest

from smalti.core.errors import UserError
from smalti.recipes import folder_autoencoder, folder_guide, folder_guided, folder_trial
from smalti.recipes.folder_guided import read_budget, text_of
from smalti.training.mup import MuReadout
from smalti.training.run_folder import MARKER
from smalti.zoo.loader import load_model, model_card


@pytest.fixture
def small(monkeypatch, tiny_autoencoder):
    """Widths of 32 and 64, of which the second one is too large for the time; few steps."""
    monkeypatch.setattr(folder_autoencoder, "SHIPPED", tiny_autoencoder)
    monkeypatch.setattr(folder_trial, "WIDTHS", (32, 64))
    monkeypatch.setattr(folder_trial, "LAST_CHECK", 0.0)
    for name in ("STEPS_DRAWN", "EVALUATED"):
        monkeypatch.setattr(folder_trial, name, 0)
    monkeypatch.setattr(folder_guide, "TOKENS_PER_WEIGHT", 1e9)
    monkeypatch.setattr(folder_guide, "LEAST_STEPS", 2)
    monkeypatch.setattr(folder_guided, "TRIAL_SHARE", 0.5)
    # However busy this machine is, planning takes no time.
    monkeypatch.setattr(folder_guided, "time", SimpleNamespace(monotonic=lambda: 0.0))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("0.5h", 1800)])
def test_budgets_are_read(text, seconds):
    assert read_budget(text) == seconds


def test_other_budgets_are_refused():
    for text in ("10", "ten minutes", "5x", ""):
        with pytest.raises(UserError, match="1h30m"):
            read_budget(text)
    assert [text_of(one) for one in (7, 500, 3600)] == ["7s", "8m20s", "1h0m0s"]


def test_a_dry_run_prints_a_plan_and_writes_nothing(smalti, small, make_pictures, tmp_path):
    data = make_pictures(tmp_path / "data", 24)
    ran = smalti("train", "--data", data, "--budget", "6s", "--dry-run", "--json", "--out", tmp_path / "run")
    assert ran.status == 0, ran.err
    plan = json.loads(ran.out)
    assert plan["choice"]["width"] == 32
    assert plan["choice"]["steps"] >= 2
    assert plan["look"]["pictures"] == 24
    assert plan["loss"][0] > 0
    assert not (tmp_path / "run").exists()


def test_a_guided_training_draws_and_is_resumed_as_planned(smalti, small, make_pictures, tmp_path, monkeypatch):
    data, run = make_pictures(tmp_path / "data", 24), tmp_path / "run"
    ran = smalti("train", "--data", data, "--budget", "6s", "--out", run)
    assert ran.status == 0, ran.err
    for part in ("pictures     24 pictures", "carried over by muP", "expected     loss", "nothing was held out"):
        assert part in ran.err
    pipe = load_model(run / "model")
    assert not any(isinstance(one, MuReadout) for one in pipe.transformer.modules())
    assert pipe.transformer.config["heads"] == 1
    card = model_card(run / "model")
    assert card["settings"]["tuned_width"] == 192
    assert "smalti generate --model" in ran.out

    monkeypatch.setattr(folder_guided, "plan", lambda *given: pytest.fail("it is planned already"))
    again = smalti("train", "--data", data, "--budget", "6s", "--out", run, "--resume")
    assert again.status == 0, again.err
    assert (
        json.loads((run / MARKER).read_text())["settings"]["training"]["steps"] == card["settings"]["training"]["steps"]
    )


def test_options_that_do_not_go_together(smalti, tmp_path, monkeypatch):
    for arguments, message in (
        (("--recipe", "emoji", "--budget", "10m"), "go with --data"),
        (("--data", "x", "--dry-run"), "add --budget"),
        (("--data", "x", "--device", "gpu"), "device 'gpu'"),
        (("--data", "x", "--budget", "soon"), "1h30m"),
        (("--data", "x", "--budget", "1m", "--dry-run", "--set", "transformer.heads=2"), "transformer.heads sets it"),
    ):
        ran = smalti("train", *arguments)
        assert ran.status == 2
        assert message in ran.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a launcher" in smalti("train", "--data", "x", "--budget", "10m").err
