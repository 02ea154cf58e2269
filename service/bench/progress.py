"""A progress bar for each point, on a terminal's standard error."""

from __future__ import annotations

import time

from tqdm import tqdm

from service.bench.report import Reply
from service.bench.workload import Load, Workload


class Progress:
    """The bar of one point: it counts requests, or seconds where the point lasts for a time. Used as a context."""

    def __init__(self, load: Load, workload: Workload) -> None:
        self._requests = workload.requests
        self._began: float | None = None
        self._counted = self._failed = 0
        unit = "s" if workload.requests is None else ""
        self._bar = tqdm(
            desc=f"{load}, warm-up",
            total=workload.requests or workload.duration,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}" + unit + " [{elapsed}{postfix}]",
            dynamic_ncols=True,
            leave=False,
            disable=None,
        )
        self._name = str(load)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def on_reply(self, reply: Reply, counted: bool) -> None:
        """Move on."""
        if self._bar.disable or not counted:
            return
        now = time.perf_counter()
        if self._began is None:
            self._began = now
            self._bar.set_description_str(self._name, refresh=False)
        self._counted += 1
        self._failed += reply.failure is not None
        self._bar.set_postfix_str(
            f"{self._counted} answers, {self._failed} failures" if self._failed else f"{self._counted} answers",
            refresh=False,
        )
        done = self._counted if self._requests is not None else now - self._began
        self._bar.update(min(done, self._bar.total) - self._bar.n)
