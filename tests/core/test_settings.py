from dataclasses import dataclass, field

import pytest

from smalti.core.errors import UserError
from smalti.core.settings import override


@dataclass(frozen=True)
class Inner:
    steps: int = 10
    rate: float = 0.5
    compile: bool = False


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    name: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    limit: float | None = None
    model: dict = field(default_factory=lambda: {"depth": 2})


def test_values_take_the_type_of_what_they_replace():
    changed = override(
        Outer(),
        ["inner.steps=20", "inner.rate=1", "name=b", "sizes=[3]", "limit=2.5", "model.depth=4", "inner.compile=true"],
    )
    assert changed == Outer(Inner(20, 1.0, True), "b", (3,), 2.5, {"depth": 4})
    assert isinstance(changed.inner.rate, float)
    assert isinstance(override(Inner(), ["steps=3.0"]).steps, int)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("inner.step=3", "did you mean 'steps'"),
        ("inner.steps", "has no value"),
        ("inner.steps=three", "a value like 10"),
        ("inner.steps=1.5", "a value like 10"),
        ("inner.steps=true", "a value like 10"),
        ("inner.compile=1", "a value like False"),
        ("inner=3", "group of settings"),
        ("name.x=3", "unknown setting 'x'"),
        ("name=[a, b]", "a value like 'a'"),
        ("name={", "cannot be read"),
    ],
)
def test_mistakes_are_named(pair, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        override(Outer(), [pair])


@dataclass(frozen=True)
class Limited:
    steps: int = 100
    warmup: int = 50
    precision: str = "no"

    def __post_init__(self):
        if self.warmup > self.steps:
            raise UserError("warmup is above steps")


def test_pairs_are_applied_at_once():
    assert override(Limited(), ["steps=20", "warmup=5"]) == Limited(20, 5)
    with pytest.raises(UserError, match="warmup is above"):
        override(Limited(), ["steps=20"])


def test_words_that_yaml_reads_otherwise():
    assert override(Limited(precision="bf16"), ["precision=no"]).precision == "no"
    assert override(Outer(limit=1.0), ["limit=none"]).limit is None


def test_values_of_the_wrong_kind_are_one_line():
    with pytest.raises(UserError, match="cannot be used"):
        override(Limited(), ["warmup=null"])
