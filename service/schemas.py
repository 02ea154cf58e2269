"""The JSON of the HTTP contract: what may be sent, what comes back.

Everything is strict (no "5" for 5) and closed (an unknown field is refused, so that a misspelt one is not ignored).
These classes know no model: limits that depend on one (longest source, most new tokens) are checked elsewhere.
`service.parameters` has the parameters of a generation.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from service.parameters import Closed, Parameters


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


_DEFAULTS = Parameters()
"""One for all: a default value, unlike what a factory gives, would be copied for each request."""


class GenerateRequest(Closed):
    """The body of POST /v1/generate."""

    inputs: Inputs
    model: str | None = Field(default=None, description="Name of the model, as GET /v1/models lists it.")
    stream: bool = Field(default=False, description="Answer as server-sent events, while the text is being generated.")
    parameters: Parameters = Field(default_factory=lambda: _DEFAULTS)


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


class ClassifyRequest(Closed):
    """The body of POST /v1/classify."""

    inputs: Inputs
    model: str | None = Field(default=None, description="Name of the model, as GET /v1/models lists it.")
    truncate: bool = Field(
        default=False, description="Cut a text that is longer than the model takes, instead of refusing it."
    )


class ScoreRequest(Closed):
    """The body of POST /v1/score."""

    inputs: Inputs
    targets: Inputs = Field(
        description="The text to score for each input: as many as there are inputs, in their order."
    )
    model: str | None = Field(default=None, description="Name of the model, as GET /v1/models lists it.")
    return_tokens: bool = Field(default=False, description="Give each target's tokens with their log-probabilities.")
    truncate: bool = Field(
        default=False,
        description="Cut an input that is longer than the model takes, instead of refusing it. A target is never cut.",
    )

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, body: Any) -> Any:
        """A text and a list do not go together, nor do lists of different lengths: pairs are not guessed."""
        if not isinstance(body, dict):
            return body
        inputs, targets = body.get("inputs"), body.get("targets")
        if {type(inputs), type(targets)} == {str, list}:
            raise PydanticCustomError("pairs", "inputs and targets must both be a string, or both be lists")
        if isinstance(inputs, list) and isinstance(targets, list) and len(inputs) != len(targets):
            numbers = {"inputs": len(inputs), "targets": len(targets)}
            sentence = "inputs and targets must be as many as each other: there are {inputs} inputs, {targets} targets"
            raise PydanticCustomError("pairs", sentence, numbers)
        return body


class SourceToken(BaseModel):
    """One token of a text; joined, the texts of its tokens are the text."""

    id: int
    text: str


class Token(SourceToken):
    """One generated or scored token."""

    logprob: float


class GeneratedSequence(BaseModel):
    """One answer to one input."""

    text: str
    finish_reason: Literal["stop", "length", "timeout"]
    score: float | None = Field(default=None, description="Present with `return_scores`.")
    tokens: list[Token] | None = Field(
        default=None,
        description="Present with `return_tokens`: those after the prefix, the end token included. Their joined texts "
        "hold the stop string that ended the sequence, which its `text` does not.",
    )
    alignment: list[list[float]] | None = Field(
        default=None,
        description="Present with `return_alignments`: a row per token of `tokens`, a column per source token.",
    )


class Output(BaseModel):
    """The answers to one input, the best first."""

    sequences: list[GeneratedSequence]
    source_tokens: list[SourceToken] | None = Field(
        default=None, description="Present with `return_alignments`: what the columns of `alignment` stand for."
    )


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
    """One `data:` line of a stream; the last of each sequence has its finish reason, usage, and what else was asked."""

    id: str
    index: int = Field(description="Which input.")
    sequence: int = Field(description="Which of its sequences, 0 the best.")
    text: str = Field(description="What became certain since the last event of this sequence.")
    finish_reason: Literal["stop", "length", "timeout"] | None
    score: float | None = None
    tokens: list[Token] | None = None
    alignment: list[list[float]] | None = None
    source_tokens: list[SourceToken] | None = None
    usage: Usage | None = Field(default=None, description="Of this sequence alone, with its whole input.")


class EncodeResponse(BaseModel):
    """The answer of POST /v1/encode: per text a vector, a list of vectors (pooling `none`), or their base64."""

    id: str
    model: str
    embeddings: list[list[float]] | list[list[list[float]]] | list[str]
    usage: SourceUsage


class Label(BaseModel):
    """One label of a text."""

    label: str
    score: float = Field(description="Its probability; those of all labels of a text sum to 1.")


class ClassifyResponse(BaseModel):
    """The answer of POST /v1/classify: per text all labels, the likeliest first."""

    id: str
    model: str
    outputs: list[list[Label]]
    usage: SourceUsage


class Score(BaseModel):
    """How probable one target is."""

    score: float = Field(description="The sum of the log-probabilities of its tokens, the end token included.")
    tokens: list[Token] | None = Field(default=None, description="Present with `return_tokens`.")


class ScoreUsage(SourceUsage):
    """What was read, in tokens, end tokens included."""

    target_tokens: int


class ScoreResponse(BaseModel):
    """The answer of POST /v1/score: one output per pair, in order."""

    id: str
    model: str
    outputs: list[Score]
    usage: ScoreUsage


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
