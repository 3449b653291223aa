"""Everything that two GPUs of one host can show, in one command of under ten minutes.

    python benchmarks/two_gpus.py --out benchmarks/results/h200-x2.json
    python benchmarks/two_gpus.py --table benchmarks/results/h200-x2.json     # print the file as Markdown

Ceilings of the link; the contract with a rank per GPU; whole operations against NCCL on the same bytes; a sweep over
multiprocessors; low latency; at last, under MPS, the contract with eight ranks on the two GPUs. Each step runs in a
process group of its own and ends with it at its limit; what a step left behind is kept, whatever became of the others.
NVLink multicast stays off. With one GPU the same steps run with both ranks on it (start MPS first).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
SWEEP = ("4", "8", "12", "16", "32", "64", "132")
LOW_LATENCY_TOKENS = ("1", "8", "32", "128", "512")
CLOCKS = ("wall_us", "events_us", "replay_us", "kernels_us")


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and whether it writes JSON (its last argument is then the file's name)."""

    name: str
    limit: float
    command: tuple[str, ...]
    has_json: bool = False
    needs_mps: bool = False


def steps(backend: str) -> Iterator[Step]:
    """List what is run, the most telling first."""
    contract = (sys.executable, "tests/gpu/run_contract.py", "--backend", backend, "--low-latency")
    bench = (sys.executable, "-m", "deepep", "bench", "--backend", backend, "--device", "cuda", "--num-ranks", "2")
    yield Step("links", 60, (sys.executable, "benchmarks/links.py", "--json"), has_json=True)
    yield Step("contract, 2 ranks", 75, (*contract, "--ranks", "2", "--seconds", "60"))
    what: tuple[str, ...]
    for num_tokens in ("4096", "8192"):
        for dtype in ("fp8", "bf16"):
            what = ("--num-tokens", num_tokens, "--dtype", dtype, "--layout", "compact", "expanded", "--num-sms", "24")
            yield Step(f"{num_tokens} tokens, {dtype}", 45, (*bench, *what, "--json"), has_json=True)
    for num_tokens in LOW_LATENCY_TOKENS:
        what = ("--low-latency", "--num-tokens", num_tokens, "--routing", "balanced")
        yield Step(f"low latency, {num_tokens} tokens", 25, (*bench, *what, "--json"), has_json=True)
    for dtype in ("fp8", "bf16"):
        what = ("--num-tokens", "4096", "--dtype", dtype, "--layout", "compact", "expanded", "--routing", "balanced")
        sweep = (*bench, *what, "--num-iters", "10", "--num-sms", *SWEEP, "--json")
        yield Step(f"sweep over SMs, {dtype}", 75, sweep, has_json=True)
    yield Step("contract, 8 ranks", 95, (*contract, "--ranks", "8", "--seconds", "80"), needs_mps=True)


def main() -> int:
    """Run all steps, or print a file of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write, again after each step")
    parser.add_argument("--table", type=Path, help="print this file as Markdown instead of running anything")
    parser.add_argument("--backend", nargs="+", default=["ipc"])
    parser.add_argument("--only", nargs="*", default=[], help="steps whose name begins with one of these")
    parser.add_argument("--commit", default=None, help="to note in the file; default: what git says")
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(options.table.read_text())))
        return 0
    report: dict[str, Any] = {"commit": options.commit or _commit(), "steps": [], "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for backend in options.backend:
            for step in steps(backend):
                if not options.only or step.name.startswith(tuple(options.only)):
                    _run(step, Path(folder), report)
                    if options.out:
                        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    return int(any(done["exit_status"] for done in report["steps"]))


def _run(step: Step, folder: Path, report: dict[str, Any]) -> None:
    environment = {**os.environ, **MULTICAST_OFF, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if step.needs_mps:
        environment |= _start_mps(folder)
    result = folder / f"{step.name}.json"
    command = [*step.command, *([str(result)] if step.has_json else [])]
    print(f"== {step.name}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(step.limit)
    except subprocess.TimeoutExpired:
        status = 124
    finally:
        # Ranks spin when their peers are gone: nothing of a step may outlive it.
        _kill_group(process)
    seconds = round(time.monotonic() - started, 1)
    print(f"== {step.name}: exit status {status} after {seconds} s", flush=True)
    report["steps"].append({"name": step.name, "exit_status": status, "seconds": seconds})
    if result.exists():
        report["runs"].append({"step": step.name, **json.loads(result.read_text())})


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
    lines = [f"Commit {report['commit']}; {runs[0]['device'] if runs else 'no results'}, 2 ranks.", ""]
    lines += [f"- {done['name']}: exit status {done['exit_status']}, {done['seconds']} s" for done in report["steps"]]
    for run in runs:
        plan = run["plan"]
        where = f"{plan['num_tokens']} tokens x {plan['hidden']}, top-{plan['num_topk']} of {plan['num_experts']}"
        lines += ["", f"**{run['step']}** ({where}, {run['ranks_per_gpu']} rank(s) per GPU), microseconds", ""]
        lines += ["| operation | routing | SMs | wall | events | replay | kernels | remote GB/s | x floor | NCCL |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        lines += [_line(row) for row in run["results"] if row["op"] != "layout"]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    def number(value: float | None, digits: int = 1) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    cells = [row["op"], row["routing"], str(row["num_sms"] or "auto"), *(number(row[clock]) for clock in CLOCKS)]
    cells += [number(row["remote_bytes_per_second"] / 1e9, 0), number(row["ratio_to_floor"], 2), number(row["bare_us"])]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
