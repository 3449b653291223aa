"""`python -m deepep {doctor,demo,bench,compile} ...`; each subcommand is imported only when asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_COMMANDS = {
    "doctor": ("deepep.doctor", "what works here, what does not, and what mends it"),
    "demo": ("deepep.demo.cli", "train a small mixture of experts, its experts spread over ranks"),
    "bench": ("deepep.bench.cli", "measure dispatch and combine"),
    "compile": ("deepep.cuda.compile_cli", "fill the kernel cache ahead of time"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the subcommand named first; returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    if given[0] == "--version":
        from deepep.version import __version__

        print(f"deepep {__version__}")
        return 0
    if given[0] not in _COMMANDS:
        print(f"'{given[0]}' is no subcommand\n{_usage()}", file=sys.stderr)
        return 2
    module, _ = _COMMANDS[given[0]]
    return importlib.import_module(module).main(given[1:])


def _usage() -> str:
    lines = ["usage: python -m deepep SUBCOMMAND [--help] ...", ""]
    return "\n".join(lines + [f"  {name:8} {what}" for name, (_, what) in _COMMANDS.items()])


if __name__ == "__main__":
    sys.exit(main())
