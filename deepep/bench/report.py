"""From what every rank measured to one table and one JSON file: slowest rank, median."""

from __future__ import annotations

import datetime as dt
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepep.bench.plan import Plan
from deepep.bench.run import RankReport, Timing
from deepep.version import __version__

# What kernels reach at best over NVLink of a Hopper GPU, each way, bytes per second: the yardstick of every operation.
_NVLINK_BYTES_PER_SECOND = 365e9
_NVLINK_GPUS = ("H100", "H200")
_LABELS = f"{'operation':36}  routing      SMs"


@dataclass(frozen=True)
class Row:
    """One line of the table; times in microseconds, each the median over calls of the slowest rank.

    Attributes:
        op, layout, routing, num_sms: what was measured.
        wall_us: Python call until its result is usable.
        events_us: between events on the stream.
        replay_us: graph replay.
        in_a_row_us: replay of a graph of many calls, per call.
        kernels_us: all kernels of the operation.
        remote_bytes: to or from other ranks, of the rank with most.
        remote_bytes_per_second: by events, or by wall on a CPU.
        floor_us: remote bytes at the speed of the link, where it is known.
        ratio_to_floor: of that clock.
        bare: what moved the same bytes in bare all-to-all calls, or None.
        bare_us: into tensors made beforehand.
        bare_new_us: into new tensors.
        kernels: by name, of the slowest rank for each.
    """

    op: str
    layout: str
    routing: str
    num_sms: int
    wall_us: float
    events_us: float | None
    replay_us: float | None
    in_a_row_us: float | None
    kernels_us: float | None
    remote_bytes: int
    remote_bytes_per_second: float
    floor_us: float | None
    ratio_to_floor: float | None
    bare: str | None
    bare_us: float | None
    bare_new_us: float | None
    kernels: dict[str, float]

    @property
    def best_us(self) -> float:
        """The time of the operation on the device, or of the call on a CPU."""
        return self.wall_us if self.events_us is None else self.events_us


def summarise(reports: Sequence[RankReport]) -> list[Row]:
    """Make one row of each operation measured, from the reports of all ranks."""
    return [_row(reports, [rank.timings[number] for rank in reports]) for number in range(len(reports[0].timings))]


def _row(reports: Sequence[RankReport], timings: list[Timing]) -> Row:
    first = timings[0]
    wall = _slowest([timing.wall for timing in timings]) or 0.0
    events = _slowest([timing.events for timing in timings])
    remote = max(timing.remote_bytes for timing in timings)
    best = wall if events is None else events
    floor = remote / _NVLINK_BYTES_PER_SECOND * 1e6 if remote and _has_nvlink(reports) else None
    kernels = {name: max(timing.kernels.get(name, 0.0) for timing in timings) for name in first.kernels}
    return Row(
        first.op, first.layout, first.routing, first.num_sms, wall, events,
        _slowest([timing.replay for timing in timings]), _slowest([timing.in_a_row for timing in timings]),
        max(sum(timing.kernels.values()) for timing in timings) if kernels else None,
        remote, remote / best * 1e6, floor, best / floor if floor else None, first.bare_name,
        _slowest([timing.bare for timing in timings]), _slowest([timing.bare_new for timing in timings]), kernels,
    )  # fmt: skip


def _slowest(times: list[list[float]]) -> float | None:
    """Median over calls of the slowest rank of each call; None where nothing was measured."""
    return statistics.median(max(call) for call in zip(*times, strict=True)) if times[0] else None


def _has_nvlink(reports: Sequence[RankReport]) -> bool:
    return (
        len(reports) > 1
        and all(report.ranks_per_gpu == 1 and report.num_hosts == 1 for report in reports)
        and any(name in reports[0].device for name in _NVLINK_GPUS)
    )


