"""Text to ids and back: every text can be encoded, none becomes a special token, no stream shows half a character."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from service.artifact import Artifact
from service.errors import ArtifactError
from service.tokenizer import Tokenizer
from tests.service.fakes import MANIFEST

TEXTS = ["the train station", "ein grüner Zug", "🙂🙂 👩‍👩‍👧", "日本語 ελληνικά"]


def _write(path: Path) -> None:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(TEXTS * 3, trainer)
    library.save(str(path))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("tokenizer")
    _write(path / "tokenizer.json")
    return Artifact(path, MANIFEST.model_copy(update={"vocab_size": 310}))


@pytest.fixture(scope="module")
def tokenizer(artifact: Artifact) -> Tokenizer:
    return Tokenizer(artifact)


HARD = [
    "",
    " ",
    "\n\t ",
    "</s>",
    "<pad><s>",
    "a</s>b",
    "\0",
    "ａ",
    "é",
    "e\u0301",
    "🙂",
    "\u2581",
    "\ufeff",
    "א ב",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back_as_they_were(tokenizer: Tokenizer, text: str) -> None:
    """NUL, other scripts, joined emoji, and texts that spell special tokens."""
    ids = tokenizer.encode(text)
    assert ids[-1] == tokenizer.eos_id
    assert not {0, 1, 2} & set(ids[:-1])
    assert tokenizer.decode(ids) == text


@given(text=st.text())
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """Whatever Unicode holds."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    """They are no characters, and JSON escapes can spell them."""
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


def test_a_batch_is_its_texts(tokenizer: Tokenizer) -> None:
    """No padding, no truncation."""
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]
    assert tokenizer.encode_batch([]) == []


@given(ids=st.lists(st.integers(0, 309), max_size=30))
def test_joined_pieces_are_the_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    """For any ids that a model may say: broken characters, special tokens, ids that no token has. And the whole is
    what the library makes of them."""
    pieces = tokenizer.detokenizer().pieces()
    said = [pieces.push([id]) for id in ids]
    said.append(pieces.finish())
    assert "".join(said) == tokenizer.decode(ids) == tokenizer.detokenizer().text(ids)
    assert tokenizer.decode(ids) == tokenizer._tokenizer.decode(ids, skip_special_tokens=True)


@given(text=st.text(alphabet=st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), max_size=12))
def test_a_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    """Every piece is a part of the text; an emoji that is four tokens comes with the last of them."""
    pieces, shown = tokenizer.detokenizer().pieces(), ""
    for id in tokenizer.encode(text):
        shown += pieces.push([id])
        assert text.startswith(shown)
    assert shown == text
    assert pieces.finish() == ""


def test_an_emoji_split_over_tokens_comes_at_once(tokenizer: Tokenizer) -> None:
    """Nothing, nothing, nothing, then the character; left incomplete it becomes one U+FFFD, as in the whole."""
    ids = [next(id for id in range(3, 310) if tokenizer._bytes[id] == bytes([byte])) for byte in "🦩".encode()]
    pieces = tokenizer.detokenizer().pieces()
    assert [pieces.push([id]) for id in ids] == ["", "", "", "🦩"]
    pieces = tokenizer.detokenizer().pieces()
    assert pieces.push(ids[:3]) == ""
    assert pieces.finish() == "\ufffd" == tokenizer.decode(ids[:3])
    assert tokenizer.token(ids[0]) == "\ufffd"


def test_a_token_has_a_text_of_its_own(tokenizer: Tokenizer) -> None:
    """For answers that list tokens."""
    for text in ("the", " train"):
        ids = tokenizer.encode(text)[:-1]
        assert "".join(tokenizer.token(id) for id in ids) == text
    assert tokenizer.token(2) == ""


def test_prefix_and_stop_strings_are_texts(tokenizer: Tokenizer) -> None:
    """In every script."""
    ids = tokenizer.encode("ein grüner Zug")
    assert tokenizer.detokenizer("日本 ", ["ün", "Zug"]).text(ids) == "日本 ein gr"


def test_the_vocabulary_is_that_of_the_tokens(tokenizer: Tokenizer) -> None:
    """Special tokens have no bytes, so that no text is found in them."""
    ids = tokenizer.encode("the train")
    assert b"".join(tokenizer.vocabulary.token_bytes[id] for id in ids) == b"the train"
    assert all(tokenizer.vocabulary.token_bytes[id] == b"" for id in (0, 1, 2))


@pytest.mark.parametrize("broken", ["not json", "no decoder", "too many tokens"])
def test_a_tokenizer_that_does_not_fit_is_refused(artifact: Artifact, tmp_path: Path, broken: str) -> None:
    """With a message that names the file and the remedy."""
    path, manifest = tmp_path / "tokenizer.json", artifact.manifest
    shutil.copy(artifact.tokenizer_path, path)
    if broken == "not json":
        path.write_text("{")
    elif broken == "no decoder":
        path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": None}))
    else:
        manifest = manifest.model_copy(update={"vocab_size": 280})
    with pytest.raises(ArtifactError, match=str(path)) as caught:
        Tokenizer(Artifact(tmp_path, manifest))
    assert "again" in str(caught.value) or "transduce train" in str(caught.value)
