"""A generation: one accepted request for text, ready for the engine."""

from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from service import answer
from service.call import Call
from service.schemas import GenerateRequest
from service.sequence import GenerateParameters, Sequence
from service.served_model import ServedModel


@dataclass(frozen=True)
class Generation:
    """One accepted request: what was asked, and the token ids of each input. An input without text has none."""

    id: str
    model: ServedModel
    asked: GenerateRequest
    sources: dict[int, list[int]]
    parameters: GenerateParameters
    deadline: float | None

    @property
    def blank(self) -> list[int]:
        """The inputs that hold nothing but white space: their answer is empty, and the engine is not asked."""
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

    def extras(self, ids: list[int], log_probabilities: list[float]) -> dict[str, Any]:
        """Score and tokens of a sequence, as far as they were asked for."""
        return answer.extras(self.model.tokenizer, self.asked.parameters, ids, log_probabilities)
