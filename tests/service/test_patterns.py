"""Texts that end an answer or must not occur in it, against `find` on the joined bytes and against all tokens tried."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.patterns import Patterns, Vocabulary

BYTES = st.text(alphabet="ab", max_size=4).map(str.encode)
SPELLINGS = st.lists(BYTES, min_size=1, max_size=12)
TEXTS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6).map(str.encode), min_size=1, max_size=4)


@settings(deadline=None)
@given(SPELLINGS, BYTES)
def test_a_vocabulary_finds_its_tokens(spellings: list[bytes], text: bytes) -> None:
    """By how they begin and by what they contain; a token without bytes begins with nothing."""
    vocabulary = Vocabulary(spellings)
    beginning = [id for id, spelling in enumerate(spellings) if spelling and spelling.startswith(text)]
    assert sorted(vocabulary.beginning_with(text)) == beginning
    assert vocabulary.containing(text) == [id for id, spelling in enumerate(spellings) if text in spelling]


@settings(deadline=None)
@given(SPELLINGS, TEXTS, st.data())
def test_a_text_is_complete_with_the_token_that_holds_its_last_byte(
    spellings: list[bytes], texts: list[bytes], data: st.DataObject
) -> None:
    """However it is split over tokens: the first token that completes one is the first after which `find` finds one."""
    patterns = Patterns(Vocabulary(spellings), texts)
    ids = data.draw(st.lists(st.integers(0, len(spellings) - 1), max_size=15))
    before, joined = b"", b""
    for id in ids:
        joined += spellings[id]
        found = any(joined.find(text) >= 0 for text in texts)
        assert patterns.completed_by(before, id) == found
        if found:
            break
        before = patterns.extend(before, id)
        assert joined.endswith(before)
        assert len(before) == min(patterns.reach, len(joined))


@settings(deadline=None)
@given(SPELLINGS, TEXTS, st.data())
def test_a_text_that_was_there_before_is_not_completed_again(
    spellings: list[bytes], texts: list[bytes], data: st.DataObject
) -> None:
    """After an occurrence the next one counts, also one that overlaps it."""
    patterns = Patterns(Vocabulary(spellings), texts)
    ids = st.integers(0, len(spellings) - 1)
    before, id = tuple(data.draw(st.lists(ids, max_size=8))), data.draw(ids)
    old = b"".join(spellings[id] for id in before)
    new = old + spellings[id]
    ends = [end for end in range(len(old) + 1, len(new) + 1) for text in texts if new[:end].endswith(text)]
    assert patterns.completed_by(patterns.text_of(before), id) == bool(ends)


@settings(deadline=None)
@given(SPELLINGS, TEXTS, st.data())
def test_the_tokens_that_complete_a_text_are_those_that_do_when_tried(
    spellings: list[bytes], texts: list[bytes], data: st.DataObject
) -> None:
    """Every token of the vocabulary, tried one by one, gives the same list, in ascending order."""
    patterns = Patterns(Vocabulary(spellings), texts)
    before = patterns.text_of(tuple(data.draw(st.lists(st.integers(0, len(spellings) - 1), max_size=8))))
    tried = [id for id in range(len(spellings)) if patterns.completed_by(before, id)]
    assert patterns.completing(before) == tried


@settings(deadline=None)
@given(SPELLINGS, TEXTS, st.integers(0, 99))
def test_whoever_avoids_the_completing_tokens_never_says_the_text(
    spellings: list[bytes], texts: list[bytes], seed: int
) -> None:
    """Token by token at random, among those that are left."""
    patterns, rng = Patterns(Vocabulary(spellings), texts), random.Random(seed)
    before, said = b"", b""
    for _ in range(30):
        left = sorted(set(range(len(spellings))) - set(patterns.completing(before)))
        if not left:
            break
        id = rng.choice(left)
        said += spellings[id]
        before = patterns.extend(before, id)
    assert all(text not in said for text in texts)


def test_characters_may_be_split_within() -> None:
    """The bytes of one character come in several tokens."""
    euro = "€".encode()
    patterns = Patterns(Vocabulary([euro[:1], euro[1:2], euro[2:], b"x"]), [euro])
    before = patterns.text_of((3, 0, 1))
    assert patterns.completing(before) == [2]
    assert patterns.completed_by(before, 2)
    assert not patterns.completed_by(before, 3)
    assert patterns.completing(patterns.text_of((0, 3, 1))) == []


def test_case_counts_and_special_tokens_say_nothing() -> None:
    """A token without bytes completes nothing, and text goes on across it."""
    patterns = Patterns(Vocabulary([b"", b"e", b"nd", b"END"]), [b"end"])
    assert patterns.completing(b"") == []
    assert patterns.completing(patterns.text_of((1, 0))) == [2]


def test_an_empty_text_is_refused() -> None:
    """It would be complete before anything is said."""
    with pytest.raises(ValueError, match="completed by everything"):
        Patterns(Vocabulary([b"a"]), [b"a", b""])
    assert repr(Patterns(Vocabulary([b"a"]), [b"a", b"a"])) == "<Patterns 1 texts>"
