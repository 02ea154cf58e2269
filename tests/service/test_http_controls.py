"""The controls of a generation over HTTP with the real engine and the tiny model, all in one running batch."""

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.models import Models
from service.served_model import ServedModel
from tests.service.fake_server import serving
from tests.service.real_model import TEXTS, running

EXTRAS = {"return_scores": True, "return_tokens": True}
CONTROLS: list[dict[str, Any]] = [
    {},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "length_penalty": 0.2, "early_stopping": True, "max_new_tokens": 20},
    {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0, "repetition_penalty": 1.5},
    {"do_sample": True, "seed": 11, "num_return_sequences": 3},
    {"do_sample": True, "seed": 12, "temperature": 0.7, "top_k": 0, "top_p": 0.8, "no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 7},
    {"prefix": "Die Katze", "max_new_tokens": 9},
    {"prefix": "the", "return_alternatives": True, "num_return_sequences": 3, "num_beams": 2},
    {"stop": ["e", "th"], "num_beams": 3, "num_return_sequences": 2},
    {"stop": ["th"], "suppress": ["e", "at"], "do_sample": True, "seed": 13},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Iterator[ServedModel]:
    with running(tiny_artifact, max_rows=24, workers=2) as model:
        yield model


@pytest.fixture(scope="module")
def client(model: ServedModel) -> Iterator[TestClient]:
    with TestClient(create_app(Models([model]))) as client:
        yield client


def generate(client: TestClient, inputs: Any, **parameters: Any) -> dict[str, Any]:
    response = client.post("/v1/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def sequences(client: TestClient, text: str, **parameters: Any) -> list[dict[str, Any]]:
    return generate(client, text, **{**EXTRAS, **parameters})["outputs"][0]["sequences"]  # type: ignore[no-any-return]


def test_any_mix_of_requests_gives_what_each_gets_alone(client: TestClient) -> None:
    """Texts, scores, tokens and reasons, with all controls at once, several calls at a time."""
    pairs = list(itertools.product(TEXTS, CONTROLS))
    alone = [sequences(client, text, **controls) for text, controls in pairs]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda pair: sequences(client, pair[0], **pair[1]), pairs))
    assert together == alone


@pytest.mark.parametrize("controls", CONTROLS)
def test_streams_join_to_the_unstreamed_answer(client: TestClient, controls: dict[str, Any]) -> None:
    """Every result of every input, with its extras, whatever decides when a token is certain."""
    parameters = {**EXTRAS, **controls}
    whole = generate(client, TEXTS, **parameters)["outputs"]
    body = {"inputs": TEXTS, "stream": True, "parameters": parameters}
    *lines, done, _ = client.post("/v1/generate", json=body).text.split("\n\n")
    assert done == "data: [DONE]"
    said: dict[tuple[int, int], str] = {}
    ends: dict[tuple[int, int], dict[str, Any]] = {}
    for line in lines:
        event = json.loads(line.removeprefix("data: "))
        key = event["index"], event["sequence"]
        assert key not in ends
        said[key] = said.get(key, "") + event["text"]
        if event["finish_reason"] is not None:
            ends[key] = event
    expected = {(i, j): one for i, output in enumerate(whole) for j, one in enumerate(output["sequences"])}
    assert set(ends) == set(expected)
    for key, sequence in expected.items():
        assert {name: ends[key][name] for name in sequence} | {"text": said[key]} == sequence


def test_one_beam_is_greedy(client: TestClient) -> None:
    """The same text, score and tokens."""
    for text in TEXTS:
        assert sequences(client, text, num_beams=1) == sequences(client, text)


def test_beams_are_ranked_by_score_and_all_different(client: TestClient) -> None:
    """And the best of four is at least as probable as what greedy finds, with a plain sum."""
    for text in filter(None, TEXTS):
        found = sequences(client, text, num_beams=4, num_return_sequences=4, length_penalty=0)
        scores = [one["score"] for one in found]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(token["id"] for token in one["tokens"]) for one in found}) == 4
        assert scores[0] == pytest.approx(sum(token["logprob"] for token in found[0]["tokens"]))


def test_a_seed_repeats_and_no_seed_does_not(client: TestClient) -> None:
    """Samples of one request differ from one another, too."""
    options = {"do_sample": True, "num_return_sequences": 4, "top_k": 0, "temperature": 1.5}
    text = TEXTS[2]
    assert sequences(client, text, **options, seed=1) == sequences(client, text, **options, seed=1)
    seeds = [tuple(one["text"] for one in sequences(client, text, **options, seed=seed)) for seed in range(4)]
    assert len(set(seeds)) == 4
    assert len(set(seeds[0])) == 4
    assert sequences(client, text, **options) != sequences(client, text, **options)


