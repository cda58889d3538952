"""DiffScaler adapts a frozen diffusion transformer to many data sets, by few parameters for each of them.

Every layer gets a scale and a shift for each output channel and a small branch with a ReLU; the model itself never
changes, so tasks stand side by side and nothing is forgotten. The claim: with less than 3 % of the parameters the
shipped `emoji` learns four sets of concepts that it never saw nearly as well as by training all of them, and better
than by scales and shifts alone.
"""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import nn

from smalti.core.protocols import Batch, Cond
from smalti.core.system import Check, System, Verdict
from smalti.evaluation.arms import Arms, run_arms
from smalti.evaluation.full_size import sit_xl
from smalti.evaluation.paired import compare
from smalti.evaluation.timing import median_seconds, paired_ratio
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.emoji_arm import stock
from smalti.recipes.task_arm import adapt, distance, drift, floor, mixed_error, pipeline, sources, target
from smalti.training.adapters import lora, scale_shift
from smalti.training.bare_step import bare_step
from smalti.training.config import TrainConfig
from smalti.training.diffscaler import DiffScaler
from smalti.training.task_bank import TaskBank

SYSTEM = System(
    slug="diffscaler",
    uses=(
        "training.diffscaler.DiffScaler", "nn.affiner.Affiner", "training.shared_base.SharedBase",
        "training.task_set.TaskSet", "training.task_bank.TaskBank", "training.task_training.train_together",
        "training.adapters.scale_shift", "recipes.task_arm.adapt",
    ),
    models=("emoji",),
    data=("emoji",),
)  # fmt: skip
METHODS = {"diffscaler": DiffScaler(rank=3), "scale-shift": scale_shift, "lora": lora(4), "full": None}
RATES = {"diffscaler": 4e-3, "scale-shift": 2e-2, "lora": 8e-3, "full": 1e-3}
"""The best of three for each, on the sets `places` and `objects` and another seed."""
SETS = ("flags", "symbols", "people", "few")  # the last one is small
STEPS, LIMIT = 200, 1.15


def small(ctx) -> Verdict:
    """Four ways to adapt `emoji` to each of four sets, and what a bank of tasks must keep."""
    stock()
    for name in SETS:
        sources(target(name))
    steps, seeds = round(STEPS * ctx.budget), ctx.seeds[-2:]  # 0 was seen while the claim was made

    def run(methods: Sequence[str], seeds: tuple[int, ...]) -> Arms:
        names = [f"{method} {name}" for name in SETS for method in methods]
        return run_arms("diffscaler", names, seeds, ctx.scratch, {"steps": steps}, say=ctx.say)

    arms, beside = run(("diffscaler", "scale-shift", "full"), seeds), run(("frozen", "lora"), seeds[:1])

    def over_full(method: str, among: Arms) -> list[float]:
        """One number for each set and seed of some arms; the distances of the sets are of different sizes."""
        both = [
            (among.values(f"{method} {name}", "distance"), arms.values(f"full {name}", "distance")) for name in SETS
        ]
        return [mine / theirs for one in both for mine, theirs in zip(*one)]

    ours, scaled = over_full("diffscaler", arms), over_full("scale-shift", arms)
    lora_, frozen = over_full("lora", beside), over_full("frozen", beside)
    main, first = compare(ours, [min(LIMIT, one) for one in scaled]), ours[:: len(seeds)]
    worst = max(mine / theirs for mine, theirs in zip(first, frozen, strict=True))
    share, few = arms.mean(f"diffscaler {SETS[0]}", "share"), fmean(ours[-len(seeds) :])
    bank = TaskBank.wrap(ctx.model("emoji").transformer, METHODS["diffscaler"])
    changed, apart = drift(bank), mixed_error(bank)

    def switch() -> None:
        with bank.using("one"):
            pass

    took = median_seconds(switch, repeats=20)
    bank.detach()
    return Verdict(
        measured=f"FD-EfficientNetLite0 of held-out captions after {steps} steps, over that of full, mean of the sets",
        unit="ratio",
        ours=main.ours,
        comparators={
            "full": 1.0, "scale-shift": fmean(scaled), "lora": fmean(lora_),
            "frozen": fmean(frozen),
        },
        rule=f"ours < {LIMIT:g} * full and < scale-shift",
        outcome=main.outcome,
        interval=(main.low, main.high),
        seeds=seeds,
        checks=(
            Check("parameters of a task, of the model's", share, "< 0.03", share < 0.03),
            compare(ours, scaled).check("ours beside scale-shift alone", "< scale-shift"),
            Check("the worst set, over the frozen model", worst, "< 1", worst < 1),
            compare(first, lora_).check("ours beside LoRA of as many parameters", "< lora"),
            Check("the set of 96 pictures, over full", few, "< 1", few < 1),
            Check("FD of full fine-tuning", fmean(arms.mean(f"full {name}", "distance") for name in SETS)),
            Check("FD of real training pictures", fmean(beside.mean(f"frozen {name}", "floor") for name in SETS)),
            Check("change of the model's output", changed, "0, bit for bit", changed == 0),
            Check("two tasks in one batch, samples apart by", apart, "< 1e-5", apart < 1e-5),
            Check("seconds of a switch", took),
        ),
        figures={name: list(some) for name, some in (*arms.figures.items(), *beside.figures.items())},
        notes=f"{steps} steps of 16, no guidance; pairs are sets (groups that emoji was not trained on) and seeds",
        tried=(
            "rates on objects, seed 100, 250 steps: ours 4e-3 1611, 8e-3 1623, 16e-3 1622; scale-shift 1e-2 1655, "
            "2e-2 1618, 4e-2 1620; full 5e-4 1607, 1e-3 1596",
            "the claim's sets, seed 0, 250 steps: ours 1366, full 1300, scale-shift 1402, lora 1342, frozen 1760; "
            "unresolved by differences of FD (4 pairs), just holding by ratios, hence the second seed",
        ),
    )  # fmt: skip


