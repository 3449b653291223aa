"""What all groups on one gloo process group share: threads that wait, and the news of dead and departing peers.

`group_gloo.py` says why it must be so.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

_FAREWELL_TAG = 0x6EE0000
_FOREVER = timedelta(days=365)

# How long the end of a process waits for its threads, seconds: one that comes back from gloo while the interpreter
# is being torn down would abort the process.
_JOIN_TIME = 1.0


@dataclass(eq=False)
class Round:
    """The messages of one exchange.

    Attributes:
        group: kept alive until they are through.
        pending: peers with unfinished messages.
        jobs: (peer, works) that no thread waits for yet.
        is_urgent: announce every peer that finishes, not only the last.
    """

    group: Any
    pending: set[int]
    jobs: deque[tuple[int, list[Any]]] = field(default_factory=deque)
    is_urgent: bool = False


@dataclass(eq=False)
class Links:
    """The connections of one process group.

    Attributes:
        peers: all ranks but this one.
        changed: guards what follows and announces changes of it.
        dead: peers whose connection is gone.
        farewells: per (tag of a group, peer that gave up in it) the ranks it missed.
    """

    peers: list[int]
    changed: threading.Condition = field(default_factory=threading.Condition)
    dead: set[int] = field(default_factory=set)
    farewells: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)
    _last_tag: int = _FAREWELL_TAG
    _idle: list[queue.SimpleQueue[Round | None]] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _expected: dict[int, Any] = field(default_factory=dict)
    _said: list[Any] = field(default_factory=list)

    def new_tag(self) -> int:
        """The tag of a new group; equal on all ranks if they make their groups in the same order."""
        self._last_tag += 1
        return self._last_tag

    def finish(self, messages: Round) -> None:
        """Takes peers out of `messages.pending` as their messages get through, by one thread. Returns at once."""
        with self.changed:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            self.start(_serve, self, inbox)
        inbox.put(messages)

    def hurry(self, messages: Round) -> None:
        """From now on by one thread per peer, so that none that is through is taken for missing."""
        messages.is_urgent = True
        for _ in range(len(messages.jobs)):
            self.finish(messages)

    def start(self, job: Callable[..., None], *args: Any) -> None:
        """Runs `job(*args)` in a new thread."""
        thread = threading.Thread(target=job, args=args, daemon=True, name="deepep-gloo")
        self._threads = [*(old for old in self._threads if old.is_alive()), thread]
        thread.start()

    def say_farewell(self, group: Any, tag: int, missing: Iterable[int]) -> None:
        """Tells all peers that this rank gives up in the group with `tag`, because of the `missing` ranks."""
        message = torch.zeros(1 + group.size(), dtype=torch.int64, device="cpu")
        message[0] = tag
        message[[1 + rank for rank in missing]] = 1
        for peer in self.peers:
            with contextlib.suppress(RuntimeError):
                self._said.append(group.send([message], peer, _FAREWELL_TAG))

    def watch(self, group: weakref.ref[Any], peer: int) -> None:
        """Waits for farewells of `peer`, until its connection or the process group is gone."""
        while (alive := group()) is not None:
            message = torch.zeros(1 + alive.size(), dtype=torch.int64, device="cpu")
            try:
                work = self._expected[peer] = alive.recv([message], peer, _FAREWELL_TAG)
                del alive
                work.wait(_FOREVER)
            except RuntimeError:
                with self.changed:
                    self._expected.pop(peer, None)
                    self.dead.add(peer)
                    self.changed.notify_all()
                return
            tag, *missing = message.tolist()
            with self.changed:
                self.farewells[tag, peer] = frozenset(rank for rank, is_missing in enumerate(missing) if is_missing)
                self.changed.notify_all()

    def release(self) -> None:
        """Ends the threads, and with them the connections: for when the process group is gone, or the process ends."""
        for work in list(self._expected.values()):
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(milliseconds=1))  # expires, which closes all connections
        with self.changed:
            for inbox in self._idle:
                inbox.put(None)
            self._idle.clear()
        end = time.monotonic() + _JOIN_TIME
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))


_links: weakref.WeakKeyDictionary[Any, Links] = weakref.WeakKeyDictionary()


def links_of(group: Any) -> Links:
    """The `Links` of a gloo process group."""
    links = _links.get(group)
    if links is None:
        links = _links[group] = Links([peer for peer in range(group.size()) if peer != group.rank()])
        for peer in links.peers:
            links.start(links.watch, weakref.ref(group), peer)
        weakref.finalize(group, links.release)
    return links


def _serve(links: Links, inbox: queue.SimpleQueue[Round | None]) -> None:
    """Life of a waiting thread. One whose message never comes stays stuck, and others take over."""
    while (messages := inbox.get()) is not None:
        with contextlib.suppress(IndexError):
            while True:
                peer, works = messages.jobs.popleft()
                is_finished = _are_finished(works)
                with links.changed:
                    if is_finished:
                        messages.pending.discard(peer)
                    if messages.is_urgent or not messages.pending:
                        links.changed.notify_all()
        del messages
        with links.changed:
            links._idle.append(inbox)


def _are_finished(works: list[Any]) -> bool:
    try:
        for work in works:
            work.wait(_FOREVER)
    except RuntimeError:
        return False
    return True
