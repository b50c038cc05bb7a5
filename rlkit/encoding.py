"""Strings from elsewhere, made encodable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def encodable(value: Value) -> Value:
    """Return a value with "?" for each lone surrogate in its strings, also those in lists and mappings.

    JSON can contain lone surrogates, each of which is half a code point. UTF-8 cannot: tokenizers, servers,
    hashes and the files of rollouts reject them.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {encodable(key): encodable(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return [encodable(item) for item in value]  # type: ignore[return-value]
    return value
