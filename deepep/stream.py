"""Communication streams: the only file that knows about them, `record_stream` and graph capture.

A synchronous call runs on the current stream. An asynchronous one runs on the buffer's own stream, after
`previous_event` (or all that the current stream holds), and gives an event that orders other streams after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch

from deepep.errors import InvalidArgument, UnsupportedOperation
from deepep.event import Event, EventHandle, EventOverlap, as_handle

Result = TypeVar("Result")


class CommStream:
    """The communication stream of one buffer, made on first use; nothing of it exists on a CPU machine."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._fork: torch.cuda.Event | None = None  # one serves all calls: a wait is for what was recorded before it

    def get(self) -> torch.cuda.Stream:
        """Give the stream.

        Raises:
            UnsupportedOperation: there is no GPU.
        """
        if self._stream is not None:
            return self._stream
        if not torch.cuda.is_available():
            raise UnsupportedOperation("get_comm_stream: streams exist on CUDA devices only, and there is none here")
        self._stream = torch.cuda.Stream(priority=-1)
        return self._stream

    def run(
        self,
        work: Callable[[], Result],
        inputs: Iterable[object],
        on_cuda: bool,
        is_async: bool,
        previous_event: Event | None,
    ) -> tuple[Result, EventOverlap]:
        """Run `work` on the right stream.

        Args:
            work: launches the operation on the current stream and returns its results.
            inputs: tensors, or dataclasses, tuples and dicts of them, that `work` reads.
            on_cuda: whether the tensors are on a GPU.
            is_async: run on the communication stream and return an event.
            previous_event: start after it; None starts after the current stream.

        Returns:
            What `work` returned, and the event (whose `.event` is None for a synchronous call).
        """
        previous = None if previous_event is None else as_handle(previous_event)
        if not is_async:
            if previous is not None and on_cuda:
                previous.current_stream_wait()
            return work(), EventOverlap()
        if not on_cuda:
            return work(), EventOverlap(EventHandle())
        return self._run_aside(work, inputs, previous)

    def _run_aside(
        self, work: Callable[[], Result], inputs: Iterable[object], previous: EventHandle | None
    ) -> tuple[Result, EventOverlap]:
        compute, comm = torch.cuda.current_stream(), self.get()
        if previous is None:
            if self._fork is None:
                self._fork = torch.cuda.Event()
            self._fork.record(compute)
            comm.wait_event(self._fork)
        # What `torch.cuda.stream` does besides is for streams of several devices.
        torch.cuda.set_stream(comm)
        try:
            if previous is not None:
                previous.current_stream_wait()
            result = work()
            event = EventHandle()
        finally:
            torch.cuda.set_stream(compute)
        # Inputs were allocated for the compute stream and outputs for this one: each is used on the other, too.
        for tensor in _once(tensors_in(inputs)):
            tensor.record_stream(comm)
        for tensor in _once(tensors_in(result)):
            tensor.record_stream(compute)
        return result, EventOverlap(event)


def check_stream_arguments(
    op: str, previous_event: Event | None, is_async: bool, allocate_on_comm_stream: bool
) -> None:
    """Refuse what upstream refuses: allocating on the communication stream needs an event and an asynchronous call."""
    if allocate_on_comm_stream and (not is_async or as_handle(previous_event) is None):
        raise InvalidArgument(
            f"{op}: allocate_on_comm_stream=True needs previous_event and an asynchronous call, "
            "so that memory is not reused before the compute stream is done with it"
        )


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the CUDA tensors inside tuples, lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))


def _once(tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return {id(tensor): tensor for tensor in tensors}.values()
