"""Avatars: the same person in every panel, other clothes; triples of person, garment, and both."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.data.avatar_panels import avatar_sets, name_of, try_on_sets

pytest.importorskip("python_avatars")
pytest.importorskip("resvg_py")


def test_a_person_changes_clothes_and_stays_the_same():
    sets = avatar_sets(4, panels=3, size=48)
    assert len({one.shared[0] for one in sets}) == 4
    for one in sets:
        assert one.panels.shape == (3, 3, 48, 48)
        assert float(one.panels.min()) < 0 < float(one.panels.max()) <= 1
        assert len(set(one.captions)) == 3
        assert all(caption.startswith("{who} ") for caption in one.captions)
        hair = one.panels[:, :, :10]  # above the face nothing changes
        assert torch.allclose(hair[0], hair[1], atol=0.02)
        assert not torch.allclose(one.panels[0, :, 36:], one.panels[1, :, 36:], atol=0.2)
        assert name_of(one) == name_of(one)
    again = avatar_sets(4, panels=3, size=48)
    assert all(torch.equal(one.panels, other.panels) for one, other in zip(sets, again))
    assert not torch.equal(sets[0].panels, avatar_sets(1, 3, 48, seed=1)[0].panels)


def test_a_try_on_triple_adds_the_garment_to_the_person():
    for one in try_on_sets(3, size=64):
        bare, garment, worn = one.panels
        changed = (bare - worn).abs().amax(0) > 0.1
        assert changed.any()
        assert not changed[:35].any()  # only the lower body differs
        drawn = garment.amin(0) < 0.9
        inside = (drawn | (garment.amax(0) > 0.999))[:20]
        assert inside.all()  # no face and no hair beside the garment
        both = drawn & changed
        assert both.any()
        assert one.captions[2] == f"{{who}} in {one.captions[1]}"


def test_mistakes_are_named():
    with pytest.raises(UserError, match="2 to 4 panels"):
        avatar_sets(1, panels=5)
