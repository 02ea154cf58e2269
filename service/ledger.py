"""The ledger of a core: who came to an end and how, what has to be told, and what the gauges have been told.

Every sequence that is worked on goes out through here, so that requests, metrics and events agree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from service.errors import EngineFailure
from service.health import Health
from service.metrics import Metrics
from service.scheduler import Scheduler
from service.sequence import Encoded, Event, Failed, Finished, Scored, Sequence, Stage, Timings
from service.state import State

log = logging.getLogger(__name__)


class Ledger:
    """Ends sequences, collects events, counts. Belongs to the core's thread; other cores add to the same metrics."""

    def __init__(self, scheduler: Scheduler, state: State, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.metrics = metrics
        self.clock = clock
        self.health = Health()
        self._scheduler = scheduler
        self._state = state
        self._events: list[tuple[Sequence, Event]] = []
        self._growths = state.growths
        self._layout, self._state_bytes = state.layout, state.nbytes
        self._told = _Levels()
        metrics.rows_capacity.inc(state.max_rows)
        metrics.state_bytes_limit.inc(state.max_nbytes)
        self.report()

    def close(self) -> None:
        """The core is no more: take back what it added to the gauges."""
        metrics, told = self.metrics, self._told
        metrics.rows_capacity.dec(self._state.max_rows)
        metrics.state_bytes_limit.dec(self._state.max_nbytes)
        metrics.num_requests_running.dec(told.running)
        metrics.rows_in_use.dec(told.rows)
        metrics.state_bytes.dec(told.state_bytes)
        self._told = _Levels()

    def tell(self, sequence: Sequence, event: Event) -> None:
        """To be posted at the end of the iteration."""
        self._events.append((sequence, event))

    def finish(self, sequence: Sequence, reason: str, event: Event | None) -> None:
        """It is over: out of the line or out of its rows' books, counted, and told unless it was cancelled."""
        self._scheduler.finish(sequence)
        self.metrics.count_finished(sequence.endpoint, reason)
        if event is not None:
            self.tell(sequence, event)
        if isinstance(event, (Finished, Encoded, Scored)):
            self.metrics.e2e_request_latency.observe(event.timings.total)

    def judge(self, call: str, inputs: int, unsound: int) -> None:
        """A call of the model for so many inputs gave to so many what is no number."""
        if unsound:
            self.metrics.count_call_failure(call)
            log.error("the model gave no number to %d of %d inputs of a call for %s", unsound, inputs, call)
        if unsound < inputs:
            self.health.succeeded(call)
        else:
            self.health.failed(call)

    def call_raised(self, call: str) -> None:
        """A call of the model raised."""
        self.metrics.count_call_failure(call)
        self.health.failed(call)

    def fail(self, sequences: Iterable[Sequence]) -> None:
        """What was being done with these failed. Those that have come to an end already are passed over."""
        error = EngineFailure("the model failed while it worked on this request; the service's log says how")
        for sequence in sequences:
            if sequence.stage is Stage.RUNNING:
                self.finish(sequence, "error", Failed(error))

    def timings(self, sequence: Sequence) -> Timings:
        """Of one that ends now."""
        began = sequence.submitted_at
        if sequence.kind != "generate":
            return Timings(sequence.admitted_at - began, None, self.clock() - began)
        first, encoded = sequence.first_token_at - began, sequence.encoded_at - began
        return Timings(sequence.admitted_at - began, first, self.clock() - began, encoded)

    def post(self) -> None:
        """Deliver what was collected."""
        events, self._events = self._events, []
        for sequence, event in events:
            try:
                sequence.on_event(event)
            except Exception:
                log.exception("a receiver of events failed; the event is dropped")

    def report(self) -> None:
        """Tell the gauges what has changed."""
        metrics, state = self.metrics, self._state
        if state.layout != self._layout:
            self._layout, self._state_bytes = state.layout, state.nbytes
        now, before = _Levels(self._scheduler.running, state.rows, self._state_bytes), self._told
        if now != before:
            metrics.num_requests_running.inc(now.running - before.running)
            metrics.rows_in_use.inc(now.rows - before.rows)
            metrics.state_bytes.inc(now.state_bytes - before.state_bytes)
            self._told = now
        if state.growths != self._growths:
            metrics.state_growths.inc(state.growths - self._growths)
            self._growths = state.growths


class _Levels(NamedTuple):
    """What has been added to the gauges."""

    running: int = 0
    rows: int = 0
    state_bytes: int = 0
