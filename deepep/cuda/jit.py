"""Compile kernels with NVRTC, keep the binaries, load them.

A kernel file defines `extern "C"` entry points over whichever transport is compiled in. Its binary depends on the
sources it reaches, the options, the NVRTC version and the architecture; a hash of these names the file in the cache, so
nothing stale is ever loaded, and ranks that compile at the same time only do the work twice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from deepep import env
from deepep.cuda import driver, sources
from deepep.errors import BackendUnavailable, DeepEPError, InvalidArgument

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


@dataclass(frozen=True)
class KernelSpec:
    """One entry point of a kernel file.

    Attributes:
        name: of the `extern "C"` function.
        source: file relative to the source root, e.g. `"kernels/dispatch.cu"`.
        defines: macros it is compiled with, as (name, value).
        transport: which transport it is compiled over, a file of `csrc/transports`.
    """

    name: str
    source: str
    defines: tuple[tuple[str, str | int], ...] = ()
    transport: str = DEFAULT_TRANSPORT


def compile_options(spec: KernelSpec, arch: str) -> list[str]:
    """Options of a kernel. Products and sums stay apart (no fused multiply-add): combine's bits are in the contract."""
    return [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "--fmad=false",
        "--generate-line-info",
        "--device-as-default-execution-space",
        f'-DDEEPEP_TRANSPORT_HEADER="{sources.transport_header(spec.transport)}"',
        f"-DDEEPEP_CHECK_INDICES={int(env.debug())}",
        *(f"-D{name}={value}" for name, value in spec.defines),
    ]


def cache_path(spec: KernelSpec, arch: str) -> Path:
    """Give the file that holds, or will hold, the binary of a kernel's file as its sources are now."""
    parts = [sources.content_hash(spec.source, spec.transport), nvrtc_version(), *compile_options(spec, arch)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    return env.cache_dir() / f"{Path(spec.source).stem}-{spec.transport}-{arch}-{digest}.cubin"


@dataclass(frozen=True)
class Compiled:
    """The binary of a kernel file for one architecture.

    Attributes:
        source: the file.
        arch: the architecture.
        path: the binary.
        num_bytes: its size.
        was_cached: whether it was there before.
        warnings: what the compiler said, if it was asked.
    """

    source: str
    arch: str
    path: Path
    num_bytes: int
    was_cached: bool
    warnings: str = ""


def compile_kernel(spec: KernelSpec, arch: str) -> Compiled:
    """Compile the file of a kernel for an architecture such as `"sm_90"`, or find it in the cache. Needs no GPU.

    Raises:
        CompileError: NVRTC refused it.
        BackendUnavailable: NVRTC is missing, cannot compile for `arch`, or the cache cannot be read or written.
        InvalidArgument: no such file or transport, or `DEEPEP_CACHE_DIR` names no folder.
    """
    path = cache_path(spec, arch)
    with _cache_access("look into"):
        if path.is_file():
            return Compiled(spec.source, arch, path, path.stat().st_size, was_cached=True)
    if arch not in supported_archs():
        known = ", ".join(supported_archs())
        raise BackendUnavailable(
            f"NVRTC {nvrtc_version()} cannot compile for {arch} (it knows {known}); install another"
        )
    cubin, warnings = _compile(spec, arch)
    with _cache_access("write to"):
        _write_atomically(path, cubin)
    return Compiled(spec.source, arch, path, len(cubin), was_cached=False, warnings=warnings)


def _compile(spec: KernelSpec, arch: str) -> tuple[bytes, str]:
    path = sources.source_path(spec.source)
    options = compile_options(spec, arch) + [f"--include-path={folder}" for folder in sources.include_dirs()]
    program = _call("nvrtcCreateProgram", path.read_bytes(), str(path).encode(), 0, [], [])
    nvrtc = _nvrtc()
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        log = bytearray(_call("nvrtcGetProgramLogSize", program))
        _call("nvrtcGetProgramLog", program, log)
        said = log.decode(errors="replace").rstrip(chr(0)).strip()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{path.name} for {arch}:\n{said}")
        cubin = bytearray(_call("nvrtcGetCUBINSize", program))
        _call("nvrtcGetCUBIN", program, cubin)
        return bytes(cubin), said
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _write_atomically(path: Path, content: bytes) -> None:
    """Readers see the whole file or none, however many processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}")
    try:
        # Made by `open`, not by `tempfile`, whose files only their owner may read: a cache filled by root in an image
        # serves the users of its containers.
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _cache_access(attempt: str) -> Iterator[None]:
    """Give what the file system refuses a name and a remedy."""
    try:
        yield
    except OSError as error:
        raise BackendUnavailable(
            f"cannot {attempt} the kernel cache {env.cache_dir()} ({error}); "
            "set DEEPEP_CACHE_DIR to a folder that this user can read and write"
        ) from error


def compile_all(
    specs: Sequence[KernelSpec], archs: Sequence[str], progress: Callable[[Compiled], None] | None = None
) -> list[Compiled]:
    """Compile every file that `specs` name, for every architecture, telling `progress` of each.

    Raises as `compile_kernel` does. A file with several entry points is compiled once per set of defines.
    """
    files = list(dict.fromkeys(replace(spec, name="") for spec in specs))
    report = []
    for arch in archs:
        for spec in files:
            report.append(compile_kernel(spec, arch))
            if progress is not None:
                progress(report[-1])
    return report


class Kernel:
    """A loaded entry point. It stays loaded until the process ends, since it may be part of captured graphs.

    Attributes:
        handle: for `launch`.
        num_regs: registers per thread.
        local_bytes: local memory per thread (spills and stack), bytes.
        shared_bytes: static shared memory per block, bytes.
    """

    def __init__(self, module: Any, name: str) -> None:
        self._function = driver.call("cuModuleGetFunction", module, name.encode())
        self.handle = int(self._function)
        self.num_regs = self._attribute("CU_FUNC_ATTRIBUTE_NUM_REGS")
        self.local_bytes = self._attribute("CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES")
        self.shared_bytes = self._attribute("CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES")

    def set_max_smem(self, num_bytes: int) -> None:
        """Allow a launch up to `num_bytes` of dynamic shared memory; needed above 48 KiB."""
        attribute = driver.bindings().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.call("cuFuncSetAttribute", self._function, attribute, num_bytes)

    def blocks_per_sm(self, num_threads: int, smem: int) -> int:
        """How many blocks of this shape one multiprocessor holds at once."""
        return int(driver.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", self._function, num_threads, smem))

    def _attribute(self, name: str) -> int:
        return int(
            driver.call("cuFuncGetAttribute", getattr(driver.bindings().CUfunction_attribute, name), self._function)
        )


@functools.cache
def _load_module(spec: KernelSpec, device: int, is_debug: bool) -> Any:  # noqa: ARG001 - options follow from it
    if torch.cuda.is_current_stream_capturing():
        raise InvalidArgument(
            "the first call of a kind loads its kernels and cannot be captured; make one such call before the capture"
        )
    compiled = compile_kernel(spec, driver.arch_of(device))
    with _cache_access("read from"):
        cubin = compiled.path.read_bytes()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context current
        return driver.call("cuModuleLoadData", cubin)


def load(spec: KernelSpec, device: int) -> Kernel:
    """Load a kernel on a device, compiling its file first if need be; raises as `compile_kernel` does."""
    return _load(spec, device, env.debug())


@functools.cache
def _load(spec: KernelSpec, device: int, is_debug: bool) -> Kernel:
    return Kernel(_load_module(replace(spec, name=""), device, is_debug), spec.name)
