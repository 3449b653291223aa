"""Compiles kernels for the CPU and runs them there: threads are fibers, ranks are queues of launches."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from translate import translate

from deepep.cuda import kernels, ll_structs
from deepep.cuda.arguments import BarrierArgs, CombineArgs, DispatchArgs
from deepep.cuda.jit import KernelSpec
from deepep.cuda.ll_structs import LlCleanArgs, LlCombineArgs, LlDispatchArgs
from deepep.cuda.sources import source_root

_HERE = Path(__file__).parent
Build = dict[KernelSpec, type[ctypes.Structure]]
"""Kernels that are compiled together, with the same macros, and what each takes."""
_LOW_LATENCY_ARGS = (LlDispatchArgs, LlCombineArgs, LlCleanArgs)
LOW_LATENCY: Build = dict(zip(ll_structs.NARROW, _LOW_LATENCY_ARGS, strict=True))
LOW_LATENCY_WIDE: Build = dict(zip(ll_structs.WIDE, _LOW_LATENCY_ARGS, strict=True))
NORMAL: Build = {
    kernels.NOTIFY: DispatchArgs,
    kernels.DISPATCH_COMPACT: DispatchArgs,
    kernels.DISPATCH_EXPANDED: DispatchArgs,
    **dict.fromkeys(kernels.COMBINE.values(), CombineArgs),
    kernels.BARRIER: BarrierArgs,
}
COMPILER = (shutil.which("c++") or shutil.which("g++")) if sys.platform == "linux" else None


class EmulationError(RuntimeError):
    """Kernels did what a GPU would not forgive: threads wait for each other or race, or lanes of a warp part."""


@functools.cache
def watch_options() -> list[str]:
    """Give the options by which GCC announces accesses, see races.h; none with other compilers: no race is found."""
    options = ["-fsanitize=thread", "--param=tsan-distinguish-volatile=1"]
    probe = b"int look(volatile int* at) { return *at; }"
    tried = subprocess.run(
        [str(COMPILER), *options, "-S", "-o-", "-xc++", "-"], input=probe, capture_output=True, check=False
    )
    return options if b"__tsan_volatile_read4" in tried.stdout else []


class Emulator:
    """The kernels of one build, and the launches that wait to be run.

    Args:
        directory: for sources and the library.
        build: which kernels.
        is_hopper: as they are compiled for GPUs from sm_90 on, with bulk copies and launches that start early.

    Attributes:
        queue: of the rank that launches now.
        before_waiting: what else goes on before a host waits for a kernel's word: other ranks' launches.
    """

    def __init__(self, directory: Path, build: Build = LOW_LATENCY, is_hopper: bool = False) -> None:
        self.is_hopper = is_hopper
        self._path = _compile(directory, build, is_hopper)
        self._library = ctypes.CDLL(str(self._path))
        self._library.emu_run.restype = ctypes.c_char_p
        self._entries = [(self._library[f"emu_{spec.name}"], ctypes.sizeof(args)) for spec, args in build.items()]
        self._names = [spec.name for spec in build]
        self.queue = 0
        self.before_waiting: Callable[[], None] = lambda: None

    def handle(self, kernel: str) -> int:
        """Give what `launch` takes for a kernel."""
        return self._names.index(kernel)

    def launch(
        self, function: int, grid: int, block: int, smem: int, _stream: int, args: int, _cooperative: bool = False,
        starts_early: bool = False,
    ) -> None:  # fmt: skip
        """Put a launch at the end of the current queue (the signature of `deepep.cuda.launch.Runtime`)."""
        entry, num_bytes = self._entries[function]
        self._enqueue(entry, args, num_bytes, grid, block, smem, starts_early)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Put a copy of the copy engine at the end of the current queue."""
        words = (ctypes.c_uint64 * 3)(target, source, num_bytes)
        self._enqueue(self._library.emu_copy, ctypes.addressof(words), ctypes.sizeof(words), 1, 32, 0)

    def wait_word(self, address: int, value: int, _timeout_s: float) -> bool:
        """Run until the word at a host address has a value; False if it never gets it."""
        queue = self.queue
        self.before_waiting()
        self.queue = queue
        word = ctypes.c_uint64.from_address(address)
        self._run(0, until=(address, value))
        return word.value == value

    def run(self, seed: int, ns_per_round: int = 100, most_rounds: int = 100_000) -> None:
        """Run all launches, those of different queues beside each other, in an order that follows from the seed."""
        self._run(seed, ns_per_round, most_rounds)

    def forget(self) -> None:
        """Drop what was launched and has not been run to its end: its memory may be gone."""
        self._library.emu_forget()

    def _enqueue(
        self, entry: Any, args: int, num_bytes: int, grid: int, block: int, smem: int, starts_early: bool = False
    ) -> None:
        self._library.emu_launch(
            ctypes.c_uint64(self.queue), ctypes.cast(entry, ctypes.c_void_p), ctypes.c_void_p(args),
            ctypes.c_uint64(num_bytes), ctypes.c_uint32(grid), ctypes.c_uint32(block), ctypes.c_uint32(smem),
            ctypes.c_bool(starts_early),
        )  # fmt: skip

    def _run(
        self, seed: int, ns_per_round: int = 100, most_rounds: int = 100_000, until: tuple[int, int] = (0, 0)
    ) -> None:
        problem = self._library.emu_run(*map(ctypes.c_uint64, (seed, ns_per_round, most_rounds, *until)))
        if problem is not None:
            raise EmulationError(_with_lines(problem.decode(), self._path))


