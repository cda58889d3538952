import pytest

from smalti.control.head_sets import HeadSet, random_heads, read_heads_text, whole_layers
from smalti.core.errors import UserError

DARK = HeadSet({(1, 10): 1.0, (2, None): 0.5}, "uniform", "image", "dark", "MMDiT", {"reached": 0.3})


def test_a_saved_set_comes_back_with_its_variant(tmp_path):
    DARK.save(tmp_path / "dark.json")
    assert HeadSet.load(tmp_path / "dark.json") == DARK
    assert '"kind": "uniform"' in (tmp_path / "dark.json").read_text()
    (tmp_path / "other.json").write_text('{"heads": {}}')
    with pytest.raises(UserError, match="no set of heads"):
        HeadSet.load(tmp_path / "other.json")


def test_a_union_keeps_the_larger_strength_and_weights_multiply():
    flat = HeadSet({(1, 10): 0.2, (3, 1): 1.0}, "uniform", "image", "flat", "MMDiT")
    both = DARK | flat
    assert both.heads == {(1, 10): 1.0, (2, None): 0.5, (3, 1): 1.0}
    assert both.name == "dark + flat"
    assert DARK.weighted(0.5).heads == {(1, 10): 0.5, (2, None): 0.25}
    assert str(DARK) == "L1H10+L2*0.5"


@pytest.mark.parametrize("other", [{"kind": "identity"}, {"target": "joint"}, {"model": "Flux"}])
def test_sets_of_different_variants_do_not_join(other):
    with pytest.raises(UserError, match="do not join"):
        DARK | HeadSet({(0, 0): 1.0}, **{"kind": "uniform", "target": "image", "model": "MMDiT", **other})


def test_heads_in_words():
    assert read_heads_text("L1H10+L2*0.5") == dict(DARK.heads)
    for words in ("L1H10+", "L1H10*x", "dark"):
        with pytest.raises(UserError, match="write L1H10"):
            read_heads_text(words)


@pytest.mark.parametrize("heads", [{(0, 0): 1.5}, {(0, 0): -0.1}, {(-1, 0): 1.0}, {3: 1.0}, {(None, 0): 1.0}])
def test_bad_heads_are_refused_in_one_line(heads):
    with pytest.raises(UserError) as error:
        HeadSet(heads)
    assert "\n" not in str(error.value)


def test_random_heads_and_whole_layers():
    pool = [(layer, head) for layer in range(3) for head in range(4)]
    sets = [random_heads(pool, 5, seed).heads for seed in (0, 0, 1)]
    assert sets[0] == sets[1] != sets[2]
    assert all(len(one) == 5 and one.keys() <= set(pool) for one in sets)
    assert whole_layers([2]).heads == {(2, None): 1.0}
    with pytest.raises(UserError, match="1 to 12"):
        random_heads(pool, 13, 0)
