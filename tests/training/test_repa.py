"""REPA by its formula, and what is easy to get wrong."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, TrainState
from smalti.seams.taps import Taken
from smalti.training.alignment import AlignmentCall
from smalti.training.repa import REPA, REPASettings, TeacherPort, cosine, match, projector


def call(tokens, features, grid=(1, 2, 3), step=0, depth=1):
    extra = {f"teacher{i}": one for i, one in enumerate(features)}
    return AlignmentCall(
        Taken({depth: tokens}, grid), torch.zeros(2, 1, 2, 3), torch.zeros(2), Cond(extra=extra), TrainState(step)
    )


def test_the_loss_is_the_mean_cosine_of_projected_tokens_over_teachers_times_the_weight():
    torch.manual_seed(0)
    tokens, features = torch.randn(2, 6, 8), [torch.randn(2, 6, 5), torch.randn(2, 6, 4)]
    term = REPA(
        8, [TeacherPort("teacher0", 5), TeacherPort("teacher1", 4)], REPASettings(depth=1, weight=0.7, hidden=16)
    )
    result = term(call(tokens, features))
    cosines = []
    for project, feature in zip(term.projectors, features, strict=True):
        h = project(tokens)
        unit_h, unit_y = h / h.norm(dim=-1, keepdim=True), feature / feature.norm(dim=-1, keepdim=True)
        cosines.append((unit_h * unit_y).sum(-1).mean())
    assert torch.allclose(result.loss, -0.7 * (cosines[0] + cosines[1]) / 2)
    assert torch.allclose(result.metrics["alignment cosine"], (cosines[0] + cosines[1]) / 2)


def test_equal_directions_give_the_minimum():
    features = torch.randn(2, 6, 5)
    assert cosine(3 * features, features).item() == pytest.approx(1.0, abs=1e-6)
    assert cosine(-features, features).item() == pytest.approx(-1.0, abs=1e-6)
    assert cosine(features.bfloat16(), features).dtype == torch.float32


def test_the_projector_has_three_layers_with_biases():
    layers = [one for one in projector(8, 32, 5) if isinstance(one, torch.nn.Linear)]
    assert [(one.in_features, one.out_features) for one in layers] == [(8, 32), (32, 32), (32, 5)]
    assert all(one.bias is not None for one in layers)


def test_grids_are_matched_by_place():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    features = torch.stack([rows, columns], -1).flatten(0, 1)[None]  # (1, 64, 2)
    small = match(features, None, (1, 4, 4)).unflatten(1, (4, 4))[0]
    assert (small[1:, :, 0] > small[:-1, :, 0]).all()
    assert torch.allclose(small[:, 1:, 0], small[:, :1, 0].expand(-1, 3), atol=1e-5)
    assert torch.equal(match(features, None, (1, 8, 8)), features)
    two = match(torch.cat([features, features + 100], 1), (8, 8), (2, 4, 4))
    assert torch.allclose(two[:, 16:], two[:, :16] + 100, atol=1e-4)
    with pytest.raises(UserError, match="give the grid"):
        match(features[:, :60], None, (1, 4, 4))


def test_the_teacher_is_neither_trained_nor_saved_nor_followed_by_gradients():
    teacher = torch.nn.Linear(3, 5)
    term = REPA(8, [TeacherPort("teacher", 5, teacher)], REPASettings(depth=1, hidden=4))
    assert all("projectors" in name for name, _ in term.named_parameters())
    pixels = torch.randn(2, 6, 3)
    given = AlignmentCall(
        Taken({1: torch.randn(2, 6, 8, requires_grad=True)}, (1, 2, 3)), pixels, torch.zeros(2),
        Cond(extra={"pixels": pixels}), TrainState(),
    )  # fmt: skip
    term(given).loss.backward()
    assert teacher.weight.grad is None


def test_missing_features_and_bad_settings_are_named():
    term = REPA(8, [TeacherPort("teacher9", 5)], REPASettings(depth=1, hidden=4))
    with pytest.raises(ValueError, match="teacher9"):
        term(call(torch.randn(2, 6, 8), []))
    with pytest.raises(UserError, match="at least"):
        REPASettings(depth=0)
    with pytest.raises(UserError, match="no teacher"):
        REPA(8, [])
