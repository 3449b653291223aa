"""`CollectiveGroup`: a torch process group without gloo, by its one collective `all_to_all_single`.

NOTES. Such a backend (NCCL) cannot say who is missing, and its first collective blocks the calling thread until all
ranks have come. So ranks meet in a roll call on the process group's store before the first exchange, and again after
one that did not finish in time: whoever does not answer is missing.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepep.errors import CommTimeout
from deepep.group import Group, Limit, torch_members

# How long ranks may differ in noticing that an exchange has failed, seconds.
_ROLL_CALL_TIME = 2.0
_POLL_INTERVAL = 50e-6

# What an unfinished transfer may still write to; it outlives its group.
_unfinished: list[Any] = []
_num_groups: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class CollectiveGroup(Group):
    """A torch process group that has no gloo; tensors elsewhere are staged through `device`.

    Args:
        group: `torch.distributed.ProcessGroup`.
        device: where its collectives work, `"cuda"` (the current device) or `"cpu"`.
    """

    def __init__(self, group: Any, device: str) -> None:
        place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        super().__init__(group, group.rank(), group.size(), place)
        number = _num_groups.get(group, 0)
        _num_groups[group] = number + 1
        self._prefix = f"deepep/{group.group_name}/{number}"
        self._num_exchanges = 0

    @property
    def members(self) -> tuple[int, ...]:
        """Global ranks."""
        return torch_members(self.raw) or super().members

    def _exchange_bytes(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, limit: Limit
    ) -> None:
        if self._num_exchanges == 0:
            self._meet("first", op, limit, limit.left)
        self._num_exchanges += 1
        parts_out, parts_in = self._without_own(send), self._without_own(recv)
        flat_in = torch.empty(sum(part.numel() for part in parts_in), dtype=torch.uint8, device=self._device)
        flat_out = torch.cat(parts_out)
        sizes_in, sizes_out = [part.numel() for part in parts_in], [part.numel() for part in parts_out]
        work = dist.all_to_all_single(flat_in, flat_out, sizes_in, sizes_out, group=self.raw, async_op=True)
        while not work.is_completed():
            if limit.left == 0:
                _unfinished.append((work, flat_in, flat_out))
                self._meet(f"late/{self._num_exchanges}", op, limit, _ROLL_CALL_TIME)
                raise CommTimeout(op, self._peers(), limit.timeout, "all ranks are there, yet the transfer is not done")
            time.sleep(_POLL_INTERVAL)
        work.wait()
        for part, received in zip(parts_in, flat_in.split(sizes_in), strict=True):
            part.copy_(received)

    def _without_own(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor[:0] if rank == self.rank else tensor for rank, tensor in enumerate(tensors)]

    def _peers(self) -> list[int]:
        return [rank for rank in range(self.num_ranks) if rank != self.rank]

    def _meet(self, name: str, op: str, limit: Limit, seconds: float) -> None:
        """Roll call. Raises `CommTimeout` with the ranks that do not answer within `seconds`."""
        missing = set(self._peers())
        # A store whose host is gone or stopped may block for minutes, hence the thread.
        thread = threading.Thread(
            target=self._roll_call, args=(f"{self._prefix}/{name}", missing, seconds), daemon=True
        )
        thread.start()
        thread.join(seconds + 1.0)
        if missing:
            raise CommTimeout(op, sorted(missing), limit.timeout)

    def _roll_call(self, prefix: str, missing: set[int], seconds: float) -> None:
        limit, mine = Limit(seconds), uuid.uuid4().hex
        with contextlib.suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{prefix}/{self.rank}", mine)
            while missing:
                missing -= {rank for rank in missing if self._answers(store, prefix, rank, mine)}
                if missing and limit.left == 0:
                    return
                time.sleep(0.01 if missing else 0.0)

    def _answers(self, store: dist.Store, prefix: str, peer: int, mine: str) -> bool:
        """Answer a peer's call, and say whether it has answered `mine`.

        The mere presence of its key would say nothing: a store may hold those of an earlier life of the process group.
        """
        call, answer = f"{prefix}/{peer}", f"{prefix}/{peer}/{self.rank}"
        if not store.check([call]):
            return False
        is_here = store.check([answer]) and store.get(answer) == mine.encode()
        # A peer calls before it answers: once it has, what it calls is of now, and this the answer that it waits for.
        store.set(f"{prefix}/{self.rank}/{peer}", store.get(call).decode())
        return is_here
