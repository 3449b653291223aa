"""Builds what pyproject.toml cannot say: the optional host runtime, and the kernel sources inside the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # not built with build isolation; the package then says what is missing
    Pybind11Extension = None

CSRC = Path("csrc")
SHIPPED = ("include", "kernels", "transports")


class BuildWithSources(build_py):
    """Copies the kernel sources to `deepep/_csrc`, where the kernel compiler looks for them."""

    def run(self) -> None:
        super().run()
        for folder in SHIPPED:
            if not self.editable_mode and (CSRC / folder).is_dir():
                shutil.copytree(CSRC / folder, Path(self.build_lib, "deepep", "_csrc", folder), dirs_exist_ok=True)


def extensions() -> list[Any]:
    """The host runtime: C++17, no CUDA or torch headers. `optional`: without a compiler the package still installs."""
    if Pybind11Extension is None:
        return []
    runtime = CSRC / "runtime"
    return [
        Pybind11Extension(
            "deepep._runtime",
            [path.as_posix() for path in sorted(runtime.glob("*.cpp"))],
            depends=[path.as_posix() for path in sorted(runtime.glob("*.h"))],
            cxx_std=17,
            extra_compile_args=["-O2"],
            libraries=["dl"],
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_py": BuildWithSources})