def _with_lines(problem: str, library: Path) -> str:
    """Say for places in the code, which come as offsets, which line each is."""
    offsets = re.findall(r"\+(0x[0-9a-f]+)", problem)
    tool = shutil.which("addr2line")
    if not offsets or tool is None:
        return problem
    said = subprocess.run([tool, "-e", str(library), *offsets], capture_output=True, text=True, check=False)
    lines = iter(Path(line.split()[0]).name for line in said.stdout.splitlines())
    return re.sub(r"\+0x[0-9a-f]+", lambda _: next(lines, "?"), problem)


def _compile(directory: Path, build: Build, is_hopper: bool) -> Path:
    names = {spec.source: [one.name for one in build if one.source == spec.source] for spec in build}
    _copy_sources(directory, names)
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-ffp-contract=off", f"-I{_HERE}", f"-I{directory / 'include'}"]
    flags += [f"-I{directory}", '-DDEEPEP_TRANSPORT_HEADER="transports/p2p.cuh"']
    flags += {f"-D{name}={value}" for spec in build for name, value in spec.defines}
    flags += ["-D__CUDA_ARCH__=900"] if is_hopper else []
    args = {spec.name: f"deepep::{struct.__name__}" for spec, struct in build.items()}
    units = [*_HERE.glob("*.cpp")]
    for source, entries in names.items():
        units.append(directory / f"{Path(source).stem}.cpp")
        text = f'#include "emulator.h"\n#define deepep {Path(source).stem}_scope\n#include "{source}"\n'
        for name in entries:
            text += (
                f'extern "C" void emu_{name}(const void* args) {{ {name}(*static_cast<const {args[name]}*>(args)); }}\n'
            )
        units[-1].write_text(text)
    library = directory / "libemulated.so"
    objects, running = [], []
    for unit in units:
        objects.append(directory / f"{unit.stem}.o")
        more = ["-g1", *watch_options()] if unit.parent == directory else []
        running.append(subprocess.Popen([str(COMPILER), *flags, *more, "-c", str(unit), "-o", str(objects[-1])]))
    codes = [one.wait() for one in running]
    if any(codes):
        raise RuntimeError("kernels do not compile for the CPU")
    subprocess.run([str(COMPILER), "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


def _copy_sources(directory: Path, kernel_files: Iterable[str]) -> None:
    """Put translated sources where they are compiled."""
    root = source_root()
    headers = [*(root / "include" / "deepep").glob("*.cuh"), *(root / "transports").glob("*.cuh")]
    for path in (*headers, *(root / file for file in kernel_files)):
        target = directory / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(translate(path.read_text()))
