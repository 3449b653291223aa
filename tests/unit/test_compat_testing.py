"""`deep_ep.utils.testing` and `deep_ep.utils.envs` in one process; several ranks are in `compat_program.py`."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepep.compat import envs, links
from deepep.compat.testing import bench, bench_kineto, flush_l2_cache
from deepep.errors import DeepEPError, InvalidArgument

KERNELS = ("gemm", "elementwise") if torch.cuda.is_available() else ("aten::mm", "aten::sub")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def multiply_and_subtract() -> None:
    x = torch.ones(64, 64, device=DEVICE)
    torch.mm(x, x)
    torch.sub(x, x)


def test_bench() -> None:
    calls: list[str] = []

    def fn() -> None:
        calls.append("fn")
        time.sleep(0.002)

    average, least, greatest = bench(fn, num_warmups=2, num_tests=3, post_fn=lambda: calls.append("post"))
    assert calls == ["fn", "post"] * 5
    assert 0 < least <= average <= greatest < 1
    with pytest.raises(InvalidArgument, match="num_tests"):
        bench(fn, num_tests=0)


def test_bench_kineto_containers(tmp_path: Path) -> None:
    one = bench_kineto(multiply_and_subtract, KERNELS[0], num_tests=3, suppress_kineto_output=True)
    assert isinstance(one, float)
    assert 0 < one < 1
    pair = bench_kineto(multiply_and_subtract, KERNELS, num_tests=3, trace_path=str(tmp_path / "trace.json"))
    assert isinstance(pair, tuple)
    assert all(isinstance(seconds, float) and seconds > 0 for seconds in pair)
    assert (tmp_path / "trace.json").stat().st_size > 0
    listed = bench_kineto(multiply_and_subtract, list(KERNELS), num_tests=2)
    assert isinstance(listed, list)


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads the names of CPU operators")
def test_bench_kineto_periods() -> None:
    small, large = torch.ones(16, 16), torch.ones(512, 512)
    lined_up: list[int] = []

    def fn() -> None:
        torch.mm(small, small)
        torch.mm(large, large)

    result = bench_kineto(fn, ("aten::mm",), num_tests=5, num_kernels_per_period=2, barrier=lambda: lined_up.append(1))
    assert isinstance(result, tuple)
    phases = result[0]
    assert isinstance(phases, list)
    assert 0 < phases[0] < phases[1]
    assert len(lined_up) == 5


def test_bench_kineto_unknown_kernel() -> None:
    with pytest.raises(InvalidArgument, match="no_such_kernel"):
        bench_kineto(multiply_and_subtract, "no_such_kernel", num_tests=1)
    with pytest.raises(InvalidArgument, match="multiple of 7"):
        bench_kineto(multiply_and_subtract, KERNELS[0], num_tests=1, num_kernels_per_period=7)


def test_flush_does_nothing_without_gpu() -> None:
    flush_l2_cache()


def test_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "_seeds", None)
    with pytest.raises(DeepEPError, match="init_seed"):
        envs.get_local_seed()
    envs.init_seed(11)
    first = torch.rand(3)
    envs.init_seed(11)
    assert torch.equal(torch.rand(3), first)
    assert (envs.get_global_seed(), envs.get_local_seed()) == (11, 11)


def test_init_dist_rejects_a_rank_outside() -> None:
    with pytest.raises(InvalidArgument, match="local_rank=2"):
        envs.init_dist(2, 2)


def test_dist_print_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "_local_rank", None)
    envs.dist_print("always")
    monkeypatch.setenv("LOCAL_RANK", "1")
    envs.dist_print("hidden", once_in_node=True)
    assert capsys.readouterr().out == "always\n"


def test_check_torch_deterministic() -> None:
    envs.check_torch_deterministic()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(InvalidArgument, match="fill_uninitialized_memory"):
            envs.check_torch_deterministic()
    finally:
        torch.use_deterministic_algorithms(False)


def test_link_speeds_are_positive() -> None:
    assert envs.get_nvlink_gbs() > 0
    assert envs.get_nvlink_gbs(0.5) == pytest.approx(envs.get_nvlink_gbs(1.0) / 2)
    assert envs.get_rdma_gbs() > 0
    assert envs.get_rdma_gbs("no_such_card") == 50.0
    assert not envs.check_fast_rdma_atomic_support("no_such_card")


def test_network_card_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "INFINIBAND", tmp_path)
    for name, model, rate in (("mlx5_0", "MT4123", "200 Gb/sec (4X HDR)"), ("mlx5_1", "MT4129", "400 Gb/sec (4X NDR)")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "rate").write_text(rate + "\n")
        (tmp_path / name / "hca_type").write_text(model + "\n")
    assert links.get_rdma_gbs() == 25.0
    assert links.get_rdma_gbs("mlx5_1") == 50.0
    assert not links.check_fast_rdma_atomic_support()
    assert links.check_fast_rdma_atomic_support("mlx5_1")
    (tmp_path / "mlx5_0" / "ports" / "1" / "rate").write_text("0 Gb/sec\n")
    assert links.get_rdma_gbs() == links.DEFAULT_RDMA_GBS


def test_nvlink_speed_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n\t Link 2: <inactive>\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))
    assert links._sum_of_links(links._nvlink_status("GPU-test")) == pytest.approx(53.124)
