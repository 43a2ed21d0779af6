"""Reads a checkpoint's JSON configuration key by key, refusing values that no code implements."""

from collections.abc import Mapping
from typing import Any

from ltxlite.errors import CheckpointError

_REQUIRED: Any = object()


class Settings:
    """One section of a checkpoint's configuration.

    Every key is either taken, required to have a value we implement, or listed as inert; what is
    left over afterwards is reported by `unread`, so that a new key of a new release is seen.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = dict(values)
        self._read: set[str] = set()
        self.where = where

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return the value of `key`; without a default its absence is a CheckpointError."""
        self._read.add(key)
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise CheckpointError(f"{self.where}: the configuration lacks {key!r}")
        return value

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """Return a positive integer, however the file spells it (8, 8.0)."""
        value = self.take(key, default)
        if not _is_whole(value):
            raise self._bad(key, value, "a whole number")
        if not 0 < value < 1 << 31:
            raise self._bad(key, value, "a positive number")
        return int(value)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """Return a finite number as float."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e30:
            raise self._bad(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """Return a boolean."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, value, "true or false")
        return value

    def integers(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """Return a list of positive integers as a tuple."""
        value = self.take(key, default)
        if not isinstance(value, (list, tuple)) or not all(
            _is_whole(item) and 0 < item < 1 << 31 for item in value
        ):
            raise self._bad(key, value, "a list of whole numbers")
        return tuple(int(item) for item in value)

    def section(self, key: str) -> "Settings":
        """Return a nested object; an absent one reads as empty."""
        value = self.take(key, {})
        if not isinstance(value, Mapping):
            raise self._bad(key, value, "an object")
        return Settings(value, f"{self.where}.{key}")

    def expect(self, key: str, *accepted: Any) -> None:
        """Refuse any value of `key` other than the accepted ones; absence is fine."""
        value = self.take(key, accepted[0])
        if value not in accepted:
            raise self._bad(key, value, " or ".join(map(repr, accepted)))

    def inert(self, *keys: str) -> None:
        """Name keys that change nothing at inference."""
        self._read.update(keys)

    def has(self, key: str) -> bool:
        """Tell whether the file gives `key`."""
        return key in self._values

    def unread(self) -> list[str]:
        """Return the keys that nobody asked for, sorted."""
        return sorted(set(self._values) - self._read)

    def _bad(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}.{key} is {value!r}, ltxlite implements {wanted}")


def _is_whole(value: object) -> bool:
    if isinstance(value, float):
        return value.is_integer()  # false for NaN and infinity, which JSON readers let in
    return isinstance(value, int) and not isinstance(value, bool)
