"""What the subcommands that work on ranks have in common: their options, and how they end."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping

from deepep import ranks
from deepep.errors import DeepEPError

#: Said by the help of every subcommand that `deepep.ranks` runs.
WHERE_RANKS_COME_FROM = (
    "Started by torchrun or mpirun it uses their processes as ranks; otherwise it starts local ones."
)


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Add `--num-ranks`, `--backend`, `--device` and `--seed`."""
    parser.add_argument(
        "--num-ranks", type=int, metavar="R", help=f"processes to start (default {ranks.DEFAULT_NUM_RANKS})"
    )
    parser.add_argument("--backend", metavar="NAME", help="reference, ipc, ... (default: DEEPEP_BACKEND, else auto)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where tensors live (default cpu)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")


def exit_status(work: Callable[[], int], needed: Mapping[str, str]) -> int:
    """Run a subcommand; 2, with one message on stderr, where it cannot run or an error with a name ends it.

    Args:
        work: gives the exit status otherwise.
        needed: modules it imports, and the packages of the extra `demo` that bring them.
    """
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"this needs {', '.join(missing)}: pip install 'deepep[demo]'", file=sys.stderr)
        return 2
    try:
        return work()
    except DeepEPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
