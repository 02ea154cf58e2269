"""The parameters of POST /v1/generate: what each may hold, what it becomes, and what does not go together."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.errors import ValidationFailed
from service.parameters import Parameters
from tests.service.fake_engine import FakeEngine, fake_model, fake_models

ROWS = 16


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(fake_models(engine, max_rows=ROWS))) as client:
        yield client


def accepted(client: TestClient, engine: FakeEngine, **parameters: Any) -> Any:
    """What the engine was asked for."""
    response = client.post("/v1/generate", json={"inputs": "abc", "parameters": parameters})
    assert response.status_code == 200, response.text
    return engine.parameters


def refused(client: TestClient, **parameters: Any) -> str:
    """The message with which it was refused."""
    response = client.post("/v1/generate", json={"inputs": "abc", "parameters": parameters})
    assert response.status_code == 422, response.text
    assert response.json()["error"]["type"] == "validation_failed"
    return str(response.json()["error"]["message"])


def test_without_parameters_it_is_greedy_up_to_the_models_limit(client: TestClient, engine: FakeEngine) -> None:
    """Nothing bends the distribution, nothing is forced, nothing more than the text is made."""
    found = accepted(client, engine)
    assert found.max_new_tokens == 48
    assert (found.num_beams, found.num_return_sequences, found.do_sample, found.rows) == (1, 1, False, 1)
    assert (found.temperature, found.top_k, found.top_p, found.repetition_penalty) == (1, 0, 1, 1)
    assert (found.min_new_tokens, found.no_repeat_ngram_size, found.early_stopping) == (0, 0, False)
    assert (found.stop, found.suppress, found.prefix_ids, found.seed) == (None, None, (), None)
    assert not found.return_alternatives
    assert not found.return_alignments


BEAMS = {"num_beams": 4}
SAMPLING = {"do_sample": True}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"max_new_tokens": 1}, {"max_new_tokens": 1}),
        ({"max_new_tokens": 48}, {"max_new_tokens": 48}),
        ({"min_new_tokens": 48}, {"min_new_tokens": 48}),
        ({"min_new_tokens": 3, "max_new_tokens": 3}, {"min_new_tokens": 3}),
        ({"num_beams": ROWS}, {"num_beams": ROWS, "rows": ROWS}),
        ({**BEAMS, "num_return_sequences": 4}, {"num_return_sequences": 4, "rows": 4}),
        ({**SAMPLING, "num_return_sequences": 9}, {"num_return_sequences": 9, "rows": 9}),
        ({**BEAMS, "num_return_sequences": 4, "return_alternatives": True}, {"return_alternatives": True, "rows": 16}),
        ({"num_return_sequences": 5, "return_alternatives": True}, {"num_return_sequences": 5, "rows": 5}),
        ({"return_alternatives": True}, {"return_alternatives": True, "rows": 1}),
        ({"length_penalty": -10}, {"length_penalty": -10.0}),
        ({**BEAMS, "length_penalty": 0.6}, {"length_penalty": 0.6}),
        ({**BEAMS, "early_stopping": True}, {"early_stopping": True}),
        ({**BEAMS, "early_stopping": False}, {"early_stopping": False}),
        ({**BEAMS, "early_stopping": "never"}, {"early_stopping": "never"}),
        (SAMPLING, {"do_sample": True, "top_k": 50, "temperature": 1.0, "top_p": 1.0, "seed": None}),
        ({**SAMPLING, "temperature": 0.001}, {"temperature": 0.001}),
        ({**SAMPLING, "temperature": 100}, {"temperature": 100.0}),
        ({**SAMPLING, "top_k": 0}, {"top_k": 0}),
        ({**SAMPLING, "top_k": 1}, {"top_k": 1}),
        ({**SAMPLING, "top_p": 1e-9}, {"top_p": 1e-9}),
        ({**SAMPLING, "top_p": 1}, {"top_p": 1.0}),
        ({**SAMPLING, "seed": 0}, {"seed": 0}),
        ({**SAMPLING, "seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"seed": 5}, {"seed": 5, "do_sample": False}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.5}, {"repetition_penalty": 0.5}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ({"prefix": "é"}, {"prefix_ids": (0xC3 + 3, 0xA9 + 3), "max_new_tokens": 46}),
        ({"prefix": "x" * 47}, {"max_new_tokens": 1}),
        ({"prefix": "x" * 40, "max_new_tokens": 48}, {"max_new_tokens": 8}),
        ({"prefix": "x" * 40, "max_new_tokens": 3}, {"max_new_tokens": 3}),
        ({"return_alignments": True}, {"return_alignments": True}),
    ],
)
def test_what_is_asked_for_reaches_the_engine(
    client: TestClient, engine: FakeEngine, parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Under Hugging Face's names; top_k is 50 when sampling; a prefix takes its tokens from the model's limit."""
    found = accepted(client, engine, **parameters)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["stop", "suppress"])
