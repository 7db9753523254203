"""The values that the user gave, the error that refuses them, and how they become a frozen group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from training.config.flags import ALL

T = TypeVar("T")


class Refusal(ValueError):
    """Bad input from the user; the message is one sentence that names the flag."""


@dataclass(frozen=True)
class Given:
    """The values of all flags, and which of them the user set."""

    values: Mapping[str, Any]
    explicit: frozenset[str] = field(default_factory=frozenset)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):  # copy and pickle ask for these before the fields exist
            raise AttributeError(key)
        return self.values[key]

    def chose(self, *keys: str) -> bool:
        """Whether any of ``keys`` was given, on the command line or in the file."""
        return any(key in self.explicit for key in keys)

    def say(self, key: str) -> str:
        """The flag as a user would type it, ``--batch-size 64``."""
        flag, value = ALL[key], self.values[key]
        if flag.kind == "switch":
            return flag.name
        if isinstance(value, Mapping):
            value = " ".join(f"{k}={v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ("::" if flag.kind == "sizes" else " ").join(map(str, value))
        return f"{flag.name} {value if value != '' else repr('')}"

    def group(self, kind: type[T], **resolved: Any) -> T:
        """A dataclass of type ``kind``: a field has its value in ``resolved``, or else that of its flag."""
        plain = {f.name: self.values[f.name] for f in fields(kind) if f.name not in resolved}  # type: ignore[arg-type]
        return kind(**{name: frozen(value) for name, value in {**plain, **resolved}.items()})


class FrozenMapping(Mapping[str, Any]):
    """A mapping that nothing can write to, equal to a dict of the same items.

    Unlike ``MappingProxyType`` it can be pickled and copied, so that a ``Config`` can be sent to other processes.
    """

    __slots__ = ("_items",)
    _items: dict[str, Any]

    def __init__(self, items: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_items", dict(items))

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot assign to {name!r}: the mapping is frozen")

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return FrozenMapping, (dict(self._items),)

    def __repr__(self) -> str:
        return repr(self._items)


def frozen(value: Any) -> Any:
    """``value`` as something that nothing can write to."""
    if isinstance(value, list):
        return tuple(value)
    return FrozenMapping(value) if isinstance(value, Mapping) else value
