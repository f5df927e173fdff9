"""What may be shown of an address: a server's URL without the user, password or token in it."""

from __future__ import annotations

__all__ = ["masked", "masked_words"]


def masked(url: str) -> str:
    """The address, or addresses with commas between them, without what stands before an `@`."""
    return ",".join(map(_one, url.split(",")))


def masked_words(words: list[str]) -> list[str]:
    """A command line with its addresses masked."""
    return [masked(word) if "@" in word and "://" in word else word for word in words]


def _one(url: str) -> str:
    head, scheme, rest = url.rpartition("://") if "://" in url else ("", "", url)
    return f"{head}{scheme}{rest.rpartition('@')[2]}"
