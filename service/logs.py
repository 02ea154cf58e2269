"""The log: one line per record on standard error, as text or as JSON.

No line holds a request's text or a key: handlers are given ids, routes, counts and times.
"""

import json
import logging
import sys
import time
from typing import Literal


class Words(dict[str, object]):
    """A message of names and values: `name=value` with spaces between them in text, members of the line in JSON."""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.items())


def set_up_logs(level: str, form: Literal["text", "json"] = "text") -> None:
    """Send the records of this program and of uvicorn to standard error, from `level` (debug, info, ...) up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and stop are told by this program


class _Text(logging.Formatter):
    """`time level logger message`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = _utc


class _Json(_Text):
    """An object a line: time, level, logger, and the message or its words."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.msg, Words):
            line |= record.msg
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _utc(seconds: float | None) -> time.struct_time:
    return time.gmtime(seconds)
