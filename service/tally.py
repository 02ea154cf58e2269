"""How many sequences, of how many tokens: in all, and of each client."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.sequence import Sequence


@dataclass(slots=True)
class Load:
    """Sequences and their tokens, those of sources and of given targets."""

    inputs: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.inputs:,} inputs of {self.tokens:,} tokens"

    def within(self, limit: Load) -> bool:
        """Whether neither number is above the limit's."""
        return self.inputs <= limit.inputs and self.tokens <= limit.tokens

    def __sub__(self, other: Load) -> Load:
        return Load(self.inputs - other.inputs, self.tokens - other.tokens)

    def __add__(self, other: Load) -> Load:
        return Load(self.inputs + other.inputs, self.tokens + other.tokens)


@dataclass(slots=True)
class Tally:
    """Only ever grows. One thread writes it; what another reads may be a moment old."""

    all: Load = field(default_factory=Load)
    _of_clients: dict[str, Load] = field(default_factory=dict)

    def add(self, sequence: Sequence) -> None:
        """Count it."""
        own = self._of_clients.setdefault(sequence.client, Load())
        for load in (self.all, own):
            load.inputs += 1
            load.tokens += sequence.tokens

    @property
    def clients(self) -> list[str]:
        """Everyone who ever came."""
        return list(self._of_clients)

    def of(self, client: str) -> Load:
        """Those of one client."""
        return self._of_clients.get(client, Load())
