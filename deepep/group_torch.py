"""Groups over torch.distributed: `GlooGroup` (point to point, knows who is missing)."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from deepep.errors import CommTimeout, InvalidArgument
from deepep.group import Group

_num_groups: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def make_torch_group(group: Any) -> Group:
    return GlooGroup(group)


class GlooGroup(Group):
    def __init__(self, group: Any) -> None:
        super().__init__(group, group.rank(), group.size())
        self._tag = 0x6EE0000 + 2 * _num_groups.get(group, 0)
        _num_groups[group] = _num_groups.get(group, 0) + 1
        self._unfinished: list[Any] = []

    def _exchange_bytes(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, timeout: float
    ) -> None:
        deadline = time.monotonic() + timeout
        works: list[tuple[int, Any]] = []
        lost: set[int] = set()
        for step in range(1, self.num_ranks):
            peer = (self.rank + step) % self.num_ranks
            try:
                if recv[peer].numel():
                    works.append((peer, self.raw.recv([recv[peer]], peer, self._tag)))
                if send[peer].numel():
                    works.append((peer, self.raw.send([send[peer]], peer, self._tag)))
            except RuntimeError:
                lost.add(peer)
        for peer, work in works:
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError:
                lost.add(peer)
        if lost:
            self._unfinished += [send, recv, works]
            raise CommTimeout(op, sorted(lost), timeout)
