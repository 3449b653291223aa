"""One rank of the bench: prepare, check, time; everything here is collective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from deepep import env
from deepep.backends.registry import requested_on
from deepep.bench import operations
from deepep.bench.checks import Scene
from deepep.bench.measure import CpuClock, CudaClock
from deepep.bench.operations import Operation
from deepep.bench.plan import Plan
from deepep.bench.transport import BareTransport
from deepep.buffer import Buffer
from deepep.elastic import ElasticBuffer
from deepep.front import Front
from deepep.group import Group
from deepep.progress import progress_bar

_CALLS_IN_A_ROW = 16


@dataclass
class Timing:
    """One operation on one rank, times in microseconds.

    Attributes:
        op, layout, routing, num_sms: what was measured.
        remote_bytes: payload to or from other ranks.
        wall: of each call.
        events: of each call between events on the stream, CUDA only.
        replay: of each graph replay, where the operation can be captured.
        in_a_row: of each replay of a graph that holds many calls, per call; only where the L2 is left as it is.
        kernels: by name, median per call.
        bare: of bare all-to-all calls that move the same bytes, into tensors made beforehand.
        bare_new: the same into new tensors, CPU only.
        bare_name: what moved them.
    """

    op: str
    layout: str
    routing: str
    num_sms: int
    remote_bytes: int
    wall: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    replay: list[float] = field(default_factory=list)
    in_a_row: list[float] = field(default_factory=list)
    kernels: dict[str, float] = field(default_factory=dict)
    bare: list[float] = field(default_factory=list)
    bare_new: list[float] = field(default_factory=list)
    bare_name: str | None = None


@dataclass
class RankReport:
    """What one rank has to tell.

    Attributes:
        backend: that was measured.
        device: name of this rank's GPU, or "cpu".
        ranks_per_gpu: ranks that share it; 0 on the CPU.
        num_hosts: of the group.
        window_bytes: memory the backend holds on this rank, per layout; 0 where it needs none of its own.
        timings: of everything measured.
    """

    backend: str = ""
    device: str = "cpu"
    ranks_per_gpu: int = 0
    num_hosts: int = 1
    window_bytes: dict[str, int] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)


def run_rank(group: Group, plan: Plan) -> RankReport:
    """Measure as one rank of `group`; collective. Shows a progress bar on rank 0.

    Raises:
        InvalidArgument: the experts cannot be spread evenly over the ranks.
        WrongResult: a result that was timed is wrong.
    """
    plan.check_ranks(group.num_ranks)
    report = RankReport()
    num_steps = len(plan.layouts) * len(plan.routings) * len(plan.num_sms)
    with progress_bar(num_steps, "bench", "setting", is_shown=group.rank == 0) as bar:
        for layout in plan.layouts:
            front = _front(group, plan, layout)
            _describe(report, front, layout, plan)
            transport = BareTransport(group, front.topology, plan.device)
            for routing in plan.routings:
                scene = Scene(plan, routing, group.rank, group.num_ranks)
                for num_sms in plan.num_sms:
                    bar.set_postfix_str(f"{layout}, {routing}")
                    report.timings += _measure(group, front, scene, layout, routing, num_sms, transport)
                    bar.update()
            group.barrier(op="bench", timeout=env.timeout())
            transport.close()
            front.destroy()
    return report


def _front(group: Group, plan: Plan, layout: str) -> Front:
    backend = requested_on(plan.device, plan.backend)
    if layout == "expanded":
        return ElasticBuffer(
            group, num_max_tokens_per_rank=plan.num_tokens, hidden=plan.hidden, num_topk=plan.num_topk,
            use_fp8_dispatch=plan.dtype == "fp8", backend=backend,
        )  # fmt: skip
    if layout == "padded":
        size = Buffer.get_low_latency_rdma_size_hint(plan.num_tokens, plan.hidden, group.num_ranks, plan.num_experts)
        return Buffer(group, num_rdma_bytes=size, low_latency_mode=True, backend=backend)
    # Room for all rows of a rank to travel at once.
    row_bytes = plan.hidden * plan.combine_dtype.itemsize
    return Buffer(group, num_nvl_bytes=4 * plan.num_tokens * row_bytes, backend=backend)


def _describe(report: RankReport, front: Front, layout: str, plan: Plan) -> None:
    topology = front.topology
    report.backend, report.num_hosts = front.backend, len(set(topology.hosts))
    if plan.device == "cuda":
        report.device = torch.cuda.get_device_name()
        report.ranks_per_gpu = topology.ranks_per_gpu(front.rank)
    report.window_bytes[layout] = int(getattr(front._backend, "window_bytes", 0))


def _measure(
    group: Group, front: Any, scene: Scene, layout: str, routing: str, num_sms: int, transport: BareTransport
) -> Iterator[Timing]:
    if layout == "compact":
        work = operations.compact(front, scene, num_sms)
    elif layout == "expanded":
        work = operations.expanded(front, scene, num_sms)
    else:
        work = operations.low_latency(front, scene)

    def meet() -> None:
        group.barrier(op="bench", timeout=env.timeout())

    for operation in work:
        timing = Timing(operation.name, layout, routing, num_sms, operation.remote_bytes)
        if scene.plan.device == "cuda":
            clock = CudaClock(meet, _device_barrier(front), scene.plan.has_cold_l2)
            _time_on_gpu(timing, operation, front, scene.plan, clock, transport)
        else:
            _time_on_cpu(timing, operation, scene.plan, CpuClock(meet), transport)
        yield timing


def _time_on_cpu(timing: Timing, operation: Operation, plan: Plan, clock: CpuClock, transport: BareTransport) -> None:
    yardsticks = [
        (times, transport.calls(operation.transport, is_reused=times is timing.bare))
        for times in (timing.bare, timing.bare_new)
    ]
    operation.check(clock.warm_up(operation.call))
    for _, bare in yardsticks:
        if bare is not None:
            timing.bare_name = transport.name
            clock.warm_up(bare)
    for iteration in range(plan.num_iters):
        # Side by side, so that whatever else the machine does slows all alike.
        microseconds, out = clock.wall(operation.call)
        timing.wall.append(microseconds)
        if iteration == plan.num_iters - 1:
            operation.check(out)
        del out
        for times, bare in yardsticks:
            if bare is not None:
                times.append(clock.wall(bare)[0])


def _time_on_gpu(
    timing: Timing, operation: Operation, front: Any, plan: Plan, clock: CudaClock, transport: BareTransport
) -> None:
    operation.check(clock.warm_up(operation.call))
    out = None
    for _ in range(plan.num_iters):
        microseconds, out = clock.wall(operation.call)
        timing.wall.append(microseconds)
    operation.check(out)
    del out
    timing.events = clock.events(operation.call, plan.num_iters)
    timing.kernels = clock.kernels(operation.call, plan.num_iters)[1]
    if operation.capture is not None and front._capabilities.graph_capture:
        timing.replay = clock.replay(operation.capture, plan.num_iters)
        if not plan.has_cold_l2:
            timing.in_a_row = clock.replay(operation.capture, plan.num_iters, _CALLS_IN_A_ROW)
    bare = transport.calls(operation.transport, is_reused=True)
    if bare is not None:
        timing.bare_name = transport.name
        clock.warm_up(bare)
        timing.bare = clock.events(bare, plan.num_iters)


def _device_barrier(front: Any) -> Any:
    """Give the backend's barrier where it works on the stream; only such backends can be captured."""
    return front._backend.barrier if front._capabilities.graph_capture else None