def full(ctx) -> Verdict:
    """SiT-XL/2 in bf16 with ten tasks of rank 8: what a forward costs, and the memory of a training step."""
    device, samples = ctx.device, 32
    model = sit_xl(device).eval()
    bank = TaskBank.wrap(model, DiffScaler(rank=8))
    for number in range(10):
        bank.add(str(number))
    cond = Cond(label=torch.randint(1000, (samples,), device=device))
    x, t = torch.randn(samples, 4, 32, 32, device=device), torch.rand(samples, device=device)

    def call(task):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return bank(x, t, cond, task=task)

    mixture = [str(row % 10) for row in range(samples)]
    one, mixed = (
        paired_ratio(lambda task=task: call(task), lambda: call(None), repeats=10, warmup=3) for task in ("0", mixture)
    )
    size = sum(p.numel() for p in model.parameters())
    memory = sum(bank.tasks.count(name) for name in bank.names) / size
    batch = Batch(x, cond, torch.arange(samples))

    def peak(learner: nn.Module) -> float:
        step = bare_step(learner.train(), FlowMatching(), batch, torch.bfloat16)
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) / 2**30

    with_tasks = peak(bank.train("0"))
    with_all = peak(bank.detach())
    return Verdict(
        measured=f"seconds of a forward of SiT-XL/2, {samples} samples, bf16, blocks compiled, one task of rank 8",
        unit="s",
        ours=one.first,
        comparators={"frozen model": one.second, "a task a sample": mixed.first},
        rule="ours < 1.08 * frozen model",
        outcome=one.outcome(1.08, below=True),
        interval=(one.low, one.high),
        checks=(
            Check("memory of ten tasks, of the model's", memory, "< 0.1", memory < 0.1),
            Check("a task a sample, over the frozen model", mixed.median),
            Check("GiB of a training step", with_tasks, "< full", with_tasks < with_all),
            Check("GiB of a training step, full", with_all),
        ),
        notes="random weights: time and memory alone; the interval is of the ratio ours / frozen model",
    )


def arm(name: str, seed: int, steps: int) -> dict[str, float]:
    """Adapts `emoji` to one set by one method, or measures it as it is."""
    method, of = name.split()
    if method == "frozen":
        return {"distance": distance(pipeline(), target(of).held_out), "floor": floor(target(of))}
    config = TrainConfig(
        steps=steps, batch=16, learning_rate=RATES[method], warmup=steps // 10, decay="linear-cooldown", ema=0.98,
        seed=seed, eval_every=steps, eval_samples=512,
    )  # fmt: skip
    return adapt(METHODS[method], of, config)
