"""Everything that two GPUs of one host can show, in one command of under ten minutes.

    python benchmarks/two_gpus.py --out benchmarks/results/h200-x2.json
    python benchmarks/two_gpus.py --table benchmarks/results/h200-x2.json                          # print as Markdown
    python benchmarks/two_gpus.py --table benchmarks/results/h200-x2.json --plot docs/h200-x2.png  # and draw the sweep
    python benchmarks/two_gpus.py --only "low latency" "8 SMs" --out some.json                     # some steps only

Ceilings of the link; the contract with a rank per GPU; whole operations against NCCL on the same bytes; low latency; a
sweep over multiprocessors; few multiprocessors; at last, under MPS, low latency with four and eight ranks and the
contract with eight ranks on the two GPUs. Every step ends at its limit and leaves no process behind; what earlier steps
found is kept, whatever becomes of the others. NVLink multicast stays off. With one GPU the same steps run with both
ranks on it (start MPS first).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from deepep.bench.plan import ROUTINGS, Plan
from deepep.bench.report import as_json, summarise
from deepep.bench.run import RankReport, run_rank
from deepep.group import make_group
from deepep.testing.launch import Workers

ROOT = Path(__file__).resolve().parent.parent
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
SWEEP = (4, 8, 16, 48, 132)
LOW_LATENCY_TOKENS = (1, 8, 32, 128, 512)
CLOCKS = ("wall_us", "events_us", "replay_us", "in_a_row_us", "kernels_us")


@dataclass(frozen=True)
class Step:
    """Something to run, and the seconds it may take: a command or a plan of the bench.

    Attributes:
        name: for people, and for `--only`.
        limit: seconds.
        command: to run; an empty one where there is a plan.
        plan: what the bench is to measure.
        has_json: the command writes JSON to the file that is its last argument.
        needs_mps: its ranks share GPUs.
    """

    name: str
    limit: float
    command: tuple[str, ...] = ()
    plan: Plan | None = None
    has_json: bool = False
    needs_mps: bool = False


def steps(backend: str) -> Iterator[Step]:
    """List what is run, the most telling first."""
    contract = (sys.executable, "tests/gpu/run_contract.py", "--backend", backend, "--low-latency")
    yield Step("links", 60, (sys.executable, "benchmarks/links.py", "--json"), has_json=True)
    yield Step("contract, 2 ranks", 90, (*contract, "--ranks", "2", "--seconds", "75"))
    for num_tokens in (4096, 8192):
        for dtype in ("fp8", "bf16"):
            plan = _plan(backend, num_tokens, dtype, routings=ROUTINGS if num_tokens == 4096 else ("balanced",))
            yield Step(f"{num_tokens} tokens, {dtype}", 45, plan=plan)
    for num_tokens in LOW_LATENCY_TOKENS:
        plan = _plan(backend, num_tokens, "bf16", layouts=("padded",), num_sms=(0,))
        yield Step(f"low latency, {num_tokens} tokens", 25, plan=plan)
        if num_tokens in (8, 128):
            yield Step(f"low latency, {num_tokens} tokens, cold L2", 25, plan=replace(plan, flushes_l2=True))
    for dtype in ("fp8", "bf16"):
        plan = _plan(backend, 4096, dtype, num_sms=SWEEP, num_iters=10)
        yield Step(f"sweep over SMs, {dtype}", 75, plan=plan)
    for dtype in ("fp8", "bf16"):
        # A point of the sweep with a name of its own: all there is to see where ranks share a GPU's multiprocessors.
        yield Step(f"8 SMs, {dtype}", 45, plan=_plan(backend, 4096, dtype, num_sms=(8,), num_iters=10))
    for num_ranks in (4, 8):
        bench = (sys.executable, "-m", "deepep", "bench", "--device", "cuda", "--backend", backend, "--low-latency")
        for num_tokens in LOW_LATENCY_TOKENS:
            sizes = ("--num-ranks", str(num_ranks), "--num-tokens", str(num_tokens), "--routing", "balanced")
            name = f"{num_ranks} ranks, low latency, {num_tokens} tokens"
            yield Step(name, 60, (*bench, *sizes, "--json"), has_json=True, needs_mps=True)
    yield Step("contract, 8 ranks", 130, (*contract, "--ranks", "8", "--seconds", "110"), needs_mps=True)


def _plan(backend: str, num_tokens: int, dtype: str, **others: Any) -> Plan:
    """Make a plan of the usual shape: 7168 channels, top-8 of 256 experts, 24 multiprocessors."""
    usual: dict[str, Any] = {
        "layouts": ("compact", "expanded"), "routings": ("balanced",), "num_sms": (24,), "num_iters": 30,
    }  # fmt: skip
    return Plan(
        backend=backend, device="cuda", num_tokens=num_tokens, hidden=7168, num_topk=8, num_experts=256, dtype=dtype,
        seed=0, **{**usual, **others},
    )  # fmt: skip


def main() -> int:
    """Run all steps, or print a file of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write, again after each step")
    parser.add_argument("--table", type=Path, help="print this file as Markdown instead of running anything")
    parser.add_argument("--plot", type=Path, help="draw the sweep over multiprocessors to this file, too")
    parser.add_argument("--backend", nargs="+", default=["ipc"])
    parser.add_argument("--only", nargs="*", default=[], help="steps whose name begins with one of these")
    parser.add_argument("--commit", default=None, help="to note in the file; default: what git says")
    options = parser.parse_args()
    report: dict[str, Any]
    if options.table:
        report = _read(options.table)
        print(markdown(report))
        if options.plot:
            plot_sweep(options.plot, report)
        return 0
    if not torch.cuda.is_available():
        sys.exit("two_gpus.py needs NVIDIA GPUs that torch can use; without any, --table prints a file of results")
    report = {"commit": options.commit or _commit(), "steps": [], "runs": []}
    os.environ.update(MULTICAST_OFF)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Workers(2, device="cuda")) as workers:
        for backend in options.backend:
            for step in steps(backend):
                if not options.only or step.name.startswith(tuple(options.only)):
                    _run(step, Path(folder), workers, report)
                    if options.out:
                        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    if options.plot:
        plot_sweep(options.plot, report)
    return int(any(done["exit_status"] for done in report["steps"]))


