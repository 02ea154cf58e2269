"""The id of a request: the client's X-Request-ID if it is sane, else a new one; returned on every response."""

import random
import re

_SANE = re.compile(rb"[\x21-\x7e]{1,128}")


def make_request_id() -> str:
    """A new id, 32 hexadecimal digits.

    Nothing depends on its being secret. The operating system's random bytes are a system call, which gives up the
    interpreter's lock, and getting that back takes longer than all the rest while the engine is busy.
    """
    return f"{random.getrandbits(128):032x}"


def request_id_of(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own id if it is 1 to 128 visible ASCII characters, else a new one.

    Anything else (spaces, control characters, a kilobyte) would travel into log lines and other systems' headers.
    """
    for name, value in headers:
        if name == b"x-request-id" and _SANE.fullmatch(value):
            return value.decode("ascii")
    return make_request_id()
