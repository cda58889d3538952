"""`smalti bench recipes`: the order of its search, what it keeps, and how it ends when time is up."""

import pytest

from smalti.core.discovery import load_benchmark
from smalti.recipes.aids import AIDS, Aids

recipes = load_benchmark("recipes")


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Trainings that cost nothing: a rate of 1e-3, a batch of 16 and an EMA of 0.98 are best, REPA and Muon help."""
    ran = []

    def figures(setup, seed):
        distance = 100 + 10 * (setup.rate != 1e-3) + 5 * (setup.batch != 16) + 2 * (setup.ema != 0.98) + seed / 100
        aids = setup.aids
        distance -= 20 * bool(aids.teacher) + 10 * (aids.optimizer == "muon")
        distance += 25 * (aids.ends < 1) + 7 * aids.is_lightning + 7 * bool(aids.mask) + 7 * aids.is_own
        distance += 7 * (aids.time != "uniform") + 7 * bool(aids.tuned_width)
        distance += 5 * (setup.images < 1000)
        found = {"distance": distance, "right": 0.5, "probe": 0.5, "images per second": 100.0, "seconds": 8.0}
        return found | {f"distance at {quarter}/4": distance + 9 for quarter in recipes.QUARTERS}

    def run_jobs(jobs, *, deadline, say):
        for path, job in jobs.items():
            if not path.is_file() and recipes.time.time() < deadline:
                ran.append(job.args)
                recipes_write(path, figures(*job.args))
                say(path, {})
        return all(path.is_file() for path in jobs)

    from smalti.core.files import write_json as recipes_write

    monkeypatch.setattr(recipes, "run_jobs", run_jobs)
    monkeypatch.setattr(recipes, "prepare", lambda settings: None)
    return ran, recipes.Settings(data=("emoji",), images=1000, keep=str(tmp_path / "kept"))


def test_aids_that_help_go_together_and_are_tuned_as_often_as_the_plain_training(trained):
    ran, settings = trained
    result = recipes.run(settings)
    [one] = result["data"]
    rows = {row["name"]: row for row in one["rows"]}
    assert set(rows) == {recipes.PLAIN, recipes.BEST, recipes.HALF, *AIDS}
    assert rows[recipes.BEST]["setup"]["aids"] == recipes.asdict(AIDS["repa"] | AIDS["muon"])
    for name in (recipes.PLAIN, recipes.BEST):
        assert {key: rows[name]["setup"][key] for key in ("rate", "batch", "ema")} == {
            "rate": 1e-3, "batch": 16, "ema": 0.98
        }  # fmt: skip
    trials = [setup for setup, seed in ran if seed == recipes.TRIAL_SEED]
    assert all(setup.is_trial for setup in trials)
    plain, together = (sum(setup.aids == aids and setup.width == 96 for setup in trials)
                       for aids in (Aids(), AIDS["repa"] | AIDS["muon"]))  # fmt: skip
    assert plain == together == 7
    assert one["half"]["outcome"] == "holds"
    assert {seed for setup, seed in ran if setup.images == 500} == {10, 11, 12}
    text = recipes.table(result)
    assert "never" in text
    assert "half of the pictures" in text


def test_of_aids_that_exclude_each_other_the_better_is_taken():
    at = dict.fromkeys((recipes.PLAIN, *AIDS), 100.0)
    chosen = recipes.together(at | {"microdit": 80.0, "lightningdit": 90.0, "repa": 95.0, "repa, ended early": 99.0})
    assert chosen == Aids(mask=AIDS["microdit"].mask, teacher=AIDS["repa"].teacher)
    assert recipes.together(at) == Aids()


def test_nothing_is_trained_twice_and_time_ends_it(trained):
    ran, settings = trained
    first = recipes.run(settings)
    count = len(ran)
    assert recipes.run(settings)["data"] == first["data"]
    assert len(ran) == count
    late = recipes.run(recipes.replace(settings, minutes=-1.0, keep=settings.keep + "-other"))
    assert not late["is_whole"]
    assert late["data"] == [{"data": "emoji", "rows": []}]
    assert "goes on" in recipes.table(late)


def test_hours_are_those_of_the_first_measure_that_is_as_good():
    row = {"mean": {"distance": 80.0, "distance at 1/4": 120.0, "distance at 2/4": 99.0, "seconds": 7200.0}}
    assert recipes.hours_to(row, 100.0) == 1.0
    assert recipes.hours_to(row, 90.0) == 2.0
    assert recipes.hours_to(row, 70.0) is None
