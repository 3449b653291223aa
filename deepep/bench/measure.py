"""Clocks. Each gives one number per call, in microseconds, on this rank; the slowest rank is found afterwards."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

# More than any L2: what the last iteration left there must not help the next.
_L2_BYTES = 256 << 20
# Cycles the GPU spends idle so that the host is done launching when ranks meet on the device.
_HEAD_START = 400_000
_WARM_UP_CALLS = 2


class CpuClock:
    """Wall time of calls that start together."""

    def __init__(self, meet: Call) -> None:
        self._meet = meet

    def warm_up(self, call: Call) -> Any:
        """Call it unmeasured; gives what it returned."""
        return call()

    def wall(self, call: Call) -> tuple[float, Any]:
        """Time one call, in microseconds; gives also what it returned."""
        self._meet()
        started = time.perf_counter()
        out = call()
        return (time.perf_counter() - started) * 1e6, out


class CudaClock:
    """Wall time, time between events, kernel time and graph replay on the current stream.

    Args:
        meet: host barrier of all ranks.
        meet_on_device: barrier of all ranks on the current stream, which lets the host run ahead; or None.
        flushes_l2: empty the L2 before each call.
    """

    def __init__(self, meet: Call, meet_on_device: Call | None, flushes_l2: bool) -> None:
        self._meet, self._meet_on_device = meet, meet_on_device
        self._scratch = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda") if flushes_l2 else None

    def warm_up(self, call: Call) -> Any:
        """Call it unmeasured; gives what it returned last."""
        out = None
        for _ in range(_WARM_UP_CALLS):
            out = call()
        torch.cuda.synchronize()
        return out

    def wall(self, call: Call) -> tuple[float, Any]:
        """Time one call up to the end of its work on the GPU, the host included."""
        self._flush()
        torch.cuda.synchronize()
        self._meet()
        started = time.perf_counter()
        out = call()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) * 1e6, out

    def events(self, call: Call, num_iters: int) -> list[float]:
        """Time calls between events on the stream; ranks start together on the device."""
        return [self._between_events(call) for _ in range(num_iters)]

    def replay(self, call: Call, num_iters: int, num_calls: int = 1) -> list[float]:
        """Time replays of a CUDA graph that holds the call, or several one after the other; gives the time per call."""
        call()  # whatever it prepares on first use cannot be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(num_calls):
                kept = call()  # results must outlive the replays that write them
        times = [self._between_events(graph.replay) / num_calls for _ in range(num_iters)]
        del kept
        return times

    def kernels(self, call: Call, num_iters: int) -> tuple[float, dict[str, float]]:
        """Sum up all kernels and copies of the call, by profiler; median of each, and their sum."""
        from torch.profiler import ProfilerActivity, profile

        # Once without the call: what the flush and the barriers launch is not the operation's.
        times: list[dict[str, list[float]]] = []
        for work in (lambda: None, call):
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(num_iters):
                    self._align()
                    work()
                    torch.cuda.synchronize()
            found: dict[str, list[float]] = {}
            for event in profiler.events() or ():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    found.setdefault(event.name, []).append(event.device_time)
            times.append(found)
        own = {}
        for name, durations in times[1].items():
            idle = times[0].get(name, [])
            per_call = (sum(durations) - sum(idle)) / num_iters if idle else _median_per_call(durations, num_iters)
            if len(durations) > len(idle):
                own[name] = per_call
        return sum(own.values()), own

    def _between_events(self, call: Call) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._align()
        begin.record()
        out = call()
        end.record()
        torch.cuda.synchronize()
        del out
        return begin.elapsed_time(end) * 1e3

    def _align(self) -> None:
        """Flush the L2 if asked to, let the host run ahead, and let all ranks begin together."""
        self._flush()
        if self._meet_on_device is None:
            torch.cuda.synchronize()
            self._meet()
            return
        torch.cuda._sleep(_HEAD_START)
        self._meet_on_device()

    def _flush(self) -> None:
        if self._scratch is not None:
            self._scratch.zero_()


def _median_per_call(durations: list[float], num_iters: int) -> float:
    """A kernel that runs n times per call counts n times its median."""
    return statistics.median(durations) * len(durations) / num_iters
