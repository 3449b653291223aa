"""The host side of the CUDA backends, as far as it needs no GPU: sources, the kernel cache, waits, the command line."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
import time
from pathlib import Path

import pytest

from deepep import env
from deepep.cuda import compile_cli, driver, jit, launch, sources
from deepep.cuda.kernels import kernel_specs
from deepep.cuda.ll_structs import NARROW
from deepep.errors import BackendUnavailable, InvalidArgument


def has_nvrtc() -> bool:
    try:
        return bool(jit.nvrtc_version())
    except BackendUnavailable:
        return False


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs cuda-bindings and NVRTC")
_RUNTIMES = [pytest.param(launch._SlowRuntime(), id="slow")]
if importlib.util.find_spec("deepep._runtime") is not None:
    _RUNTIMES.append(pytest.param(launch.runtime(), id="compiled"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPEP_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_hash_follows_includes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("include/deepep", "kernels", "transports"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "transports/p2p.cuh").write_text("")
    (tmp_path / "kernels/one.cu").write_text("#include <deepep/far.cuh>\n")
    (tmp_path / "include/deepep/far.cuh").write_text('#include "near.cuh"\n#include <not_ours.h>\n')
    near = tmp_path / "include/deepep/near.cuh"
    near.write_text("int x;")
    monkeypatch.setattr(sources, "source_root", lambda: tmp_path)
    before = sources.content_hash("kernels/one.cu", "p2p")
    assert sources.content_hash("kernels/one.cu", "p2p") == before
    near.write_text("int y;")
    assert sources.content_hash("kernels/one.cu", "p2p") != before


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"kernels/none\.cu"):
        sources.source_path("kernels/none.cu")
    with pytest.raises(InvalidArgument, match="p2p"):
        sources.transport_header("carrier_pigeon")


@needs_nvrtc
def test_a_kernel_is_compiled_once(cache: Path) -> None:
    first, second = jit.compile_kernel(NARROW.clean, "sm_90"), jit.compile_kernel(NARROW.clean, "sm_90")
    assert (first.was_cached, second.was_cached) == (False, True)
    assert first.path.parent == cache == env.cache_dir()
    assert first.path.stat().st_size == first.num_bytes > 0
    assert [path.name for path in cache.iterdir()] == [first.path.name]  # no temporary file stays


@needs_nvrtc
def test_the_cache_knows_architectures_and_defines(cache: Path) -> None:
    other = jit.KernelSpec(NARROW.clean.name, NARROW.clean.source, defines=(("X", 1),))
    paths = {
        jit.cache_path(NARROW.clean, "sm_90"),
        jit.cache_path(NARROW.clean, "sm_80"),
        jit.cache_path(other, "sm_90"),
    }
    assert len(paths) == 3
    assert {path.parent for path in paths} == {cache}


def test_other_users_may_read_the_cache(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        jit._write_atomically(tmp_path / "new" / "one.cubin", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "one.cubin").stat().st_mode & 0o777 == 0o644


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv("DEEPEP_CACHE_DIR", str(folder))
    monkeypatch.setattr(jit, "_compile", lambda _spec, _arch: (b"binary", ""))
    with pytest.raises(BackendUnavailable, match=f"cannot write to the kernel cache {folder} .*; set DEEPEP_CACHE_DIR"):
        jit.compile_kernel(NARROW.clean, "sm_90")
    assert compile_cli.main(["--arch", "sm_90"]) == 1
    assert "set DEEPEP_CACHE_DIR" in capsys.readouterr().err


@needs_nvrtc
@pytest.mark.usefixtures("cache")
def test_a_cache_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    monkeypatch.setattr(jit, "cache_path", lambda _spec, _arch: env.cache_dir() / "one.cubin")
    with pytest.raises(BackendUnavailable, match="cannot look into the kernel cache"):
        jit.compile_kernel(NARROW.clean, "sm_90")


@needs_nvrtc
@pytest.mark.usefixtures("cache")
def test_failures_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="sm_1"):
        jit.compile_kernel(NARROW.clean, "sm_1")
    for folder in ("include/deepep", "kernels", "transports"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "transports/p2p.cuh").write_text("")
    (tmp_path / "kernels/broken.cu").write_text('extern "C" __global__ void f() { nonsense; }\n')
    monkeypatch.setattr(sources, "source_root", lambda: tmp_path)
    with pytest.raises(jit.CompileError, match="nonsense"):
        jit.compile_kernel(jit.KernelSpec("f", "kernels/broken.cu"), "sm_90")


@needs_nvrtc
@pytest.mark.usefixtures("cache")
def test_command_line_compiles_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_cli.main(["--arch", "sm_90"]) == 0
    printed = capsys.readouterr().out
    assert all(spec.source in printed for spec in kernel_specs())
    assert compile_cli.main(["--arch", "sm_90"]) == 0
    assert "compiled" not in capsys.readouterr().out
    assert compile_cli.main(["--arch", "sm_1"]) == 1


@needs_nvrtc
@pytest.mark.usefixtures("cache")
def test_what_the_compiler_warns_of_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("include/deepep", "kernels", "transports"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    (tmp_path / "csrc/transports/p2p.cuh").write_text("")
    (tmp_path / "csrc/kernels/odd.cu").write_text('extern "C" __global__ void odd() { int unused; }\n')
    monkeypatch.setattr(sources, "source_root", lambda: tmp_path / "csrc")
    monkeypatch.setattr(compile_cli, "kernel_specs", lambda: [jit.KernelSpec("odd", "kernels/odd.cu")])
    assert compile_cli.main(["--arch", "sm_90", "--strict"]) == 1
    assert "unused" in capsys.readouterr().err
    assert compile_cli.main(["--arch", "sm_80"]) == 0, "warnings are no failures for users"


@pytest.mark.parametrize("runtime", _RUNTIMES)
def test_a_wait_ends_with_its_word_or_its_time(runtime: launch.Runtime) -> None:
    word = ctypes.c_uint64(5)
    assert runtime.wait_word(ctypes.addressof(word), 5, 0.0)
    started = time.monotonic()
    assert not runtime.wait_word(ctypes.addressof(word), 6, 0.1)
    assert 0.1 <= time.monotonic() - started < 5


@pytest.mark.parametrize("runtime", _RUNTIMES)
def test_a_wait_lets_other_threads_run(runtime: launch.Runtime) -> None:
    word = ctypes.c_uint64(0)

    def write() -> None:
        time.sleep(0.02)
        word.value = 2**40 + 7

    thread = threading.Thread(target=write)
    thread.start()
    assert runtime.wait_word(ctypes.addressof(word), 2**40 + 7, 10.0)
    thread.join()


def test_a_thread_without_a_context_gets_one_before_its_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    current, calls = threading.local(), list[str]()

    def call(name: str, *args: int) -> int:
        calls.append(name)
        if name == "cuCtxSetCurrent":
            current.context = args[0]
        return {
            "cuCtxGetCurrent": getattr(current, "context", 0),
            "cuDeviceGet": 1,
            "cuDevicePrimaryCtxRetain": 77,
        }.get(name, 0)

    def in_new_thread(given: int) -> tuple[int, list[str]]:
        calls.clear()

        def work() -> None:
            current.context = given
            driver.ensure_context(1)
            driver.ensure_context(1)
            seen.append(current.context)

        seen = list[int]()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return seen[0], list(calls)

    monkeypatch.setattr(driver, "call", call)
    driver._primary_context.cache_clear()
    first = ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert in_new_thread(0) == (77, first)
    assert in_new_thread(0) == (77, ["cuCtxGetCurrent", "cuCtxSetCurrent"])
    assert in_new_thread(5) == (5, ["cuCtxGetCurrent"])  # somebody's own: stays
    driver._primary_context.cache_clear()


@pytest.mark.parametrize(("major", "version", "can"), [(8, 13000, False), (9, 12020, False), (9, 12030, True)])
def test_kernels_start_early_where_graphs_can_hold_them(
    major: int, version: int, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "device_attribute", lambda _name, _device: major)
    monkeypatch.setattr(driver, "call", lambda _name: version)
    assert driver.can_start_early.__wrapped__(0) is can
