"""The log: one line per record on standard error, `time level logger message`, the message as key=value words.

No line holds a request's text or a key: handlers are given ids, routes, counts and times.
"""

import logging
import sys
import time


def set_up_logs(level: str) -> None:
    """Send the records of this program and of uvicorn to standard error, from `level` (debug, info, ...) up."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = _utc
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and stop are told by this program


def _utc(seconds: float | None) -> time.struct_time:
    return time.gmtime(seconds)