def test_texts_come_alone_or_in_a_list(client: TestClient, engine: FakeEngine, name: str) -> None:
    """As bytes, so that a text is found however it is split over tokens."""
    for value in ("né", ["né"], ["né"] * 32, ["né", "x" * 100]):
        patterns = getattr(accepted(client, engine, **{name: value}), name)
        assert patterns.completed_by(b"n\xc3", 0xA9 + 3)
        assert not patterns.completed_by(b"n", 0xA9 + 3)
    assert getattr(accepted(client, engine, **{name: []}), name) is None


def test_null_is_left_out(client: TestClient, engine: FakeEngine) -> None:
    """For every parameter."""
    accepted(client, engine, **dict.fromkeys(Parameters.model_fields))
    assert engine.parameters.max_new_tokens == 48


def test_the_defaults_may_be_sent(client: TestClient, engine: FakeEngine) -> None:
    """A client that sends all it knows, with Hugging Face's defaults, contradicts nothing."""
    defaults = {name: field.default for name, field in Parameters.model_fields.items() if field.default is not None}
    assert accepted(client, engine, **defaults, seed=1).rows == 1


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"max_new_tokens": 0}, ["max_new_tokens", "between 1 and 48"]),
        ({"max_new_tokens": 49}, ["max_new_tokens", "between 1 and 48"]),
        ({"min_new_tokens": -1}, ["min_new_tokens", "between 0 and 48"]),
        ({"min_new_tokens": 49}, ["min_new_tokens", "between 0 and 48"]),
        ({"num_beams": 0}, ["num_beams", f"between 1 and {ROWS}"]),
        ({"num_beams": ROWS + 1}, ["num_beams", f"between 1 and {ROWS}"]),
        ({"num_beams": 10**30}, ["num_beams", f"between 1 and {ROWS}"]),
        ({"num_return_sequences": 0}, ["num_return_sequences", f"between 1 and {ROWS}"]),
        ({"do_sample": True, "num_return_sequences": 17}, ["num_return_sequences", f"between 1 and {ROWS}"]),
        ({"length_penalty": 10.1}, ["length_penalty", "between -10 and 10"]),
        ({"early_stopping": "sometimes"}, ["early_stopping", 'true, false or "never"']),
        ({"early_stopping": 1}, ["early_stopping", 'true, false or "never"']),
        ({"temperature": 0}, ["temperature", "between 0.001 and 100", "use do_sample false"]),
        ({"do_sample": True, "temperature": 0.0}, ["temperature", "use do_sample false"]),
        ({"do_sample": True, "temperature": -1}, ["temperature", "between 0.001 and 100"]),
        ({"do_sample": True, "temperature": 101}, ["temperature", "between 0.001 and 100"]),
        ({"do_sample": True, "top_k": -1}, ["top_k", "between 0 and 1000000"]),
        ({"do_sample": True, "top_p": 0}, ["top_p", "above 0 and at most 1"]),
        ({"do_sample": True, "top_p": 1.01}, ["top_p", "above 0 and at most 1"]),
        ({"seed": -1}, ["seed", "between 0 and 9223372036854775807"]),
        ({"seed": 2**63}, ["seed", "between 0 and 9223372036854775807"]),
        ({"repetition_penalty": 0}, ["repetition_penalty", "between 0.01 and 100"]),
        ({"no_repeat_ngram_size": -1}, ["no_repeat_ngram_size", "between 0 and 1000"]),
        ({"stop": ""}, ["stop", "item 0 is empty"]),
        ({"stop": ["a", ""]}, ["stop", "item 1 is empty"]),
        ({"stop": ["a", 3]}, ["stop", "item 1 must be a string"]),
        ({"stop": 3}, ["stop", "a string or a list of strings"]),
        ({"stop": ["a"] * 33}, ["stop", "33 strings", "limit is 32"]),
        ({"suppress": ["x" * 101]}, ["suppress", "101 characters", "limit is 100"]),
        ({"prefix": "x" * 48}, ["prefix", "48 tokens", "limit is 47"]),
        ({"prefix": "x" * 100_000}, ["prefix", "100,000 characters", "48 target tokens"]),
        ({"timeout": 0}, ["timeout", "between 0.001 and 86400"]),
        ({"nonsense": 1}, ["nonsense", "unknown field"]),
    ],
)
def test_a_value_out_of_its_range_is_named_with_the_range(
    client: TestClient, parameters: dict[str, Any], words: list[str]
) -> None:
    """Of the field, of the model, or of this server."""
    message = refused(client, **parameters)
    assert message.startswith(f"parameters.{words[0]}: ")
    assert all(word in message for word in words), message