def text(plan: Plan, reports: Sequence[RankReport], rows: Sequence[Row]) -> str:
    """Lay out everything measured for people."""
    first = reports[0]
    shared = f", {first.ranks_per_gpu} ranks per GPU" if first.ranks_per_gpu > 1 else ""
    work = (
        f"{plan.num_tokens} tokens x {plan.hidden} per rank, top-{plan.num_topk} of {plan.num_experts} experts, "
        f"dispatch {plan.dtype}, median of {plan.num_iters} calls, slowest rank, ms; results checked"
        f"{'' if plan.has_cold_l2 or plan.device == 'cpu' else '; L2 not flushed'}"
    )
    lines = [
        f"{len(reports)} ranks on {first.num_hosts} host(s), {first.device}{shared}, backend {first.backend}",
        work,
    ]
    for layout, size in first.window_bytes.items():
        lines += [f"memory of the {layout} buffer: {size / 2**20:.0f} MiB per rank"] if size else []
    clocks = "    wall    events    replay  in a row   kernels"
    lines += ["", f"{_LABELS}  {clocks}  remote MB    GB/s  floor x"]
    lines += [
        f"{_labels(row)}  {_ms(row.wall_us)}  {_ms(row.events_us)}  "
        f"{_ms(row.replay_us)}  {_ms(row.in_a_row_us)}  {_ms(row.kernels_us)}  {row.remote_bytes / 1e6:9.2f}  "
        f"{row.remote_bytes_per_second / 1e9:6.2f}  {_times(row.ratio_to_floor)}"
        for row in rows
    ]
    return "\n".join(lines + _comparison(rows))


def ratios(rows: Sequence[Row]) -> dict[str, tuple[float, float | None]]:
    """Compare dispatch + combine with the bare calls, for each layout and routing.

    Returns:
        Per "layout, routing": ratio to calls into tensors made beforehand, and into new ones (None on CUDA).
    """
    found = {}
    for layout, routing, num_sms in dict.fromkeys((row.layout, row.routing, row.num_sms) for row in rows):
        pair = [
            row
            for row in rows
            if (row.layout, row.routing, row.num_sms) == (layout, routing, num_sms) and _is_pair(row)
        ]
        if len(pair) == 2 and all(row.bare_us for row in pair):
            total = sum(row.best_us for row in pair)
            new = sum(row.bare_new_us or 0.0 for row in pair)
            name = f"{layout}, {routing}" + (f", {num_sms} SMs" if num_sms else "")
            found[name] = (total / sum(row.bare_us or 0.0 for row in pair), total / new if new else None)
    return found


def _is_pair(row: Row) -> bool:
    return not any(word in row.op for word in ("cached", "ahead", "layout"))


def _comparison(rows: Sequence[Row]) -> list[str]:
    measured = [row for row in rows if row.bare_us]
    if not measured:
        return []
    lines = [
        "",
        f"bare all_to_all_single calls ({measured[0].bare}) that move the same bytes, ms, and the ratio to them:",
        f"{_LABELS}   reused tensors         new tensors",
    ]
    for row in measured:
        new = f"{_ms(row.bare_new_us)} {row.best_us / row.bare_new_us:6.2f}x" if row.bare_new_us else ""
        lines.append(f"{_labels(row)}  {_ms(row.bare_us)} {row.best_us / (row.bare_us or 1.0):6.2f}x   {new}")
    for name, (reused, new_ratio) in ratios(rows).items():
        end = "" if new_ratio is None else f", {new_ratio:.2f}x the same calls into new tensors"
        lines.append(f"dispatch + combine ({name}): {reused:.2f}x bare calls into tensors made beforehand{end}")
    return lines


def as_json(plan: Plan, reports: Sequence[RankReport], rows: Sequence[Row]) -> dict[str, Any]:
    """Collect everything for a file: what was measured, where, with which code."""
    return {
        "deepep": __version__,
        "commit": _commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_ranks": len(reports),
        "num_hosts": reports[0].num_hosts,
        "device": reports[0].device,
        "ranks_per_gpu": reports[0].ranks_per_gpu,
        "backend": reports[0].backend,
        "window_bytes_per_rank": reports[0].window_bytes,
        "plan": asdict(plan),
        "results": [asdict(row) for row in rows],
        "ratio_to_bare": {name: {"reused": pair[0], "new": pair[1]} for name, pair in ratios(rows).items()},
    }


def _commit() -> str | None:
    """The commit of the checkout this package lies in, marked where files differ from it; None if it lies in none."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _labels(row: Row) -> str:
    return f"{row.op:36}  {row.routing:10}  {row.num_sms or 'auto':>4}"


def _ms(microseconds: float | None) -> str:
    return f"{'-':>8}" if microseconds is None else f"{microseconds / 1e3:8.3f}"


def _times(ratio: float | None) -> str:
    return f"{'-':>7}" if ratio is None else f"{ratio:6.2f}x"
