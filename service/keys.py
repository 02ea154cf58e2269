"""Who may call: API keys, known by their hashes, each with the name of the client that holds it.

An entry is NAME:DIGEST, the digest being the SHA-256 of the key in hexadecimal. Keys are long and random (`transduce
key` makes them), so one plain hash is enough to make a stolen list useless. Entries stand in a setting or, one a line,
in a file, which is looked at again while the service runs: a key is added or withdrawn without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import SettingsError, Unauthorized
from service.metrics import Metrics
from service.problem import problem_response

logger = logging.getLogger("transduce.keys")

LOOK_AGAIN_SECONDS = 1.0
"""How old a look at the file may be when a request comes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENTRY = re.compile(rf"({_NAME.pattern}):([0-9a-fA-F]{{64}})")


@dataclass(frozen=True)
class Entry:
    """A key that is let in."""

    client: str
    digest: bytes

    def __str__(self) -> str:
        return f"{self.client}:{self.digest.hex()}"


def make_key(client: str) -> tuple[str, Entry]:
    """A new key of 256 random bits, and its entry. Raises SettingsError for a name that cannot be one."""
    if not _NAME.fullmatch(client):
        raise SettingsError(f"{client!r} is no client's name: 1 to 64 letters, digits, dots, dashes and underscores")
    key = "td-" + secrets.token_urlsafe(32)
    return key, Entry(client, _digest(key.encode()))


class Keys:
    """The keys in effect. Used on the event loop alone."""

    def __init__(
        self, listed: str = "", path: str = "", clock: Callable[[], float] = time.monotonic, *, flag: str = "--api-key"
    ) -> None:
        """`listed` are entries with commas or spaces between them, `path` the file; empty is none. `flag` is how the
        flags begin that gave them.

        Raises SettingsError for a file that cannot be read or has no entry, and for an entry that is none.
        """
        self._file_flag = f"{flag}-file"
        self._listed = _entries(re.split(r"[,\s]+", listed), f"{flag}s: entry")
        self._path = Path(path) if path else None
        self._clock = clock
        self._of_file: tuple[Entry, ...] = ()
        self._seen: object = None
        self._looked_at = clock()
        if self._path is not None:
            self._seen = _version(self._path)
            self._of_file = _read(self._path, self._file_flag)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Everyone who is let in now."""
        return (*self._listed, *self._of_file)

    @property
    def required(self) -> bool:
        """Whether a key has to be shown at all. It stays so: a file that loses its last entry is not taken."""
        return bool(self._listed) or self._path is not None

    def client(self, key: bytes) -> str | None:
        """Whose key it is, None if it is nobody's. Takes the same time wherever, and whether or not, it is found."""
        self._look_again()
        digest, found = _digest(key), None
        for entry in self.entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.client
        return found

    def client_of(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Whose request it is, by its header Authorization; empty if no key is wanted, None if it shows none."""
        if not self.required:
            return ""
        shown = [value for name, value in headers if name == b"authorization"]
        return self.client(key) if len(shown) == 1 and (key := _bearer(shown[0])) else None

    def _look_again(self) -> None:
        now = self._clock()
        if self._path is None or now - self._looked_at < LOOK_AGAIN_SECONDS:
            return
        self._looked_at = now
        if (version := _version(self._path)) == self._seen:
            return
        self._seen = version
        try:
            self._of_file = _read(self._path, self._file_flag)
        except SettingsError as error:
            logger.error("%s; the keys stay as they were", error)
        else:
            logger.info(
                "read the keys again: %d of %d clients", len(self.entries), len({e.client for e in self.entries})
            )


class Gate:
    """Lets nobody in without a key, where keys are required: an ASGI layer around every route but the open ones."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        metrics: Metrics,
        open_paths: frozenset[str],
        other_keys: Mapping[str, Keys] = MappingProxyType({}),
    ) -> None:
        """`other_keys`: paths that begin so want a key of these, and no other opens them."""
        self.app = app
        self._keys = keys
        self._other_keys = other_keys
        self._metrics = metrics
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request; `state.trail.client` is the name of who sent it, empty if nobody is asked."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        others = (keys for beginning, keys in self._other_keys.items() if scope["path"].startswith(beginning))
        keys = next(others, self._keys)
        if not keys.required or scope["path"] in self._open_paths:
            await self.app(scope, receive, send)
            return
        if (client := keys.client_of(scope["headers"])) is None:
            error = Unauthorized(_WRONG if any(name == b"authorization" for name, _ in scope["headers"]) else _MISSING)
            self._metrics.count_failure(error.type)
            answer = problem_response(error, scope["state"]["trail"].request_id, {"www-authenticate": "Bearer"})
            await answer(scope, receive, send)
            return
        scope["state"]["trail"].client = client
        await self.app(scope, receive, send)


_MISSING = "this service wants a key: send it in the header Authorization: Bearer KEY"
_WRONG = "this key is none of the service's; ask who runs it, and send the header as Authorization: Bearer KEY"


def _bearer(header: bytes) -> bytes:
    """The token of an Authorization header (RFC 6750), empty if it has none."""
    scheme, _, token = header.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _version(path: Path) -> object:
    """What changes when the file does; its directory may be swapped under it, as Kubernetes does with a Secret."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path, flag: str) -> tuple[Entry, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"{flag} {path}: {reason}") from None
    entries = _entries((line.partition("#")[0] for line in text.splitlines()), f"{flag} {path}: line")
    if not entries:
        raise SettingsError(f"{flag} {path}: there is no key in it; `transduce key NAME` makes one")
    return entries


def _entries(texts: Iterable[str], place: str) -> tuple[Entry, ...]:
    entries = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        if (match := _ENTRY.fullmatch(text.strip())) is None:  # which may be a key: it is not repeated
            raise SettingsError(f"{place} {number} is not NAME:SHA-256 in hexadecimal; `transduce key NAME` makes one")
        entries.append(Entry(match[1], bytes.fromhex(match[2])))
    return tuple(entries)