def _read(path: Path) -> dict[str, Any]:
    """Read a file that this program wrote."""
    report: dict[str, Any] = json.loads(path.read_text())
    if "runs" not in report:
        kind = "figures of links.py" if "figures" in report else "something else"
        sys.exit(f"{path} has no 'runs' to print: it holds {kind}, not a report of two_gpus.py")
    return report


def _run(step: Step, folder: Path, workers: Workers, report: dict[str, Any]) -> None:
    print(f"== {step.name}", flush=True)
    started = time.monotonic()
    if step.plan is not None:
        status = _measure(step.name, step.plan, workers, step.limit, report)
    else:
        status = _execute(step, folder, workers, report)
    seconds = round(time.monotonic() - started, 1)
    print(f"== {step.name}: exit status {status} after {seconds} s", flush=True)
    report["steps"].append({"name": step.name, "exit_status": status, "seconds": seconds})


def _measure(name: str, plan: Plan, workers: Workers, limit: float, report: dict[str, Any]) -> int:
    """Run the bench on ranks that live on from plan to plan; one that fails takes them along, and others start."""
    try:
        found = workers.run(_bench_rank, plan, timeout=limit)
    except Exception as error:  # noqa: BLE001  whatever a rank raises is noted, and the next step runs
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    report["runs"].append({"step": name, **as_json(plan, found, summarise(found)), "commit": report["commit"]})
    return 0


def _bench_rank(process_group: Any, plan: Plan) -> RankReport:
    return run_rank(make_group(process_group), plan)


