"""Trainings in processes of their own: several together, killed, stopped, on a full disk."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_toy import run

from smalti.training import checkpoints
from smalti.training.progress import read_log

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
SCRIPT = Path(__file__).with_name("run_toy.py")


def start(processes, out, environment=None, largest_file=None, **settings):
    out.mkdir(exist_ok=True)
    process = processes.Process(target=run, args=(out, settings, {**ENVIRONMENT, **(environment or {})}, largest_file))
    process.start()
    return process


def finish(process):
    process.join(120)
    assert process.exitcode is not None, "the training did not end"
    return process.exitcode


def start_group(processes, out, **settings):
    """Two processes that train together, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [start(processes, out, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, **settings) for r in (0, 1)]


def wait_for_step(out, step):
    deadline = time.monotonic() + 120
    while not ((out / "log.jsonl").exists() and any(line["step"] >= step for line in read_log(out / "log.jsonl"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def losses(out):
    return [line.get("loss") for line in read_log(out / "log.jsonl")]


def final_bytes(out):
    last = checkpoints.latest(out / "checkpoints")
    return last.name, {file.name: file.read_bytes() for file in sorted(last.glob("*.safetensors"))}


def difference(one, other):
    assert len(losses(one)) == len(losses(other))
    return max(abs(a - b) for a, b in zip(losses(one), losses(other)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_walk_the_curve_of_one(processes, tmp_path, optimizer):
    assert finish(start(processes, tmp_path / "one", optimizer=optimizer)) == 0
    group = start_group(processes, tmp_path / "two", optimizer=optimizer, unused=True)
    assert [finish(process) for process in group] == [0, 0]
    assert len(losses(tmp_path / "two")) == 50
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4


@pytest.mark.parametrize("is_own", [False, True])
@pytest.mark.parametrize("shard", [False, True])
def test_alignment_terms_walk_the_same_curve_in_two_processes_and_stop_together(processes, tmp_path, shard, is_own):
    settings = {"steps": 20, "aligned_until": 12, "learning_rate": 3e-3, "is_own": is_own}
    assert finish(start(processes, tmp_path / "one", **settings)) == 0
    group = start_group(processes, tmp_path / "two", shard=shard, **settings)
    assert [finish(process) for process in group] == [0, 0]
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4
    name = "self distance" if is_own else "alignment cosine"
    aligned = [name in line for line in read_log(tmp_path / "two" / "log.jsonl") if "loss" in line]
    assert aligned == [True] * 12 + [False] * 8


def test_processes_agree_on_figures_that_end_a_term(processes, tmp_path):
    group = start_group(processes, tmp_path / "two", steps=16, aligned_until=0, learning_rate=3e-3)
    assert [finish(process) for process in group] == [0, 0]
    assert finish(start(processes, tmp_path / "one", steps=16, aligned_until=0, learning_rate=3e-3)) == 0
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4
    aligned = ["alignment cosine" in line for line in read_log(tmp_path / "two" / "log.jsonl")]
    assert aligned == [True] * 12 + [False] * 4


def test_a_model_in_pieces_walks_the_curve_of_a_whole_one(processes, tmp_path):
    settings = {"accumulate": 2, "eval_every": 25, "sample_every": 25, "patience": 3}
    assert finish(start(processes, tmp_path / "one", **settings)) == 0
    group = start_group(processes, tmp_path / "two", shard=True, unused=True, **settings)
    assert [finish(process) for process in group] == [0, 0]
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for key in ("loss", "norm", "held_out_loss"):
        figures = [[line[key] for line in log if key in line] for log in logs]
        assert figures[0] == pytest.approx(figures[1], abs=1e-4), key
    assert len(figures[0]) == 2
    drawn = [torch.load(tmp_path / name / "samples" / "50.pt") for name in ("one", "two")]
    assert torch.allclose(*drawn, atol=1e-4)


def test_each_held_out_loss_of_a_model_in_pieces_is_of_its_newest_average(processes, tmp_path):
    settings = {"steps": 30, "eval_every": 10, "ema": 0.5}  # no checkpoint comes between
    assert finish(start(processes, tmp_path / "one", **settings)) == 0
    group = start_group(processes, tmp_path / "two", shard=True, **settings)
    assert [finish(process) for process in group] == [0, 0]
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    figures = [[line["held_out_loss"] for line in log if "held_out_loss" in line] for log in logs]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_a_run_goes_on_with_another_number_of_processes(processes, tmp_path):
    settings = {"save_every": 10, "eval_every": 5, "patience": 100}
    group = start_group(processes, tmp_path / "moved", steps=15, shard=True, **settings)
    assert [finish(process) for process in group] == [0, 0]
    assert finish(start(processes, tmp_path / "moved", steps=25, **settings)) == 0
    group = start_group(processes, tmp_path / "moved", steps=35, shard=True, **settings)
    assert [finish(process) for process in group] == [0, 0]
    group = start_group(processes, tmp_path / "moved", steps=50, **settings)
    assert [finish(process) for process in group] == [0, 0]
    assert finish(start(processes, tmp_path / "one", steps=50, **settings)) == 0
    pairs = zip(losses(tmp_path / "moved"), losses(tmp_path / "one"), strict=True)
    assert all(a == b if a is None or b is None else abs(a - b) < 1e-4 for a, b in pairs)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_launchers_walk_the_curve_of_one(processes, tmp_path, launcher):
    launch = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--standalone"],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1",
                       "--mixed_precision=no", "--dynamo_backend=no"],
    }[launcher]  # fmt: skip
    command = [sys.executable, "-m", *launch, str(SCRIPT), str(tmp_path / "two"), "accumulate=2"]
    (tmp_path / "two").mkdir()
    subprocess.run(command, check=True, timeout=200, env=os.environ | ENVIRONMENT, capture_output=True)
    assert finish(start(processes, tmp_path / "one")) == 0
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-4


def test_a_batch_that_cannot_be_dealt_out_is_refused(processes, tmp_path):
    group = start_group(processes, tmp_path, batch=12, accumulate=4)
    assert [finish(process) for process in group] == [2, 2]
    assert (tmp_path / "error.0").read_text().endswith("choose a multiple of 8")


def test_processes_skip_together_and_resume_together(processes, tmp_path):
    settings = {"broken": (3,), "steps": 30, "save_every": 10}
    group = start_group(processes, tmp_path / "cut", **{**settings, "steps": 13})
    assert [finish(process) for process in group] == [0, 0]
    group = start_group(processes, tmp_path / "cut", **settings)
    assert [finish(process) for process in group] == [0, 0]
    assert finish(start(processes, tmp_path / "one", **settings)) == 0
    skipped = [line["skipped"] for line in read_log(tmp_path / "cut" / "log.jsonl")]
    assert skipped == [line["skipped"] for line in read_log(tmp_path / "one" / "log.jsonl")]
    assert skipped[-1] >= 7
    pairs = zip(losses(tmp_path / "cut"), losses(tmp_path / "one"), strict=True)
    assert all(a == b if a is None or b is None else abs(a - b) < 1e-4 for a, b in pairs)


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(processes, tmp_path):
    settings = {"steps": 100, "save_every": 3, "delay": 0.002, "dropout": 0.2}
    assert finish(start(processes, tmp_path / "whole", **settings)) == 0
    dice, kills = random.Random(time.time_ns()), 0
    while True:
        process = start(processes, tmp_path / "cut", **settings)
        if kills < 4:
            wait_for_step(tmp_path / "cut", 12 * kills + 1)
            process.join(dice.uniform(0, 0.3))
        else:
            process.join(120)
        if process.exitcode is not None:
            break
        process.kill()
        assert finish(process) == -signal.SIGKILL
        kills += 1
    assert process.exitcode == 0
    assert kills > 1
    name, files = final_bytes(tmp_path / "cut")
    assert (name, files) == final_bytes(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not list((tmp_path / "cut" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_status(processes, tmp_path, number, status):
    settings = {"steps": 80, "save_every": 10**6, "delay": 0.01}
    process = start(processes, tmp_path / "cut", **settings)
    wait_for_step(tmp_path / "cut", 5)
    os.kill(process.pid, number)
    assert finish(process) == status
    saved = checkpoints.latest(tmp_path / "cut" / "checkpoints")
    assert 5 <= checkpoints.step_of(saved) < 80
    assert len(losses(tmp_path / "cut")) == checkpoints.step_of(saved)
    if number == signal.SIGTERM:
        assert finish(start(processes, tmp_path / "cut", **settings)) == 0
        assert finish(start(processes, tmp_path / "whole", **settings)) == 0
        assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


def test_a_signal_to_one_process_stops_all(processes, tmp_path):
    group = start_group(processes, tmp_path, steps=10**5, delay=0.01)
    wait_for_step(tmp_path, 3)
    os.kill(group[1].pid, signal.SIGTERM)
    assert [finish(process) for process in group] == [143, 143]
    assert checkpoints.latest(tmp_path / "checkpoints") is not None


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(processes, tmp_path):
    assert finish(start(processes, tmp_path, steps=4)) == 0
    before = final_bytes(tmp_path)
    largest = max(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*.safetensors"))
    assert finish(start(processes, tmp_path, steps=8, largest_file=largest - 1000)) == 2
    message = (tmp_path / "error.0").read_text()
    assert message.startswith("cannot write")
    assert "\n" not in message
    assert final_bytes(tmp_path) == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert finish(start(processes, tmp_path, steps=8)) == 0
    assert torch.isfinite(torch.tensor(losses(tmp_path))).all()
