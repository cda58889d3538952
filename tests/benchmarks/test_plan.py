"""`smalti bench plan` on a tiny setting: its rows, its checks, and what "no worse" means."""

from smalti.core.discovery import load_benchmark

plan = load_benchmark("plan")


def test_a_plan_stands_beside_plain_ways():
    settings = plan.Settings(steps=(6,), speedup=1.5, minutes=0.1, batch=4, count=16, reference=8, judged=8)
    result = plan.run(settings)
    [found] = result["plans"]
    plain, ours, *others = found["rows"]
    assert (plain["way"], plain["distance"]) == ("6 steps", 0.0)
    assert any("dpm++" in one["way"] for one in others)
    assert any("guided" in one["way"] for one in others)
    assert all(0 < one["reference"] < 2 for one in (plain, ours, *others))
    assert len(found["checks"]) == 6
    text = plan.table(result)
    assert all(one["way"] in text for one in found["rows"])


def test_worse_means_wholly_on_the_wrong_side():
    near, far = [0.1, 0.2, 0.15, 0.12], [0.5, 0.6, 0.55, 0.52]
    assert plan.is_worse(far, near, below=True)
    assert not plan.is_worse(near, far, below=True)
    assert plan.is_worse(near, far, below=False)
    assert not plan.is_worse(near, [0.12, 0.18, 0.16, 0.1], below=True)
