"""Parallel text: streamed in, bad rows counted, split by sentence, batched within the budget, the same for a seed."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from model.config import TransformerConfig
from model.data import BadRows, Corpus, DataError, _augment, epoch_batches, normalise_source, read_pairs, split_of
from model.recipe import TrainingConfig
from model.tokenizer import Segment, segmenter, train_tokenizer

PAIRS = [
    (f"the number {i} and {'so on ' * (i % 7)}end.", f"die Zahl {i} und {'so weiter ' * (i % 5)}Ende.")
    for i in range(200)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([text for pair in PAIRS for text in pair], 300)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus.write(tmp_path / "corpus.bin", PAIRS)


def test_a_tsv_plain_or_gzipped_and_two_aligned_files_are_the_same(tmp_path: Path) -> None:
    text = "".join(f"{s}\t{t}\n" for s, t in PAIRS)
    (tmp_path / "plain.tsv").write_text(text)
    (tmp_path / "packed").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "en").write_text("".join(f"{s}\n" for s, _ in PAIRS))
    (tmp_path / "de.gz").write_bytes(gzip.compress("".join(f"{t}\r\n" for _, t in PAIRS).encode()))
    for names in (["plain.tsv"], ["packed"], ["en", "de.gz"]):
        bad = BadRows()
        assert list(read_pairs(tuple(tmp_path / name for name in names), bad)) == PAIRS
        assert not bad.counts


def test_bad_rows_are_counted_and_named_and_cost_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"a\tb\nno tab\n\xff\xfe\tx\nc\t \nd\te\tf\n\ng\th\n")
    bad = BadRows()
    assert list(read_pairs((path,), bad)) == [("a", "b"), ("g", "h")]
    assert bad.counts == {"not two columns": 3, "not UTF-8": 1, "with an empty side": 1}
    assert "pairs.tsv:2" in str(bad)
    assert "pairs.tsv:3" in str(bad)


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1\n2\n")
    (tmp_path / "b").write_text("1\n")
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"a\tb\n" * 1000)[:-9])
    for names, message in (
        (["a", "b"], "differ in length"),
        (["none"], "none: No such file"),
        (["c.gz"], "c.gz: broken gzip"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_pairs(tuple(tmp_path / name for name in names), BadRows()))


@given(
    pairs=st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t"), min_size=1)] * 2),
        min_size=1,
    )
)
def test_a_corpus_gives_back_its_pairs(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    corpus = Corpus.write(tmp_path_factory.mktemp("corpus") / "corpus.bin", pairs)
    assert [corpus[i] for i in range(len(corpus))] == pairs


def test_the_split_keeps_all_translations_of_a_sentence_together() -> None:
    """Case and punctuation do not make another sentence; each split gets about its share."""
    assert normalise_source("Where's the  Station?") == normalise_source("wheres the station")
    splits = [split_of(f"sentence {i}", 0.1) for i in range(3000)]
    assert splits == [split_of(f"Sentence, {i}!", 0.1) for i in range(3000)]
    assert splits.count("valid") == pytest.approx(300, abs=60)
    assert splits.count("test") == pytest.approx(300, abs=60)


def rows_of(batches: list, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    rows = []
    for batch in batches:
        for source, length, target in zip(batch.source_ids, batch.source_lengths, batch.target_outputs, strict=True):
            rows.append((tokenizer.decode(source[:length].tolist()), tokenizer.decode(target.tolist())))
    return rows


def test_an_epoch_gives_every_pair_once_within_the_budget(corpus: Corpus, tokenizer: Tokenizer) -> None:
    config = TrainingConfig(batch_tokens=200, pool_pairs=64)
    batches = list(
        epoch_batches(corpus, segmenter(tokenizer, 0.0, 1), TransformerConfig(vocab_size=300), config, 0, BadRows())
    )
    assert sorted(rows_of(batches, tokenizer)) == sorted(PAIRS)
    assert all(batch.source_ids.numel() <= 200 and batch.target_inputs.numel() <= 200 for batch in batches)
    for batch in batches:
        assert (batch.target_inputs[:, 0] == 1).all()
        assert (batch.target_outputs == 2).sum(dim=1).tolist() == [1] * len(batch.source_lengths)
        assert (
            batch.target_inputs[:, 1:][batch.target_outputs[:, 1:] != 0]
            == batch.target_outputs[:, :-1][batch.target_outputs[:, 1:] != 0]
        ).all()
        assert batch.target_tokens == (batch.target_outputs != 0).sum()


def test_an_epoch_is_decided_by_its_seed_and_number(corpus: Corpus, tokenizer: Tokenizer) -> None:
    def epoch(seed: int, number: int) -> list[tuple[str, str]]:
        config = TrainingConfig(batch_tokens=200, seed=seed, join_share=0.3, lowercase_share=0.2)
        return rows_of(
            list(
                epoch_batches(
                    corpus, segmenter(tokenizer, 0.0, 1), TransformerConfig(vocab_size=300), config, number, BadRows()
                )
            ),
            tokenizer,
        )

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) != epoch(2, 0)


def test_with_bpe_dropout_an_epoch_has_the_same_texts_in_other_tokens(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Decided by the seed and the epoch's number, whatever was cut before: a run that is continued has no memory."""
    config, model = TrainingConfig(batch_tokens=200), TransformerConfig(vocab_size=300)

    def epoch(segment: Segment, number: int) -> list[list[int]]:
        return [
            ids
            for b in epoch_batches(corpus, segment, model, config, number, BadRows())
            for ids in b.source_ids.tolist()
        ]

    fresh, used = segmenter(tokenizer, 0.3, 1), segmenter(tokenizer, 0.3, 1)
    first, second = epoch(used, 0), epoch(used, 1)
    assert epoch(fresh, 1) == second
    assert (
        sorted(tokenizer.decode_batch(first)) == sorted(tokenizer.decode_batch(second)) == sorted(s for s, _ in PAIRS)
    )
    assert sum(map(len, first)) != sum(map(len, second))
    assert epoch(segmenter(tokenizer, 0.3, 2), 1) != second


