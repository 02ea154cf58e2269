"""From what the engine found to what the contract returns: scores, tokens, alignments, usage. No HTTP here."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from service.parameters import Parameters
from service.sequence import FinishReason, Result
from service.tokenizer import Tokenizer


def score(log_probabilities: Sequence[float], length_penalty: float = 0.0) -> float:
    """The sum of the tokens' log-probabilities, divided by (their number) ** length_penalty; 0 for no tokens."""
    if not log_probabilities:
        return 0.0
    return float(sum(log_probabilities) / len(log_probabilities) ** length_penalty)


def source_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Each token with the text that is certain with it: joined, they are the text of all."""
    pieces = tokenizer.detokenizer().pieces()
    listed: list[dict[str, Any]] = [{"id": id, "text": pieces.push((id,))} for id in ids]
    if listed:
        listed[-1]["text"] += pieces.finish()
    return listed


def tokens(tokenizer: Tokenizer, ids: Sequence[int], log_probabilities: Sequence[float]) -> list[dict[str, Any]]:
    """The same with the log-probabilities of generated or scored tokens."""
    listed = source_tokens(tokenizer, ids)
    for token, log_probability in zip(listed, log_probabilities, strict=True):
        token["logprob"] = log_probability
    return listed


def extras(tokenizer: Tokenizer, parameters: Parameters, result: Result) -> dict[str, Any]:
    """The optional members of a sequence, those that were asked for."""
    asked: dict[str, Any] = {}
    if parameters.return_scores:
        asked["score"] = score(result.log_probabilities, parameters.length_penalty)
    if parameters.return_tokens:
        asked["tokens"] = tokens(tokenizer, result.ids, result.log_probabilities)
    if parameters.return_alignments:
        asked["alignment"] = [] if result.alignment is None else np.ascontiguousarray(result.alignment)
    return asked


def sequence(text: str, finish_reason: FinishReason, optional: dict[str, Any]) -> dict[str, Any]:
    """One generated sequence as the contract has it."""
    return {"text": text, "finish_reason": finish_reason, **optional}


def usage(source_tokens: int, generated_tokens: int) -> dict[str, int]:
    """What was read and written, end tokens included."""
    return {"source_tokens": source_tokens, "generated_tokens": generated_tokens}


def as_json(value: Any) -> bytes:
    """JSON; a float32 of an array is written with the fewest digits that give the same float32 again."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
