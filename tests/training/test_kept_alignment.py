"""Features of the kept places, and of no others, are what kept tokens are compared with."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Cond, TrainState
from smalti.seams.taps import Taken
from smalti.training.alignment import AlignmentCall
from smalti.training.kept_alignment import KeptAlignment
from smalti.training.repa import REPA, REPASettings, TeacherPort

KEEP = torch.tensor([[0, 5], [2, 3]])


def terms():
    torch.manual_seed(0)
    term = REPA(4, [TeacherPort("teacher", 6)], REPASettings(1, hidden=8))
    return term, KeptAlignment(term)


def call(tokens, grid, extra):
    taken = Taken({1: tokens}, grid)
    return AlignmentCall(taken, torch.zeros(2, 1), torch.zeros(2), Cond(extra=extra), TrainState())


def test_without_a_mask_it_is_the_term_itself():
    term, kept = terms()
    given = call(torch.randn(2, 6, 4), (1, 2, 3), {"teacher": torch.randn(2, 6, 6)})
    assert torch.equal(kept(given).loss, term(given).loss)
    assert (kept.name, kept.depths, kept.settings) == (term.name, term.depths, term.settings)


def test_only_features_of_kept_places_count():
    term, kept = terms()
    tokens, features = torch.randn(2, 2, 4), torch.randn(2, 6, 6)
    given = call(tokens, None, {"teacher": features, "keep": KEEP})
    chosen = torch.stack([features[row, places] for row, places in enumerate(KEEP)])
    assert torch.allclose(kept(given).loss, term(call(tokens, (1, 1, 2), {"teacher": chosen})).loss)
    other = features.clone()
    other[0, 1] += 9
    assert torch.equal(kept(call(tokens, None, {"teacher": other, "keep": KEEP})).loss, kept(given).loss)
    other[0, 5] += 9
    assert not torch.equal(kept(call(tokens, None, {"teacher": other, "keep": KEEP})).loss, kept(given).loss)


def test_before_the_drop_all_tokens_are_compared():
    term, kept = terms()
    given = call(torch.randn(2, 6, 4), (1, 2, 3), {"teacher": torch.randn(2, 6, 6), "keep": KEEP})
    assert torch.equal(kept(given).loss, term(given).loss)


def test_features_that_are_not_cached_are_named():
    _, kept = terms()
    with pytest.raises(UserError, match="'teacher'"):
        kept(call(torch.randn(2, 2, 4), None, {"keep": KEEP}))


def test_what_is_said_to_it_is_said_to_the_term():
    term = REPA(4, [TeacherPort("teacher", 6, torch.nn.Linear(3, 6))], REPASettings(1, hidden=8))
    kept = KeptAlignment(term)
    kept.release()
    assert term.ports[0].teacher is None
    assert kept.attentions == term.attentions