def test_rows_beyond_the_models_limits_are_left_out_and_counted(corpus: Corpus, tokenizer: Tokenizer) -> None:
    bad = BadRows()
    model = TransformerConfig(vocab_size=300, max_source_tokens=16)
    batches = list(epoch_batches(corpus, segmenter(tokenizer, 0.0, 1), model, TrainingConfig(), 0, bad))
    rows = rows_of(batches, tokenizer)
    assert 0 < len(rows) < len(PAIRS)
    assert bad.counts["longer than the model's limits"] == len(PAIRS) - len(rows)


def test_augmentation_joins_about_its_share_and_loses_no_pair() -> None:
    """Joined pairs stand whole and in order on both sides; lower-casing and bare sources come at their rates."""
    config = TrainingConfig(join_share=0.3, join_most=8)
    pairs = [(f"s{i}.", f"t{i}.") for i in range(20000)]
    out = list(_augment(pairs, config, np.random.default_rng(0)))
    assert " ".join(s for _, s, _ in out).split() == [s for s, _ in pairs]
    assert " ".join(t for _, _, t in out).split() == [t for _, t in pairs]
    assert all(pairs[place][0] == s.split()[0] for place, s, _ in out)
    joined = sum(len(s.split()) for _, s, _ in out if " " in s)
    assert joined / len(pairs) == pytest.approx(0.3, abs=0.03)
    assert max(len(s.split()) for _, s, _ in out) == 8
    config = TrainingConfig(lowercase_share=0.2, unpunctuated_share=0.1)
    out = list(_augment([("Yes.", "Ja.")] * 10000, config, np.random.default_rng(0)))
    assert sum(s[0] == "y" for _, s, _ in out) / 10000 == pytest.approx(0.2, abs=0.02)
    assert sum(not s.endswith(".") for _, s, _ in out) / 10000 == pytest.approx(0.1, abs=0.02)
    assert all(t == "Ja." for _, _, t in out)
