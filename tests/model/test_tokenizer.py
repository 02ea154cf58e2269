"""The tokenizer: every text comes back as it was, and no text becomes a special token."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from model.tokenizer import SPECIAL_TOKENS, BpeDropout, encode_texts, tokenizer_from_json, train_tokenizer

CORPUS = ["Where is the train station?", "Wo ist der Bahnhof?", "the cat sat on the mat", "naïve café Straße"] * 20


@pytest.fixture(scope="module", params=["before", "after"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Of either way to treat spaces: all that is said here holds for both."""
    return tokenizer_from_json(train_tokenizer(CORPUS, 300, request.param).to_str())


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 300


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """Any Unicode text that can be encoded: scripts, emoji, NUL, combining marks, odd spaces, unnormalised forms."""
    (ids,) = encode_texts(tokenizer, [text])
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    [
        "</s>",
        "<s> <pad></s>",
        "a</s>b",
        "\u2581",
        "e\u0301 \u00e9 \ufb01",
        "\x00\x01",
        "  two  spaces ",
        "\r\n\t",
        "👩‍👩‍👧‍👦 🇩🇪",
        "\u202eabc",
    ],
)
def test_hard_texts_come_back_without_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = encode_texts(tokenizer, [text])
    assert min(ids) > 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    (ids,) = encode_texts(tokenizer, ["a\ud800b"])
    assert tokenizer.decode(ids) == "a\ufffdb"


@pytest.mark.parametrize(("spaces", "shared"), [("before", " haus"), ("after", "tür ")])
def test_a_compound_shares_its_last_part_with_a_word_where_spaces_are_after(
    spaces: Literal["before", "after"], shared: str
) -> None:
    """Its first part otherwise: here "haustür" with "haus" and "tür", of which alone the tokenizer learnt."""
    tokenizer = train_tokenizer(["das haus , ein haus , die tür , eine tür ."] * 20, 300, spaces)
    (ids,) = encode_texts(tokenizer, ["die haustür ."])
    assert [part for part in (" haus", "tür ") if part in [tokenizer.decode([id]) for id in ids]] == [shared]


def test_bpe_dropout_of_nothing_is_the_tokenizer_itself(tokenizer: Tokenizer) -> None:
    """The merges by rank that the library does, on texts it learnt from and others."""
    texts = [*CORPUS[:4], "Where café sat", "Zug  und\tBahn!", "\x00é", "der Straße", ""]
    assert list(BpeDropout(tokenizer, 0.0, 1)(texts, np.random.default_rng(0))) == list(encode_texts(tokenizer, texts))


def test_bpe_dropout_of_all_but_everything_is_bytes(tokenizer: Tokenizer) -> None:
    (ids,) = BpeDropout(tokenizer, 1 - 1e-12, 1)(["the Straße"], np.random.default_rng(0))
    assert len(ids) == len("the Straße".encode())


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bpe_dropout_keeps_the_text(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = BpeDropout(tokenizer, 0.5, 1)([text], np.random.default_rng(0))
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_bpe_dropout_leaves_out_its_share_of_merges(tokenizer: Tokenizer) -> None:
    """ "at" is one merge, so with a probability of 0.25 a quarter of its occurrences are two tokens, the rest one."""
    assert len(next(encode_texts(tokenizer, ["at"]))) == 1
    counts = []
    for seed in range(40):  # each draws its own variants
        counts += [len(ids) for ids in BpeDropout(tokenizer, 0.25, seed)(["at"] * 50, np.random.default_rng(seed))]
    assert counts.count(2) / len(counts) == pytest.approx(0.25, abs=0.05)
    assert counts.count(1) + counts.count(2) == len(counts)
