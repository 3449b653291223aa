"""How large an `ElasticBuffer` is, how many multiprocessors it wants, and which domains its ranks form."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch

from deepep import env
from deepep.errors import InvalidArgument
from deepep.group import make_group
from deepep.layout import align
from deepep.topology import Topology

if TYPE_CHECKING:
    from deepep.front import Front

    _Base = Front
else:
    _Base = object

SIZE_ALIGNMENT = 2 << 20
"""Buffer sizes are multiples of this many bytes: the page size of device memory."""
DEFAULT_NUM_TOPK = 32
"""Assumed where a caller gives no `num_topk`."""
DEFAULT_NVLINK_GBS = 366.0
"""What kernels reach at best between two H200, GB/s each way: assumed where a caller gives no speed."""
DEFAULT_RDMA_GBS = 50.0
"""A network card of 400 Gb/s: likewise."""

_SM_HEADROOM = 1.25
_MIN_SMS = 4
_MIN_SMS_ALONE = 64  # where nothing else runs beside the operation
_QPS_PER_SM = 16  # across hosts: one queue pair per channel
_MAX_DIRECT_QPS = 9
_SIZE_ATTRIBUTES = ("num_ranks", "size", "Get_size")


class SizesMixin(_Base):
    """Sizes of an `ElasticBuffer` and of its domains."""

    allow_hybrid_mode: bool
    prefer_overlap_with_compute: bool
    num_scaleout_ranks: int
    num_scaleup_ranks: int
    num_allocated_qps: int

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,  # noqa: ARG004 - upstream's rings across hosts are larger; none here
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Give the `num_bytes` that an MoE shape needs, a multiple of 2 MB. Not collective; see `buffer_size_hint`."""
        return buffer_size_hint(
            group_size(group), num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, allow_multiple_reduction
        )

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Give `(num_rdma_ranks, num_nvlink_ranks)`: hosts, and ranks per host."""
        return self.topology.num_scaleout_ranks, self.topology.num_scaleup_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Give `(num_scaleout_ranks, num_scaleup_ranks)`; one domain of all ranks without `allow_hybrid_mode`."""
        return logical_domain_size(self.get_physical_domain_size(), self.allow_hybrid_mode)

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """Give the multiprocessors a call takes with `num_sms=0`; arguments as in `theoretical_num_sms`."""
        needed = theoretical_num_sms(
            (self.num_scaleout_ranks, self.num_scaleup_ranks), num_experts, num_topk, num_scaleout_topk, rdma_gbs,
            nvlink_gbs, sm_read_gbs, sm_write_gbs,
        )  # fmt: skip
        return limited_num_sms(needed, self.prefer_overlap_with_compute, self._num_sms_available)

    @functools.cached_property
    def _num_sms_available(self) -> int | None:
        """Multiprocessors of this rank's GPU, shared out among the ranks on it; None without a GPU."""
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.multi_processor_count // self.topology.ranks_per_gpu(self.rank)

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Give the network queue pairs that `num_sms` multiprocessors can use, at most `num_allocated_qps`."""
        return theoretical_num_qps(num_sms, self.num_scaleout_ranks > 1, self.num_allocated_qps)


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """Give `(num_rdma_ranks, num_nvlink_ranks)`: hosts, and ranks per host. Collective over `group` (upstream API)."""
    topology = Topology.discover(make_group(group), use_cuda=False, timeout=env.timeout())
    return topology.num_scaleout_ranks, topology.num_scaleup_ranks


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """Give `(num_scaleout_ranks, num_scaleup_ranks)`: as above, or one domain of all ranks without hybrid mode.

    Collective over `group` (upstream API).
    """
    return logical_domain_size(get_physical_domain_size(group), allow_hybrid_mode)


def logical_domain_size(physical: tuple[int, int], allow_hybrid_mode: bool) -> tuple[int, int]:
    """Turn `(num_rdma_ranks, num_nvlink_ranks)` into `(num_scaleout_ranks, num_scaleup_ranks)`."""
    return physical if allow_hybrid_mode else (1, math.prod(physical))


def buffer_size_hint(
    num_ranks: int, num_max_tokens_per_rank: int, hidden: int, num_topk: int, use_fp8_dispatch: bool,
    allow_multiple_reduction: bool,
) -> int:  # fmt: skip
    """Give the bytes of a window that two ranks' rows go through at once, and every rank's routing.

    Args:
        num_ranks: R.
        num_max_tokens_per_rank: M.
        hidden: H; two bytes an element, or one and a scale factor per 128 with `use_fp8_dispatch`.
        num_topk: K; 0 for 32.
        use_fp8_dispatch: payload of dispatch is FP8.
        allow_multiple_reduction: one row per (token, rank) comes home, not one per (token, expert).

    Returns:
        A multiple of 2 MB.
    """
    if num_max_tokens_per_rank <= 0 or hidden <= 0 or num_topk < 0:
        raise InvalidArgument(
            f"get_buffer_size_hint: num_max_tokens_per_rank={num_max_tokens_per_rank}, hidden={hidden}, "
            f"num_topk={num_topk}; the first two must be above 0, the last 0 (unknown) or above"
        )
    num_topk = num_topk or DEFAULT_NUM_TOPK
    row_bytes = align(2 * hidden, 32)
    sent_bytes = align(hidden, 32) + align(4 * -(-hidden // 128), 32) if use_fp8_dispatch else row_bytes
    # Rows travel through rings: more ranks make them shorter, not the window larger.
    num_at_once = min(num_ranks, 2)
    num_returned = 1 if allow_multiple_reduction else min(num_topk, 2)
    payload = num_at_once * max(sent_bytes, num_returned * row_bytes)
    # Beside each row of every rank, for two operations: top-k numbers and weights, the source, its expanded copies.
    beside = 2 * num_ranks * align(num_topk * (8 + 4) + (1 + num_topk) * 4, 32)
    num_bytes = num_max_tokens_per_rank * (payload + beside)
    return align(num_bytes, SIZE_ALIGNMENT)


def check_num_bytes(num_bytes: int) -> None:
    """Check the size that a constructor was given."""
    if num_bytes <= 0:
        raise InvalidArgument(
            f"ElasticBuffer: num_bytes is {num_bytes}; it must be above 0, or None and given by "
            "num_max_tokens_per_rank and hidden"
        )


def group_size(group: Any) -> int:
    """Give the ranks of a torch process group, an mpi4py communicator or a `Group`, without communicating."""
    for name in _SIZE_ATTRIBUTES:
        size = getattr(group, name, None)
        if size is not None:
            return int(size() if callable(size) else size)
    raise InvalidArgument(f"group is a {type(group).__name__}; pass a process group or communicator")


@functools.lru_cache(maxsize=256)
def theoretical_num_sms(
    domain: tuple[int, int], num_experts: int, num_topk: int, num_scaleout_topk: int = 0, rdma_gbs: float = 0,
    nvlink_gbs: float = 0, sm_read_gbs: float = 200, sm_write_gbs: float = 50,
) -> int:  # fmt: skip
    """Give the even number of multiprocessors that keeps up with the slowest link under uniform routing.

    All rates are per row received: bytes over each link, bytes that multiprocessors read and write.

    Args:
        domain: `(num_scaleout_ranks, num_scaleup_ranks)`.
        num_experts: E.
        num_topk: K.
        num_scaleout_topk: most domains a token may go to; 0 for no limit.
        rdma_gbs: GB/s of this rank's network; 0 for what is usual.
        nvlink_gbs: GB/s of its load/store link; 0 likewise.
        sm_read_gbs: GB/s that one multiprocessor reads.
        sm_write_gbs: GB/s that one multiprocessor writes.
    """
    num_scaleout, num_scaleup = domain
    num_ranks = num_scaleout * num_scaleup
    if num_topk < 1 or num_experts < num_ranks or num_experts % num_ranks or min(sm_read_gbs, sm_write_gbs) <= 0:
        raise InvalidArgument(
            f"get_theoretical_num_sms: num_experts={num_experts}, num_topk={num_topk}, sm_read_gbs={sm_read_gbs}, "
            f"sm_write_gbs={sm_write_gbs}; experts must be a multiple of the {num_ranks} ranks, the rest above 0"
        )
    ranks_per_token = _expected_groups(num_ranks, num_experts, num_topk)
    hosts_per_token = min(_expected_groups(num_scaleout, num_experts, num_topk), num_scaleout_topk or math.inf)
    # A single rank copies to itself; it is given as many as one of two.
    rate = (nvlink_gbs or DEFAULT_NVLINK_GBS) / (1 - 1 / max(num_scaleup, 2))
    reads, writes = 1 / ranks_per_token, 1.0
    if num_scaleout > 1:
        per_row = hosts_per_token / ranks_per_token
        rate = min(rate, (rdma_gbs or DEFAULT_RDMA_GBS) / (per_row * (1 - 1 / num_scaleout)))
        # What comes over the network is written down and read again on its way to the ranks of the host.
        reads, writes = reads + per_row, writes + per_row
    needed = _SM_HEADROOM * rate * max(reads / sm_read_gbs, writes / sm_write_gbs)
    return max(align(math.ceil(needed), 2), _MIN_SMS)


def limited_num_sms(needed: int, prefer_overlap_with_compute: bool, available: int | None) -> int:
    """Fit a number of multiprocessors to what there is; more of them where nothing runs beside the operation."""
    wanted = needed if prefer_overlap_with_compute else max(needed, _MIN_SMS_ALONE)
    return wanted if available is None else max(min(wanted, available // 2 * 2), 2)


def theoretical_num_qps(num_sms: int, is_hybrid: bool, num_allocated_qps: int) -> int:
    """Give the network queue pairs that so many multiprocessors can use, no more than were allocated."""
    return min(_QPS_PER_SM * num_sms + 1 if is_hybrid else min(max(num_sms, 1), _MAX_DIRECT_QPS), num_allocated_qps)


def _expected_groups(num_groups: int, num_experts: int, num_topk: int) -> float:
    """Give the expected number of distinct groups that K distinct experts fall into."""
    num_others = num_experts - num_experts // num_groups
    num_topk = min(num_topk, num_experts)
    return num_groups * (1 - math.comb(num_others, num_topk) / math.comb(num_experts, num_topk))
