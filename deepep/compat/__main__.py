"""`python -m deepep.compat script.py args...` and `python -m deepep.compat -m module args...`."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

import deepep
from deepep.compat import ALIAS_PATH, install

USAGE = """usage: python -m deepep.compat SCRIPT [ARGS...]
       python -m deepep.compat -m MODULE [ARGS...]

Run a program written for deep_ep with `deep_ep` being deepep, in this process and in every Python process it starts."""


def main() -> None:
    """Run the program named on the command line as `__main__`, with the alias installed."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help") or args == ["-m"]:
        print(USAGE, file=sys.stdout if args and args[0] != "-m" else sys.stderr)
        raise SystemExit(0 if args and args[0] != "-m" else 2)
    if args[0] != "-m":
        _check_script(args[0])
    _hand_down()
    if args[0] == "-m":
        install()
        _check_module(args[1])
        sys.argv[:] = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        _put_script_folder_first(args[0])
        install()
        sys.argv[:] = args
        runpy.run_path(args[0], run_name="__main__")


def _check_script(script: str) -> None:
    path = Path(script)
    if not path.exists() or (path.is_dir() and not (path / "__main__.py").is_file()):
        what = "unknown option" if script.startswith("-") else "no such program:"
        _refuse(f"{what} {script}")


def _check_module(module: str) -> None:
    parts = module.split(".")
    above = [".".join(parts[:length]) for length in range(1, len(parts))]
    try:
        is_there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name not in [*above, module]:
            raise  # something that a package above it imports
        is_there = False
    if not is_there:
        _refuse(f"no module named {module}")


def _refuse(text: str) -> NoReturn:
    print(f"python -m deepep.compat: {text}; --help shows the usage", file=sys.stderr)
    raise SystemExit(2)


def _hand_down() -> None:
    """Put the alias on PYTHONPATH for programs that start other interpreters by themselves."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ALIAS_PATH) not in inherited:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ALIAS_PATH), *filter(None, inherited)])


def _put_script_folder_first(script: str) -> None:
    """`python script.py` has the script's folder where `python -m` has the working directory."""
    if getattr(sys.flags, "safe_path", False):
        return
    sys.path[0] = str(Path(script).resolve().parent)
    # deepep itself may have been found in the working directory, which was just replaced.
    root = str(Path(deepep.__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.append(root)


if __name__ == "__main__":
    main()
