"""From what the engine generated to what the contract returns: text, score, tokens, usage. No HTTP here."""

from collections.abc import Sequence
from typing import Any

from service.schemas import Parameters
from service.sequence import FinishReason
from service.tokenizer import Tokenizer


def score(log_probabilities: Sequence[float], length_penalty: float) -> float:
    """The sum of the tokens' log-probabilities, divided by (their number) ** length_penalty; 0 for no tokens."""
    if not log_probabilities:
        return 0.0
    return float(sum(log_probabilities) / len(log_probabilities) ** length_penalty)


def tokens(tokenizer: Tokenizer, ids: Sequence[int], log_probabilities: Sequence[float]) -> list[dict[str, Any]]:
    """Each token with the text that became certain with it: joined, they are the text of the sequence."""
    detokenizer = tokenizer.detokenizer()
    listed: list[dict[str, Any]] = [
        {"id": id, "text": detokenizer.push([id]), "logprob": logprob}
        for id, logprob in zip(ids, log_probabilities, strict=True)
    ]
    if listed:
        listed[-1]["text"] += detokenizer.finish()
    return listed


def extras(
    tokenizer: Tokenizer, parameters: Parameters, ids: Sequence[int], log_probabilities: Sequence[float]
) -> dict[str, Any]:
    """The optional members of a sequence, those that were asked for."""
    asked: dict[str, Any] = {}
    if parameters.return_scores:
        asked["score"] = score(log_probabilities, parameters.length_penalty)
    if parameters.return_tokens:
        asked["tokens"] = tokens(tokenizer, ids, log_probabilities)
    return asked


def sequence(
    text: str,
    finish_reason: FinishReason,
    optional: dict[str, Any],
) -> dict[str, Any]:
    """One generated sequence as the contract has it."""
    return {"text": text, "finish_reason": finish_reason, **optional}


def usage(source_tokens: int, generated_tokens: int) -> dict[str, int]:
    """What was read and written, end tokens included."""
    return {"source_tokens": source_tokens, "generated_tokens": generated_tokens}
