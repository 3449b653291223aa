"""Frozen dataclasses that are quick to make."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

Record = TypeVar("Record", bound=type)


def quickly_made(cls: Record) -> Record:
    """Give a frozen dataclass a constructor that assigns its fields as that of any other class does.

    The one that `dataclass` writes has to go round `__setattr__` for each field, which for a request of eighteen fields
    takes 2 us of the 15 that a call may take before its first kernel. What it goes round is gone, so it is left to type
    checkers to refuse assignments. Not for classes with `__post_init__`, keyword-only fields or default factories.
    """
    made_by_dataclass: Any = vars(cls)["__init__"]
    names = [field.name for field in fields(cls)]
    namespace: dict[str, Any] = {}
    lines = [f"def __init__(self, {', '.join(names)}):", *(f"    self.{name} = {name}" for name in names)]
    exec("\n".join(lines), namespace)
    init = namespace["__init__"]
    init.__defaults__, init.__annotations__ = made_by_dataclass.__defaults__, made_by_dataclass.__annotations__
    init.__qualname__ = made_by_dataclass.__qualname__
    cls.__init__ = init  # type: ignore[misc]
    del cls.__setattr__, cls.__delattr__
    return cls
