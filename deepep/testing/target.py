"""What a contract check works with: the backend under test and a list of what it got wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepep.testing.oracle import bits
from deepep.testing.routing import Case

#: Which rows of a tensor to look at: a range, or True where one counts.
Rows = slice | torch.Tensor


class ContractViolation(AssertionError):
    """A backend's outcome differs from the oracle's; one line per difference."""


@dataclass(frozen=True)
class Target:
    """The backend under test.

    Attributes:
        backend: name for `backend=`.
        device: where tensors live, 'cpu' or 'cuda' (the current device).
        timeout: of every buffer, seconds.
    """

    backend: str = "reference"
    device: str = "cpu"
    timeout: float = 30.0

    def buffer(self, group: Any, case: Case, *, low_latency_mode: bool = False, **options: Any) -> Any:
        """Build a `Buffer` large enough for `case`; collective."""
        import deepep

        num_ranks, hidden_bytes = case.num_ranks, case.hidden * 4
        config = deepep.Buffer.get_dispatch_config(num_ranks)
        num_nvl_bytes = config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks)
        num_rdma_bytes = config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks)
        if low_latency_mode:
            shape = (case.num_max_tokens_per_rank, case.hidden, num_ranks, case.num_experts)
            num_nvl_bytes, num_rdma_bytes = 0, deepep.Buffer.get_low_latency_rdma_size_hint(*shape)
        return deepep.Buffer(
            group,
            num_nvl_bytes,
            num_rdma_bytes,
            low_latency_mode=low_latency_mode,
            explicitly_destroy=True,
            **self._common(case),
            **options,
        )

    def elastic_buffer(self, group: Any, case: Case, **options: Any) -> Any:
        """Build an `ElasticBuffer` for the shape of `case`; collective."""
        import deepep

        return deepep.ElasticBuffer(
            group,
            num_max_tokens_per_rank=case.num_max_tokens_per_rank,
            hidden=case.hidden,
            num_topk=case.num_topk,
            explicitly_destroy=True,
            **self._common(case),
            **options,
        )

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor to where the backend works; strides are kept."""
        placed = tensor.to(self.device)
        if placed.stride() == tensor.stride():
            return placed
        # `to` keeps strides only where elements leave no gaps.
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device).copy_(tensor)

    def put_unaligned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a contiguous tensor to an address that is a multiple of its elements' size only."""
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=self.device)
        return room[1:].view(tensor.shape).copy_(tensor)

    def payload(self, x: torch.Tensor, sf: torch.Tensor | None) -> Any:
        """Hand a payload over as programs do: alone, or as a pair with its scale factors."""
        return self.put(x) if sf is None else (self.put(x), self.put(sf))

    def _common(self, case: Case) -> dict[str, Any]:
        from deepep.topology import Topology

        common: dict[str, Any] = {"backend": self.backend, "timeout": self.timeout}
        if case.num_hosts > 1:
            common["topology"] = Topology.split(case.num_ranks, case.num_hosts)
        return common


class Findings:
    """Collects differences, so that a rank that finds one still takes part in the communication that follows."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.lines: list[str] = []

    def equal(self, what: str, got: Any, want: Any) -> None:
        """Note any difference of type, shape, element type or value between plain values or the bits of tensors."""
        if isinstance(want, torch.Tensor):
            difference = _tensor_difference(got, want)
        else:
            difference = "" if type(got) is type(want) and got == want else f"got {got!r}, expected {want!r}"
        if difference:
            self.lines.append(f"rank {self.rank}: {what}: {difference}")

    def true(self, what: str, holds: bool) -> None:
        """Note a statement that does not hold."""
        if not holds:
            self.lines.append(f"rank {self.rank}: not true: {what}")

    def payload(self, what: str, got: Any, x: torch.Tensor, sf: torch.Tensor | None, rows: Rows) -> None:
        """Compare the chosen `rows` of a received payload, alone or a pair, with `x` and `sf`."""
        if (sf is not None) != (isinstance(got, tuple) and len(got) == 2):
            self.lines.append(f"rank {self.rank}: {what}: got {type(got).__name__}, sf expected: {sf is not None}")
            return
        got_x, got_sf = got if sf is not None else (got, None)
        self.equal(f"{what} x", pick(got_x, rows), x)
        if sf is not None and got_sf is not None:
            self.equal(f"{what} sf", pick(got_sf, rows), sf)

    def finish(self) -> None:
        """Raise `ContractViolation` if anything was noted."""
        if self.lines:
            raise ContractViolation("\n".join(self.lines))


def pick(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Take rows of a tensor of any element type, on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    return bits(tensor)[rows].view(tensor.dtype)


def poisoned(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Extend rows with NaN to `num_rows`: whoever reads the tail gives itself away."""
    tail = torch.full((num_rows - len(rows), *rows.shape[1:]), float("nan"), dtype=rows.dtype)
    return torch.cat([rows, tail])


def scattered(rows: torch.Tensor, mask: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Take `rows` where `mask` is True and NaN elsewhere, and a NaN tail up to `num_rows`."""
    shape = (-1, *[1] * (rows.dim() - 1))
    return poisoned(torch.where(mask.view(shape), rows, torch.tensor(float("nan"), dtype=rows.dtype)), num_rows)


def _tensor_difference(got: Any, want: torch.Tensor) -> str:
    if not isinstance(got, torch.Tensor):
        return f"got {got!r}, expected a tensor {tuple(want.shape)} {want.dtype}"
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"got {tuple(got.shape)} {got.dtype}, expected {tuple(want.shape)} {want.dtype}"
    got = got.detach().cpu()
    wrong = bits(got.contiguous()) != bits(want.contiguous())
    if not wrong.any():
        return ""
    places: Sequence[int] = wrong.nonzero()[0].tolist()
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements of {tuple(want.shape)} differ, first at {list(places)}: "
        f"got {got.float()[tuple(places)]:g}, expected {want.float()[tuple(places)]:g}"
    )
