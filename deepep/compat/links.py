"""Link speeds as the system reports them: `nvidia-smi` for NVLink, sysfs for RDMA network cards."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist

from deepep.errors import UnsupportedOperation

DEFAULT_NVLINK_GBS = 450.0
"""One direction of an H100's or H200's NVLink, GB/s: assumed where there is no GPU or no NVLink to ask."""
DEFAULT_RDMA_GBS = 50.0
"""A network card of 400 Gb/s, in GB/s: assumed where there is none to ask."""
INFINIBAND = Path("/sys/class/infiniband")
"""Where Linux lists RDMA network cards."""

_CONNECTX_7 = 4129


def get_nvlink_gbs(factor: float = 0.9) -> float:
    """GB/s that the current GPU can send over NVLink (one direction, all links): nominal speed times `factor`.

    Where there is nothing to ask, `DEFAULT_NVLINK_GBS` stands for the nominal speed, so the result is always positive.
    """
    if not torch.cuda.is_available():
        return DEFAULT_NVLINK_GBS * factor
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return (_sum_of_links(_nvlink_status(f"GPU-{uuid}")) or DEFAULT_NVLINK_GBS) * factor


@functools.cache
def _nvlink_status(gpu: str) -> str:
    command = ["nvidia-smi", "nvlink", "--status", "-i", gpu]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _sum_of_links(status: str) -> float:
    return sum(float(speed) for speed in re.findall(r"Link \d+:\s*([\d.]+) GB/s", status))


def get_rdma_gbs(nic: str | None = None) -> float:
    """GB/s of one RDMA network card, from its first port with a rate; `DEFAULT_RDMA_GBS` where there is none.

    Args:
        nic: its name, e.g. `mlx5_0`; by default the first one there is.
    """
    for port in sorted((INFINIBAND / (nic or _first_nic())).glob("ports/*/rate")):
        rate = re.match(r"[\d.]+", _read(port))  # "400 Gb/sec (4X NDR)"
        if rate is not None and float(rate[0]) > 0:
            return float(rate[0]) / 8
    return DEFAULT_RDMA_GBS


def check_fast_rdma_atomic_support(nic: str | None = None) -> bool:
    """Whether an RDMA network card does atomics at full speed: a ConnectX-7 or newer, by its `hca_type`.

    Args:
        nic: its name, e.g. `mlx5_0`; by default the first one there is. False where there is none.
    """
    model = re.match(r"MT(\d+)", _read(INFINIBAND / (nic or _first_nic()) / "hca_type"))
    return model is not None and int(model[1]) >= _CONNECTX_7


def _first_nic() -> str:
    return min((card.name for card in INFINIBAND.glob("*")), default="none")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def check_nvlink_connections(group: dist.ProcessGroup) -> None:
    """Check that the GPUs of the group's ranks on this host can load from and store to each other. Collective.

    Ours: upstream looks at the GPU's name and at NVLink alone; what counts is the access, over whatever link. GPUs that
    this process cannot see cannot be judged. Nothing to check without a GPU.

    Raises:
        UnsupportedOperation: names the pair that has no access.
    """
    if not torch.cuda.is_available():
        return
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    here = torch.cuda.current_device()
    everyone: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, str(torch.cuda.get_device_properties(here).uuid), group=group)
    for rank, uuid in enumerate(everyone):
        peer = visible.get(uuid or "", here)
        if peer != here and not torch.cuda.can_device_access_peer(here, peer):
            raise UnsupportedOperation(
                f"GPU {here} (rank {dist.get_rank(group)}) cannot access GPU {peer} (rank {rank}): no NVLink and no "
                "PCIe peer access between them; `nvidia-smi topo -m` shows the links. Use backend='reference' there"
            )
