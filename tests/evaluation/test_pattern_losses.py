from dataclasses import dataclass, field

import pytest
import torch

from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.method import CoreMethod
from smalti.core.protocols import Cond
from smalti.evaluation.pattern_losses import SPARSE, record_columns, record_losses
from smalti.ops.head_patterns import Patterns, allowed_keys, best_cells, stripe_columns
from smalti.seams.apply import apply

GRID, WIDE, STEPS = (3, 4, 4), Patterns(1 / 3, 0.5, 0.25), 4


def model_and_inputs(batch=2, seed=0):
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(seed)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])[:batch]
    cond = Cond(text=torch.randn(batch, 5, 12), pooled=torch.randn(batch, 10), mask=mask)
    return model, (torch.randn(batch, 4, 3, 8, 8), cond)


@torch.no_grad()
def run_steps(model, inputs):
    x, cond = inputs
    return [model(x + 0.2 * step, torch.full((len(x),), 1 - step / STEPS), cond) for step in range(STEPS)]


def record(batch=2, seed=0, **settings):
    model, inputs = model_and_inputs(batch, seed)
    return record_losses(model, lambda: run_steps(model, inputs), WIDE, **settings)


@dataclass(frozen=True)
class Watch(CoreMethod):
    """Keeps every call."""

    calls: list = field(default_factory=list, compare=False)

    @classmethod
    def neutral(cls):
        return cls()

    active = neutral

    @property
    def is_neutral(self):
        return True

    def at_core(self, state, call):
        self.calls.append(call)
        return call.attend(call.q, call.k, call.v, call.mask)


def watched():
    model, inputs = model_and_inputs()
    with apply(model, Watch()) as handle:
        run_steps(model, inputs)
        return handle.methods[0].calls


def maps(call):
    """Scores of a call with masked text (B, h, L, L)."""
    return (call.q @ call.k.mT / call.q.shape[-1] ** 0.5).masked_fill(~call.mask, -torch.inf)


def test_losses_are_of_outputs_and_equal_maps_written_out():
    """Each sample with its own padded text."""
    found = record()
    assert (found.grid, found.steps, found.planned, found.samples) == (GRID, (0, 1, 2, 3), 4, 2)
    for call in watched():
        image, scores = call.layout.span("image"), maps(call)
        dense, after = scores.softmax(-1) @ call.v, len(call.layout) - image.stop
        name, step = str(call.site), call.moment.step
        assert torch.allclose(found.energy[name][step].float(), dense.square().mean((2, 3)).sum(0), rtol=1e-3)
        for index, mode in enumerate(SPARSE[1:], 1):
            allowed = torch.ones(1, *scores.shape[-2:], dtype=torch.bool)
            allowed[:, image] = allowed_keys(torch.arange(48), mode, WIDE, GRID, image.start, after)
            sparse = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ call.v
            error = (sparse - dense).square().mean((2, 3)).sum(0)
            assert torch.allclose(found.errors[name][step][:, index].float(), error, rtol=1e-3)


def test_recording_leaves_the_dense_trajectory():
    model, inputs = model_and_inputs()
    results = []
    record_losses(model, lambda: results.extend(run_steps(model, inputs)), WIDE)
    assert all(torch.equal(one, other) for one, other in zip(results, run_steps(model, inputs), strict=True))


def test_skipping_a_head_loses_all_its_output():
    found = record(modes=("skip",), every=2)
    assert found.steps == (0, 2)
    for name, errors in found.errors.items():
        assert torch.allclose(errors[..., 0], found.energy[name])


def test_two_sets_of_prompts_are_joined_as_if_recorded_together():
    model, (x, cond) = model_and_inputs()
    halves = [(x[:1], cond[:1]), (x[1:], cond[1:])]
    one, other = (record_losses(model, lambda half=half: run_steps(model, half), WIDE) for half in halves)
    both, joined = record(), one.joined(other)
    assert joined.samples == both.samples == 2
    assert all(torch.allclose(joined.errors[name], both.errors[name], rtol=1e-3) for name in both.errors)
    with pytest.raises(UserError, match="differ in modes"):
        one.joined(record(modes=("skip",)))


def test_a_sample_of_queries_says_about_the_same():
    """All image queries by masks are exactly the fast modes; half of them come near, and order heads alike."""
    whole, half = record(), record(queries=0.5)
    index = [SPARSE.index(mode) for mode in ("diagonal", "multi-diagonal", "stripes")]
    for name in whole.errors:
        one, other = ((part.errors[name] / part.energy[name][..., None]).mean(0)[:, index] for part in (whole, half))
        assert not torch.equal(one, other)
        assert torch.allclose(one, other, rtol=0.5)
    for name, errors in record(queries=0.999).errors.items():
        image, length = 48, 53
        assert torch.allclose(errors[..., index] * image / length, whole.errors[name][..., index], rtol=0.02)


def test_measured_columns_receive_most_attention():
    model, inputs = model_and_inputs()
    cells = record_columns(model, lambda: run_steps(model, inputs), WIDE)
    received = {}
    for call in watched():
        image = call.layout.span("image")
        part = maps(call).softmax(-1)[:, :, image, image].sum((0, 2))
        received[str(call.site)] = received.get(str(call.site), 0) + part
    assert {name: best_cells(one, GRID, 0.25) for name, one in received.items()} == cells
    columns, heads = record(cells=cells), record()
    stripes = SPARSE.index("stripes")
    assert columns.cells == cells
    assert any(
        not torch.allclose(columns.errors[name][..., stripes], heads.errors[name][..., stripes]) for name in cells
    )
    assert stripe_columns(GRID, 0.25, next(iter(cells.values()))).shape == (2, 12)


@pytest.mark.parametrize(
    "settings", [{"every": 0}, {"queries": 0}, {"queries": 1.5}, {"modes": ()}, {"modes": ("full",)}]
)
def test_bad_settings_are_refused_in_one_line(settings):
    with pytest.raises(UserError) as error:
        record(**settings)
    assert "\n" not in str(error.value)


def test_runs_of_two_sizes_are_refused():
    model, inputs = model_and_inputs()
    other = (inputs[0][:, :, :2], inputs[1])
    with pytest.raises(UserError, match="one size"):
        record_losses(model, lambda: (run_steps(model, inputs), run_steps(model, other)), WIDE)
