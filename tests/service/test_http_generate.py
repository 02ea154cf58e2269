"""POST /v1/generate without a stream, against the engine that says every text back."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.schemas import GenerateResponse
from tests.service.fake_engine import FakeEngine, fake_models


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(engine, max_inputs=8))) as client:
        yield client


def generate(client: TestClient, inputs: Any, **parameters: Any) -> dict[str, Any]:
    response = client.post("/v1/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    GenerateResponse.model_validate(response.json())
    return response.json()


def texts(answer: dict[str, Any]) -> list[str]:
    return [output["sequences"][0]["text"] for output in answer["outputs"]]


def test_one_text_gives_one_output(client: TestClient) -> None:
    """A single string is a list of one; usage counts end tokens."""
    answer = generate(client, "Where is the station?")
    assert texts(answer) == ["Where is the station?"]
    assert answer["model"] == "echo"
    assert answer["usage"] == {"source_tokens": 22, "generated_tokens": 22}
    assert answer["outputs"][0]["sequences"] == [{"text": "Where is the station?", "finish_reason": "stop"}]


def test_a_list_is_answered_in_order(client: TestClient) -> None:
    """One output per input, in order, however long each took."""
    inputs = ["a long one that takes more steps", "b", "", "c c"]
    assert texts(generate(client, inputs)) == inputs


@pytest.mark.parametrize(
    "text",
    [
        "Grüße",
        "汉字",
        "🦜🇩🇪",
        "a\x00b",
        "nul\u0000",
        "\u202eright",
        "</s><pad>",
        "\ufeffbom",
        "e\u0301",
        "a\r\nb\u2028c",
    ],
)
def test_any_text_goes_through(client: TestClient, text: str) -> None:
    """Any script, emoji, control characters and the spelling of special tokens are text like any other."""
    assert texts(generate(client, text)) == [text]


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u3000\u00a0"])
def test_blank_text_gives_empty_text_without_the_engine(client: TestClient, engine: FakeEngine, blank: str) -> None:
    """Nothing to say is answered with nothing, finish reason stop, score 0; the engine is not asked."""
    answer = generate(client, [blank], return_scores=True, return_tokens=True)
    assert answer["outputs"][0]["sequences"] == [{"text": "", "finish_reason": "stop", "score": 0.0, "tokens": []}]
    assert answer["usage"] == {"source_tokens": 0, "generated_tokens": 0}
    assert engine.submitted == 0


def test_lone_surrogates_become_replacement_characters(client: TestClient) -> None:
    """A JSON escape can spell what UTF-8 cannot; it is answered, not refused, and the answer is valid UTF-8."""
    response = client.post("/v1/generate", content=rb'{"inputs": ["\ud800 x", "\udfff", "\ud83e\udd9c"]}')
    assert response.status_code == 200
    assert texts(response.json()) == ["\ufffd x", "\ufffd", "🦜"]


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "text/plain", "multipart/form-data"]
)
def test_the_content_type_is_not_asked(client: TestClient, content_type: str | None) -> None:
    """`curl -d` announces a form; the body is JSON all the same."""
    headers = {} if content_type is None else {"content-type": content_type}
    response = client.post("/v1/generate", content=b'{"inputs": "a"}', headers=headers)
    assert texts(response.json()) == ["a"]


def test_a_byte_order_mark_before_the_body_is_skipped(client: TestClient) -> None:
    """Some shells write one."""
    assert client.post("/v1/generate", content=b'\xef\xbb\xbf{"inputs": "a"}').status_code == 200


def test_score_is_the_sum_over_a_power_of_the_length(client: TestClient) -> None:
    """Three tokens of -0.5: the sum is -1.5 with penalty 0, its mean with 1, a ninth of it with 2."""
    found = [
        generate(client, "ab", return_scores=True, length_penalty=penalty)["outputs"][0]["sequences"][0]["score"]
        for penalty in (0, 1, 2.0)
    ]
    assert found == [-1.5, -0.5, pytest.approx(-1.5 / 9)]


def test_the_texts_of_tokens_join_to_the_text(client: TestClient) -> None:
    """A token that ends a character gives the whole of it, one that cuts it gives nothing."""
    sequence = generate(client, "né🦜", return_tokens=True)["outputs"][0]["sequences"][0]
    assert "".join(token["text"] for token in sequence["tokens"]) == "né🦜"
    assert [token["logprob"] for token in sequence["tokens"]] == [-0.5] * 8
    assert "score" not in sequence


def test_max_new_tokens_ends_a_text(client: TestClient) -> None:
    """With finish reason length; by default the limit is the model's."""
    answer = generate(client, "abcdef", max_new_tokens=3)
    assert answer["outputs"][0]["sequences"] == [{"text": "abc", "finish_reason": "length"}]
    assert generate(client, "a" * 60)["usage"]["generated_tokens"] == 48


