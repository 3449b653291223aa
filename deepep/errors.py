"""The named errors of deepep. Every message says what happened, where, and what mends it (CONTRACT, 'Errors')."""

from __future__ import annotations

from collections.abc import Sequence


class DeepEPError(Exception):
    """Base of all errors that deepep raises on purpose."""


class InvalidArgument(DeepEPError, ValueError):
    """An argument is wrong, or ranks disagree about one. Nothing was sent: mend the argument and call again."""


class CommTimeout(DeepEPError, TimeoutError):
    """A peer did not arrive in time or has died. The buffer is broken until it is rebuilt or the rank is masked.

    Attributes:
        op: the operation that waited, e.g. `"dispatch"`.
        missing_ranks: ranks (of the group) that were not heard from, ascending.
        timeout: the limit that passed, seconds.
        detail: what else is known, or empty.
    """

    def __init__(self, op: str, missing_ranks: Sequence[int], timeout: float, detail: str = "") -> None:
        self.op = op
        self.missing_ranks = tuple(sorted(missing_ranks))
        self.timeout = timeout
        self.detail = detail
        who = ", ".join(str(rank) for rank in self.missing_ranks) or "unknown"
        suffix = f" ({detail})" if detail else ""
        super().__init__(
            f"{op}: rank(s) {who} did not arrive within {timeout:g} s{suffix}; "
            "rebuild the buffer without them, or raise `timeout` if they are only slow"
        )

    def __reduce__(self) -> tuple[type[CommTimeout], tuple[str, tuple[int, ...], float, str]]:
        return type(self), (self.op, self.missing_ranks, self.timeout, self.detail)


class UnsupportedOperation(DeepEPError, NotImplementedError):
    """The chosen backend cannot do this operation; the message names the backends that can."""


class BackendUnavailable(DeepEPError, RuntimeError):
    """The backend that was asked for cannot run here; the message holds one line per backend with reason and remedy."""


class BufferDestroyed(DeepEPError, RuntimeError):
    """A buffer was used after `destroy()`, or after an error broke it. Build a new one."""
