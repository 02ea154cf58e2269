"""Server-sent events: what a stream says, in which order, and how it ends."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.schemas import StreamEvent
from tests.service.fake_engine import FakeEngine, fake_models


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(step_seconds=0.002)


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(engine))) as client:
        yield client


def stream(client: TestClient, inputs: Any, **parameters: Any) -> list[str]:
    """The data lines of a stream."""
    response = client.post("/v1/generate", json={"inputs": inputs, "stream": True, "parameters": parameters})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def events(client: TestClient, inputs: Any, **parameters: Any) -> list[dict[str, Any]]:
    """The events of a stream that ends well."""
    *data, done = stream(client, inputs, **parameters)
    assert done == "[DONE]"
    found = [json.loads(line) for line in data]
    for event in found:
        StreamEvent.model_validate(event)
    return found


def joined(found: list[dict[str, Any]], index: int = 0, sequence: int = 0) -> str:
    return "".join(event["text"] for event in found if (event["index"], event["sequence"]) == (index, sequence))


@pytest.mark.parametrize("text", ["Where is the station?", "é", "汉字 und 🦜🇩🇪", "", " ", "a\n\ndata: b\r\n"])
def test_joined_texts_are_the_unstreamed_answer(client: TestClient, text: str) -> None:
    """Whatever the text; line ends in it do not break the events."""
    whole = client.post("/v1/generate", json={"inputs": text}).json()["outputs"][0]["sequences"][0]["text"]
    assert joined(events(client, text)) == whole


SAMPLES = {"do_sample": True, "num_return_sequences": 3}
BEAMS = {"num_beams": 3, "num_return_sequences": 3}


@pytest.mark.parametrize("options", [{}, SAMPLES, BEAMS, {"return_alternatives": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("more", [{}, {"prefix": "cé "}, {"stop": ["é d", "zz"]}, {"prefix": "🦜", "stop": "cé"}])
def test_every_result_joins_to_the_unstreamed_answer(client: TestClient, options: Any, more: Any) -> None:
    """With prefix and stop strings, greedy, by samples, alternatives and beams; last events carry the extras."""
    parameters = {**options, **more, "return_scores": True, "return_tokens": True, "return_alignments": True}
    inputs = ["abcé dee", "cé", "x", ""]
    whole = client.post("/v1/generate", json={"inputs": inputs, "parameters": parameters}).json()
    found = events(client, inputs, **parameters)
    ends = {(event["index"], event["sequence"]): event for event in found if event["finish_reason"]}
    assert len(ends) == sum(event["finish_reason"] is not None for event in found)
    for index, output in enumerate(whole["outputs"]):
        assert sorted(place for other, place in ends if other == index) == list(range(len(output["sequences"])))
        for place, sequence in enumerate(output["sequences"]):
            assert joined(found, index, place) == sequence["text"]
            end = ends[index, place]
            assert {name: end[name] for name in sequence if name != "text"} == {
                name: value for name, value in sequence.items() if name != "text"
            }
            assert end["source_tokens"] == output["source_tokens"]
    generated = sum(event["usage"]["generated_tokens"] for event in ends.values())
    assert generated == whole["usage"]["generated_tokens"]


def test_samples_come_side_by_side(client: TestClient) -> None:
    """Each result has events of its own while all are being made."""
    found = events(client, "abcdefgh", **SAMPLES)
    order = [event["sequence"] for event in found]
    assert set(order[:6]) == {0, 1, 2}


def test_beams_are_told_as_far_as_they_agree_and_the_rest_at_the_end(client: TestClient) -> None:
    """The best one's certain beginning comes early, the others whole."""
    found = events(client, "abcdefgh", **BEAMS)
    assert found[0]["sequence"] == 0
    assert found[0]["finish_reason"] is None
    assert "abcdefgh".startswith(found[0]["text"])
    assert [event["text"] for event in found if event["sequence"] == 2] == ["cdefgh"]


def test_what_may_become_a_stop_string_is_held_back(client: TestClient) -> None:
    """And comes when it did not."""
    found = events(client, "abcabd", stop="abd")
    said = [event["text"] for event in found]
    assert "".join(said) == "abc"
    assert "a" not in said
    assert events(client, "ab", stop="abd")[-1]["text"] == "ab"


def test_an_event_never_holds_half_a_character(client: TestClient) -> None:
    """A character of four bytes comes with the last of its four tokens."""
    found = events(client, "🦜🦜")
    assert [event["text"] for event in found if event["text"]] == ["🦜", "🦜"]


def test_a_character_cut_off_by_the_limit_ends_as_in_the_unstreamed_answer(client: TestClient) -> None:
    """Six tokens of two parrots: one of them, and U+FFFD for the beginning of the other."""
    assert joined(events(client, "🦜🦜", max_new_tokens=6)) == "🦜\ufffd"
    answer = client.post("/v1/generate", json={"inputs": "🦜🦜", "parameters": {"max_new_tokens": 6}}).json()
    assert answer["outputs"][0]["sequences"][0]["text"] == "🦜\ufffd"


def test_only_the_last_event_of_an_input_has_reason_and_usage(client: TestClient) -> None:
    """And every event has the same id, its input's index, and sequence 0."""
    found = events(client, "abc", return_scores=True)
    assert {(event["id"], event["index"], event["sequence"]) for event in found} == {(found[0]["id"], 0, 0)}
    assert [event["finish_reason"] for event in found] == [None] * (len(found) - 1) + ["stop"]
    assert found[-1]["usage"] == {"source_tokens": 4, "generated_tokens": 4}
    assert found[-1]["score"] == -0.5
    assert not any("usage" in event or "score" in event for event in found[:-1])


def test_several_inputs_interleave(client: TestClient) -> None:
    """The second input's first event comes before the first input's last; the blank one ends at once."""
    found = events(client, ["abcdefgh", "ijklmnop", " "])
    assert [joined(found, index) for index in range(3)] == ["abcdefgh", "ijklmnop", ""]
    order = [event["index"] for event in found]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0)
    assert sorted(event["index"] for event in found if event["finish_reason"]) == [0, 1, 2]


def test_a_failure_before_the_first_event_is_a_status(client: TestClient, engine: FakeEngine) -> None:
    """So is everything that is refused without the engine."""
    engine.step_seconds = 0
    for body, status in (({"inputs": "a" * 99}, 413), ({"inputs": "a", "parameters": {"num_beams": 0}}, 422)):
        assert client.post("/v1/generate", json={**body, "stream": True}).status_code == status


def test_a_failure_later_is_an_event_and_the_end(client: TestClient, engine: FakeEngine) -> None:
    """The error event has the one shape; no [DONE] follows; the call's other sequences are cancelled."""
    *said, last = stream(client, ["poison", "a" * 40])
    assert any(json.loads(line)["text"] for line in said)
    error = json.loads(last)
    assert error["error"]["type"] == "engine_failure"
    assert len(error["request_id"]) == 32
    assert len(engine.cancelled) == 1


def test_streams_are_not_to_be_cached_or_buffered(client: TestClient) -> None:
    """Proxies are told so."""
    headers = client.post("/v1/generate", json={"inputs": "a", "stream": True}).headers
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers
