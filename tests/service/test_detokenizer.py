"""Ids to the text of a result: the same whole and in pieces, cut at the first stop string, after the prefix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.detokenizer import Detokenizer, StopFilter, first_occurrence
from service.patterns import Patterns, Vocabulary

BYTES = [
    b"",
    *(bytes([byte]) for byte in b"ab\xf0\x9f\xa6\x9c\xc3\xa9"),
    b"ab",
    b"ba",
    "aé".encode(),
    b"\x9f\xa6",
    b"aab",
]
"""Tokens of a small alphabet, so that stop strings come often, whole and in part."""

IDS = st.lists(st.integers(0, len(BYTES) - 1), max_size=30)
STOPS = st.lists(st.text(alphabet="ab\u00e9\U0001f99c", min_size=1, max_size=5), max_size=3)


@given(ids=IDS, prefix=st.text(max_size=3), stop=STOPS, data=st.data())
def test_joined_pieces_are_the_whole(ids: list[int], prefix: str, stop: list[str], data: st.DataObject) -> None:
    """However the tokens come, whatever they break off, wherever a stop string begins."""
    detokenizer = Detokenizer(BYTES, prefix, [text.encode() for text in stop])
    pieces, said, place = detokenizer.pieces(), "", 0
    whole = detokenizer.text(ids)
    while place < len(ids):
        step = data.draw(st.integers(1, 4))
        said += pieces.push(ids[place : place + step])
        place += step
        assert whole.startswith(said)
    assert said + pieces.finish() == whole
    assert pieces.count == len(ids)


@given(ids=IDS, stop=STOPS.filter(bool))
def test_the_cut_is_where_the_engine_ends(ids: list[int], stop: list[str]) -> None:
    """The engine ends with the token that completes a stop string; the text then ends before the first of them."""
    patterns, before, taken = Patterns(Vocabulary(BYTES), [text.encode() for text in stop]), b"", []
    for id in ids:
        taken.append(id)
        if completes := patterns.completed_by(before, id):
            break
        before += BYTES[id]
    else:
        completes = False
    text = Detokenizer(BYTES, "", [text.encode() for text in stop]).text(taken)
    plain = Detokenizer(BYTES).text(taken)
    assert not any(one in text for one in stop)
    assert plain.startswith(text)
    assert (text != plain) == completes


def test_the_prefix_comes_with_the_first_piece_and_is_never_cut() -> None:
    """A stop string that the prefix holds, or that begins in it, does not count."""
    detokenizer = Detokenizer(BYTES, "ab", [b"ab", b"ba"])
    pieces = detokenizer.pieces()
    assert pieces.push([1]) == "ab"
    assert pieces.finish() == "a"
    assert detokenizer.text([1]) == "aba"
    assert detokenizer.text([]) == "ab"
    assert Detokenizer(BYTES, "ab").pieces().finish() == "ab"


def test_what_may_become_a_stop_string_is_held_back_and_no_more() -> None:
    """The longest end of the text that begins one; when it turns out otherwise it is said."""
    filter = StopFilter([b"aab", b"bb"])
    assert filter.push(b"xa") == b"x"
    assert filter.push(b"a") == b""
    assert filter.push(b"a") == b"a"
    assert filter.push(b"x") == b"aax"
    assert filter.push(b"xb") == b"x"
    assert filter.finish() == b"b"


def test_nothing_follows_a_stop_string() -> None:
    """Whatever comes after it."""
    filter = StopFilter([b"aab"])
    assert filter.push(b"xaa") == b"x"
    assert filter.push(b"baa") == b""
    assert filter.push(b"x") == b""
    assert filter.finish() == b""


@pytest.mark.parametrize(
    ("text", "stop", "place"),
    [(b"abc", [b"c", b"bc"], 1), (b"abc", [b"bc", b"a"], 0), (b"abc", [b"d"], None), (b"", [b"a"], None)],
)
def test_the_first_occurrence_of_any(text: bytes, stop: list[bytes], place: int | None) -> None:
    """By where it begins, not by where it ends."""
    assert first_occurrence(text, stop) == place
