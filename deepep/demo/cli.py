"""`python -m deepep demo`: train over ranks, train alone, compare, report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from deepep import cli, ranks
from deepep.demo.options import Options

_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
_DEFAULTS = Options()


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0 if the loss curves agree, 1 if not, 2 if it could not run."""
    chosen = _parser().parse_args(args)
    return cli.exit_status(lambda: _run(chosen), _NEEDED)


def _run(chosen: argparse.Namespace) -> int:
    from deepep.demo import report
    from deepep.demo.train import run_alone, run_rank

    options = Options(
        backend=chosen.backend,
        device=chosen.device,
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        seed=chosen.seed,
        num_experts=chosen.num_experts,
        num_topk=chosen.num_topk,
        is_digested=chosen.digest,
    )
    if not chosen.no_plot:
        cli.check_picture("--plot", chosen.plot)
    if ranks.launcher() is None:
        options.experts_of(0, chosen.num_ranks or ranks.DEFAULT_NUM_RANKS)  # said before processes start
    started = time.monotonic()
    outcomes = ranks.run_on_ranks(run_rank, options, num_ranks=chosen.num_ranks, device=options.device)
    if outcomes is None:
        return 0
    torch.set_num_threads(1)
    alone = run_alone(options)
    print(report.text(options, outcomes, alone))
    if not chosen.no_plot:
        report.plot(chosen.plot, options, outcomes, alone)
        print(f"plot: {chosen.plot}")
    print(f"{time.monotonic() - started:.0f} s in all")
    return int(not report.agrees(options, outcomes[0], alone))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deepep demo",
        description="Train a small mixture of experts on handwritten digits, its experts spread over ranks, and the "
        f"same model in one process; compare the two. {cli.WHERE_RANKS_COME_FROM}",
    )
    cli.add_rank_options(parser)
    for name, what in {
        "epochs": "passes over the training images",
        "batch-size": "images per step, over all ranks",
        "num-experts": "a multiple of the number of ranks",
        "num-topk": "experts per image",
    }.items():
        default = getattr(_DEFAULTS, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})")
    parser.add_argument(
        "--plot", type=Path, default=Path("deepep_demo.png"), metavar="FILE", help="to draw to (default %(default)s)"
    )
    parser.add_argument("--no-plot", action="store_true", help="draw nothing")
    parser.add_argument("--digest", action="store_true", help="print a hash of all rows of each rank")
    return parser
