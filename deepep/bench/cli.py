"""`python -m deepep bench`: measure on the ranks there are, print a table, write JSON and a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from deepep import cli, ranks
from deepep.bench.plan import DTYPES, ROUTINGS, Plan
from deepep.errors import InvalidArgument

# A GPU gives steady times fast; a CPU call of full size takes seconds.
_NUM_ITERS = {"cpu": 7, "cuda": 30}
_NUM_TOKENS = {False: {"cpu": 512, "cuda": 4096}, True: {"cpu": 128, "cuda": 128}}


def main(args: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit status: 0, or 2 if it could not run or a result was wrong."""
    chosen = _parser().parse_args(args)
    return cli.exit_status(lambda: _run(chosen), {} if chosen.plot is None else {"matplotlib": "matplotlib"})


def _run(chosen: argparse.Namespace) -> int:
    from deepep.bench import report
    from deepep.bench.run import run_rank

    plan = _plan(chosen)
    cli.check_output("--json", chosen.json)
    cli.check_picture("--plot", chosen.plot)
    if ranks.launcher() is None:
        plan.check_ranks(chosen.num_ranks or ranks.DEFAULT_NUM_RANKS)  # said before processes start
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
    if chosen.low_latency:
        for name in ("layout", "dtype", "num_sms"):
            if getattr(chosen, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise InvalidArgument(f"{option} does not go with --low-latency, which has one layout, dtype and grid")
    num_tokens, num_iters = chosen.num_tokens, chosen.num_iters
    return Plan(
        backend=chosen.backend,
        device=chosen.device,
        num_tokens=_NUM_TOKENS[chosen.low_latency][chosen.device] if num_tokens is None else num_tokens,
        hidden=chosen.hidden,
        num_topk=chosen.num_topk,
        num_experts=chosen.num_experts,
        dtype=chosen.dtype or "bf16",
        layouts=("padded",) if chosen.low_latency else tuple(chosen.layout or ["compact"]),
        routings=tuple(chosen.routing),
        num_sms=tuple(chosen.num_sms or [0]),
        num_iters=_NUM_ITERS[chosen.device] if num_iters is None else num_iters,
        seed=chosen.seed,
        flushes_l2=chosen.flush_l2,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deepep bench",
        description="Measure whole operations on random inputs: median over calls, slowest rank, and the very results "
        f"that were timed are checked. {cli.WHERE_RANKS_COME_FROM}",
    )
    cli.add_rank_options(parser)
    for name, default, what in (
        ("num-tokens", None, "tokens per rank (default 512 on the CPU, 4096 on GPUs; low latency 128)"),
        ("hidden", 7168, "channels of a row (default %(default)s)"),
        ("num-topk", 8, "experts per token (default %(default)s)"),
        ("num-experts", 256, "experts of all ranks (default %(default)s)"),
        ("num-iters", None, "timed calls of each operation (default 7 on the CPU, 30 on GPUs)"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=what)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the rows that dispatch moves (default bf16)")
    parser.add_argument("--layout", nargs="+", choices=("compact", "expanded"), help="of rows (default compact)")
    parser.add_argument("--low-latency", action="store_true", help="padded rows and FP8 dispatch instead")
    parser.add_argument(
        "--flush-l2", action=argparse.BooleanOptionalAction, help="before each call (default: not with --low-latency)"
    )
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="default both")
    parser.add_argument(
        "--num-sms", type=int, nargs="+", metavar="N", help="multiprocessors to try (default automatic)"
    )
    parser.add_argument(
        "--timeout", type=cli.seconds, default=900.0, metavar="SECONDS", help="for everything (default %(default)g)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="to write all results to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="to draw to")
    return parser
