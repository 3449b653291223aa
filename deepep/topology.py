"""Which ranks share a GPU, a host, a load/store domain. Every rank of a group holds the same `Topology`."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deepep import env
from deepep.errors import InvalidArgument
from deepep.group import Group


@dataclass(frozen=True)
class Topology:
    """Host and GPU of every rank.

    Attributes:
        hosts: per rank, a name that is equal exactly for ranks on one host (container).
        gpus: per rank, the UUID of its CUDA device, or None where it works on the CPU.
    """

    hosts: tuple[str, ...]
    gpus: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if not self.hosts or len(self.hosts) != len(self.gpus):
            raise InvalidArgument(
                f"Topology: {len(self.hosts)} hosts and {len(self.gpus)} gpus; expected one of each per rank"
            )

    @classmethod
    def discover(cls, group: Group, use_cuda: bool, timeout: float) -> Topology:
        """Asks every rank where it is. `DEEPEP_NUM_HOSTS` lets the ranks stand for that many hosts (see `split`).

        Args:
            group: collective over its ranks.
            use_cuda: look at the current CUDA device; otherwise no GPU is touched and `gpus` are None.
            timeout: seconds.

        Raises:
            CommTimeout: a rank did not answer.
            InvalidArgument: `DEEPEP_NUM_HOSTS` is no number, differs between ranks or does not divide them.
        """
        wish: int | InvalidArgument | None
        try:
            wish = env.num_hosts()
        except InvalidArgument as error:
            wish = error  # raised on all ranks, so that none waits for this one
        mine = (_host_name(), _gpu_uuid() if use_cuda else None, wish)
        everyone = group.all_gather_object(mine, op="Topology.discover", timeout=timeout)
        hosts, gpus, wishes = zip(*everyone, strict=True)
        for rank, wish in enumerate(wishes):
            if isinstance(wish, InvalidArgument):
                raise InvalidArgument(f"rank {rank}: {wish}")
        if len(set(wishes)) > 1:
            by_rank = ", ".join(f"rank {rank}: {wish}" for rank, wish in enumerate(wishes))
            raise InvalidArgument(f"DEEPEP_NUM_HOSTS differs between ranks ({by_rank}); set it equally everywhere")
        topology = cls(hosts, gpus)
        return topology if wishes[0] is None else topology._regrouped(wishes[0])

    @classmethod
    def split(cls, num_ranks: int, num_hosts: int) -> Topology:
        """`num_ranks` CPU ranks as `num_hosts` equal contiguous hosts, wherever they really run.

        Raises:
            InvalidArgument: `num_hosts` is below 1 or does not divide `num_ranks`.
        """
        return cls(("here",) * num_ranks, (None,) * num_ranks)._regrouped(num_hosts)

    def _regrouped(self, num_hosts: int) -> Topology:
        num_ranks = len(self.hosts)
        if num_hosts < 1 or num_ranks % num_hosts:
            raise InvalidArgument(f"num_hosts={num_hosts}: expected a number that divides the {num_ranks} ranks")
        per_host = num_ranks // num_hosts
        return Topology(tuple(f"host{rank // per_host}" for rank in range(num_ranks)), self.gpus)

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return len(self.hosts)

    @property
    def spans_hosts(self) -> bool:
        """Whether the ranks are on more than one host."""
        return len(set(self.hosts)) > 1

    @property
    def num_scaleout_ranks(self) -> int:
        """Number of hosts, if each holds an equal, contiguous block of ranks; otherwise 1 (one flat domain)."""
        num_hosts = len(set(self.hosts))
        return num_hosts if _are_equal_blocks(self.hosts, num_hosts) else 1

    @property
    def num_scaleup_ranks(self) -> int:
        """Ranks per host, if each host holds an equal, contiguous block of ranks; otherwise all ranks."""
        return self.num_ranks // self.num_scaleout_ranks

    def scaleup_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks of `rank`'s scaleup domain, itself included, ascending; `num_scaleup_ranks` of them."""
        first = self._checked(rank) // self.num_scaleup_ranks * self.num_scaleup_ranks
        return tuple(range(first, first + self.num_scaleup_ranks))

    def ranks_per_gpu(self, rank: int) -> int:
        """How many ranks work on the GPU of `rank`, itself included; 1 where it has none."""
        gpu = self.gpus[self._checked(rank)]
        return 1 if gpu is None else self.gpus.count(gpu)

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.num_ranks:
            raise InvalidArgument(f"rank={rank}: expected 0 to {self.num_ranks - 1}")
        return rank


def _are_equal_blocks(hosts: Sequence[str], num_hosts: int) -> bool:
    if len(hosts) % num_hosts:
        return False
    size = len(hosts) // num_hosts
    return all(len(set(hosts[first : first + size])) == 1 for first in range(0, len(hosts), size))


def _host_name() -> str:
    # Containers of one machine share the boot id and cloned machines the name: only both tell hosts apart.
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot_id = ""
    return f"{socket.gethostname()}/{boot_id}"


def _gpu_uuid() -> str | None:
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
