"""Ranks on which a client is loaded, for one test after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepep.testing.launch import Workers


class PreparedWorkers(Workers):
    """Workers on which `prepare(group, *args)` was called; so it is on those that replace them after a failure.

    A failure ends the ranks: a client keeps its buffer for good, and with ranks that are out of step in it the tests
    that follow would fail for that reason.
    """

    def __init__(self, num_ranks: int, prepare: Callable[..., Any], *args: Any, **options: Any) -> None:
        super().__init__(num_ranks, **options)
        self._prepare = (prepare, *args)
        self._prepared: list[int] = []

    def run(self, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        try:
            if not self.pids or self.pids != self._prepared:
                super().run(*self._prepare)
                self._prepared = self.pids
            return super().run(fn, *args, **options)
        except BaseException:
            self.close()
            raise
