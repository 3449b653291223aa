"""Every environment variable that deepep reads, in one place. Read afresh at each call; empty counts as unset."""

from __future__ import annotations

import os
from pathlib import Path

from deepep.errors import InvalidArgument

DEFAULT_TIMEOUT = 100.0


def backend() -> str | None:
    """`DEEPEP_BACKEND`: the backend to take where the caller names none (`backend=` beats it); None if unset."""
    return _text("DEEPEP_BACKEND")


def timeout(default: float = DEFAULT_TIMEOUT) -> float:
    """`DEEPEP_TIMEOUT`: how long to wait for a peer, seconds, above 0; `default` if unset.

    Raises:
        InvalidArgument: it is not a positive number.
    """
    return _positive("DEEPEP_TIMEOUT", default)


def num_hosts() -> int | None:
    """`DEEPEP_NUM_HOSTS`: let the ranks of one host stand for so many hosts (`Topology.split`); None if unset.

    Raises:
        InvalidArgument: it is not a whole number above 0.
    """
    if _text("DEEPEP_NUM_HOSTS") is None:
        return None
    value = _positive("DEEPEP_NUM_HOSTS", 1)
    if value != int(value):
        raise InvalidArgument(f"DEEPEP_NUM_HOSTS={value:g}: expected a whole number of hosts, e.g. 2")
    return int(value)


def cache_dir() -> Path:
    """`DEEPEP_CACHE_DIR`: where compiled kernels are kept; `$XDG_CACHE_HOME/deepep` or `~/.cache/deepep` if unset.

    Raises:
        InvalidArgument: it begins with the home of a user who has none, or nothing is set and this user has none.
    """
    base = _text("XDG_CACHE_HOME")
    default = "~/.cache/deepep" if base is None else str(Path(base) / "deepep")
    chosen = _text("DEEPEP_CACHE_DIR") or default
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:  # no such user, or one without a home, as in containers with made-up user ids
        raise InvalidArgument(f"{chosen}: {error}; set DEEPEP_CACHE_DIR to a folder for compiled kernels") from error


def debug() -> bool:
    """`DEEPEP_DEBUG`: True for anything but unset, empty and `0`."""
    return _text("DEEPEP_DEBUG") not in (None, "0")


def _text(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _positive(name: str, default: float) -> float:
    text = _text(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InvalidArgument(f"{name}={text!r}: expected a number above 0")
    return value
