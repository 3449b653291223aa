"""What is measured: sizes, types, routing and how often. Equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepep.errors import InvalidArgument

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
ROUTINGS = ("balanced", "unbalanced")
SF_GROUP = 128  # channels per scale factor of an FP8 payload
EXPERT_ALIGNMENT = 128  # of expanded rows, as grouped GEMMs want it


@dataclass(frozen=True)
class Plan:
    """One run of the bench.

    Attributes:
        backend: "auto" or a name; None for `DEEPEP_BACKEND`, else "auto".
        device: "cpu" or "cuda".
        num_tokens: T of every rank.
        hidden: H.
        num_topk: K.
        num_experts: E.
        dtype: of the payload of dispatch, a name in `DTYPES`; "fp8" comes with float32 scale factors.
        layouts: "compact" (`Buffer`), "expanded" (`ElasticBuffer`), "padded" (low latency).
        routings: "balanced" draws experts evenly, "unbalanced" draws the lower half twice as readily.
        num_sms: multiprocessors to allow, one run of everything for each; 0 for the backend's own choice.
        num_iters: timed calls of each operation.
        seed: of all inputs.
        flushes_l2: empty the GPU's L2 before each timed call. None does so except in low latency, where the time of a
            call is that of a few dependent accesses, most of them to what the call before it touched.
    """

    backend: str | None
    device: str
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    dtype: str
    layouts: tuple[str, ...]
    routings: tuple[str, ...]
    num_sms: tuple[int, ...]
    num_iters: int
    seed: int
    flushes_l2: bool | None = None

    def __post_init__(self) -> None:
        for name in ("num_tokens", "hidden", "num_topk", "num_experts", "num_iters"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_topk > self.num_experts:
            raise InvalidArgument(f"num_topk is {self.num_topk}; it must be at most num_experts = {self.num_experts}")
        if self.uses_fp8 and self.hidden % SF_GROUP:
            raise InvalidArgument(f"hidden is {self.hidden}; FP8 rows need a multiple of {SF_GROUP}")
        if self.hidden * DTYPES[self.dtype].itemsize % 16:
            raise InvalidArgument(f"hidden is {self.hidden}; a row must be a multiple of 16 bytes")

    def check_ranks(self, num_ranks: int) -> None:
        """Raise `InvalidArgument` where the experts cannot be spread evenly over so many ranks."""
        if self.num_experts % num_ranks:
            raise InvalidArgument(f"num_experts is {self.num_experts}; it must be a multiple of {num_ranks} ranks")

    @property
    def has_cold_l2(self) -> bool:
        """Whether the L2 is emptied before each timed call."""
        return "padded" not in self.layouts if self.flushes_l2 is None else self.flushes_l2

    @property
    def uses_fp8(self) -> bool:
        """Whether rows travel to their experts as FP8; always so in low latency."""
        return self.dtype == "fp8" or "padded" in self.layouts

    @property
    def combine_dtype(self) -> torch.dtype:
        """Type of the rows that experts hand back."""
        return torch.bfloat16 if self.dtype == "fp8" else DTYPES[self.dtype]