def test_texts_end_at_stop_strings_and_hold_no_suppressed_ones(client: TestClient) -> None:
    """Greedy, by beams and by samples."""
    for more in ({}, {"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "seed": 3}):
        for text in TEXTS:
            for one in sequences(client, text, **more, stop=["e"], suppress=["a", "th"]):
                spelt = "".join(token["text"] for token in one["tokens"])
                assert "e" not in one["text"]
                assert "a" not in spelt
                assert "th" not in spelt
                if "e" in spelt:
                    assert one["finish_reason"] == "stop"
                    assert spelt.startswith(one["text"] + "e")


def test_lengths_are_kept(client: TestClient) -> None:
    """At least, at most, and with a prefix."""
    for text in filter(None, TEXTS):
        (one,) = sequences(client, text, min_new_tokens=10, max_new_tokens=10)
        assert len(one["tokens"]) == 10
        assert one["finish_reason"] == "length"
        (one,) = sequences(client, text, prefix="the cat " * 4, min_new_tokens=1)
        assert one["text"].startswith("the cat " * 4)


def test_alternatives_begin_with_different_tokens(client: TestClient) -> None:
    """The likeliest ones after the prefix, each completed; the first is what greedy decoding takes."""
    for text in filter(None, TEXTS):
        found = sequences(client, text, prefix="the", return_alternatives=True, num_return_sequences=5)
        firsts = [one["tokens"][0] for one in found]
        assert len({token["id"] for token in firsts}) == 5
        (greedy,) = sequences(client, text, prefix="the")
        assert greedy in found
        assert max(firsts, key=lambda token: token["logprob"])["id"] == greedy["tokens"][0]["id"]


def test_a_greedy_answer_continues_from_any_beginning_of_it(client: TestClient) -> None:
    """The tokens of its own text, as a prefix, are followed by those that followed."""
    text = TEXTS[0]
    (whole,) = sequences(client, text)
    beginning = "".join(token["text"] for token in whole["tokens"][:1])
    if "\ufffd" not in beginning:
        (rest,) = sequences(client, text, prefix=beginning)
        assert rest["tokens"] == whole["tokens"][1:]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("controls", [{}, CONTROLS[1], CONTROLS[4], CONTROLS[8]])
def test_a_client_that_leaves_frees_its_rows(
    model: ServedModel, client: TestClient, controls: dict[str, Any], stream: bool
) -> None:
    """Whatever it asked for: at once, long before its thousand inputs would have been done; each is counted."""
    body = {"inputs": TEXTS[:4] * 250, "stream": stream, "parameters": controls}

    def metric(name: str, words: str = "") -> float:
        lines = client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(name) and words in line]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def ended() -> float:
        return metric("transduce_requests_total")

    before, cancelled_before = ended(), metric("transduce_requests_total", "cancelled")
    with serving(model) as port, contextlib.suppress(httpx.ReadTimeout):
        timeout = httpx.Timeout(30, read=None if stream else 0.1)
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/generate", json=body, timeout=timeout) as response:
            next(response.iter_lines())
    until = time.monotonic() + 20
    while ended() - before < 1000:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert ended() - before == 1000
    assert metric("transduce_rows_in_use") == 0
    assert metric("transduce_requests_total", "cancelled") - cancelled_before > 100


def test_a_score_is_what_generation_added_up(client: TestClient) -> None:
    """Of a greedy answer: the same tokens, and their log-probabilities, within what quantised arithmetic allows."""
    for text in filter(None, TEXTS):
        (one,) = sequences(client, text, suppress=["\ufffd"])
        if one["finish_reason"] != "stop" or "\ufffd" in one["text"]:
            continue
        body = {"inputs": text, "targets": one["text"], "return_tokens": True}
        (scored,) = client.post("/v1/score", json=body).json()["outputs"]
        if [token["id"] for token in scored["tokens"]] == [token["id"] for token in one["tokens"]]:
            found = [token["logprob"] for token in one["tokens"]]
            assert [token["logprob"] for token in scored["tokens"]] == pytest.approx(found, abs=0.05)
            assert scored["score"] == pytest.approx(sum(token["logprob"] for token in scored["tokens"]))


def test_alignments_are_of_the_tokens_and_their_rows_add_up(client: TestClient) -> None:
    """Greedy, by beams and by samples; alone and together the same numbers."""
    for more in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "seed": 1, "prefix": "the"}):
        options = {**EXTRAS, **more, "return_alignments": True}
        outputs = generate(client, TEXTS, **options)["outputs"]
        assert outputs == [generate(client, text, **options)["outputs"][0] for text in TEXTS]
        for text, output in zip(TEXTS, outputs, strict=True):
            assert "".join(token["text"] for token in output["source_tokens"]) == text
            for sequence in output["sequences"]:
                assert len(sequence["alignment"]) == len(sequence["tokens"])
                for row in sequence["alignment"]:
                    assert len(row) == len(output["source_tokens"])
                    assert sum(row) == pytest.approx(1, abs=1e-3)
