"""The yardstick: bare all-to-all calls that move the same bytes, prepared and unpacked by nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepep.group import Group
from deepep.topology import Topology


class BareTransport:
    """`all_to_all_single` over gloo on the CPU, over NCCL between GPUs that ranks do not share.

    Attributes:
        name: what moves the bytes; None where there is no yardstick (MPI, shared GPUs, no NCCL).
    """

    def __init__(self, group: Group, topology: Topology, device: str) -> None:
        self.name: str | None = None
        self._group: Any = None
        self._device = device
        if not isinstance(group.raw, dist.ProcessGroup):
            return
        if device == "cpu":
            self.name, self._group = "gloo", group.raw
        elif dist.is_nccl_available() and all(topology.ranks_per_gpu(rank) == 1 for rank in range(group.num_ranks)):
            self.name, self._group = "nccl", dist.new_group(backend="nccl")

    def calls(self, moves: list[tuple[list[int], list[int]]], *, is_reused: bool) -> Callable[[], Any] | None:
        """Prepare one all-to-all per (bytes to each rank, bytes from each rank); the rank's own bytes move, too.

        Args:
            moves: of one operation.
            is_reused: receive into the same tensors every time; otherwise into new ones, as an operation that returns
                tensors must.

        Returns:
            The calls, or None where there is nothing to compare with.
        """
        if self.name is None or not moves:
            return None
        sources = [torch.ones(sum(sent), dtype=torch.uint8, device=self._device) for sent, _ in moves]

        def room() -> list[torch.Tensor]:
            return [torch.empty(sum(received), dtype=torch.uint8, device=self._device) for _, received in moves]

        kept = room() if is_reused else None

        def call() -> list[torch.Tensor]:
            outs = room() if kept is None else kept
            for out, source, (sent, received) in zip(outs, sources, moves, strict=True):
                dist.all_to_all_single(out, source, received, sent, group=self._group)
            return outs

        return call

    def close(self) -> None:
        """Leave the process group made here, if one was."""
        if self.name == "nccl":
            dist.destroy_process_group(self._group)
