"""The environment variables that deepep reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepep import env
from deepep.errors import InvalidArgument

VARIABLES = ["DEEPEP_BACKEND", "DEEPEP_TIMEOUT", "DEEPEP_NUM_HOSTS", "DEEPEP_CACHE_DIR", "DEEPEP_DEBUG"]


@pytest.mark.parametrize("value", [None, "", " "])
def test_unset_and_empty_mean_default(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert env.backend() is None
    assert env.timeout() == 100.0
    assert env.num_hosts() is None
    assert env.cache_dir() == Path("/cache/deepep")
    assert not env.debug()


def test_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ["reference", "2.5", "2", "/elsewhere", "1"], strict=True):
        monkeypatch.setenv(name, value)
    assert env.backend() == "reference"
    assert env.timeout() == 2.5
    assert env.num_hosts() == 2
    assert env.cache_dir() == Path("/elsewhere")
    assert env.debug()


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan"])
def test_nonsense_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DEEPEP_TIMEOUT", value)
    monkeypatch.setenv("DEEPEP_NUM_HOSTS", value)
    with pytest.raises(InvalidArgument, match="DEEPEP_TIMEOUT"):
        env.timeout()
    with pytest.raises(InvalidArgument, match="DEEPEP_NUM_HOSTS"):
        env.num_hosts()


def test_a_cache_in_the_home_of_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_CACHE_DIR", "~no_such_user/x")
    with pytest.raises(InvalidArgument, match=r"^~no_such_user/x: .* set DEEPEP_CACHE_DIR"):
        env.cache_dir()
    monkeypatch.setenv("DEEPEP_CACHE_DIR", "~/x")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert env.cache_dir() == Path("/home/somebody/x")
    monkeypatch.delenv("DEEPEP_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert env.cache_dir() == Path("/home/somebody/.cache/deepep")
