"""What the subcommands that work on ranks have in common: their options, what is looked at first, how they end."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from deepep import ranks
from deepep.errors import DeepEPError, InvalidArgument
from deepep.testing.launch import WorkerError

#: Said by the help of every subcommand that `deepep.ranks` runs.
WHERE_RANKS_COME_FROM = (
    "Started by torchrun or mpirun it uses their processes as ranks; otherwise it starts local ones."
)

# Ranks and their streams of random numbers make 64-bit seeds from it.
_SEED_BITS = 32
_RANK_VARIABLES = {"torchrun": ("RANK",), "mpi": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")}


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Add `--num-ranks`, `--backend`, `--device` and `--seed`."""
    parser.add_argument(
        "--num-ranks", type=int, metavar="R", help=f"processes to start (default {ranks.DEFAULT_NUM_RANKS})"
    )
    parser.add_argument("--backend", metavar="NAME", help="reference, ipc, ... (default: DEEPEP_BACKEND, else auto)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where tensors live (default cpu)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of everything random (default 0)")


def seconds(text: str) -> float:
    """Read the value of an option: seconds, above 0 and finite."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**_SEED_BITS:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2^{_SEED_BITS} - 1")
    return value


def check_output(option: str, path: Path | None) -> None:
    """Find out whether a file can be written before the work whose results it is for.

    Args:
        option: that named the file, for the message.
        path: the file; None is fine.

    Raises:
        InvalidArgument: its folder is missing, or it is a folder itself, or the user may not write it.
    """
    if path is None or not _writes_files():
        return
    if not path.parent.is_dir():
        raise InvalidArgument(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise InvalidArgument(f"{option} {path}: this is a folder; name a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidArgument(f"{option} {path}: this user may not write there; name another place")


def check_picture(option: str, path: Path | None) -> None:
    """Check a file to draw to as `check_output` does, and that matplotlib knows the kind its name says."""
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().lstrip(".") not in kinds:
        raise InvalidArgument(f"{option} {path}: the name must end in one of .{', .'.join(kinds)}")
    check_output(option, path)


def _writes_files() -> bool:
    """Whether this is the rank that reports; the folder need not be there on the hosts of the others."""
    names = _RANK_VARIABLES.get(ranks.launcher() or "", ())
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def exit_status(work: Callable[[], int], needed: Mapping[str, str]) -> int:
    """Run a subcommand; 2, with one message on stderr, where it cannot run or an expected error ends it.

    Expected are errors with a name, ranks that fail or do not answer, and what the operating system refuses.

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
    except (DeepEPError, WorkerError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
