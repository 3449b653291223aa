"""Compiles low-latency kernels for the CPU and runs them there: threads are fibers, ranks are queues of launches."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from translate import translate

from deepep.cuda.ll_structs import LlCleanArgs, LlCombineArgs, LlDispatchArgs
from deepep.cuda.sources import source_root

_HERE = Path(__file__).parent
_ARGS: dict[str, type[ctypes.Structure]] = {
    "ll_dispatch_kernel": LlDispatchArgs,
    "ll_combine_kernel": LlCombineArgs,
    "ll_clean_kernel": LlCleanArgs,
}
COMPILER = (shutil.which("c++") or shutil.which("g++")) if sys.platform == "linux" else None


class EmulationError(RuntimeError):
    """Kernels did what a GPU would not forgive: they wait for each other, or lanes of a warp part."""


class Emulator:
    """The kernels of one build, and the launches that wait to be run.

    Args:
        directory: for sources and the library.
        is_wide: the build for more than 32 ranks or choices.
    """

    def __init__(self, directory: Path, is_wide: bool = False) -> None:
        self._library = ctypes.CDLL(str(_build(directory, is_wide)))
        self._library.emu_run.restype = ctypes.c_char_p
        self._names = list(_ARGS)
        self.queue = 0

    def handle(self, kernel: str) -> int:
        """Give what `launch` takes for a kernel."""
        return self._names.index(kernel)

    def launch(self, function: int, grid: int, block: int, smem: int, _stream: int, args: int, **_: Any) -> None:
        """Put a launch at the end of the current queue (the signature of `deepep.cuda.launch.Runtime`)."""
        name = self._names[function]
        entry = ctypes.cast(getattr(self._library, f"emu_{name}"), ctypes.c_void_p)
        self._library.emu_launch(
            ctypes.c_uint64(self.queue), entry, ctypes.c_void_p(args), ctypes.c_uint64(ctypes.sizeof(_ARGS[name])),
            ctypes.c_uint32(grid), ctypes.c_uint32(block), ctypes.c_uint32(smem),
        )  # fmt: skip

    def run(self, seed: int, ns_per_round: int = 100, most_rounds: int = 100_000) -> None:
        """Run all launches, those of different queues beside each other, in an order that follows from the seed."""
        problem = self._library.emu_run(*map(ctypes.c_uint64, (seed, ns_per_round, most_rounds)))
        if problem is not None:
            raise EmulationError(problem.decode())


def _sources() -> Iterator[Path]:
    root = source_root()
    yield from sorted((root / "include" / "deepep").glob("*.cuh"))
    yield from sorted((root / "transports").glob("*.cuh"))
    yield from (root / _file(name) for name in _ARGS)


def _file(kernel: str) -> str:
    return f"kernels/{kernel.removesuffix('_kernel')}.cu"


def _build(directory: Path, is_wide: bool) -> Path:
    for path in _sources():
        target = directory / path.relative_to(source_root())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(translate(path.read_text()))
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-ffp-contract=off", f"-I{_HERE}", f"-I{directory / 'include'}"]
    flags += [f"-I{directory}", f"-DDEEPEP_LL_WIDE={int(is_wide)}", '-DDEEPEP_TRANSPORT_HEADER="transports/p2p.cuh"']
    units = [_HERE / "emulator.cpp"]
    for name, args in _ARGS.items():
        unit = directory / f"{name}.cpp"
        unit.write_text(
            f'#include "emulator.h"\n#define deepep {name}_scope\n#include "{_file(name)}"\n'
            f'extern "C" void emu_{name}(const void* args) {{\n'
            f"    {name}(*static_cast<const deepep::{args.__name__}*>(args));\n}}\n"
        )
        units.append(unit)
    library = directory / "libemulated.so"
    objects, running = [], []
    for unit in units:
        objects.append(directory / f"{unit.stem}.o")
        running.append(subprocess.Popen([str(COMPILER), *flags, "-c", str(unit), "-o", str(objects[-1])]))
    codes = [one.wait() for one in running]
    if any(codes):
        raise RuntimeError("kernels do not compile for the CPU")
    subprocess.run([str(COMPILER), "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library
