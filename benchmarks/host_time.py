"""Time what the CPU does in a call on a GPU: until its first kernel starts, until its last one, until it returns.

One rank with a GPU to itself; medians in microseconds. The GPU is idle when the call begins, and the CPU waited for it
just before, which leaves little of the call in its caches; *in a row* is the first kernel's time again, of calls that
come right after calls of the same kind.

Processors of shared machines lose half of their speed for seconds, so a loop in Python is timed before and after each
of several rounds: what is printed are medians of those at *full speed*, and of *all* for the first kernel's time, too.
Where none was at full speed, they are of all.

    python benchmarks/host_time.py --tokens 128
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import deepep
from deepep.cuda.launch import runtime
from deepep.testing import launch

_SLOWED = 1.2  # times as long as the fastest loop


class Clock:
    """Notes when launches happen, from before any buffer is built."""

    def __init__(self) -> None:
        self.times: list[int] = []
        start: Any = runtime()
        inner = start.launch

        def noted(*args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter_ns())
            inner(*args, **kwargs)

        start.launch = noted

    def measure(self, call: Callable[[], Any], count: int) -> list[float]:
        """Median time to the first launch, the last launch and the return, and to the first launch in a row."""
        rows = []
        for turn in range(count + 20):
            self.times.clear()
            begin = time.perf_counter_ns()
            result = call()
            end = time.perf_counter_ns()
            torch.cuda.synchronize()
            del result
            if turn >= 20:
                rows.append([(at - begin) / 1e3 for at in (self.times[0], self.times[-1], end)])
        return [*(statistics.median(column) for column in zip(*rows, strict=True)), self._in_a_row(call, count)]

    def _in_a_row(self, call: Callable[[], Any], count: int, depth: int = 8) -> float:
        times = []
        for _ in range(-(-count // depth)):
            torch.cuda.synchronize()
            for turn in range(depth + 1):
                self.times.clear()
                begin = time.perf_counter_ns()
                result = call()
                if turn:
                    times.append((self.times[0] - begin) / 1e3)
        torch.cuda.synchronize()
        del result
        return statistics.median(times)


def _python_loop() -> float:
    """Microseconds that 10,000 additions take: how fast the processor is at present."""
    begin, total = time.perf_counter_ns(), 0
    for i in range(10_000):
        total += i
    return (time.perf_counter_ns() - begin) / 1e3


class Measured(NamedTuple):
    """One round of one job.

    Attributes:
        loop: microseconds of the loop, the slower of before and after.
        times: as `Clock.measure` gives them.
    """

    loop: float
    times: list[float]


def _bench(group: Any, args: argparse.Namespace) -> dict[str, list[Measured]]:
    clock = Clock()
    num_tokens, hidden, num_topk, num_experts = args.tokens, args.hidden, args.topk, args.experts
    x = torch.randn((num_tokens, hidden), dtype=torch.bfloat16, device="cuda")
    idx = torch.rand((num_tokens, num_experts), device="cuda").topk(num_topk, dim=1).indices
    weights = torch.rand((num_tokens, num_topk), device="cuda")
    buffer = deepep.Buffer(group, 200 << 20, low_latency_mode=True, backend="ipc", timeout=10)
    elastic = deepep.ElasticBuffer(
        group, num_max_tokens_per_rank=num_tokens, hidden=hidden, num_topk=num_topk, backend="ipc", timeout=10
    )
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts)
    counts: dict[str, Any] = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
    counts |= {"is_token_in_rank": in_rank, "topk_idx": idx, "topk_weights": weights}
    got, _, _, _, handle, _ = buffer.dispatch(x, **counts)
    wide: dict[str, Any] = {"num_experts": num_experts, "expert_alignment": 128, "do_expand": True}
    spread: Any
    padded: Any
    spread, _, _, spread_handle, _ = elastic.dispatch(x, idx, weights, **wide)
    padded, _, padded_handle, _, _ = buffer.low_latency_dispatch(x, idx, num_tokens, num_experts, use_fp8=False)
    worst = num_tokens * group.size()
    jobs: dict[str, Callable[[], Any]] = {
        "layout": lambda: buffer.get_dispatch_layout(idx, num_experts),
        "dispatch": lambda: buffer.dispatch(x, **counts),
        "dispatch async": lambda: buffer.dispatch(x, **counts, async_finish=True),
        "dispatch without CPU sync": lambda: buffer.dispatch(x, **counts, num_worst_tokens=worst),
        "dispatch cached": lambda: buffer.dispatch(x, handle=handle),
        "combine": lambda: buffer.combine(got, handle),
        "low latency dispatch": lambda: buffer.low_latency_dispatch(x, idx, num_tokens, num_experts),
        "low latency combine": lambda: buffer.low_latency_combine(padded, idx, weights, padded_handle),
        "elastic dispatch expanded": lambda: elastic.dispatch(x, idx, weights, **wide),
        "elastic dispatch cached": lambda: elastic.dispatch(x, handle=spread_handle),
        "elastic combine expanded": lambda: elastic.combine(spread, spread_handle),
    }
    found: dict[str, list[Measured]] = {name: [] for name in jobs}
    loop = _python_loop()
    for _ in range(args.rounds):
        for name, call in jobs.items():
            before, times, loop = loop, clock.measure(call, args.count), _python_loop()
            found[name].append(Measured(max(before, loop), times))
    buffer.destroy()
    elastic.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("host_time.py needs an NVIDIA GPU that torch can use; there is none")
    with launch.Workers(1, device="cuda") as workers:
        (found,) = workers.run(_bench, args, timeout=200.0)
    fastest = min(measured.loop for rounds in found.values() for measured in rounds)
    print(f"10,000 additions in Python take {fastest:.0f} us at full speed")
    columns = f"{'first launch':>12} {'all':>6} {'last launch':>12} {'return':>8} {'in a row':>9} {'full speed':>11}"
    print(f"{'us':26} {columns}")
    for name, rounds in found.items():
        quick = [measured.times for measured in rounds if measured.loop < _SLOWED * fastest]
        used = quick or [measured.times for measured in rounds]
        first, last, end, next_one = (statistics.median(column) for column in zip(*used, strict=True))
        first_of_all = statistics.median(measured.times[0] for measured in rounds)
        kept = f"{len(quick)} of {len(rounds)}"
        print(f"{name:26} {first:12.1f} {first_of_all:6.1f} {last:12.1f} {end:8.1f} {next_one:9.1f} {kept:>11}")


if __name__ == "__main__":
    main()
