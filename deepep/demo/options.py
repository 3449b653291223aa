"""What can be chosen about the demo."""

from __future__ import annotations

from dataclasses import dataclass

from deepep.errors import InvalidArgument


@dataclass(frozen=True)
class Options:
    """Model, training and placement; equal on all ranks.

    Attributes:
        backend: of `deepep.Buffer`, "auto" or a name; None for `DEEPEP_BACKEND`, else "auto".
        device: "cpu" or "cuda".
        epochs: passes over the training images.
        batch_size: images per step, over all ranks.
        learning_rate: of Adam.
        seed: of the split, the parameters and the order of the images.
        num_experts: E, a multiple of the number of ranks.
        num_topk: K.
        hidden: H, a multiple of 4, so that a float32 row is a multiple of 16 bytes.
        expert_hidden: width inside an expert.
        balance: factor of the loss that keeps the load of the experts even.
        is_digested: hash the rows of every step, to compare runs bit for bit.
    """

    backend: str | None = None
    device: str = "cpu"
    epochs: int = 25
    batch_size: int = 256
    learning_rate: float = 1e-2
    seed: int = 0
    num_experts: int = 8
    num_topk: int = 2
    hidden: int = 64
    expert_hidden: int = 64
    balance: float = 0.1
    is_digested: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "num_experts", "num_topk", "hidden", "expert_hidden"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_topk > self.num_experts:
            raise InvalidArgument(f"num_topk is {self.num_topk}; it must be at most num_experts = {self.num_experts}")
        if self.hidden % 4:
            raise InvalidArgument(f"hidden is {self.hidden}; it must be a multiple of 4 (rows of 16 bytes)")

    def experts_of(self, rank: int, num_ranks: int) -> range:
        """Give the experts that live on a rank.

        Raises:
            InvalidArgument: the experts cannot be spread evenly.
        """
        if self.num_experts % num_ranks:
            raise InvalidArgument(f"num_experts is {self.num_experts}; it must be a multiple of {num_ranks} ranks")
        share = self.num_experts // num_ranks
        return range(rank * share, (rank + 1) * share)
