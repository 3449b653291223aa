"""Training, alone or as one of several ranks: the same steps on the same images either way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from deepep import env
from deepep.backends.registry import requested_on
from deepep.buffer import Buffer
from deepep.demo import data
from deepep.demo.model import Classifier
from deepep.demo.options import Options
from deepep.group import Group
from deepep.progress import progress_bar


@dataclass
class Outcome:
    """What one rank has to tell.

    Attributes:
        losses: of each step, over the whole batch.
        accuracy: on the held-out digits, of all ranks together.
        expert_load: tokens each of the E experts got in the last epoch.
        backend: that moved the rows.
        num_hosts: that the ranks are on.
        num_rows: rows sent to other ranks.
        num_bytes: bytes of them.
        digest: of all rows received and combined, where asked for.
    """

    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    expert_load: list[int] = field(default_factory=list)
    backend: str = "none"
    num_hosts: int = 1
    num_rows: int = 0
    num_bytes: int = 0
    digest: str = ""


class Peers:
    """The ranks that share the batch; without a group there is one."""

    def __init__(self, group: Group | None) -> None:
        self._group = group
        self.rank = group.rank if group else 0
        self.num_ranks = group.num_ranks if group else 1

    def sum(self, mine: torch.Tensor) -> torch.Tensor:
        """Add up every rank's tensor in rank order, so that all ranks, however launched, hold the same bits."""
        if self._group is None:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        self._group.exchange([mine.contiguous()] * self.num_ranks, parts, op="gradients", timeout=env.timeout())
        return torch.stack(parts).sum(dim=0) if mine.dtype == torch.int64 else _ordered_sum(parts)

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """Give this rank's contiguous part of a batch; parts of a small batch may be empty."""
        return batch.tensor_split(self.num_ranks)[self.rank]


def run_rank(group: Group, options: Options) -> Outcome:
    """Train as one rank of `group`; collective. Shows a progress bar on rank 0."""
    share = options.experts_of(group.rank, group.num_ranks)
    buffer = Buffer(group, backend=requested_on(options.device, options.backend))
    outcome = train(options, Peers(group), share, buffer, with_bar=group.rank == 0)
    outcome.backend, outcome.num_hosts = buffer.backend, len(set(buffer.topology.hosts))
    outcome.num_rows, outcome.num_bytes = buffer.traffic["num_rows"], buffer.traffic["num_bytes"]
    buffer.destroy()
    return outcome


def run_alone(options: Options) -> Outcome:
    """Train the same model in this process, without any communication."""
    return train(options, Peers(None), range(options.num_experts), None, with_bar=False)


def train(options: Options, peers: Peers, share: range, buffer: Buffer | None, *, with_bar: bool) -> Outcome:
    """Train and test one model whose experts `share` are here."""
    digits = data.load(options.seed, options.device)
    model = Classifier(options, share, buffer).to(options.device)
    trainer = _Trainer(options, peers, model)
    outcome = Outcome()
    shuffle = torch.Generator().manual_seed(options.seed)
    num_images = len(digits.train.digits)
    num_steps = options.epochs * -(-num_images // options.batch_size)
    with progress_bar(num_steps, "train", "step", is_shown=with_bar) as bar:
        for _ in range(options.epochs):
            load = torch.zeros(options.num_experts, dtype=torch.int64, device=options.device)
            for batch in torch.randperm(num_images, generator=shuffle).split(options.batch_size):
                loss, counts = trainer.step(digits.train, batch)
                outcome.losses.append(loss)
                load += counts
                bar.update()
            bar.set_postfix_str(f"loss {outcome.losses[-1]:.4f}")
            outcome.expert_load = load.tolist()
    if model.digest is not None:
        outcome.digest = model.digest.hexdigest()
    outcome.accuracy = trainer.accuracy(digits.test)
    return outcome


class _Trainer:
    def __init__(self, options: Options, peers: Peers, model: Classifier) -> None:
        self.options, self.peers, self.model = options, peers, model
        self.dense = model.dense_parameters()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)

    def step(self, images: data.Images, batch: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Learn from one batch; its loss, and the tokens of each expert [E] int64, both over all ranks."""
        mine = self.peers.share(batch).to(images.pixels.device)
        output = self.model(images.pixels[mine])
        counts = self.peers.sum(torch.bincount(output.topk_idx.flatten(), minlength=self.options.num_experts))
        # Every term is a sum over tokens divided by the whole batch, so losses and gradients of ranks just add up.
        wrong = functional.cross_entropy(output.logits, images.digits[mine], reduction="sum")
        uneven = (counts / counts.sum() * output.probabilities.sum(dim=0)).sum() * self.options.num_experts
        # An even load has unevenness 1: that constant is left out.
        loss = (wrong + self.options.balance * (uneven - len(mine))) / len(batch)
        self.optimizer.zero_grad()
        loss.backward()
        total = self._sum_dense(loss.detach())
        self.optimizer.step()
        return total, counts

    @torch.no_grad()
    def accuracy(self, images: data.Images) -> float:
        """Share of these images that the model reads right, over all ranks."""
        mine = self.peers.share(torch.arange(len(images.digits), device=images.digits.device))
        right = (self.model(images.pixels[mine]).logits.argmax(dim=1) == images.digits[mine]).sum()
        return int(self.peers.sum(right.view(1))) / len(images.digits)

    def _sum_dense(self, loss: torch.Tensor) -> float:
        """Add up over ranks the gradients of the dense parameters, and the loss."""
        grads = [weight.grad for weight in self.dense if weight.grad is not None]
        total = self.peers.sum(torch.cat([loss.view(1), *(grad.flatten() for grad in grads)]))
        for grad, part in zip(grads, total[1:].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return float(total[0])


def _ordered_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
