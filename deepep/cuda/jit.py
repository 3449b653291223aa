"""Compile kernels with NVRTC, keep the binaries, load them.

A kernel file defines `extern "C"` entry points over whichever transport is compiled in. Its binary depends on the sources
it reaches, the options, the NVRTC version and the architecture; a hash of these names the file in the cache, so nothing
stale is ever loaded and ranks that compile at the same time only do the work twice.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from deepep.cuda import driver, sources
from deepep.errors import BackendUnavailable, DeepEPError

DEFAULT_TRANSPORT = "p2p"
_MAX_SMEM_ATTRIBUTE = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"


class CompileError(DeepEPError, RuntimeError):
    """NVRTC refused a kernel; the message holds its log. A bug of this package, or a toolkit it does not know yet."""


@functools.cache
def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BackendUnavailable(f"the Python package cuda-bindings is missing ({error}); {driver.REMEDY}") from error
    return nvrtc


def _call(name: str, *args: Any) -> Any:
    nvrtc = _nvrtc()
    try:
        status, *results = getattr(nvrtc, name)(*args)
    except RuntimeError as error:  # cuda.bindings could not open libnvrtc
        raise BackendUnavailable(f"NVRTC is missing ({error}); {driver.REMEDY}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{name} failed: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return results[0] if len(results) == 1 else tuple(results)


@functools.cache
def nvrtc_version() -> str:
    """Give NVRTC's version, e.g. `"13.0"`; raises `BackendUnavailable` where it is missing."""
    major, minor = _call("nvrtcVersion")
    return f"{major}.{minor}"


@functools.cache
def supported_archs() -> tuple[str, ...]:
    """Architectures this NVRTC can compile for."""
    return tuple(f"sm_{number}" for number in _call("nvrtcGetSupportedArchs"))


def cache_dir() -> Path:
    """Folder of compiled kernels: `DEEPEP_CACHE_DIR`, or `~/.cache/deepep`."""
    return Path(os.environ.get("DEEPEP_CACHE_DIR") or Path.home() / ".cache" / "deepep")


def compile_options(arch: str, transport: str = DEFAULT_TRANSPORT) -> list[str]:
    """Options every kernel is compiled with. Products and sums stay apart: combine's bits are part of the contract."""
    return [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "--fmad=false",
        "--generate-line-info",
        "--device-as-default-execution-space",
        f'-DDEEPEP_TRANSPORT_HEADER="{sources.transport_header(transport)}"',
    ]


def cache_path(name: str, arch: str, transport: str = DEFAULT_TRANSPORT) -> Path:
    """Give the file that holds, or will hold, the binary of a kernel as its sources are now."""
    parts = [sources.content_hash(name, transport), nvrtc_version(), *compile_options(arch, transport)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    return cache_dir() / f"{name}-{transport}-{arch}-{digest}.cubin"


@dataclass(frozen=True)
class Compiled:
    """One kernel file compiled for one architecture: where it lies, its size in bytes, and whether it was there before."""

    name: str
    arch: str
    path: Path
    num_bytes: int
    was_cached: bool


def compile_kernel(name: str, arch: str, transport: str = DEFAULT_TRANSPORT) -> Compiled:
    """Compile `csrc/kernels/<name>.cu`, or find it in the cache. Needs no GPU.

    Args:
        name: of the kernel file.
        arch: e.g. `"sm_90"`.
        transport: which transport the kernels are compiled over, a file of `csrc/transports`.

    Raises:
        CompileError: NVRTC refused it.
        BackendUnavailable: NVRTC is missing, or cannot compile for `arch`.
        InvalidArgument: no such kernel or transport.
    """
    path = cache_path(name, arch, transport)
    if path.is_file():
        return Compiled(name, arch, path, path.stat().st_size, was_cached=True)
    if arch not in supported_archs():
        known = ", ".join(supported_archs())
        raise BackendUnavailable(
            f"NVRTC {nvrtc_version()} cannot compile for {arch} (it knows {known}); install another"
        )
    cubin = _compile(name, arch, transport)
    _write_atomically(path, cubin)
    return Compiled(name, arch, path, len(cubin), was_cached=False)


def _compile(name: str, arch: str, transport: str) -> bytes:
    path = sources.kernel_path(name)
    options = compile_options(arch, transport) + [f"--include-path={folder}" for folder in sources.include_dirs()]
    program = _call("nvrtcCreateProgram", path.read_bytes(), str(path).encode(), 0, [], [])
    nvrtc = _nvrtc()
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_call("nvrtcGetProgramLogSize", program))
            _call("nvrtcGetProgramLog", program, log)
            raise CompileError(f"{path.name} for {arch}:\n{log.decode(errors='replace').rstrip(chr(0))}")
        cubin = bytearray(_call("nvrtcGetCUBINSize", program))
        _call("nvrtcGetCUBIN", program, cubin)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _write_atomically(path: Path, content: bytes) -> None:
    """Readers see the whole file or none, however many processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def compile_all(
    archs: list[str], transport: str = DEFAULT_TRANSPORT, progress: Callable[[Compiled], None] | None = None
) -> list[Compiled]:
    """Compile every kernel for every architecture, telling `progress` of each; raises as `compile_kernel` does."""
    report = []
    for arch in archs:
        for name in sources.kernel_names():
            report.append(compile_kernel(name, arch, transport))
            if progress is not None:
                progress(report[-1])
    return report


class Module:
    """A loaded kernel file. It stays loaded until the process ends, since functions may be part of captured graphs."""

    def __init__(self, cubin: bytes) -> None:
        self._module = driver.call("cuModuleLoadData", cubin)

    @functools.cache  # noqa: B019 (a module lives as long as the process)
    def function(self, symbol: str, max_dynamic_smem: int = 0) -> int:
        """Give the handle of an entry point, allowed to use `max_dynamic_smem` bytes of dynamic shared memory."""
        function = driver.call("cuModuleGetFunction", self._module, symbol.encode())
        if max_dynamic_smem:
            attribute = getattr(driver.bindings().CUfunction_attribute, _MAX_SMEM_ATTRIBUTE)
            driver.call("cuFuncSetAttribute", function, attribute, max_dynamic_smem)
        return int(function)


@functools.cache
def _load(name: str, device: int, transport: str) -> Module:
    return Module(compile_kernel(name, driver.arch_of(device), transport).path.read_bytes())


def load(name: str, transport: str = DEFAULT_TRANSPORT) -> Module:
    """Load kernel file `name` on the current device, compiling it first if need be; raises as `compile_kernel` does."""
    return _load(name, driver.current_device(), transport)
