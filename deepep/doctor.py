"""`python -m deepep doctor`: versions, GPUs and the links between them, ranks, and which backends can run here.

Started by torchrun or mpirun it also says which ranks share a host and a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from deepep import env, ranks
from deepep.backends import registry
from deepep.backends.base import Capabilities, Layout
from deepep.errors import DeepEPError
from deepep.group import Group
from deepep.topology import Topology
from deepep.version import __version__

_PACKAGES = ("numpy", "mpi4py", "cuda-core", "cuda-bindings", "cupy-cuda13x", "cupy-cuda12x", "nvshmem4py-cu13")
_COMMAND_TIMEOUT = 20.0
_DESCRIPTION = (
    "Say what works here: versions, GPUs and the links between them, and which backends can run, with the remedy for "
    "each that cannot. Started by torchrun or mpirun it also says which ranks share a host and a GPU."
)


def main(args: Sequence[str] | None = None) -> int:
    """Print the report on the first rank; returns the exit status: 0, or 1 if no backend can run."""
    parser = argparse.ArgumentParser(prog="python -m deepep doctor", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    chosen = parser.parse_args(args)
    try:
        placed = _placed_ranks()
    except DeepEPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if placed is None:
        return 0
    found = examine(placed[0] if placed else None)
    print(json.dumps(found, indent=1) if chosen.json else as_text(found))
    return 0 if any(backend["ok"] for backend in found["backends"]) else 1


def examine(topology: Topology | None) -> dict[str, Any]:
    """Look at everything; `topology` is that of the ranks, where there are several."""
    return {
        "versions": _versions(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("DEEPEP_")},
        "gpus": _gpus(),
        "peer_access": _peer_access(),
        "links": _links(),
        "ranks": _ranks(topology),
        "backends": [
            {"name": status.name, **vars(status.availability), "capabilities": _capabilities(status.capabilities)}
            for status in (registry.probe(name, topology) for name in registry.names())
        ],
    }


def as_text(found: dict[str, Any]) -> str:
    """Lay out a report for people."""
    lines = ["versions"]
    lines += [f"  {name:14} {version}" for name, version in found["versions"].items()]
    lines += ["environment"] if found["environment"] else []
    lines += [f"  {name}={value}" for name, value in found["environment"].items()]
    lines.append("GPUs" if found["gpus"] else "GPUs: none that torch sees")
    for gpu in found["gpus"]:
        lines.append(
            f"  {gpu['index']}: {gpu['name']}, sm_{gpu['capability']}, {gpu['num_sms']} SMs, "
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['uuid']}"
        )
    for one, row in enumerate(found["peer_access"]):
        lines += [f"  {one} <-> {two}: no peer access" for two in range(one) if not row[two]]
    for one, row in found["links"].items():
        lines += [f"  {one} - {two}: {link}" for two, link in row.items() if one < two]
    lines += _ranks_as_text(found["ranks"])
    lines.append("backends, as `auto` tries them")
    for backend in found["backends"]:
        lines.append(
            f"  {backend['name']:10} {'available' if backend['ok'] else 'not available: ' + backend['reason']}"
        )
        if backend["remedy"] and not backend["ok"]:
            lines.append(f"  {'':10} mend it: {backend['remedy']}")
        if backend["capabilities"]:
            lines.append(f"  {'':10} {_capabilities_as_text(backend['capabilities'])}")
    return "\n".join(lines)


def _capabilities_as_text(able: dict[str, Any]) -> str:
    text = [
        f"{' and '.join(able['devices'])} tensors",
        f"{', '.join(able['layouts'])} rows",
        f"up to {able['max_topk']} experts per token",
        "any number of hosts" if able["spans_hosts"] else "one host",
    ]
    text += ["CUDA graphs"] if able["graph_capture"] else []
    text += ["input buffers read in place"] if able["zero_copy"] else []
    return "; ".join(text)


def _ranks_as_text(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["ranks: one process; start this by torchrun or mpirun to see theirs"]
    lines = [f"ranks: {found['num_ranks']} on {found['num_hosts']} host(s), started by {found['launcher']}"]
    return lines + [
        f"  {place['rank']}: {place['host']}, " + (f"GPU {place['gpu']}, {place['ranks_per_gpu']} rank(s) on it"
                                                  if place["gpu"] else "no GPU")
        for place in found["places"]
    ]  # fmt: skip


def _placed_ranks() -> list[Topology] | None:
    """Ask all ranks of a launcher where they are: [] without a launcher, None on ranks that say nothing."""
    if ranks.launcher() is None:
        return []
    return ranks.run_on_ranks(_topology, device="cuda" if torch.cuda.is_available() else "cpu")


def _topology(group: Group) -> Topology:
    return Topology.discover(group, use_cuda=torch.cuda.is_available(), timeout=env.timeout())


def _capabilities(able: Capabilities | None) -> dict[str, Any] | None:
    if able is None:
        return None
    layouts = [layout.value for layout in Layout if layout in able.layouts]
    return {**vars(able), "devices": sorted(able.devices), "layouts": layouts}


def _versions() -> dict[str, str]:
    found = {
        "deepep": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda or "none",
        "nccl of torch": _nccl_version(),
        "driver": _driver_version(),
        "mpirun": shutil.which("mpirun") or "none",
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _nccl_version() -> str:
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "none"
    version = torch.cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _driver_version() -> str:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else "none"


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "index": index,
                "name": properties.name,
                "uuid": str(properties.uuid),
                "capability": f"{properties.major}{properties.minor}",
                "num_sms": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        )
    return gpus


def _peer_access() -> list[list[bool]]:
    """Say for each pair of GPUs whether one can read and write the other's memory."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [[one == two or torch.cuda.can_device_access_peer(one, two) for two in range(count)] for one in range(count)]


def _links() -> dict[str, dict[str, str]]:
    """Give the kind of link between GPUs as nvidia-smi names it (NV18: 18 NVLinks; PIX, NODE, SYS: PCIe)."""
    return parse_links(_output("nvidia-smi", "topo", "-m"))


def parse_links(text: str) -> dict[str, dict[str, str]]:
    """Read the matrix of `nvidia-smi topo -m`; {} where there is none."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d", line)]
    if len(rows) < 2 or not rows[0][1].startswith("GPU"):
        return {}
    names = [cell for cell in rows[0] if re.fullmatch(r"GPU\d+", cell)]
    return {
        row[0]: {name: cell for name, cell in zip(names, row[1:], strict=False) if name != row[0]} for row in rows[1:]
    }


def _ranks(topology: Topology | None) -> dict[str, Any] | None:
    if topology is None:
        return None
    places = [
        {
            "rank": rank,
            "host": topology.hosts[rank].partition("/")[0],
            "gpu": topology.gpus[rank],
            "ranks_per_gpu": topology.ranks_per_gpu(rank),
        }
        for rank in range(topology.num_ranks)
    ]
    hosts = len(set(topology.hosts))
    return {"launcher": ranks.launcher(), "num_ranks": topology.num_ranks, "num_hosts": hosts, "places": places}


def _output(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
