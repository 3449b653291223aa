"""`Config`: upstream's tuning record and its size hints; any rank count has a default."""

from __future__ import annotations

from dataclasses import dataclass

from deepep.errors import InvalidArgument
from deepep.layout import align

_SLOT_TOPK = 128  # top-k entries a slot of upstream's rings has room for
_SLOT_META_BYTES = 8 + _SLOT_TOPK * (8 + 4 + 4)
_MAX_NVL_PEERS = 8


@dataclass(frozen=True)
class Config:
    """How much of the GPU an operation may use (upstream API).

    Only `num_sms` steers the backends here; the chunk sizes describe rings that no backend of ours has. They are
    checked and enter the size hints, so that programs which carry tuned tables run unchanged.

    Raises:
        InvalidArgument: a chunk size is not positive, or a receive chunk is not larger than its send chunk.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        if self.num_sms < 0:
            raise InvalidArgument(f"Config: num_sms is {self.num_sms}; it must be 0 (automatic) or more")
        for link in ("nvl", "rdma"):
            send = getattr(self, f"num_max_{link}_chunked_send_tokens")
            recv = getattr(self, f"num_max_{link}_chunked_recv_tokens")
            if not 0 < send < recv:
                raise InvalidArgument(
                    f"Config: num_max_{link}_chunked_send_tokens={send} and num_max_{link}_chunked_recv_tokens={recv}; "
                    "0 < send < recv must hold"
                )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for `num_nvl_bytes`, rounded up to 128: rings of `num_sms / 2` channels to each peer of the host."""
        num_channels = max(self.num_sms // 2, 1)
        num_slots = num_channels * min(num_ranks, _MAX_NVL_PEERS) * self.num_max_nvl_chunked_recv_tokens
        return align(num_slots * (hidden_bytes + _SLOT_META_BYTES), 128)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for `num_rdma_bytes`, rounded up to 128; 0 where the ranks fit one host of eight."""
        if num_ranks <= _MAX_NVL_PEERS:
            return 0
        num_hosts = -(-num_ranks // _MAX_NVL_PEERS)
        num_slots = max(self.num_sms // 2, 1) * num_hosts * 2 * self.num_max_rdma_chunked_recv_tokens
        return align(num_slots * (hidden_bytes + _SLOT_META_BYTES + 16), 128)


def default_config(num_ranks: int, num_sms: int) -> Config:
    """Give the default for any rank count from 1 up; nothing in it depends on the rank count."""
    if num_ranks < 1:
        raise InvalidArgument(f"num_ranks is {num_ranks}; a group has at least one rank")
    return Config(num_sms=num_sms)
