"""The classifier: a dense layer, a router, experts of which this process holds some, and a dense layer on top.

Tokens and experts are float32, the rest is float64. A router's choice jumps where two experts are almost tied, so that
one rounding more can lead training elsewhere. In float64, sums over ranks instead of over a whole batch differ so
little that the float32 tokens, and with them all choices, come out the same.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from deepep import autograd
from deepep.buffer import Buffer
from deepep.demo.data import NUM_CLASSES, NUM_PIXELS
from deepep.demo.options import Options


class Output(NamedTuple):
    """Logits [T, 10], the router's probabilities [T, E] and its choice [T, K]."""

    logits: torch.Tensor
    probabilities: torch.Tensor
    topk_idx: torch.Tensor


class Experts(nn.Module):
    """Some of the experts, each two layers deep. All are drawn, in order, so that any share of them is the same."""

    def __init__(self, options: Options, share: range) -> None:
        super().__init__()
        num, hidden, inner = options.num_experts, options.hidden, options.expert_hidden
        kept = slice(share.start, share.stop)
        self.w_in = nn.Parameter((torch.randn(num, hidden, inner) * (2 / hidden) ** 0.5)[kept].clone())
        self.w_out = nn.Parameter((torch.randn(num, inner, hidden) * (1 / inner) ** 0.5)[kept].clone())
        self.b_in = nn.Parameter(torch.zeros(len(share), inner))

    def forward(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Give each row of x [N, H] the weighted sum of the experts here that it chose; -1 is none."""
        total = torch.zeros_like(x)
        for expert in range(self.w_in.shape[0]):
            row, slot = (topk_idx == expert).nonzero(as_tuple=True)
            inner = functional.relu(x[row] @ self.w_in[expert] + self.b_in[expert])
            weighted = inner @ self.w_out[expert] * topk_weights[row, slot].unsqueeze(1)
            total = total.index_add(0, row, weighted)
        return total


class Classifier(nn.Module):
    """Pixels to logits. With a buffer the experts are spread over its ranks; without one they are all here.

    Args:
        options: shapes and the seed of the parameters.
        share: the experts of this process.
        buffer: carries the tokens to their experts and back, or None.
    """

    def __init__(self, options: Options, share: range, buffer: Buffer | None = None) -> None:
        super().__init__()
        torch.manual_seed(options.seed)
        self.embed = nn.Linear(NUM_PIXELS, options.hidden, dtype=torch.float64)
        self.router = nn.Linear(options.hidden, options.num_experts, dtype=torch.float64)
        self.head = nn.Linear(options.hidden, NUM_CLASSES, dtype=torch.float64)
        self.experts = Experts(options, share)
        self.options = options
        self.buffer = buffer
        self.digest = hashlib.sha256() if options.is_digested else None

    def forward(self, pixels: torch.Tensor) -> Output:
        """Classify [T, 64] float64 pixels; collective where there is a buffer."""
        hidden = functional.relu(self.embed(pixels))
        probabilities = self.router(hidden).softmax(dim=1)
        chosen, topk_idx = probabilities.topk(self.options.num_topk, dim=1)
        weights = chosen / chosen.sum(dim=1, keepdim=True)
        mix = self.experts if self.buffer is None else self._spread
        mixed = mix(hidden.float(), topk_idx, weights.float())
        return Output(self.head(hidden + mixed), probabilities, topk_idx)

    def dense_parameters(self) -> list[nn.Parameter]:
        """What every rank holds alike; each expert has one owner, to whom all its gradients come by themselves."""
        return [*self.embed.parameters(), *self.router.parameters(), *self.head.parameters()]

    def _spread(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        if self.buffer is None:
            raise TypeError("experts elsewhere need a buffer")
        recv_x, recv_idx, recv_weights, _, handle = autograd.dispatch(
            self.buffer, x, topk_idx, topk_weights, self.options.num_experts
        )
        if recv_weights is None:
            raise TypeError("weights were sent and none arrived")
        combined = autograd.combine(self.buffer, self.experts(recv_x, recv_idx, recv_weights), handle)
        if self.digest is not None:
            for tensor in (recv_x, recv_idx, recv_weights, combined):
                self.digest.update(tensor.detach().cpu().numpy().tobytes())
        return combined
