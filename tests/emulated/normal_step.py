"""Calls of every rank in normal mode: dispatch, the same again, combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from normal_wanted import Wanted, Way
from normal_world import NormalWorld

from deepep.backends.base import CombineRequest, CombineResult, DispatchRequest, DispatchResult, WeightSource
from deepep.cuda.combine import combine
from deepep.cuda.dispatch import dispatch
from deepep.cuda.engine import Engine
from deepep.testing.oracle import expected_layout
from deepep.testing.oracle_elastic import worst_case_rows
from deepep.testing.routing import Case


class NormalStep:
    """Launches the calls, and compares what they gave once they have run.

    Args:
        world: where.
        case: what is sent.
        way: how.
    """

    def __init__(self, world: NormalWorld, case: Case, way: Way) -> None:
        self.world, self.case, self.way = world, case, way
        self.wanted = Wanted(case, way)
        self._in_use: list[Any] = []  # kernels read it after the call
        self._dispatched: list[list[DispatchResult]] = []
        self._combined: list[CombineResult] = []

    def dispatch(self) -> None:
        """Launch everyone's dispatch; from the second time on a cached one."""
        known = self._dispatched[0] if self._dispatched else None
        self._dispatched.append(self.world.on_all(lambda engine: self._dispatch(engine, known)))

    def combine(self) -> None:
        """Launch everyone's combine."""
        self._combined += self.world.on_all(self._combine)

    def check(self) -> None:
        """Compare everything with the oracle, bit for bit."""
        for number, results in enumerate(self._dispatched):
            for rank, result in enumerate(results):
                self.wanted.check_dispatch(rank, result, is_cached=number > 0)
        for number, combined in enumerate(self._combined):
            self.wanted.check_combine(number % self.case.num_ranks, combined)

    def run(self, seed: int) -> None:
        """Dispatch twice and combine, one after the other, and compare."""
        for launch in (self.dispatch, self.dispatch, self.combine):
            launch()
            self.world.run(seed)
        self.check()

    def _dispatch(self, engine: Engine, known: Sequence[DispatchResult] | None) -> DispatchResult:
        case, way, mine = self.case, self.way, self.wanted.inputs[engine.rank]
        most, experts = case.num_max_tokens_per_rank, way.has_topk and known is None
        layout = None if experts or known else expected_layout(self.wanted.route, engine.rank)
        if way.is_expanded:
            num_worst_rows = worst_case_rows(self.wanted.route, most, case.expert_alignment)
        else:
            num_worst_rows = most * case.num_ranks + 3
        request = DispatchRequest(
            mine.x,
            mine.sf,
            mine.topk_idx if experts else None,
            mine.topk_weights if experts else None,
            case.num_experts,
            is_token_in_rank=layout.is_token_in_rank if layout else None,
            num_tokens_per_expert=layout.num_tokens_per_expert if layout else None,
            num_max_tokens_per_rank=most,
            layout=way.layout,
            expert_alignment=case.expert_alignment,
            num_worst_rows=None if way.is_exact else num_worst_rows,
            do_zero_padding=way.is_zeroed,
            routing=known[engine.rank].routing if known else None,
            sf_format=way.sf_format,
        )
        self._in_use.append(request)
        return dispatch(engine, request)

    def _combine(self, engine: Engine) -> CombineResult:
        rank, way = engine.rank, self.way
        routing = self._dispatched[0][rank].routing
        request = CombineRequest(
            self.wanted.outputs(rank, routing),
            routing,
            reduction=way.reduction,
            topk_weights=self.wanted.weights(rank, routing) if way.has_weights else None,
            weight_source=WeightSource.OWNER if way.is_expanded else WeightSource.ALL_RANKS,
            bias=self.wanted.biases(rank),
        )
        self._in_use.append(request)
        return combine(engine, request)
