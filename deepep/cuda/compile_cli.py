"""`python -m deepep compile`: fill the kernel cache ahead of time, without a GPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from deepep import env
from deepep.cuda import jit
from deepep.cuda.kernels import kernel_specs
from deepep.errors import DeepEPError
from deepep.progress import progress_bar

DEFAULT_ARCHS = ["sm_80", "sm_90", "sm_100"]


def main(args: Sequence[str] | None = None) -> int:
    """Compile every kernel for the architectures asked for and print one line per file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deepep compile", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=DEFAULT_ARCHS, metavar="sm_90", help="what to compile for")
    parser.add_argument("--strict", action="store_true", help="fail if the compiler warns of anything")
    options = parser.parse_args(args)
    started = time.monotonic()
    try:
        specs = kernel_specs()
        num_files = len({(spec.source, spec.defines) for spec in specs})
        with progress_bar(num_files * len(options.arch), "compile", "kernel") as bar:
            report = jit.compile_all(specs, options.arch, lambda _: bar.update())
    except DeepEPError as error:
        print(error, file=sys.stderr)
        return 1
    for item in report:
        state = "cached" if item.was_cached else "compiled"
        print(f"{item.arch:8} {item.source:28} {item.num_bytes / 1024:8.1f} KiB  {state}")
    warnings = dict.fromkeys(item.warnings for item in report if item.warnings)
    for warning in warnings:
        print(warning, file=sys.stderr)
    seconds = time.monotonic() - started
    print(f"{len(report)} kernel files in {env.cache_dir()} ({seconds:.1f} s, NVRTC {jit.nvrtc_version()})")
    return 1 if options.strict and warnings else 0
