"""Texts that end an answer or must not occur in it, as questions about tokens: which one completes a text?

Works on bytes, so a text is found however it is split over tokens, within characters too. Case counts.
"""

from __future__ import annotations

import bisect
from functools import cached_property


class Vocabulary:
    """The bytes of every token, made to be searched. Special tokens have none."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        self.token_bytes = token_bytes

    def beginning_with(self, text: bytes) -> list[int]:
        """The tokens whose bytes begin with `text`."""
        spellings, ids = self._sorted
        first = bisect.bisect_left(spellings, text)
        last = first
        while last < len(spellings) and spellings[last].startswith(text):
            last += 1
        return ids[first:last]

    def containing(self, text: bytes) -> list[int]:
        """The tokens whose bytes contain `text`."""
        return [id for id, spelling in enumerate(self.token_bytes) if text in spelling]

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        pairs = sorted((spelling, id) for id, spelling in enumerate(self.token_bytes) if spelling)
        return [spelling for spelling, _ in pairs], [id for _, id in pairs]


class Patterns:
    """Some texts, and which tokens complete one of them."""

    def __init__(self, vocabulary: Vocabulary, texts: list[bytes]) -> None:
        if not all(texts):
            raise ValueError("an empty text is completed by everything")
        self._vocabulary = vocabulary
        self._texts = list(dict.fromkeys(texts))
        self.reach = max(map(len, texts), default=1) - 1
        """How many bytes before a token can matter."""

    def text_of(self, ids: tuple[int, ...]) -> bytes:
        """As much of the end of these tokens' text as can matter."""
        return self._tail(b"".join(map(self._vocabulary.token_bytes.__getitem__, ids)))

    def extend(self, before: bytes, id: int) -> bytes:
        """As much of the end as can matter when token `id` follows the text `before`."""
        return self._tail(before + self._vocabulary.token_bytes[id])

    def completed_by(self, before: bytes, id: int) -> bool:
        """Whether token `id`, after the text `before`, completes one of the texts."""
        joined = before + self._vocabulary.token_bytes[id]
        # An occurrence that lies in `before` alone is an old one.
        return any(joined.find(text, max(0, len(before) - len(text) + 1)) >= 0 for text in self._texts)

    def completing(self, before: bytes) -> list[int]:
        """Every token that completes one of the texts after the text `before`, in ascending order."""
        found = set(self._at_once)
        for text in self._texts:
            for length in range(1, min(len(text) - 1, len(before)) + 1):
                if before.endswith(text[:length]):
                    found.update(self._vocabulary.beginning_with(text[length:]))
        return sorted(found)

    @cached_property
    def _at_once(self) -> frozenset[int]:
        """The tokens that complete a text whatever stands before them."""
        return frozenset(id for text in self._texts for id in self._vocabulary.containing(text))

    def _tail(self, text: bytes) -> bytes:
        return text[-self.reach :] if self.reach else b""

    def __repr__(self) -> str:
        return f"<Patterns {len(self._texts)} texts>"
