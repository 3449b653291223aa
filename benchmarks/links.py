"""What the links carry: the denominators of every "ratio to the floor".

    python benchmarks/links.py --json links.json

Two GPUs with peer access are measured in both directions at once; one GPU alone copies inside its own memory, which
says what two ranks that share it can reach. Needs cupy: pip install ".[bench13]" (or bench12 beside a CUDA 12 driver).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NUM_WARPS = 14
NUM_RUNS = 10


@dataclass(frozen=True)
class Figure:
    """One measured rate, each way, both ways busy."""

    way: str
    num_sms: int
    row_bytes: int
    gigabytes_per_second: float


def main() -> None:
    """Measure and print one line per figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--num-sms", type=int, nargs="+", default=[4, 8, 12, 16, 24, 32, 132])
    parser.add_argument("--row-bytes", type=int, nargs="+", default=[14336, 7392])
    parser.add_argument("--num-rows", type=int, default=16384)
    options = parser.parse_args()
    problem = _problem()
    if problem:
        sys.exit(f"links.py {problem}")
    link = Link(options.num_rows)
    figures = []
    for row_bytes in options.row_bytes:
        figures.append(Figure("copy engine", 0, row_bytes, link.copy_engine(row_bytes)))
        for kernel in ("bulk", "threads"):
            for pull in (True, False):
                way = f"{'pull' if pull else 'push'} by {kernel}"
                for num_sms in options.num_sms:
                    rate = link.kernel(kernel, pull, num_sms, row_bytes)
                    figures.append(Figure(way, num_sms, row_bytes, rate))
    for figure in figures:
        where = f"{figure.num_sms:4} SMs {figure.row_bytes:6} B"
        print(f"{figure.way:16} {where}  {figure.gigabytes_per_second:7.1f} GB/s")
    if options.json:
        report = {
            "gpu": link.gpu,
            "num_gpus": len(set(link.devices)),
            "figures": [asdict(figure) for figure in figures],
        }
        options.json.write_text(json.dumps(report, indent=1))


def _problem() -> str:
    """Say what is missing to measure anything; nothing if nothing is."""
    try:
        import cupy
    except ImportError:
        return "needs cupy: pip install '.[bench13]' (or '.[bench12]' beside a CUDA 12 driver)"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"needs an NVIDIA GPU that cupy can use: {error}"
    return ""


class Link:
    """Two buffers on each of two devices (or twice on the only one), and kernels to copy between them."""

    def __init__(self, num_rows: int) -> None:
        import cupy

        self.cupy = cupy
        self.num_rows = num_rows
        self.devices = (0, 1) if cupy.cuda.runtime.getDeviceCount() > 1 else (0, 0)
        self.gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        num_bytes = num_rows * 16384
        self.here, self.there, self.streams = [], [], []
        for device in self.devices:
            with cupy.cuda.Device(device):
                if self.devices[0] != self.devices[1]:
                    cupy.cuda.runtime.deviceEnablePeerAccess(1 - device)
                self.here.append(cupy.random.randint(0, 255, num_bytes, dtype=cupy.uint8))
                self.there.append(cupy.empty(num_bytes, dtype=cupy.uint8))
                self.streams.append(cupy.cuda.Stream(non_blocking=True))
        self.module = cupy.RawModule(
            code=(ROOT / "benchmarks" / "links.cu").read_text(),
            options=("-std=c++17", f"-I{ROOT / 'csrc' / 'include' / 'nvrtc'}", f"-I{ROOT / 'csrc' / 'include'}"),
            backend="nvrtc",
        )

    def kernel(self, name: str, pull: bool, num_sms: int, row_bytes: int) -> float:
        """Give GB/s each way of a copy kernel that runs on `num_sms` multiprocessors of each device."""
        warps = min(NUM_WARPS, 220 * 1024 // row_bytes) if name == "bulk" else 32
        smem = warps * row_bytes if name == "bulk" else 0
        functions = []
        for device in self.devices:
            with self.cupy.cuda.Device(device):
                functions.append(self.module.get_function(f"copy_by_{name}"))
                if smem:
                    functions[-1].max_dynamic_shared_size_bytes = smem

        def launch(side: int) -> None:
            # Pulling, a side reads the other's buffer; pushing, it writes the other's.
            source, target = (
                (self.here[1 - side], self.there[side]) if pull else (self.here[side], self.there[1 - side])
            )
            arguments = (source.data.ptr, target.data.ptr, self.cupy.int32(self.num_rows), self.cupy.int32(row_bytes))
            functions[side]((num_sms,), (warps * 32,), arguments, shared_mem=smem)

        return self._rate(launch, row_bytes)

    def copy_engine(self, row_bytes: int) -> float:
        """Give GB/s each way of asynchronous copies."""
        num_bytes = self.num_rows * row_bytes

        def launch(side: int) -> None:
            stream = self.streams[side].ptr
            self.cupy.cuda.runtime.memcpyAsync(
                self.there[1 - side].data.ptr, self.here[side].data.ptr, num_bytes, 4, stream
            )

        return self._rate(launch, row_bytes)

    def _rate(self, launch: Any, row_bytes: int) -> float:
        times = [self._once(launch) for _ in range(NUM_RUNS + 2)][2:]
        return self.num_rows * row_bytes / statistics.median(times) / 1e6

    def _once(self, launch: Any) -> float:
        """Run both sides at once; milliseconds of the slower."""
        events = []
        for side, device in enumerate(self.devices):
            with self.cupy.cuda.Device(device), self.streams[side]:
                begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
                begin.record()
                for _ in range(4):
                    launch(side)
                end.record()
                events.append((begin, end))
        for side, device in enumerate(self.devices):
            with self.cupy.cuda.Device(device):
                self.streams[side].synchronize()
        return max(self.cupy.cuda.get_elapsed_time(begin, end) for begin, end in events) / 4


if __name__ == "__main__":
    main()