KINDS = {
    "integer": ["max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences", "top_k", "seed",
                "no_repeat_ngram_size"],
    "number": ["length_penalty", "temperature", "top_p", "repetition_penalty", "timeout"],
    "boolean": ["do_sample", "return_alternatives", "return_scores", "return_tokens", "return_alignments", "truncate"],
    "string": ["prefix", "stop", "suppress"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_a_value_of_a_wrong_type_is_refused(client: TestClient, kind: str, name: str) -> None:
    """Nothing is converted: neither "1" nor 1 is true, and true is no number."""
    wrong: dict[str, list[Any]] = {
        "integer": ["1", 1.5, True, [1], {}],
        "number": ["1", True, [1], {}],
        "boolean": ["true", 1, [], {}],
        "string": [1, True, {}, {"a": 1}],
    }
    for value in wrong[kind]:
        message = refused(client, **{name: value})
        assert message.startswith(f"parameters.{name}: ")
        assert kind in message


def test_every_parameter_is_in_these_tests() -> None:
    """But early_stopping, whose types have tests of their own."""
    assert {*itertools.chain(*KINDS.values()), "early_stopping"} == set(Parameters.model_fields)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({**SAMPLING, **BEAMS}, ["num_beams", "do_sample", "leave one"]),
        ({**SAMPLING, "return_alternatives": True}, ["return_alternatives", "do_sample", "leave one"]),
        ({"temperature": 0.7}, ["temperature", "without do_sample", "set do_sample"]),
        ({"top_k": 10}, ["top_k", "without do_sample", "set do_sample"]),
        ({"top_p": 0.9}, ["top_p", "without do_sample", "set do_sample"]),
        ({**BEAMS, "temperature": 0.7}, ["temperature", "without do_sample"]),
        ({"early_stopping": True}, ["early_stopping", "raise num_beams"]),
        ({"early_stopping": "never"}, ["early_stopping", "raise num_beams"]),
        ({"num_return_sequences": 2}, ["num_return_sequences", "which is 1", "raise num_beams", "do_sample"]),
        ({**BEAMS, "num_return_sequences": 5}, ["num_return_sequences", "which is 4", "raise num_beams"]),
        ({"num_return_sequences": 8, "return_alternatives": True, "num_beams": 3},
         ["num_return_sequences", "24 rows", f"has {ROWS}", "lower"]),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, ["min_new_tokens", "between 0 and 4", "max_new_tokens"]),
        ({"min_new_tokens": 9, "prefix": "x" * 40}, ["min_new_tokens", "between 0 and 8", "prefix"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_a_remedy(
    client: TestClient, parameters: dict[str, Any], words: list[str]
) -> None:
    """The message names the field that has no effect, or contradicts another, and says what to change."""
    message = refused(client, **parameters)
    assert message.startswith(f"parameters.{words[0]}: ")
    assert all(word in message for word in words), message


def test_all_contradictions_are_told_at_once(client: TestClient) -> None:
    """One by one would be tedious."""
    message = refused(client, temperature=0.5, top_p=0.5, num_return_sequences=3)
    assert message.count("parameters.") == 3


def test_an_answer_has_a_bounded_number_of_sequences(client: TestClient) -> None:
    """Inputs times sequences: 413 with both numbers."""
    body = {"inputs": ["a"] * 300, "parameters": {"do_sample": True, "num_return_sequences": 14}}
    response = client.post("/v1/generate", json=body)
    assert response.status_code == 413
    assert "300 inputs with 14 sequences each, the limit of an answer is 4,096" in response.json()["error"]["message"]


def test_alignments_are_bounded_before_the_work(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be far larger than the texts."""
    monkeypatch.setattr("service.generate.MAX_WEIGHTS", 4 * 48 - 1)
    body = {"inputs": "abc", "parameters": {"return_alignments": True}}
    response = client.post("/v1/generate", json=body)
    assert response.status_code == 413
    assert "lower max_new_tokens" in response.json()["error"]["message"]
    body["parameters"]["max_new_tokens"] = 47  # type: ignore[index]
    assert client.post("/v1/generate", json=body).status_code == 200


def test_a_refusal_can_name_flags(engine: FakeEngine) -> None:
    """For the command line, whose parameters are the same."""
    with pytest.raises(ValidationFailed, match=r"^--num_beams: must be between 1 and 16$"):
        fake_model(engine, max_rows=ROWS).generate_parameters(Parameters(num_beams=17), path="--")
