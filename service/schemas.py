"""The JSON of the HTTP contract: what may be sent, what comes back.

Everything is strict (no "5" for 5) and closed (an unknown field is refused, so that a misspelt one is not ignored).
These classes know no model: limits that depend on one (longest source, most new tokens) are checked elsewhere.
"""

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("inputs", "must be a string or a list of strings")
    if not value:
        raise PydanticCustomError("inputs", "must hold at least one string")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise PydanticCustomError("inputs", "item {index} must be a string", {"index": index})
    return value


Inputs = Annotated[
    list[str],
    BeforeValidator(_texts),
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
            "description": "One text, or a list of texts. The answer has one output per text, in order.",
        }
    ),
]


def _within(low: float, high: float) -> BeforeValidator:
    """A check that names the whole range, where pydantic's own names one end of it."""

    def check(value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value <= high:
            bounds = {"low": f"{low:g}", "high": f"{high:g}"}
            raise PydanticCustomError("range", "must be between {low} and {high}", bounds)
        return value

    return BeforeValidator(check, json_schema_input_type=Annotated[float, Field(ge=low, le=high)])


def _greedy(allowed: Any, meaning: str) -> Any:
    """The field of a parameter for which greedy decoding has one value; `_greedy_only` refuses the others."""
    text = f"{meaning} This version decodes greedily: only {orjson.dumps(allowed).decode()}."
    return Field(default=allowed, description=text, json_schema_extra={"const": allowed})


class Closed(BaseModel):
    """A JSON object with known fields only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Parameters(Closed):
    """How to generate. The names have the meaning that they have in Hugging Face transformers."""

    max_new_tokens: int | None = Field(
        default=None,
        description="Most tokens to generate, end token included: from 1 to the model's limit, which is the default.",
    )
    length_penalty: Annotated[float, _within(-10, 10)] = Field(
        default=1.0, description="`score` is divided by (number of tokens) ** length_penalty; 0 gives the plain sum."
    )
    return_scores: bool = Field(default=False, description="Give each sequence its `score`.")
    return_tokens: bool = Field(
        default=False, description="Give each sequence its tokens with their log-probabilities."
    )
    truncate: bool = Field(
        default=False, description="Cut a source that is longer than the model takes, instead of refusing it."
    )
    timeout: Annotated[float, _within(0.001, 86_400)] | None = Field(
        default=None,
        description="Seconds. Runs out while generating: what there is, with finish_reason `timeout`. In line: 504.",
    )
    num_beams: int = _greedy(1, "Number of beams.")
    num_return_sequences: int = _greedy(1, "Sequences per input.")
    early_stopping: bool = _greedy(False, "When a beam search may stop.")
    do_sample: bool = _greedy(False, "Sample instead of taking the likeliest token.")
    temperature: float = _greedy(1.0, "Of sampling.")
    top_k: int = _greedy(0, "Of sampling.")
    top_p: float = _greedy(1.0, "Of sampling.")
    repetition_penalty: float = _greedy(1.0, "Makes what was said less likely.")
    no_repeat_ngram_size: int = _greedy(0, "N-grams of this size occur once.")
    min_new_tokens: int = _greedy(0, "Least tokens to generate.")
    stop: list[str] = _greedy([], "Strings that end a sequence.")
    suppress: list[str] = _greedy([], "Strings that are never generated.")
    prefix: str = _greedy("", "How the answer begins.")
    return_alternatives: bool = _greedy(False, "Other words at each place.")
    return_alignments: bool = _greedy(False, "Which source tokens each token came from.")

    @field_validator("*", mode="before")
    @classmethod
    def _greedy_only(cls, value: Any, info: ValidationInfo) -> Any:
        """A parameter that cannot be honoured yet is refused and named, never ignored; null means left out."""
        field = cls.model_fields[str(info.field_name)]
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or "const" not in extra:
            return field.default if value is None else value
        allowed = extra["const"]
        if value is None or (value == allowed and isinstance(value, bool) == isinstance(allowed, bool)):
            return allowed
        spelling = {"allowed": orjson.dumps(allowed).decode()}
        raise PydanticCustomError("unsupported", "must be {allowed}: this version decodes greedily", spelling)


class GenerateRequest(Closed):
    """The body of POST /v1/generate."""

    inputs: Inputs
    model: str | None = Field(default=None, description="Name of the model, as GET /v1/models lists it.")
    stream: bool = Field(default=False, description="Answer as server-sent events, while the text is being generated.")
    parameters: Parameters = Parameters()


class EncodeRequest(Closed):
    """The body of POST /v1/encode."""

    inputs: Inputs
    model: str | None = Field(default=None, description="Name of the model, as GET /v1/models lists it.")
    pooling: Literal["mean", "max", "first", "none"] = Field(
        default="mean", description="How the vectors of a text's tokens become one; `none` gives one vector per token."
    )
    normalize: bool = Field(default=True, description="Divide each vector by its Euclidean length.")
    truncate: bool = Field(
        default=False, description="Cut a text that is longer than the model takes, instead of refusing it."
    )
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="`base64` gives each text's vectors as little-endian float32, row by row."
    )


class Token(BaseModel):
    """One generated token; joined, the texts of a sequence's tokens are its text."""

    id: int
    text: str
    logprob: float


class GeneratedSequence(BaseModel):
    """One answer to one input."""

    text: str
    finish_reason: Literal["stop", "length", "timeout"]
    score: float | None = Field(default=None, description="Present with `return_scores`.")
    tokens: list[Token] | None = Field(
        default=None, description="Present with `return_tokens`; the end token is the last one."
    )


class Output(BaseModel):
    """The answers to one input, the best first."""

    sequences: list[GeneratedSequence]


class SourceUsage(BaseModel):
    """What was read, in tokens, end tokens included."""

    source_tokens: int


class Usage(SourceUsage):
    """What was read and written, in tokens, end tokens included."""

    generated_tokens: int


class GenerateResponse(BaseModel):
    """The answer of POST /v1/generate without `stream`."""

    id: str
    model: str
    outputs: list[Output]
    usage: Usage


class StreamEvent(BaseModel):
    """One `data:` line of a stream; the last of each input has its finish reason and usage."""

    id: str
    index: int
    sequence: int
    text: str
    finish_reason: Literal["stop", "length", "timeout"] | None
    score: float | None = None
    tokens: list[Token] | None = None
    usage: Usage | None = None


class EncodeResponse(BaseModel):
    """The answer of POST /v1/encode: per text a vector, a list of vectors (pooling `none`), or their base64."""

    id: str
    model: str
    embeddings: list[list[float]] | list[list[list[float]]] | list[str]
    usage: SourceUsage


class ModelCard(BaseModel):
    """One served model, in its manifest's words, in the frame that OpenAI's clients expect."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970.")
    owned_by: str = "transduce"
    version: str
    description: str
    languages: dict[str, str]
    license: str
    training_data: str
    max_source_tokens: int
    max_target_tokens: int
    embedding_size: int
    parity: dict[str, Any] = Field(description="How the exported graphs compare with the model that was trained.")
    engine: dict[str, Any] = Field(description="How this server runs it: provider, precision, threads.")


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The answer of the two probes."""

    status: Literal["alive", "ready"]


class ErrorDetail(BaseModel):
    """What went wrong: a stable word for programs, a sentence for people."""

    type: str
    message: str


class ErrorResponse(BaseModel):
    """The body of every answer with a status from 400 up."""

    error: ErrorDetail
    request_id: str
