"""Kernels with a fault, to find out whether tests notice it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from emulator import Emulator
from translate import translate


def compile_broken(monkeypatch: pytest.MonkeyPatch, line: str, instead: str, make: Callable[[], Emulator]) -> Emulator:
    """Compile kernels in whose sources `line`, which must be there, is another one."""
    seen = []

    def break_one(source: str) -> str:
        seen.extend([line] * source.count(line))
        return translate(source.replace(line, instead))

    monkeypatch.setattr("emulator.translate", break_one)
    emulator = make()
    assert seen
    return emulator
