"""`GlooGroup`: a torch process group with gloo on the CPU, by point-to-point messages, so that it knows who is missing.

NOTES on gloo. A work can only be waited for, not polled, and a wait that expires closes this rank's connections to
*all* peers, who then see it vanish as if it had died. Hence:
- Waits run in a thread of the group, so that at the deadline this rank can still tell its peers that it gives up.
- It tells them by a *farewell*: one byte per rank, 1 for those it knows to be dead. Every rank listens for it from the
  start. A peer whose connection closes without a farewell has died; one that sent it is healthy and is not named.
- A death is seen at once, as a closed connection. The other peers still get some seconds to finish with this rank.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from deepep.errors import CommTimeout
from deepep.group import Group, Health, Limit

_FAREWELL_TAG = 0x6EE0000
_FIRST_TAG = _FAREWELL_TAG + 1
# After a peer has died, how long the others get to finish; waiting longer would only delay the bad news. Seconds.
_GRACE = 5.0
# Between saying farewell and closing the connections by an expiring wait, so that it is out before. Seconds.
_FAREWELL_TIME = 0.25


class _Shared:
    """What all groups on one process group have in common, for a connection that closes is closed for all of them.

    Attributes:
        health: says whether the process group is still usable.
        next_tag: for the next group.
        waiter: the thread that waits.
        farewells: per peer, the message it may send and the work that receives it; the work is None once looked at.
        unfinished: keeps tensors alive, to which gloo writes for as long as the process group lives.
    """

    def __init__(self, group: Any) -> None:
        self.health = Health()
        self.next_tag = _FIRST_TAG
        self.waiter = ThreadPoolExecutor(1, "deepep-wait")
        self.farewells = {peer: _listen(group, peer) for peer in range(group.size()) if peer != group.rank()}
        self.unfinished: list[Any] = []


_shared: weakref.WeakKeyDictionary[Any, _Shared] = weakref.WeakKeyDictionary()


@dataclass
class _Outcome:
    """What became of the peers of one exchange.

    Attributes:
        closed: peers whose connection is gone.
        silent: peers with unfinished messages when the wait ended.
        dead: ranks known to have died, by a closed connection without farewell or by a peer's farewell.
        left: peers that said farewell.
        is_overdue: whether the wait ended at the caller's limit, not earlier because of a death.
    """

    closed: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    is_overdue: bool = False


class GlooGroup(Group):
    """A torch process group that has gloo for CPU tensors. CUDA tensors are staged through pinned host memory."""

    def __init__(self, group: Any) -> None:
        shared = _shared.get(group)
        if shared is None:
            shared = _shared[group] = _Shared(group)
        super().__init__(group, group.rank(), group.size(), torch.device("cpu"), shared.health)
        self._shared = shared
        self._tag = shared.next_tag
        shared.next_tag += 1

    def _exchange_bytes(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, limit: Limit
    ) -> None:
        outcome = _Outcome()
        works = self._post(send, recv, outcome)
        try:
            self._wait(works, limit.end, outcome)
        except BaseException:
            # Ctrl-C and the like: release the waiting thread, by an expiring wait of our own, and never come back.
            self._shared.unfinished += [send, recv, works]
            self._close_connections()
            raise
        if outcome.closed or outcome.silent:
            self._shared.unfinished += [send, recv, works]
            raise self._verdict(outcome, op, limit.timeout)

    def _post(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], outcome: _Outcome
    ) -> list[tuple[int, Any]]:
        works = []
        for step in range(1, self.num_ranks):
            peer = (self.rank + step) % self.num_ranks
            try:
                if recv[peer].numel():
                    works.append((peer, self.raw.recv([recv[peer]], peer, self._tag)))
                if send[peer].numel():
                    works.append((peer, self.raw.send([send[peer]], peer, self._tag)))
            except RuntimeError:
                self._note_closed(peer, outcome)
        return works

    def _wait(self, works: list[tuple[int, Any]], deadline: float, outcome: _Outcome) -> None:
        """Waits for all works; on return the peers of those that failed are in `outcome`."""
        works = list(works)
        while works:
            limit = min(deadline, time.monotonic() + _GRACE) if outcome.dead else deadline
            future = self._shared.waiter.submit(_finish, works, limit + _FAREWELL_TIME)
            try:
                failed = future.result(max(0.0, limit - time.monotonic()))
            except FutureTimeoutError:
                self._give_up(works, future, outcome)
                outcome.is_overdue = limit == deadline
                return
            if failed is not None:
                self._note_closed(failed, outcome)
        if outcome.closed:
            self._say_farewell(outcome)

    def _give_up(self, works: list[tuple[int, Any]], future: Future[int | None], outcome: _Outcome) -> None:
        late = works[:1]
        self._say_farewell(outcome)
        failed = future.result()  # the thread's wait expires now, and with that all connections are closed
        outcome.silent = {peer for peer, work in works if not _is_finished(work)}
        if failed is not None:
            outcome.silent.add(failed)
        # If the last message came after the farewell was said, it came too late all the same.
        outcome.silent |= set() if outcome.silent else {peer for peer, _ in late}

    def _note_closed(self, peer: int, outcome: _Outcome) -> None:
        """A connection is gone: has that peer died, or has it left with a farewell that says who has?"""
        if peer in outcome.closed:
            return
        outcome.closed.add(peer)
        self._read_farewell(peer, outcome)
        if peer not in outcome.left:
            outcome.dead.add(peer)

    def _verdict(self, outcome: _Outcome, op: str, timeout: float) -> CommTimeout:
        for peer in outcome.silent - outcome.closed:
            self._read_farewell(peer, outcome)
        outcome.dead.discard(self.rank)
        silent = outcome.silent - outcome.left - outcome.dead
        if outcome.dead:
            missing = outcome.dead | silent if outcome.is_overdue else outcome.dead
            return CommTimeout(op, sorted(missing), timeout, f"connection closed: {sorted(outcome.dead)}")
        if silent:
            return CommTimeout(op, sorted(silent), timeout)
        return CommTimeout(op, sorted(outcome.left), timeout, "they gave up waiting earlier")

    def _say_farewell(self, outcome: _Outcome) -> None:
        message = torch.zeros(self.num_ranks, dtype=torch.uint8, device="cpu")
        message[sorted(outcome.dead)] = 1
        works = []
        for peer in self._shared.farewells.keys() - outcome.closed:
            with contextlib.suppress(RuntimeError):
                works.append(self.raw.send([message], peer, _FAREWELL_TAG))
        self._shared.unfinished += [message, works]

    def _read_farewell(self, peer: int, outcome: _Outcome) -> None:
        message, work = self._shared.farewells[peer]
        if work is not None and _is_finished(work):
            outcome.left.add(peer)
            outcome.dead |= {rank for rank in range(self.num_ranks) if message[rank]}
        self._shared.farewells[peer] = (message, None)  # a work can be waited for only once

    def _close_connections(self) -> None:
        for _, work in self._shared.farewells.values():
            if work is not None and not _is_finished(work):
                return


def _listen(group: Any, peer: int) -> tuple[torch.Tensor, Any]:
    message = torch.zeros(group.size(), dtype=torch.uint8, device="cpu")
    try:
        return message, group.recv([message], peer, _FAREWELL_TAG)
    except RuntimeError:
        return message, None  # dead already: the first exchange will say so


def _finish(works: list[tuple[int, Any]], limit: float) -> int | None:
    """Takes works off the list as they finish; returns the peer of the first that fails, or None after the last."""
    while works:
        peer, work = works[0]
        try:
            work.wait(timedelta(seconds=max(0.001, limit - time.monotonic())))
        except RuntimeError:
            works.pop(0)
            return peer
        works.pop(0)
    return None


def _is_finished(work: Any) -> bool:
    """Whether this message is through; closes all connections if it is merely pending."""
    try:
        return bool(work.wait(timedelta(milliseconds=1)))
    except RuntimeError:
        return False
