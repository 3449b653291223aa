"""Normal mode over a symmetric window: an operation is these launches."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from deepep.backends.base import BackendOptions
from deepep.cuda import driver, jit, kernels
from deepep.cuda.arguments import MAX_RANKS, BarrierArgs, HostWord, Window
from deepep.cuda.call_order import CallOrder
from deepep.cuda.copies import Copies
from deepep.cuda.host_words import HostWords
from deepep.cuda.launch import current_stream, runtime
from deepep.cuda.status import Status, op_word
from deepep.cuda.window import MAX_LOCAL_EXPERTS, WindowMap, map_window
from deepep.errors import DeepEPError, InvalidArgument, UnsupportedOperation
from deepep.layout import align

_SMEM_ATTRIBUTE = "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"
_SM_ATTRIBUTE = "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT"
DEFAULT_NUM_SMS = 24
_ALIGNMENT = 256
_MOST_PLANS = 256


class Memory(Protocol):
    """What an engine needs of symmetric memory."""

    base: int
    peer_table: int

    def as_tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor over own bytes from `offset` on."""

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Give the offset of a contiguous tensor inside own memory, or None."""


@dataclass
class Engine:
    """Kernels, window and status page of one backend; what dispatch and combine have in common.

    Attributes:
        memory: the symmetric window, `window_map.num_bytes` long.
        window_map: its division.
        rank: of this process.
        num_ranks: R.
        device: index of the CUDA device.
        ranks_per_gpu: ranks that share it; they divide its multiprocessors.
        timeout: longest wait for a peer, seconds.
        order: in which operations run, those of low latency included.
        plans: of dispatches and combines, by shape; for as many shapes as `remember` keeps.
    """

    memory: Memory
    window_map: WindowMap
    rank: int
    num_ranks: int
    device: int
    ranks_per_gpu: int
    timeout: float
    order: CallOrder = field(default_factory=CallOrder)
    plans: dict[Any, Any] = field(default_factory=dict)
    _scratch: dict[int, torch.Tensor] = field(default_factory=dict)
    _handles: dict[str, int] = field(default_factory=dict)
    _inputs: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind -> offset in the window, bytes
    _input_bytes: int = 0
    _ticket: int = 0

    def __post_init__(self) -> None:
        self.words = HostWords(8 * (HostWord.MISSING + 2 * self.num_ranks + 1 + MAX_LOCAL_EXPERTS))
        self.status = Status(self.words, self.rank, self.num_ranks, self.timeout)
        self.most_sms = max(driver.device_attribute(_SM_ATTRIBUTE, self.device) // self.ranks_per_gpu, 1)
        optin = driver.device_attribute(_SMEM_ATTRIBUTE, self.device)
        self.smem_bytes = min(optin - kernels.STATIC_SMEM_BYTES, kernels.MOST_SMEM_BYTES)
        struct = self.window_map.struct
        struct.peers, struct.host = self.memory.peer_table, self.words.device_address
        struct.rank, struct.timeout_ns = self.rank, int(self.timeout * 1e9)
        self.window = struct
        self._launch, self._wait_word = runtime().launch, runtime().wait_word

    @functools.cached_property
    def copies(self) -> Copies:
        """The copy engine, at this backend's disposal."""
        return Copies(self.device)

    def stream(self) -> int:
        """Give the handle of torch's current stream, for launches by this thread."""
        driver.ensure_context(self.device)
        return current_stream(self.device)

    def num_sms(self, wanted: int) -> int:
        """Multiprocessors to use: never more than this rank's share, since kernels that wait must all be resident."""
        return max(1, min(wanted or DEFAULT_NUM_SMS, self.most_sms))

    def remember(self, key: Any, plan: Any) -> None:
        """Keep a plan, and not ever more of them."""
        if len(self.plans) >= _MOST_PLANS:
            self.plans.clear()
        self.plans[key] = plan

    def begin(self) -> int:
        """Let what is launched next on the current stream wait for calls on other streams; gives the stream."""
        stream = self.stream()
        self.order.enter(stream)
        return stream

    def prepare(self, window: Window, num_experts: int) -> int:
        """Begin, and fill in scratch memory and the ticket that marks host words; gives the stream."""
        stream = self.begin()
        self._ticket = self._ticket % 0xFFFFFFFF + 1
        window.ticket = self._ticket
        scratch = self._scratch.get(num_experts)
        if scratch is None:
            # Kept for good: graphs hold its address.
            num_words = num_experts + self.most_sms * (num_experts + self.num_ranks)
            scratch = torch.empty(num_words, dtype=torch.int32, device=f"cuda:{self.device}")
            self._scratch[num_experts] = scratch
        window.scratch = scratch.data_ptr()
        return stream

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """What is wrong in here is known to this rank alone, before it has begun: let the others know."""
        try:
            yield
        except InvalidArgument:
            self.barrier_launch(is_refusal=True)
            raise

    def launch(
        self, spec: jit.KernelSpec, num_sms: int, num_threads: int, smem: int, args: ctypes.Structure, stream: int
    ) -> None:
        """Start a kernel on a stream, see `stream`."""
        handle = self._handles.get(spec.name)
        if handle is None:
            kernel = jit.load(spec, self.device)
            kernel.set_max_smem(self.smem_bytes)
            handle = self._handles[spec.name] = kernel.handle
        self._launch(handle, num_sms, num_threads, smem, stream, ctypes.addressof(args))
        self.order.leave(stream)

    def wait_counts(self) -> int:
        """Wait, without the GIL, until notify has written this call's counts; raise what went wrong instead.

        Returns:
            Compact rows received. The other counts can be read until the next notify.
        """
        ready = self._ticket << 32 | 1
        # The kernel gives up by itself; the host only needs to outlast it.
        self._wait_word(self.words.host_address + 8 * HostWord.READY, ready, self.timeout + 10.0)
        words = self.words.host
        if int(words[HostWord.CODE]):
            self.barrier_launch(is_close=True)
            self.status.raise_error()
        if int(words[HostWord.READY]) != ready:
            torch.cuda.current_stream(self.device).synchronize()
            self.status.raise_error()
        return int(words[HostWord.MISSING + self.num_ranks]) & 0xFFFFFFFF

    def aligned_counts(self, num_local_experts: int, alignment: int) -> list[int]:
        """Give the rows received for each local expert, aligned, after `wait_counts`."""
        counts = self._values(HostWord.MISSING + 2 * self.num_ranks + 1, num_local_experts)
        if alignment > 1:
            counts = (counts + (alignment - 1)) // alignment * alignment
        aligned: list[int] = counts.tolist()
        return aligned

    def sent_counts(self) -> tuple[int, ...]:
        """Give the rows that this rank sent to each rank, after `wait_counts`."""
        return tuple(self._values(HostWord.MISSING + self.num_ranks + 1, self.num_ranks).tolist())

    def _values(self, first: int, number: int) -> np.ndarray:
        """Give the lower halves of host words."""
        return self.words.host.view(np.int32)[2 * first : 2 * (first + number) : 2]

    def barrier_launch(self, *, is_refusal: bool = False, is_close: bool = False) -> None:
        """Meet all ranks, refuse the running operation towards them, or end a failed one."""
        args = BarrierArgs(window=self.window, is_refusal=is_refusal, is_close=is_close)
        args.header[0] = op_word("barrier")
        self.launch(kernels.BARRIER, 1, kernels.BARRIER_THREADS, 0, args, self.begin())

    @property
    def ring_bytes(self) -> int:
        """Bytes of the payload region that are not handed out as input buffers."""
        return self.window_map.payload_bytes - self._input_bytes

    def input_buffer(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor inside the window; each kind has one place, and what is asked for again lies there, too.

        Raises:
            InvalidArgument: the window is too small; says what would do.
        """
        needed = align(max(torch.Size(shape).numel() * dtype.itemsize, 1), _ALIGNMENT)
        limit, end = self.window_map.payload_bytes, self.window_map.payload + self.window_map.payload_bytes
        offset, size = self._inputs.get(kind, (end, 0))
        if needed > size:
            # From the end of the window down, rings before them all: what was given to another kind is never moved.
            is_lowest = offset == end - self._input_bytes
            total = self._input_bytes + needed - (size if is_lowest else 0)
            if total > limit // 2:
                more = self.window_map.num_bytes + 2 * total - limit
                raise InvalidArgument(
                    f"get_{kind}_input_buffer: {total} bytes do not fit half of this window's {limit}; build the "
                    f"buffer with at least {more} bytes"
                )
            self._input_bytes = total
            offset, _ = self._inputs[kind] = (end - total, needed)
        return self.memory.as_tensor(offset, shape, dtype)

    def close(self) -> None:
        """Give the status page back; kernels must be over."""
        self.words.close()
        self._scratch.clear()
        self.order.close()
        if "copies" in self.__dict__:
            with contextlib.suppress(DeepEPError):
                self.copies.close()


def place_in_window(engine: Engine, x: torch.Tensor) -> int:
    """Where in the window a tensor begins, -1 if elsewhere: what plans depend on, at less cost than `offset_of`."""
    offset = x.data_ptr() - engine.memory.base
    return offset if 0 <= offset < engine.window_map.num_bytes else -1


def make_engine(
    memory_of: Any, rank: int, num_ranks: int, device: int, ranks_per_gpu: int, options: BackendOptions
) -> Engine:
    """Build an engine; `memory_of(num_bytes)` makes the symmetric memory, collectively."""
    if num_ranks > MAX_RANKS:
        raise UnsupportedOperation(
            f"normal mode: at most {MAX_RANKS} ranks share a window, the group has {num_ranks}; use backend='reference'"
        )
    window_map = map_window(num_ranks, options)
    memory = memory_of(window_map.num_bytes)
    return Engine(memory, window_map, rank, num_ranks, device, ranks_per_gpu, options.timeout)
