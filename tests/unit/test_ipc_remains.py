"""What is left of symmetric memory after `close`, with a driver that only keeps books."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from deepep.backends.ipc import segments
from deepep.backends.ipc.memory import _is_alive, _Remains
from deepep.cuda import driver
from deepep.cuda.driver import CudaError


class Books:
    """The driver's memory: one word per address."""

    def __init__(self, broken: set[int]) -> None:
        self.words: dict[int, int] = {}
        self.freed: list[int] = []
        self.broken = broken

    def call(self, name: str, *args: int) -> None:
        if name == "cuMemsetD32":
            if args[0] in self.broken:
                raise CudaError(name, "CUDA_ERROR_INVALID_VALUE", "no such memory")
            self.words[args[0]] = args[1]
        elif name == "cuMemcpyDtoH":
            host, device, num_bytes = args
            read = (ctypes.c_uint32 * (num_bytes // 4)).from_address(host)
            read[:] = [self.words.get(device + 4 * i, 0) for i in range(num_bytes // 4)]
        elif name == "cuMemFree":
            self.freed.append(args[0])


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Books:
    made = Books(broken={200})
    monkeypatch.setattr(driver, "call", made.call)
    return made


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_memory_goes_when_every_peer_has_left_or_died(books: Books, dead_pid: int) -> None:
    alive = os.getpid()
    own = segments.IpcSegment(1000, 64)
    # Rank 1 is dead; what rank 0 writes to it would fail, and is left out.
    remains = _Remains(own, 1000, [], [1000, 200, 300], [alive, dead_pid, alive])
    assert not remains.try_free()
    assert books.words == {1000: 1, 300: 1}
    assert not remains.try_free()
    books.words[1008] = 1  # rank 2 leaves
    assert remains.try_free()
    assert books.freed == [1000]


def test_writing_that_fails_does_not_keep_the_others_from_hearing(books: Books) -> None:
    alive = os.getpid()
    _Remains(segments.IpcSegment(1000, 64), 1000, [], [200, 300], [alive, alive]).close()
    assert books.words == {300: 1}


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks into /proc")
def test_a_dead_process_that_nobody_has_waited_for_is_dead() -> None:
    assert _is_alive(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert _is_alive(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    assert not _is_alive(process.pid)
    process.communicate()
    assert not _is_alive(process.pid)
