"""The tree of errors is the contract's: types and statuses."""

from __future__ import annotations

from service import errors


def test_types_and_statuses_are_those_of_the_contract() -> None:
    """Each request error has a status of its own and a type that is its name."""
    found = {cls.type: cls.status for cls in errors.RequestError.__subclasses__()}
    assert found == {
        "invalid_request": 400,
        "unauthorized": 401,
        "not_found": 404,
        "method_not_allowed": 405,
        "conflict": 409,
        "too_large": 413,
        "validation_failed": 422,
        "queue_full": 429,
        "engine_failure": 500,
        "unavailable": 503,
        "deadline_exceeded": 504,
    }


def test_who_should_come_back_is_told_when() -> None:
    """429 and 503 carry Retry-After, the others do not."""
    assert errors.QueueFull("x").retry_after == 1
    assert errors.Unavailable("x", retry_after=7).retry_after == 7
    assert errors.TooLarge("x").retry_after is None
    assert str(errors.TooLarge("x")) == errors.TooLarge("x").message == "x"
