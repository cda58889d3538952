"""Names and keywords are all there, split by concept, and come back from their tokens."""

import doctest

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.data import words
from smalti.data.emoji import load_emoji
from smalti.data.words import (
    END,
    MASK,
    PAD,
    START,
    UNKNOWN,
    VOCABULARY,
    Lines,
    Pairs,
    Words,
    decode,
    encode,
    load_words,
)


def test_all_emoji_are_split_by_concept():
    train, held_out = load_words("train"), load_words("held-out")
    assert len(train) + len(held_out) == len(load_words("all"))
    assert 0.05 < len(held_out) / len(train) < 0.15
    clocks = load_emoji("held-out", styles=["noto"], topics=["clocks"]).items
    names = {one.name for one in held_out}
    assert {item.label.lower() for item in clocks} <= names
    assert not names & {one.name for one in train}


def test_most_characters_are_known():
    tokens = [token for one in load_words("all") for token in encode(f"{one.name} {' '.join(one.keywords)}")]
    assert tokens.count(UNKNOWN) < 0.005 * len(tokens)
    assert max(tokens) < VOCABULARY
    assert min(tokens) >= UNKNOWN


def test_text_comes_back():
    assert decode([START, *encode("A cat, 1st"), END, *encode("xx")]) == "a cat, 1st"
    assert decode([*encode("a~"), MASK, PAD]) == "a?_"


def test_lines_keep_their_limit_and_shuffle_their_keywords():
    source = Lines([Words("red apple", ("fruit", "mac", "red", "ripe")), Words("sun", ())], limit=24)
    drawn = [source.batch(torch.tensor([0, 1]), generators_for([seed, seed])) for seed in range(8)]
    lines = {decode(one.x0[0].tolist()) for one in drawn}
    assert len(lines) > 2
    assert all(line.startswith("red apple: ") and len(line) <= 24 for line in lines)
    again = source.batch(torch.tensor([0, 1]), generators_for([3, 3]))
    assert torch.equal(again.x0, drawn[3].x0)
    assert decode(again.x0[1].tolist()) == "sun"
    assert again.cond.mask[1].sum() == 3
    assert torch.equal(again.x0 != PAD, again.cond.mask)


def test_pairs_have_keywords_as_source_and_the_name_as_target():
    source = Pairs([Words("cat", ("pet", "whiskers")), Words("sunflower", ("flower",))])
    one = source.batch(torch.tensor([0, 1]), generators_for([0, 1]))
    assert [decode(row) for row in one.x0.tolist()] == ["cat", "sunflower"]
    assert one.x0[0, 0] == START
    assert one.x0[0, 4] == END
    assert not one.cond.mask[0, 5:].any()
    assert decode(one.cond.extra["source"][0].tolist()) in ("pet, whiskers", "whiskers, pet")
    assert one.cond.extra["source_mask"].sum(1).tolist() == [13, 6]


def test_refuses_and_examples():
    with pytest.raises(UserError, match="unknown split 'test'"):
        load_words("test")
    assert doctest.testmod(words).failed == 0