def test_truncate_cuts_to_the_limit(client: TestClient) -> None:
    """The first tokens that fit are kept, with the end token; a megabyte is cut without being tokenised whole."""
    for text in ("x" * 64, "x" * 1_000_000):
        assert generate(client, text, truncate=True)["usage"]["source_tokens"] == 64


@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_a_timeout_while_generating_gives_what_there_is(more: dict[str, Any]) -> None:
    """200, with finish reason timeout and the text so far, of every sequence."""
    with TestClient(create_app(fake_models(FakeEngine(step_seconds=0.02)))) as client:
        sequences = generate(client, "a" * 40, prefix="b", timeout=0.1, **more)["outputs"][0]["sequences"]
    assert len(sequences) == more.get("num_return_sequences", 1)
    for sequence in sequences:
        assert sequence["finish_reason"] == "timeout"
        assert 1 < len(sequence["text"]) < 40
        assert sequence["text"].startswith("ba")


def test_null_means_left_out(client: TestClient) -> None:
    """A client that sends every field it knows may send null for those it does not set."""
    names = ["max_new_tokens", "timeout", "num_beams", "temperature", "stop", "prefix", "length_penalty", "truncate"]
    assert texts(generate(client, "a", **dict.fromkeys(names))) == ["a"]


def several(answer: dict[str, Any]) -> list[str]:
    return [sequence["text"] for sequence in answer["outputs"][0]["sequences"]]


def test_the_best_of_several_come_in_order_with_their_scores(client: TestClient) -> None:
    """As the engine ranked them; the tokens of all are counted."""
    answer = generate(client, ["abc", "de"], num_beams=4, num_return_sequences=3, return_scores=True)
    assert several(answer) == ["abc", "bc", "c"]
    scores = [sequence["score"] for sequence in answer["outputs"][0]["sequences"]]
    assert scores == pytest.approx([-0.5, -0.6, -0.7])
    assert [sequence["text"] for sequence in answer["outputs"][1]["sequences"]] == ["de", "e", ""]
    assert answer["usage"] == {"source_tokens": 7, "generated_tokens": 4 + 3 + 2 + 3 + 2 + 1}


def test_samples_and_alternatives_are_sequences_too(client: TestClient) -> None:
    """More of them than beams."""
    assert several(generate(client, "abc", do_sample=True, num_return_sequences=2, seed=1)) == ["abc", "bc"]
    assert several(generate(client, "abc", return_alternatives=True, num_return_sequences=2)) == ["abc", "bc"]


