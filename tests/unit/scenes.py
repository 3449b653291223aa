"""A buffer and good arguments for it, for tests that spoil one of them; and how its errors are caught and read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

BF16 = torch.bfloat16
E, H, K, M, T = 8, 128, 2, 6, 4
Outcome = tuple[str, str] | None  # name of the error, its text


@dataclass
class Scene:
    """A buffer of one of two ranks, and arguments that are right; tests spoil one of them."""

    buffer: Any
    x: torch.Tensor = field(default_factory=lambda: torch.ones(T, H, dtype=BF16))
    topk_idx: torch.Tensor = field(default_factory=lambda: torch.tensor([[0, 5], [1, -1], [7, 2], [-1, -1]]))
    topk_weights: torch.Tensor = field(default_factory=lambda: torch.ones(T, K))

    def dispatch(self, **changed: Any) -> Any:
        counts = self.buffer.get_dispatch_layout(self.topk_idx, E)
        arguments = {
            "x": self.x,
            "num_tokens_per_rank": counts[0],
            "num_tokens_per_expert": counts[2],
            "is_token_in_rank": counts[3],
            "topk_idx": self.topk_idx,
            "topk_weights": self.topk_weights,
        }
        return self.buffer.dispatch(**{**arguments, **changed})

    def cached(self, **changed: Any) -> Any:
        return self.buffer.dispatch(**{"x": self.x, "handle": self.dispatch()[4], **changed})

    def combine(self, **changed: Any) -> Any:
        recv_x, _, recv_weights, _, handle, _ = self.dispatch()
        return self.buffer.combine(**{"x": recv_x, "handle": handle, "topk_weights": recv_weights, **changed})

    def ll_dispatch(self, **changed: Any) -> Any:
        arguments = {"x": self.x, "topk_idx": self.topk_idx, "num_max_dispatch_tokens_per_rank": M, "num_experts": E}
        return self.buffer.low_latency_dispatch(**{**arguments, **changed})

    def clean(self, **changed: Any) -> None:
        self.buffer.clean_low_latency_buffer(
            **{"num_max_dispatch_tokens_per_rank": M, "hidden": H, "num_experts": E, **changed}
        )

    def ll_combine(self, **changed: Any) -> Any:
        x, _, handle, _, _ = self.ll_dispatch(use_fp8=False)
        arguments = {"x": x, "topk_idx": self.topk_idx, "topk_weights": self.topk_weights, "handle": handle}
        return self.buffer.low_latency_combine(**{**arguments, **changed})


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    try:
        call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  the test says which it must be
        return type(error).__name__, str(error)
    return None


def assert_says(text: str, pattern: str) -> None:
    assert re.search(pattern, text, re.DOTALL), f"{text!r} does not match {pattern!r}"
