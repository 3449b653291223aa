"""`python -m deepep bench`: measure on the ranks there are, print a table, write JSON and a plot."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deepep import ranks
from deepep.bench.plan import DTYPES, ROUTINGS, Plan
from deepep.errors import DeepEPError

# A GPU gives steady times fast; a CPU call of full size takes seconds.
_NUM_ITERS = {"cpu": 7, "cuda": 30}
_NUM_TOKENS = {False: {"cpu": 512, "cuda": 4096}, True: {"cpu": 128, "cuda": 128}}


def main(args: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit status: 0, or 2 if it could not run or a result was wrong."""
    chosen = _parser().parse_args(args)
    if chosen.plot is not None and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install 'deepep[demo]'", file=sys.stderr)
        return 2
    try:
        return _run(chosen)
    except DeepEPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _run(chosen: argparse.Namespace) -> int:
    from deepep.bench import report
    from deepep.bench.run import run_rank

    plan = _plan(chosen)
    reports = ranks.run_on_ranks(run_rank, plan, num_ranks=chosen.num_ranks, device=plan.device, timeout=chosen.timeout)
    if reports is None:
        return 0
    rows = report.summarise(reports)
    print(report.text(plan, reports, rows))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report.as_json(plan, reports, rows), indent=1) + "\n")
        print(f"JSON: {chosen.json}")
    if chosen.plot is not None:
        from deepep.bench.plot import plot

        plot(chosen.plot, f"{len(reports)} ranks, {reports[0].device}, backend {reports[0].backend}", rows)
        print(f"plot: {chosen.plot}")
    return 0


def _plan(chosen: argparse.Namespace) -> Plan:
    layouts = ("padded",) if chosen.low_latency else tuple(chosen.layout)
    return Plan(
        backend=chosen.backend,
        device=chosen.device,
        num_tokens=chosen.num_tokens or _NUM_TOKENS[chosen.low_latency][chosen.device],
        hidden=chosen.hidden,
        num_topk=chosen.num_topk,
        num_experts=chosen.num_experts,
        dtype="bf16" if chosen.low_latency else chosen.dtype,
        layouts=layouts,
        routings=tuple(chosen.routing),
        num_sms=tuple(chosen.num_sms),
        num_iters=chosen.num_iters or _NUM_ITERS[chosen.device],
        seed=chosen.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deepep bench",
        description="Measure whole operations: slowest rank, median, random inputs, the very results that were timed "
        "checked. Started by torchrun or mpirun it uses their processes as ranks; otherwise it starts local ones.",
    )
    parser.add_argument("--backend", default="auto", help="auto, reference, ipc, ... (default auto)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where tensors live (default cpu)")
    parser.add_argument("--num-ranks", type=int, help=f"processes to start (default {ranks.DEFAULT_NUM_RANKS})")
    parser.add_argument("--num-tokens", type=int, help="per rank (default 512 on CPU, 4096 on CUDA; low latency 128)")
    parser.add_argument("--hidden", type=int, default=7168, help="channels of a row (default %(default)s)")
    parser.add_argument("--num-topk", type=int, default=8, help="experts per token (default %(default)s)")
    parser.add_argument("--num-experts", type=int, default=256, help="of all ranks (default %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of dispatch (default %(default)s)")
    parser.add_argument(
        "--layout", nargs="+", choices=("compact", "expanded"), default=["compact"], help="default compact"
    )
    parser.add_argument("--low-latency", action="store_true", help="padded rows, FP8 dispatch, instead of --layout")
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="default both")
    parser.add_argument("--num-sms", type=int, nargs="+", default=[0], help="multiprocessors to try (default auto)")
    parser.add_argument("--num-iters", type=int, help="timed calls (default 7 on CPU, 30 on CUDA)")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs (default 0)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for everything (default 900)")
    parser.add_argument("--json", type=Path, help="file to write all results to")
    parser.add_argument("--plot", type=Path, help="file to draw to")
    return parser
