"""`deep_ep.utils.testing`: timing of whole calls and of single kernels, in seconds.

Without a GPU both work on the CPU: `bench` reads the wall clock, and the kernels of `bench_kineto` are torch operators
such as `aten::mm`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from deepep.errors import InvalidArgument

__all__ = ["bench", "bench_kineto", "flush_l2_cache"]

FLUSH_BYTES = 256 << 20
"""More than any GPU's L2 cache."""

Times = float | list[float]


def flush_l2_cache() -> None:
    """Overwrite the L2 cache of the current GPU. Does nothing on a machine without GPU: host caches stay warm."""
    if torch.cuda.is_available():
        torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_()


def bench(
    fn: Callable[[], Any],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], Any] | None = None,
    flush_l2: bool = True,
) -> tuple[float, float, float]:
    """Time `fn`: between CUDA events on the current stream, or by the wall clock without GPU.

    Args:
        fn: what to time.
        num_warmups: calls before the first that counts.
        num_tests: calls that count, at least 1.
        post_fn: called after each `fn`, outside its time.
        flush_l2: empty the L2 cache before each `fn` that counts (`flush_l2_cache`).

    Returns:
        Average, least and greatest seconds per call.
    """
    _check_num_tests(num_tests)
    for _ in range(num_warmups):
        fn()
        if post_fn is not None:
            post_fn()
    measure = _cuda_times if torch.cuda.is_available() else _wall_times
    seconds = measure(fn, num_tests, post_fn, flush_l2)
    return sum(seconds) / num_tests, min(seconds), max(seconds)


def _wall_times(
    fn: Callable[[], Any], num_tests: int, post_fn: Callable[[], Any] | None, _flush_l2: bool
) -> list[float]:
    seconds = []
    for _ in range(num_tests):
        begin = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - begin)
        if post_fn is not None:
            post_fn()
    return seconds


def _cuda_times(
    fn: Callable[[], Any], num_tests: int, post_fn: Callable[[], Any] | None, flush_l2: bool
) -> list[float]:
    torch.cuda.synchronize()
    begins = [torch.cuda.Event(enable_timing=True) for _ in range(num_tests)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(num_tests)]
    for begin, end in zip(begins, ends, strict=True):
        if flush_l2:
            flush_l2_cache()
        begin.record()
        fn()
        end.record()
        if post_fn is not None:
            post_fn()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in zip(begins, ends, strict=True)]


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | Sequence[str],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Callable[[], Any] | None = None,
) -> Times | list[Times] | tuple[Times, ...]:
    """Average seconds of single kernels inside `fn`, from the torch profiler.

    Args:
        fn: what to profile; called once before, then `num_tests` times.
        kernel_names: a kernel, or several; each a part of the names of GPU kernels or, without GPU, of operators.
        num_tests: calls under the profiler, at least 1.
        suppress_kineto_output: send what the profiler prints to nowhere.
        trace_path: also write a Chrome trace there.
        flush_l2: empty the L2 cache before each `fn`.
        barrier_comm_profiling: line the ranks of the default process group up before each `fn`, behind enough GPU work
            for the host to run ahead.
        num_kernels_per_period: a name stands for this many different launches that come in turns (send and receive
            phase of one kernel, say), timed each on its own.
        barrier: what to line up with instead.

    Returns:
        Per name, in the container (tuple, list or none) that `kernel_names` is: seconds per launch, above 0, or the
        list of them when `num_kernels_per_period` is more than 1.

    Raises:
        InvalidArgument: a name occurs in no kernel, or not a multiple of `num_kernels_per_period` times.
    """
    _check_num_tests(num_tests)
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    on_gpu = torch.cuda.is_available()
    with _silence() if suppress_kineto_output else contextlib.nullcontext():
        fn()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as prof:
            for _ in range(num_tests):
                if flush_l2:
                    flush_l2_cache()
                if barrier is not None:
                    barrier()
                elif barrier_comm_profiling:
                    _line_up(on_gpu)
                fn()
            if on_gpu:
                torch.cuda.synchronize()
        if trace_path is not None:
            prof.export_chrome_trace(trace_path)
    launches = _launches(prof, on_gpu)
    times = [_average(launches, name, num_kernels_per_period) for name in names]
    if isinstance(kernel_names, str):
        return times[0]
    return tuple(times) if isinstance(kernel_names, tuple) else times


def _launches(prof: profile, on_gpu: bool) -> list[tuple[str, float]]:
    """Name and seconds of every GPU kernel (CPU operator), in order of their start."""
    wanted = "CUDA" if on_gpu else "CPU"
    events = [event for event in prof.events() or [] if event.device_type.name == wanted]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events]


def _average(launches: Sequence[tuple[str, float]], name: str, period: int) -> Times:
    seconds = [duration for kernel, duration in launches if name in kernel]
    if not seconds or len(seconds) % period:
        seen = ", ".join(sorted({kernel for kernel, _ in launches})[:20]) or "none"
        raise InvalidArgument(
            f"bench_kineto: kernel {name!r} ran {len(seconds)} times; expected a multiple of {period}, not 0. "
            f"Seen: {seen}"
        )
    averages = [sum(seconds[phase::period]) * period / len(seconds) for phase in range(period)]
    return averages[0] if period == 1 else averages


def _line_up(on_gpu: bool) -> None:
    """Let all ranks start together."""
    if not on_gpu:
        dist.barrier()
        return
    filler = torch.ones(4096, 4096, dtype=torch.float32, device="cuda")
    torch.mm(filler, filler)
    dist.all_reduce(torch.ones(1, dtype=torch.float32, device="cuda"))


def _check_num_tests(num_tests: int) -> None:
    if num_tests < 1:
        raise InvalidArgument(f"num_tests={num_tests}: must be at least 1")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Point file descriptors 1 and 2 at nothing: the profiler's library prints past `sys.stderr`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, original in zip((1, 2), saved, strict=True):
            os.dup2(original, target)
            os.close(original)
        os.close(nowhere)
