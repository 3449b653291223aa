"""Events that order streams (upstream API: `EventHandle`, `EventOverlap`). Without CUDA they do nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch

from deepep.errors import InvalidArgument


class EventHandle:
    """A point on the stream that was current when this was made."""

    def __init__(self) -> None:
        self.cuda_event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self.cuda_event = torch.cuda.Event()
            self.cuda_event.record()

    def current_stream_wait(self) -> None:
        """Let the current stream go on only after this point."""
        if self.cuda_event is not None:
            torch.cuda.current_stream().wait_event(self.cuda_event)


class EventOverlap:
    """What every operation returns: the point at which its results are complete.

    Attributes:
        event: the point, or None when the call was synchronous and there is nothing to wait for.
        extra_tensors: kept alive until this object goes.
        hook_after_wait: called once, after the next wait.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[torch.Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], None] | None = None

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Let the current stream go on only after the operation; does nothing when there is no event.

        Args:
            release_handle: drop the event and the tensors it keeps alive afterwards.
        """
        if self.event is not None:
            self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = self.extra_tensors = None
            self._release_on_exit = False

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        """Call `hook` once after the next wait. A second hook replaces nothing: it raises `RuntimeError`."""
        if self.hook_after_wait is not None:
            raise RuntimeError("register_hook_after_wait: a hook is registered already; wait on the event first")
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Choose what leaving the `with` block does, as in `with event(release_handle=True):`."""
        self._release_on_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current_stream_wait(self._release_on_exit)

    _release_on_exit = False


Event = EventOverlap | EventHandle


def as_handle(event: Event | None) -> EventHandle | None:
    """Take either kind of event, or none, wherever an event is asked for (CONTRACT, 'Events and streams')."""
    handle = event.event if isinstance(event, EventOverlap) else event
    if handle is not None and not isinstance(handle, EventHandle):
        raise InvalidArgument(f"an event is a {type(handle).__name__}; pass an EventOverlap or an EventHandle")
    return handle