def _execute(step: Step, folder: Path, workers: Workers, report: dict[str, Any]) -> int:
    """Run a command in a process group of its own, which ends with it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if step.needs_mps:
        workers.close()  # MPS wants the GPUs to itself
        environment |= _start_mps(folder)
    result = folder / f"{step.name}.json"
    process = subprocess.Popen(
        [*step.command, *([str(result)] if step.has_json else [])], cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        status = process.wait(step.limit)
    except subprocess.TimeoutExpired:
        status = 124
    finally:
        # Ranks spin when their peers are gone: nothing of a step may outlive it.
        _kill_group(process)
    if result.exists():
        report["runs"].append({"step": step.name, **json.loads(result.read_text()), "commit": report["commit"]})
    return status


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _start_mps(folder: Path) -> dict[str, str]:
    """Let kernels of several processes run at the same time on one GPU; nothing to do where somebody has done so."""
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        return {}
    variables = {name: str(folder / name.lower()) for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")}
    if not all(Path(path).exists() for path in variables.values()):
        for path in variables.values():
            Path(path).mkdir()
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env={**os.environ, **variables}, check=True)
    return variables


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def markdown(report: dict[str, Any]) -> str:
    """Put a report into words and tables."""
    runs = [run for run in report["runs"] if "results" in run]
    lines = [f"Commit {report['commit']}; {runs[0]['device'] if runs else 'no results'}.", ""]
    lines += [f"- {done['name']}: exit status {done['exit_status']}, {done['seconds']} s" for done in report["steps"]]
    for run in runs:
        plan = run["plan"]
        experts = f"top-{plan['num_topk']} of {plan['num_experts']}"
        where = f"{run['num_ranks']} ranks, {plan['num_tokens']} tokens x {plan['hidden']}, {experts}"
        lines += ["", f"**{run['step']}** ({where}, {run['ranks_per_gpu']} rank(s) per GPU), microseconds", ""]
        clocks = "wall | events | replay | in a row | kernels"
        lines += [f"| operation | routing | SMs | {clocks} | remote GB/s | x floor | NCCL |", "|---" * 11 + "|"]
        lines += [_line(row) for row in run["results"] if row["op"] != "layout"]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    def number(value: float | None, digits: int = 1) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    # `get`: files that are older than a clock do not have it.
    cells = [row["op"], row["routing"], str(row["num_sms"] or "auto"), *(number(row.get(clock)) for clock in CLOCKS)]
    cells += [number(row["remote_bytes_per_second"] / 1e9, 0), number(row["ratio_to_floor"], 2), number(row["bare_us"])]
    return "| " + " | ".join(cells) + " |"


def plot_sweep(path: Path, report: dict[str, Any]) -> None:
    """Draw time over multiprocessors: for each operation the lower of two clocks, and the time at the floor's rate."""
    sweeps = [run for run in report["runs"] if run["step"].startswith("sweep") and "results" in run]
    if not sweeps:
        sys.exit(f"{path} is not drawn: there is no run of a sweep over multiprocessors")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, len(sweeps), figsize=(6.5 * len(sweeps), 4.5), squeeze=False)
    for axes, run in zip(all_axes[0], sweeps, strict=True):
        for op in dict.fromkeys(row["op"] for row in run["results"] if row["op"] != "layout"):
            rows = [row for row in run["results"] if row["op"] == op]
            best = [min(row[clock] for clock in ("events_us", "replay_us") if row[clock]) for row in rows]
            axes.plot([row["num_sms"] for row in rows], best, marker="o", label=op)
            if rows[0]["floor_us"]:
                axes.axhline(rows[0]["floor_us"], color="black", linewidth=0.5)
        axes.set(xscale="log", yscale="log", xlabel="multiprocessors", title=run["step"])
        axes.set_ylabel("us, the lower of events and graph replay")
        axes.set_xticks([row["num_sms"] for row in rows], [str(row["num_sms"]) for row in rows])
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
