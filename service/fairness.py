"""What each client has been served, so that the one who had least goes first: no client can starve another.

Service is counted in tokens, as in Sheng et al. (2024), "Fairness in Serving Large Language Models": a source token
counts one, a row's decoder step two. Who comes to an empty place in line starts level with those who are being served
(start-time fair queueing, Goyal et al., 1996): nobody saves up service by keeping quiet. Pure, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

STEP_COST = 2
"""Of one row in one decoder step, in encoded tokens."""


@dataclass(slots=True)
class _Account:
    """served = fixed + STEP_COST * rows * step: it grows by itself while rows run, and nobody has to count steps."""

    fixed: int = 0
    rows: int = 0
    running: int = 0
    """Sequences."""


class Accounts:
    """The service of every client that waits or runs. Others are forgotten as soon as that changes nothing."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._step = 0
        self._level = 0  # what the last one who was picked had been served then

    def __len__(self) -> int:
        return len(self._accounts)

    def tick(self) -> None:
        """A decoder step goes by."""
        self._step += 1

    def served(self, client: str) -> int:
        """Tokens so far; only differences mean anything."""
        account = self._accounts[client]
        return account.fixed + STEP_COST * account.rows * self._step

    def come(self, client: str) -> None:
        """It had nothing in line and has now."""
        account = self._accounts.setdefault(client, _Account())
        account.fixed += max(0, self._level - self.served(client))

    def take(self, client: str, tokens: int, rows: int) -> None:
        """One of its sequences leaves the line to be worked on."""
        self._level = max(self._level, self.served(client))
        account = self._accounts[client]
        account.fixed += tokens - STEP_COST * rows * self._step
        account.rows += rows
        account.running += 1

    def give_back(self, client: str, rows: int) -> None:
        """One that was worked on is done."""
        account = self._accounts[client]
        account.fixed += STEP_COST * rows * self._step
        account.rows -= rows
        account.running -= 1

    def go(self, client: str) -> None:
        """It has nothing in line: forgotten if nothing of it runs and it would start level anyway."""
        if self._accounts[client].running == 0 and self.served(client) <= self._level:
            del self._accounts[client]
