"""The parameters of POST /v1/generate: each one's type, range, default and meaning.

Names and meanings are those of Hugging Face transformers' `generate` unless a description says otherwise. Here a field
is judged by itself; what fits together, and what a model and this server allow, is the matter of `service.controls`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

MAX_TEXTS = 32
"""Texts in `stop` or in `suppress`; each is looked for at every step of every row."""

MAX_TEXT_CHARACTERS = 100
"""Length of one of them."""

DEFAULT_TOP_K = 50
"""Hugging Face's."""


class Closed(BaseModel):
    """A JSON object with known fields only, each of its very type (no "5" for 5)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _within(low: float, high: float, kind: type = float) -> BeforeValidator:
    """A check that names the whole range, where pydantic's own names one end of it."""

    def check(value: Any) -> Any:
        if _is_number(value) and not low <= value <= high:
            bounds = {"low": f"{low:.15g}" if kind is float else low, "high": f"{high:.15g}" if kind is float else high}
            raise PydanticCustomError("range", "must be between {low} and {high}", bounds)
        return value

    return BeforeValidator(check, json_schema_input_type=Annotated[kind, Field(ge=low, le=high)])


def _temperature(value: Any) -> Any:
    if _is_number(value) and value == 0:
        sentence = "must be between 0.001 and 100; to take the likeliest token at each step use do_sample false"
        raise PydanticCustomError("range", sentence)
    return value


def _top_p(value: Any) -> Any:
    if _is_number(value) and not 0 < value <= 1:
        raise PydanticCustomError("range", "must be above 0 and at most 1")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _early_stopping(value: Any) -> Any:
    if not isinstance(value, bool) and value != "never":
        raise PydanticCustomError("early_stopping", 'must be true, false or "never"')
    return value


def _few_texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise PydanticCustomError("texts", "must be a string or a list of strings")
    if len(texts) > MAX_TEXTS:
        numbers = {"count": len(texts), "limit": MAX_TEXTS}
        raise PydanticCustomError("texts", "holds {count} strings, the limit is {limit}", numbers)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise PydanticCustomError("texts", "item {index} must be a string", {"index": index})
        if not text:
            raise PydanticCustomError("texts", "item {index} is empty; leave it out", {"index": index})
        if len(text) > MAX_TEXT_CHARACTERS:
            numbers = {"index": index, "length": len(text), "limit": MAX_TEXT_CHARACTERS}
            raise PydanticCustomError("texts", "item {index} has {length} characters, the limit is {limit}", numbers)
    return texts


_TEXT_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_CHARACTERS}

FewTexts = Annotated[
    list[str],
    BeforeValidator(_few_texts),
    WithJsonSchema({"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _TEXT_SCHEMA, "maxItems": MAX_TEXTS}]}),
]


def _count(default: int | None, low: int, description: str) -> Any:
    """A number of tokens or rows: its upper end depends on the model or on the server, so it is checked elsewhere."""
    return Field(default=default, description=description, json_schema_extra={"minimum": low})


def _say_that_null_is_left_out(schema: dict[str, Any]) -> None:
    """The document says what the validator below does: every parameter may be null."""
    for name, own in schema["properties"].items():
        about = {key: own.pop(key) for key in ("default", "description", "title") if key in own}
        kinds = own.pop("anyOf", None)
        if kinds is None:
            kinds, own = [own], {}
        if _NULL not in kinds:
            kinds = [*kinds, _NULL]
        schema["properties"][name] = {"anyOf": kinds, **own, **about}


_NULL = {"type": "null"}


class Parameters(Closed):
    """How to generate; null means left out."""

    model_config = ConfigDict(json_schema_extra=_say_that_null_is_left_out)

    max_new_tokens: int | None = _count(
        None, 1, "Tokens to generate at most, the end token included; by default as many as the model allows."
    )
    min_new_tokens: int = _count(0, 0, "Tokens to generate before the end token may come.")
    num_beams: int = _count(1, 1, "Hypotheses of a beam search; 1 is greedy decoding, or sampling.")
    num_return_sequences: int = _count(
        1,
        1,
        "Results per input, the best first: at most `num_beams`, except with `do_sample` or `return_alternatives`.",
    )
    length_penalty: Annotated[float, _within(-10, 10)] = Field(
        default=1.0,
        description="Scores, by which beams are ranked, are divided by (number of tokens) ** length_penalty; "
        "0 gives the plain sum.",
    )
    early_stopping: Annotated[bool | Literal["never"], BeforeValidator(_early_stopping)] = Field(
        default=False,
        description="A beam search ends: with true, when `num_beams` hypotheses are finished; with false, when a "
        'better one is unlikely; with "never", when a better one is impossible.',
    )
    do_sample: bool = Field(default=False, description="Draw each token instead of taking the likeliest.")
    temperature: Annotated[float, _within(0.001, 100), BeforeValidator(_temperature)] = Field(
        default=1.0, description="Of sampling: below 1, likely tokens become likelier; above 1, less so."
    )
    top_k: Annotated[int, _within(0, 1_000_000, int)] = Field(
        default=DEFAULT_TOP_K, description="Of sampling: draw from this many of the likeliest tokens; 0 is all."
    )
    top_p: Annotated[float, BeforeValidator(_top_p, json_schema_input_type=Annotated[float, Field(gt=0, le=1)])] = (
        Field(
            default=1.0,
            description="Of sampling: draw from the fewest likeliest tokens that together have this probability.",
        )
    )
    seed: Annotated[int, _within(0, 2**63 - 1, int)] | None = Field(
        default=None,
        description="Of sampling: the same seed gives a text the same answer, whatever runs beside it; "
        "by default it is another each time.",
    )
    repetition_penalty: Annotated[float, _within(0.01, 100)] = Field(
        default=1.0, description="Above 1, tokens that the target already has, prefix included, become less likely."
    )
    no_repeat_ngram_size: Annotated[int, _within(0, 1000, int)] = Field(
        default=0, description="No run of so many tokens occurs twice in the target; 0 allows it."
    )
    stop: FewTexts = Field(
        default=[],
        description="A sequence ends where one of these texts comes up after the prefix; the text is cut off.",
    )
    suppress: FewTexts = Field(
        default=[], description="Texts that are never generated, however they are spelt in tokens."
    )
    prefix: str = Field(
        default="",
        description="Text that every sequence begins with; `text` has it, scores and `tokens` are of what follows.",
    )
    return_alternatives: bool = Field(
        default=False,
        description="Take the `num_return_sequences` likeliest tokens after the prefix, and complete each.",
    )
    return_scores: bool = Field(default=False, description="Give each sequence its `score`.")
    return_tokens: bool = Field(
        default=False, description="Give each sequence its `tokens`, with their log-probabilities."
    )
    return_alignments: bool = Field(
        default=False,
        description="Give each sequence its `alignment`, the weight of every source token for every generated one.",
    )
    truncate: bool = Field(
        default=False, description="Cut a source that is longer than the model takes, instead of refusing it."
    )
    timeout: Annotated[float, _within(0.001, 86_400)] | None = Field(
        default=None,
        description="Seconds. If they run out while generating, the answer is what there is, with finish_reason "
        "`timeout`; if they run out in line, it is 504.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_left_out(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[str(info.field_name)].default if value is None else value
