"""`GlooGroup`: a torch process group with gloo on the CPU, by point-to-point messages, so that it knows who is missing.

NOTES on gloo, which shape this file and `gloo_links.py`:
- A message cannot be polled, only waited for; and a wait that expires closes this process's connections to *all*
  peers, who then take it for dead. So nothing here waits with a limit: threads wait without one, one per peer, and the
  caller watches what they note. A call that fails leaves its connections open, and a new group works on them.
- A peer's death closes its connection at once, but a message that is half through does not notice. A message that has
  not begun does. So one is always expected from every peer, on a tag of its own: the *farewell*.
- A rank that gives up sends a farewell with the ranks it misses. Its peers then fail as well, for that reason, and
  name those ranks, not the one that gave up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from deepep.errors import CommTimeout
from deepep.gloo_links import Round, links_of
from deepep.group import Group, Limit, torch_members

# After a peer is gone, how long the others get to finish with this rank, so that nobody stops half-way. Seconds.
_GRACE = 1.0
# Ranks reach the same deadline at slightly different times: how long to listen for farewells after it. Seconds.
_LISTEN_TIME = 0.1


class GlooGroup(Group):
    """A torch process group that has gloo for CPU tensors. CUDA tensors are staged through pinned host memory."""

    def __init__(self, group: Any) -> None:
        super().__init__(group, group.rank(), group.size(), torch.device("cpu"))
        self._links = links_of(group)
        self._tag = self._links.new_tag()

    @property
    def members(self) -> tuple[int, ...]:
        """Global ranks."""
        return torch_members(self.raw) or super().members

    def _exchange_bytes(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, limit: Limit
    ) -> None:
        pending = {peer for peer in self._links.peers if send[peer].numel() or recv[peer].numel()}
        messages = Round(self.raw, pending)
        try:
            for peer in sorted(pending, key=lambda peer: (peer - self.rank) % self.num_ranks):
                self._post(send[peer], recv[peer], peer, messages)
            self._links.finish(messages)
            error = self._wait(messages, op, limit)
        except BaseException:
            self._links.say_farewell(self.raw, self._tag, ())
            raise
        if error is not None:
            self._links.say_farewell(self.raw, self._tag, error.missing_ranks)
            raise error

    def _post(self, send: torch.Tensor, recv: torch.Tensor, peer: int, messages: Round) -> None:
        works = []
        # This fails where the connection is gone: the peer stays pending, and the links know or will know it is dead.
        with contextlib.suppress(RuntimeError):
            if recv.numel():
                works.append(self.raw.recv([recv], peer, self._tag))
            if send.numel():
                works.append(self.raw.send([send], peer, self._tag))
            messages.jobs.append((peer, works))

    def _wait(self, messages: Round, op: str, limit: Limit) -> CommTimeout | None:
        """Returns once no peer is pending any more, or with the reason why some will be for ever."""
        changed, pending = self._links.changed, messages.pending
        with changed:
            is_decided = changed.wait_for(lambda: not pending or self._gone(pending), limit.left)
            if pending:
                self._links.hurry(messages)
                changed.wait_for(lambda: not pending - self._gone(pending), _GRACE if is_decided else _LISTEN_TIME)
            return self._verdict(pending, op, limit.timeout) if pending else None

    def _gone(self, peers: set[int]) -> set[int]:
        """Those of `peers` that will not finish: dead, or having given up."""
        return {peer for peer in peers if peer in self._links.dead or (self._tag, peer) in self._links.farewells}

    def _verdict(self, pending: set[int], op: str, timeout: float) -> CommTimeout:
        dead = self._links.dead & pending
        gone = self._gone(pending)
        farewells = [self._links.farewells[self._tag, peer] for peer in gone - dead]
        missing = dead.union(*farewells) - {self.rank}
        if missing:
            died = f"died: {', '.join(map(str, sorted(dead)))}" if dead else "as a peer says, which has given up"
            return CommTimeout(op, sorted(missing), timeout, died)
        if gone:
            return CommTimeout(op, sorted(gone), timeout, "they have given up waiting for this rank")
        return CommTimeout(op, sorted(pending), timeout)