def test_a_prefix_begins_every_text_and_is_in_no_count(client: TestClient) -> None:
    """Scores, tokens and usage are of what follows it."""
    answer = generate(client, "né", prefix="🦜 ", return_tokens=True, return_scores=True, length_penalty=0)
    (sequence,) = answer["outputs"][0]["sequences"]
    assert sequence["text"] == "🦜 né"
    assert "".join(token["text"] for token in sequence["tokens"]) == "né"
    assert sequence["score"] == -0.5 * 4
    assert answer["usage"]["generated_tokens"] == 4


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("d", "abc", "stop"),
        (["de"], "abc", "stop"),
        (["x", "cd", "d"], "ab", "stop"),
        (["a"], "", "stop"),
        (["efg"], "abcd", "stop"),
        (["efgh"], "abcdefg", "stop"),
        (["x", "ga"], "abcdefg", "stop"),
    ],
)
def test_a_stop_string_ends_a_text_and_is_cut_off(client: TestClient, stop: Any, text: str, reason: str) -> None:
    """The first one that comes; it is not in the text, but its tokens are listed and counted."""
    answer = generate(client, "abcdefg", stop=stop, return_tokens=True)
    (sequence,) = answer["outputs"][0]["sequences"]
    assert (sequence["text"], sequence["finish_reason"]) == (text, reason)
    whole = "".join(token["text"] for token in sequence["tokens"])
    assert whole.startswith(text)
    assert answer["usage"]["generated_tokens"] == len(sequence["tokens"])
    if text != "abcdefg":
        assert any(whole.endswith(one) for one in stop)


def test_a_stop_string_in_the_prefix_does_not_count(client: TestClient) -> None:
    """Nor one that begins in it."""
    assert texts(generate(client, "abc", prefix="ab", stop=["ab", "ba"])) == ["ab"]
    assert texts(generate(client, "xabc", prefix="ab", stop=["ab", "bx"])) == ["abx"]


def test_alignments_are_a_row_per_token_and_a_column_per_source_token(client: TestClient) -> None:
    """What the columns stand for is beside them; the rows are those of `tokens`."""
    answer = generate(client, "né", return_alignments=True, return_tokens=True, num_beams=2, num_return_sequences=2)
    (output,) = answer["outputs"]
    assert [token["text"] for token in output["source_tokens"]] == ["n", "", "é", ""]
    assert [token["id"] for token in output["source_tokens"]] == [113, 198, 172, 2]
    for sequence in output["sequences"]:
        assert sequence["alignment"] == [[0.25] * 4] * len(sequence["tokens"])
    assert "source_tokens" not in generate(client, "a")["outputs"][0]


def test_blank_text_has_one_empty_sequence_whatever_is_asked(client: TestClient, engine: FakeEngine) -> None:
    """Neither a prefix nor a number of sequences makes something of nothing."""
    options = {"prefix": "ab", "num_beams": 3, "num_return_sequences": 3, "return_alignments": True}
    assert generate(client, " ", **options)["outputs"] == [
        {"sequences": [{"text": "", "finish_reason": "stop", "alignment": []}], "source_tokens": []}
    ]
    assert engine.submitted == 0


def test_a_large_answer_is_the_same(client: TestClient) -> None:
    """It is rendered in a thread."""
    options = {"return_tokens": True, "return_alignments": True, "do_sample": True, "num_return_sequences": 16}
    (alone,) = generate(client, "a" * 40, **options)["outputs"]
    assert generate(client, ["a" * 40] * 8, **options)["outputs"] == [alone] * 8


def test_a_failed_input_fails_its_call_and_cancels_the_others(client: TestClient, engine: FakeEngine) -> None:
    """One call has one status; what still ran for it is given up."""
    engine.step_seconds = 0.005
    response = client.post("/v1/generate", json={"inputs": ["poison", "a" * 40]})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "engine_failure"
    assert len(engine.cancelled) == 1


def test_the_model_can_be_named(client: TestClient) -> None:
    """By its own name; another is 404."""
    assert client.post("/v1/generate", json={"inputs": "a", "model": "echo"}).status_code == 200
    response = client.post("/v1/generate", json={"inputs": "a", "model": "other"})
    assert response.status_code == 404
    assert "'echo'" in response.json()["error"]["message"]
