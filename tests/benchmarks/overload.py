"""What a server still does that is offered a multiple of what it can do.

    python -m tests.benchmarks.overload [--times 10] [--rounds 5] [--seconds 8] [--num-beams 4] [--options ...]

It starts `transduce serve` with `--max-wait 1` (and the options) on all processors but the last, where `wrk` makes the
load: in turns a closed loop of as many clients as keep the server busy, and that multiple of its answers a second,
offered by clients that ask again a second after they were told anything. What counts is read from the server's metrics,
and from its threads' processor time: where other work makes the machine slow, goodput varies, and the share of the
processor that decoding gets does not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.load import metric, sentences, served

_SCRIPT = """
local bodies = {}
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end
local seconds = tonumber(os.getenv("PAUSE"))
local n = 0
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
request = function()
  n = n % #bodies + 1
  return wrk.format(nil, "/v1/generate", nil, bodies[n])
end
if seconds > 0 then delay = function() return seconds * 1000 end end
"""

_SETTLE_SECONDS = 2.5


@dataclass(frozen=True)
class Look:
    """The server at a moment."""

    time: float
    answered: float
    refused: float
    latency: float
    loop_seconds: float
    other_seconds: float
    tokens: float


def look(port: int, server: subprocess.Popen[bytes]) -> Look:
    """Its counters now."""
    threads = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process(server.pid).threads()}
    loop = threads.pop(server.pid)
    return Look(
        time.monotonic(),
        metric(port, "transduce_requests_total"),
        metric(port, "transduce_request_failures_total"),
        metric(port, "transduce_e2e_request_latency_seconds_sum"),
        loop,
        sum(threads.values()),
        metric(port, "transduce_generated_tokens_total"),
    )


class Bench:
    """A server and its clients."""

    def __init__(self, port: int, server: subprocess.Popen[bytes], work: Path, seconds: float) -> None:
        self._port, self._server, self._work, self._seconds = port, server, work, seconds

    def run(self, name: str, clients: int, pause: float) -> Look:
        """One phase. What it prints and returns is a second's worth."""
        processor = str(os.cpu_count() - 1) if os.cpu_count() else "0"
        command = [
            "taskset", "--cpu-list", processor, "wrk", "--threads", "1", "--connections", str(clients),
            "--duration", f"{math.ceil(_SETTLE_SECONDS + self._seconds + 1)}s", "--timeout", "60s",
            "--script", str(self._work / "load.lua"), f"http://127.0.0.1:{self._port}",
        ]  # fmt: skip
        environment = os.environ | {"BODIES": str(self._work / "bodies"), "PAUSE": f"{pause:g}"}
        load = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(_SETTLE_SECONDS)
        before = look(self._port, self._server)
        time.sleep(self._seconds)
        after = look(self._port, self._server)
        if load.wait() != 0:
            raise RuntimeError(f"wrk ended with status {load.returncode}")
        time.sleep(_SETTLE_SECONDS)
        passed = after.time - before.time
        answered = after.answered - before.answered
        found = Look(
            passed,
            answered / passed,
            (after.refused - before.refused) / passed,
            (after.latency - before.latency) / max(1, answered),
            (after.loop_seconds - before.loop_seconds) / passed,
            (after.other_seconds - before.other_seconds) / passed,
            (after.tokens - before.tokens) / max(1e-9, after.other_seconds - before.other_seconds),
        )
        sys.stdout.write(
            f"{name:9} {clients:5} clients  answered {found.answered:6.1f}/s  refused {found.refused:7.1f}/s  "
            f"latency {found.latency:5.2f} s  processor: decoding {found.other_seconds:.3f}, HTTP "
            f"{found.loop_seconds:.3f}  {found.tokens:5.0f} tokens a second of decoding\n"
        )
        sys.stdout.flush()
        return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overload", description=__doc__)
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=24, help="that keep the server busy")
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--texts", type=int, default=4, help="joined in one input")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[])
    asked = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("this wants wrk (apt install wrk): a client that takes little of the processor")
    texts = sentences(asked.texts * 300)
    joined = [" ".join(texts[start::300]) for start in range(300)]
    parameters = {"num_beams": asked.num_beams, "max_new_tokens": 128}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        (work / "load.lua").write_text(_SCRIPT)
        lines = (json.dumps({"inputs": text, "parameters": parameters}) for text in joined)
        (work / "bodies").write_text("\n".join(lines) + "\n")
        os.sched_setaffinity(0, range(max(1, (os.cpu_count() or 1) - 1)))  # the server inherits it
        with served("--max-wait", "1", "--max-connections", "8192", *asked.options) as (port, server):
            bench = Bench(port, server, work, asked.seconds)
            capacity = bench.run("warm", asked.clients, 0.0).answered
            pairs = [
                (
                    bench.run("closed", asked.clients, 0.0),
                    bench.run("overload", round((asked.times + 1.5) * capacity), 1.0),
                )
                for _ in range(asked.rounds)
            ]
    goodput = [over.answered / closed.answered for closed, over in pairs]
    share = [over.other_seconds / closed.other_seconds for closed, over in pairs]
    print(
        "goodput, overload to closed:",
        *(f"{ratio:.2f}" for ratio in goodput),
        f"median {statistics.median(goodput):.3f}",
    )
    print("processor for decoding:", *(f"{ratio:.2f}" for ratio in share), f"median {statistics.median(share):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
