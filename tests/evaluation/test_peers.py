"""Peers act where ours acts, at the schedule they are told; their memory is counted whole and once."""

import sys
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peer_shapes import TINY
from torch import nn

from smalti.acceleration.taylorseer import TaylorSeer
from smalti.core.errors import Refusal
from smalti.evaluation import peers
from smalti.evaluation.peer_hosts import random_host
from smalti.evaluation.peers import Attached, NotInstalled, Schedule, Watch, held_bytes, twin
from smalti.seams.apply import apply

SCHEDULE = Schedule(steps=9, warmup=2, interval=3)


@pytest.fixture(params=TINY)
def host(request):
    return random_host(request.param, TINY[request.param], torch.device("cpu"), torch.float32)


def ours(model, schedule, order=1, lite=False):
    handle = apply(model, TaylorSeer(schedule.interval, order, schedule.warmup, lite=lite))
    return Attached(model, lambda: handle.run(schedule.steps), lambda: handle)


def measure(host, attach, **settings):
    """Final latents of two runs, the evaluations that were full, the bytes held."""
    model = twin(host.model)
    watch = Watch(model)
    attached = attach(model, SCHEDULE, **settings)
    with attached.run():
        latents = host.draw(watch.around(attached.model), SCHEDULE.steps)
        held = held_bytes(attached.state(), (list(host.model.parameters()), list(host.model.buffers()), watch.inputs))
    watch.end()
    with attached.run():
        again = host.draw(attached.model, SCHEDULE.steps)
    return latents, again, watch.full, held, attached


def test_schedule():
    assert SCHEDULE.mask == [1, 1, 0, 0, 1, 0, 0, 1, 0]
    assert Schedule(2, 3, 4).mask == [1, 1]


def test_twin_shares_weights_and_nothing_else(host):
    other = twin(host.model)
    weights = dict(host.model.named_parameters())
    assert all(one is weights[name] for name, one in other.named_parameters())
    assert torch.equal(host.draw(other, 2), host.draw(host.model, 2))
    peers.diffusers_taylorseer(other, SCHEDULE)
    assert not any(hasattr(one, "_diffusers_hook") for one in host.model.modules())


@pytest.mark.parametrize("order", [1, 2])
def test_diffusers_at_our_places_forecasts_what_ours_does(host, order):
    """Two implementations of the same paper, at the same sites and steps, agree and hold as much."""
    latents, again, full, held, _ = measure(host, peers.diffusers_taylorseer, order=order, is_replayed=True)
    mine, _, my_full, my_held, attached = measure(host, ours, order=order)
    plain = host.draw(host.model, SCHEDULE.steps)
    assert full == my_full == SCHEDULE.mask
    assert torch.equal(latents, again)
    # The first differences of the warm-up are thrown away by ours alone; order 1 does not see them.
    if order == 1:
        torch.testing.assert_close(latents, mine, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents, plain, rtol=1e-4, atol=1e-5)
    assert held == my_held == attached.state().report().methods[0].kept > 0


def test_diffusers_by_its_own_rule(host):
    full = measure(host, peers.diffusers_taylorseer)[2]
    assert full == [1, 1, 0, 1, 0, 0, 1, 0, 0]
    assert sum(full) == sum(SCHEDULE.mask)


def test_lite(host):
    latents, again, full, held, _ = measure(host, peers.diffusers_taylorseer, is_lite=True, is_replayed=True)
    mine, _, my_full, my_held, _ = measure(host, ours, lite=True)
    assert full == my_full == SCHEDULE.mask
    assert torch.equal(latents, again)
    assert held == my_held > 0
    torch.testing.assert_close(latents, mine, rtol=1e-4, atol=1e-5)  # its last projection is the output, laid out


def test_cache_dit(host):
    pytest.importorskip("cache_dit")
    latents, again, full, held, _ = measure(host, peers.cache_dit_taylorseer)
    assert full == SCHEDULE.mask
    assert torch.equal(latents, again)
    assert not torch.equal(latents, host.draw(host.model, SCHEDULE.steps))
    assert held > 0


def test_without_the_package(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(NotInstalled, match=r"smalti\[peers\]"):
        peers.cache_dit_taylorseer(twin(host.model), SCHEDULE)


def test_sites_that_cannot_be_hooked_are_refused(monkeypatch):
    """diffusers itself goes on without a word when nothing of a model matches."""
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    monkeypatch.setattr(peers, "_patterns", lambda names: ["no such module"])
    with pytest.raises(Refusal, match="0 modules"):
        peers.diffusers_taylorseer(model, SCHEDULE)


@dataclass
class Held:
    name: str
    tensors: dict = field(default_factory=dict)
    model: nn.Module | None = None


def test_held_bytes():
    base = torch.zeros(10, 4)
    few = torch.zeros(3, dtype=torch.float16)
    held = Held("state", {"a": [base[:2], base[2:4]], "b": (few, None, 5)}, nn.Linear(9, 9))
    held.tensors["itself"] = held
    assert held_bytes(held) == 10 * 4 * 4 + 3 * 2  # views keep their whole storage alive
    assert held_bytes(held, [base]) == 6
    assert held_bytes(None) == 0
