"""From the parameters of a request to the engine's: what fits together, and what the model and this server allow.

Every refusal is a ValidationFailed that names the field and says what to change. Knows nothing of HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import ValidationFailed
from service.parameters import DEFAULT_TOP_K, Parameters
from service.patterns import Patterns, Vocabulary
from service.sequence import GenerateParameters


@dataclass(frozen=True)
class Limits:
    """What bounds a request besides the parameters' own ranges."""

    max_target_tokens: int
    """Of the model: prefix and new tokens together, the end token included."""
    max_rows: int
    """Of this server's batch."""


def controls(
    asked: Parameters, prefix_ids: list[int], vocabulary: Vocabulary, limits: Limits, path: str = "parameters."
) -> GenerateParameters:
    """The engine's parameters; ValidationFailed with all that is wrong. `path` comes before a field's name."""
    wrong = _out_of_range(asked, limits) or _contradictions(asked, limits)
    room = limits.max_target_tokens - len(prefix_ids)
    max_new_tokens = min(room, asked.max_new_tokens or room)
    wrong = wrong or _without_room(asked, len(prefix_ids), max_new_tokens, limits)
    if wrong:
        raise ValidationFailed("; ".join(f"{path}{field}: {sentence}" for field, sentence in wrong))
    return GenerateParameters(
        max_new_tokens=max_new_tokens,
        min_new_tokens=asked.min_new_tokens,
        num_beams=asked.num_beams,
        num_return_sequences=asked.num_return_sequences,
        length_penalty=asked.length_penalty,
        early_stopping=asked.early_stopping,
        do_sample=asked.do_sample,
        temperature=asked.temperature,
        top_k=asked.top_k if asked.do_sample else 0,
        top_p=asked.top_p,
        seed=asked.seed,
        repetition_penalty=asked.repetition_penalty,
        no_repeat_ngram_size=asked.no_repeat_ngram_size,
        stop=_patterns(asked.stop, vocabulary),
        suppress=_patterns(asked.suppress, vocabulary),
        prefix_ids=tuple(prefix_ids),
        return_alternatives=asked.return_alternatives,
        return_alignments=asked.return_alignments,
    )


def _patterns(texts: list[str], vocabulary: Vocabulary) -> Patterns | None:
    return Patterns(vocabulary, [text.encode() for text in texts]) if texts else None


def _out_of_range(asked: Parameters, limits: Limits) -> list[tuple[str, str]]:
    """Counts whose upper end depends on the model or on the server."""
    wrong = []
    for field, value, limit in (
        ("max_new_tokens", asked.max_new_tokens, limits.max_target_tokens),
        ("num_beams", asked.num_beams, limits.max_rows),
        ("num_return_sequences", asked.num_return_sequences, limits.max_rows),
    ):
        if value is not None and not 1 <= value <= limit:
            wrong.append((field, f"must be between 1 and {limit}"))
    if not 0 <= asked.min_new_tokens <= limits.max_target_tokens:
        wrong.append(("min_new_tokens", f"must be between 0 and {limits.max_target_tokens}"))
    return wrong


def _contradictions(asked: Parameters, limits: Limits) -> list[tuple[str, str]]:
    """Fields that are right by themselves and not together. A field at its default contradicts nothing."""
    wrong = []
    if asked.do_sample:
        if asked.num_beams > 1:
            wrong.append(("num_beams", "must be 1 with do_sample: leave one of the two out"))
        if asked.return_alternatives:
            sentence = "does not go with do_sample: alternatives are the likeliest tokens, not drawn; leave one out"
            wrong.append(("return_alternatives", sentence))
    else:
        for field, changed in (
            ("temperature", asked.temperature != 1),
            ("top_k", asked.top_k not in (0, DEFAULT_TOP_K)),
            ("top_p", asked.top_p != 1),
        ):
            if changed:
                wrong.append((field, f"has no effect without do_sample: set do_sample, or leave {field} out"))
    if asked.num_beams == 1 and asked.early_stopping is not False:
        sentence = "has no effect without beams: raise num_beams, or leave early_stopping out"
        wrong.append(("early_stopping", sentence))
    if not (asked.do_sample or asked.return_alternatives) and asked.num_return_sequences > asked.num_beams:
        sentence = (
            f"must be at most num_beams, which is {asked.num_beams}: "
            "raise num_beams, or set do_sample or return_alternatives"
        )
        wrong.append(("num_return_sequences", sentence))
    if asked.return_alternatives and (rows := asked.num_return_sequences * asked.num_beams) > limits.max_rows:
        sentence = (
            f"times num_beams makes {rows} rows with return_alternatives, and this server has {limits.max_rows}: "
            "lower one of the two"
        )
        wrong.append(("num_return_sequences", sentence))
    return wrong


def _without_room(asked: Parameters, prefix_tokens: int, max_new_tokens: int, limits: Limits) -> list[tuple[str, str]]:
    """What does not fit into the target."""
    limit = limits.max_target_tokens
    if max_new_tokens < 1:
        sentence = (
            f"has {prefix_tokens} tokens, the limit is {limit - 1}: one of the model's {limit} is for what follows"
        )
        return [("prefix", sentence)]
    if asked.min_new_tokens > max_new_tokens:
        why = "max_new_tokens" if asked.max_new_tokens == max_new_tokens else "what the prefix leaves"
        return [("min_new_tokens", f"must be between 0 and {max_new_tokens}, which is {why}")]
    return []
