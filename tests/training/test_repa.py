"""REPA by its formula, and what is easy to get wrong."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, TrainState
from smalti.seams.taps import Taken
from smalti.training.alignment import AlignmentCall
from smalti.training.repa import REPA, REPASettings, TeacherPort


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


def test_a_released_term_holds_no_teacher():
    teacher = torch.nn.Linear(3, 5)
    term = REPA(8, [TeacherPort("teacher", 5, teacher, (2, 3))], REPASettings(depth=1, hidden=4))
    term.release()
    assert term.ports == (TeacherPort("teacher", 5, None, (2, 3)),)
