"""A rank that `deepep.testing.launch` has spawned, from its own side: it joins the group, then does what it is told."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from deepep.errors import InvalidArgument
from deepep.testing import whereabouts

LEAVE = b"leave"
"""What the parent sends instead of a job at the end."""


def work(
    connection: Connection, telling: Connection, place: tuple[int, int, int], setup: tuple[str, str, float]
) -> None:
    """Join the group, then serve jobs until the parent says `LEAVE` or is gone; never returns.

    Args:
        connection: to the parent: each reply is a pickled `("ok", result)` or `("error", exception or None, trace)`.
        telling: to the parent: where this rank is, if it is asked that.
        place: rank, number of ranks, port of the parent's store.
        setup: backend of the group, device, seconds to join.
    """
    whereabouts.tell_when_asked(telling)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it ends us
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    _answer(connection, _join, place, setup)
    for job in _jobs(connection):
        _answer(connection, _call, job)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # tearing down an interpreter with torch in it takes seconds on a busy machine


def _jobs(connection: Connection) -> Iterator[bytes]:
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        if job == LEAVE:
            return
        yield job


def _call(job: bytes) -> Any:
    fn, args = pickle.loads(job)
    return fn(dist.group.WORLD, *args)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _join(place: tuple[int, int, int], setup: tuple[str, str, float]) -> None:
    rank, num_ranks, port = place
    backend, device, timeout = setup
    if any(name == "lo" for _, name in socket.if_nameindex()):
        # Without this gloo asks a resolver for this host's name, which containers often cannot answer.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        if not torch.cuda.device_count():
            raise InvalidArgument(
                f'Workers: device="cuda", but rank {rank} finds no CUDA device; use device="cpu", '
                "or look at nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(rank % torch.cuda.device_count())
    limit = timedelta(seconds=timeout)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=limit)


def _answer(connection: Connection, fn: Callable[..., Any], *args: Any) -> None:
    try:
        reply = pickle.dumps(("ok", fn(*args)))
    except BaseException as error:  # noqa: BLE001  whatever it is, the parent raises it
        reply = _pack_error(error, traceback.format_exc())
    with contextlib.suppress(OSError):
        connection.send_bytes(reply)


def _pack_error(error: BaseException, trace: str) -> bytes:
    try:
        reply = pickle.dumps(("error", error, trace))
        pickle.loads(reply)  # some exceptions pickle, yet cannot be made again
    except Exception:  # noqa: BLE001
        return pickle.dumps(("error", None, trace))
    return reply
