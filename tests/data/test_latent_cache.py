import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from smalti.core.errors import UserError
from smalti.data import latent_cache
from smalti.data.latent_cache import build_cache, cache_key

COUNT = 23
SHAPES = [(4, 8, 8) if i % 3 else (4, 6, 10) for i in range(COUNT)]


class Encoder:
    """Latents that are told by their sample's number, and the calls that asked for them."""

    def __init__(self):
        self.calls: list[list[int]] = []

    def __call__(self, indices):
        self.calls.append(indices.tolist())
        return torch.stack([torch.full(SHAPES[i], float(i)) for i in indices.tolist()])


def build(folder, encode, key="k", **settings):
    return build_cache(folder, key, COUNT, encode, groups=SHAPES, batch=5, **settings)


def place_of(folder) -> Path:
    (found,) = folder.iterdir()
    return found


def test_latents_come_back_by_sample_in_any_order(tmp_path):
    encode = Encoder()
    cache = build(tmp_path, encode)
    assert len(cache) == COUNT
    assert sorted(i for call in encode.calls for i in call) == list(range(COUNT))
    assert all(len({SHAPES[i] for i in call}) == 1 and len(call) <= 5 for call in encode.calls)
    for i in range(COUNT):
        assert cache.shape(i) == SHAPES[i]
    chosen = [20, 1, 7, 1]
    assert cache[chosen].dtype == torch.float32
    assert torch.equal(cache[torch.tensor(chosen)], torch.stack([torch.full((4, 8, 8), float(i)) for i in chosen]))
    with pytest.raises(ValueError, match="2 shapes"):
        cache[[0, 1]]


def test_a_cache_is_computed_once(tmp_path):
    first = build(tmp_path, Encoder())
    again = Encoder()
    second = build(tmp_path, again)
    assert again.calls == []
    assert torch.equal(first[[1, 2]], second[[1, 2]])


def test_the_shards_are_memory_mapped(tmp_path):
    cache = build(tmp_path, Encoder())
    assert len(cache.shards) == 2
    if Path("/proc/self/maps").exists():
        assert str(place_of(tmp_path) / "0000.safetensors") in Path("/proc/self/maps").read_text()


def test_shards_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 6 * 4 * 8 * 8 * 2)
    cache = build(tmp_path, Encoder())
    assert len(cache.shards) == 5  # 8 samples of 480 bytes: 5 + 3; 15 of 512 bytes: 5 + 5 + 5
    assert all(torch.equal(cache[[i]][0], torch.full(SHAPES[i], float(i))) for i in range(COUNT))


def tear(place):
    file = place / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def alter(place):
    file = place / "0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def lose(place):
    (place / "0000.safetensors").unlink()


def lose_manifest(place):
    (place / "cache.json").unlink()


def make_foreign(place):
    manifest = json.loads((place / "cache.json").read_text())
    (place / "cache.json").write_text(json.dumps({**manifest, "key": "another"}))


def forget_samples(place):
    manifest = json.loads((place / "cache.json").read_text())
    manifest["shards"].pop()
    (place / "cache.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [tear, alter, lose, lose_manifest, make_foreign, forget_samples])
def test_what_is_torn_or_foreign_is_computed_again(tmp_path, damage):
    build(tmp_path, Encoder())
    damage(place_of(tmp_path))
    again = Encoder()
    cache = build(tmp_path, again)
    assert sum(map(len, again.calls)) == COUNT
    assert torch.equal(cache[[4]][0], torch.full(SHAPES[4], 4.0))
    third = Encoder()
    build(tmp_path, third)
    assert third.calls == []


def test_other_keys_and_dtypes_lie_apart(tmp_path):
    build(tmp_path, Encoder())
    for settings in ({"key": "other"}, {"dtype": "float32"}):
        encode = Encoder()
        build(tmp_path, encode, **settings)
        assert encode.calls
    assert len(list(tmp_path.iterdir())) == 3


def test_float32_keeps_every_bit(tmp_path):
    values = torch.randn(10, 3)
    cache = build_cache(tmp_path, "k", 10, lambda indices: values[indices], dtype="float32")
    assert torch.equal(cache[range(10)], values)


def test_an_interrupted_encoding_leaves_nothing(tmp_path):
    def encode(indices):
        if 9 in indices.tolist():
            raise KeyboardInterrupt
        return torch.zeros(len(indices), 2)

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path, "k", 20, encode, batch=4)
    assert list(tmp_path.iterdir()) == []


def test_bad_latents_and_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="use float32"):
        build_cache(tmp_path, "k", 2, lambda indices: torch.full((len(indices), 1), 1e6))
    with pytest.raises(UserError, match="choose one of float16, float32"):
        build_cache(tmp_path, "k", 2, lambda indices: torch.zeros(2, 1), dtype="int8")
    with pytest.raises(ValueError, match="1 latents for 2 samples"):
        build_cache(tmp_path, "k", 2, lambda indices: torch.zeros(1, 1))
    with pytest.raises(ValueError, match="3 groups for 2"):
        build_cache(tmp_path, "k", 2, lambda indices: torch.zeros(2, 1), groups=[1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the file size stands in for the full disk; it is set in a process of its own."""
    script = f"""
import resource, signal, torch
from smalti.core.errors import UserError
from smalti.data.latent_cache import build_cache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    build_cache({str(tmp_path)!r}, "k", 100, lambda indices: torch.zeros(len(indices), 1000))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot write")
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_keys_depend_on_every_part_and_their_order():
    keys = {cache_key("a", "b", 64), cache_key("b", "a", 64), cache_key("a", "b", 128), cache_key("ab", 64)}
    assert len(keys) == 4


def test_shards_are_those_of_one_process_in_whatever_order_workers_answer(tmp_path, monkeypatch):
    here = build(tmp_path / "here", Encoder())
    honest = latent_cache.run_all
    monkeypatch.setattr(latent_cache, "run_all", lambda *call: reversed(list(honest(call[0], call[1]))))
    there = build(tmp_path / "there", Encoder(), cluster="ray")
    assert len(here.shards) == len(there.shards)
    assert all(torch.equal(one, other) for one, other in zip(here.shards, there.shards))
    assert torch.equal(here.places, there.places)


@pytest.mark.slow
def test_workers_of_ray_encode_the_same_though_one_is_killed(tmp_path):
    pytest.importorskip("ray")
    marks = tmp_path / "marks"
    marks.mkdir()

    def slowly(indices):
        (marks / f"{os.getpid()}").touch()
        time.sleep(0.3)
        return indices[:, None].float()

    killed = []

    def kill_one():
        while not any(marks.iterdir()):
            time.sleep(0.01)
        killed.append(int(next(marks.iterdir()).name))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    found = build_cache(tmp_path / "cache", "k", 12, slowly, batch=2, cluster="ray", workers=2)
    thread.join()
    assert killed
    assert len(list(marks.iterdir())) > 1
    assert found[range(12)][:, 0].tolist() == list(range(12))
