"""A generation: one accepted request for text, ready for the engine."""

from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from service import answer
from service.call import Call
from service.detokenizer import Detokenizer
from service.schemas import GenerateRequest
from service.sequence import GenerateParameters, Result, Sequence
from service.served_model import ServedModel

NOTHING = Result([], [], "stop")
"""The result of an input that holds nothing but white space."""


@dataclass(frozen=True)
class Generation:
    """One accepted request: what was asked, and the token ids of each input. An input without text has none."""

    id: str
    model: ServedModel
    asked: GenerateRequest
    sources: dict[int, list[int]]
    parameters: GenerateParameters
    detokenizer: Detokenizer
    deadline: float | None

    @property
    def blank(self) -> list[int]:
        """The inputs that hold nothing but white space: each has one empty sequence, and the engine is not asked."""
        return [index for index in range(len(self.asked.inputs)) if index not in self.sources]

    def submit(self, call: Call, receive: Receive, *, stream: bool) -> None:
        """Hand the sequences to the engine; EngineRefusal if it does not take them."""
        if self.sources:
            sequences = {index: self._sequence(ids, call, index, stream) for index, ids in self.sources.items()}
            call.submit(sequences, receive)
        for _ in self.blank:
            self.model.metrics.count_finished("generate", "stop")

    def _sequence(self, source_ids: list[int], call: Call, index: int, stream: bool) -> Sequence:
        return Sequence(
            source_ids,
            call.listener(index),
            parameters=self.parameters,
            deadline=self.deadline,
            stream=stream,
        )

    def output(self, index: int, results: list[Result]) -> dict[str, Any]:
        """The answer to one input."""
        if index in self.sources:
            sequences = [
                answer.sequence(self.detokenizer.text(result.ids), result.reason, self.extras(result))
                for result in results
            ]
        else:
            sequences = [answer.sequence("", NOTHING.reason, self.extras(NOTHING))]
        return {"sequences": sequences, **self.source_tokens(index)}

    def extras(self, result: Result) -> dict[str, Any]:
        """The optional members of a sequence, as far as they were asked for."""
        return answer.extras(self.model.tokenizer, self.asked.parameters, result)

    def source_tokens(self, index: int) -> dict[str, Any]:
        """The tokens of an input, where alignments were asked for: what their columns stand for."""
        if not self.asked.parameters.return_alignments:
            return {}
        return {"source_tokens": answer.source_tokens(self.model.tokenizer, self.sources.get(index, []))}
