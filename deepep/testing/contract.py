"""The contract as checks: what a backend must pass, and in which situations.

A backend is judged by running every check in every case on all ranks::

    with launch.Workers(2) as workers:
        for check, name in contract.checks_and_cases():
            outcomes = workers.run(contract.run_check, check, name, Target("mine"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deepep.testing import cases, checks_buffer, checks_elastic, checks_errors, checks_expanded, checks_low_latency
from deepep.testing.routing import Case
from deepep.testing.target import ContractViolation, Findings, Target

__all__ = ["CHECKS", "Check", "ContractViolation", "Findings", "Target", "checks_and_cases", "run_check"]

CaseTable = Callable[[int], dict[str, Case]]


@dataclass(frozen=True)
class Check:
    """A check and its situations.

    Attributes:
        run: called on every rank as `run(group, target, case)`; raises `ContractViolation` at its end.
        tables: functions of the rank count that give cases by name.
        only: names to keep, all if empty.
        min_ranks: fewest ranks it makes sense for.
    """

    run: Callable[[Any, Target, Case], None]
    tables: tuple[CaseTable, ...]
    only: frozenset[str] = frozenset()
    min_ranks: int = 1

    def cases(self, num_ranks: int) -> dict[str, Case]:
        """Give the cases by name; the names do not depend on the rank count."""
        every = {name: case for table in self.tables for name, case in table(num_ranks).items()}
        return {name: case for name, case in every.items() if not self.only or name in self.only}


_ALL = (cases.routing_cases, cases.payload_cases, cases.size_cases, cases.host_cases)
_ONE_HOST = _ALL[:3]
_FEW = frozenset({"uniform", "holes", "idle_ranks", "no_tokens", "fp8_float_sf", "hosts"})
_FEW_LOW_LATENCY = frozenset({"uniform", "holes", "idle_ranks", "no_tokens", "batch"})
_ONE = frozenset({"uniform"})
_LOW_LATENCY = (cases.low_latency_cases,)

#: Name -> check. A backend passes the contract when every check holds in every case, or says `UnsupportedOperation`.
CHECKS: dict[str, Check] = {
    "layout": Check(checks_buffer.check_layout, (cases.routing_cases, cases.host_cases)),
    "dispatch": Check(checks_buffer.check_dispatch, _ALL),
    "combine": Check(checks_buffer.check_combine, _ALL),
    "weights_round_trip": Check(checks_buffer.check_weights_round_trip, _ALL, _FEW),
    "without_topk": Check(checks_buffer.check_without_topk, _ALL, _FEW | {"fp32", "one_rank"}),
    "worst_case": Check(checks_buffer.check_worst_case, _ALL, _FEW | {"none", "one_rank", "mid", "aligned"}),
    "async": Check(checks_buffer.check_async, _ALL, _FEW),
    "interleaved": Check(checks_buffer.check_interleaved, _ALL, _FEW),
    "low_latency_dispatch": Check(checks_low_latency.check_low_latency_dispatch, _LOW_LATENCY),
    "low_latency_combine": Check(checks_low_latency.check_low_latency_combine, _LOW_LATENCY),
    "low_latency_logfmt": Check(checks_low_latency.check_low_latency_logfmt, _LOW_LATENCY, _FEW_LOW_LATENCY),
    "low_latency_zero_copy": Check(checks_low_latency.check_low_latency_zero_copy, _LOW_LATENCY, _FEW_LOW_LATENCY),
    "low_latency_phases": Check(checks_low_latency.check_low_latency_phases, _LOW_LATENCY, _FEW_LOW_LATENCY),
    "low_latency_stats": Check(checks_low_latency.check_low_latency_stats, _LOW_LATENCY, _FEW_LOW_LATENCY),
    "low_latency_unaligned": Check(checks_low_latency.check_low_latency_unaligned, _LOW_LATENCY, _FEW_LOW_LATENCY),
    "low_latency_after_normal": Check(checks_low_latency.check_low_latency_after_normal, _LOW_LATENCY, _ONE),
    "low_latency_mask": Check(checks_low_latency.check_low_latency_mask, _LOW_LATENCY, _FEW_LOW_LATENCY, min_ranks=2),
    "elastic_compact": Check(checks_elastic.check_elastic_compact, _ALL),
    "elastic_combine": Check(checks_elastic.check_elastic_combine, _ALL),
    "elastic_restored_handle": Check(checks_elastic.check_elastic_restored_handle, _ALL, _FEW | {"aligned"}),
    "elastic_one_level": Check(checks_elastic.check_elastic_one_level, (cases.host_cases,)),
    "elastic_options": Check(checks_elastic.check_elastic_options, _ONE_HOST, _FEW | {"fp8_int_column_major_sf"}),
    "expanded_dispatch": Check(checks_expanded.check_expanded_dispatch, _ONE_HOST),
    "expanded_combine": Check(checks_expanded.check_expanded_combine, _ALL),
    "expanded_single_reduction": Check(checks_expanded.check_expanded_single_reduction, _ALL),
    "bad_arguments": Check(checks_errors.check_bad_arguments, _ONE_HOST, _ONE),
    "too_few_rows": Check(checks_errors.check_too_few_rows, _ONE_HOST, _ONE),
    "misuse": Check(checks_errors.check_misuse, _ONE_HOST, _ONE),
    "disagreement": Check(checks_errors.check_disagreement, _ONE_HOST, _ONE, min_ranks=2),
    "timeout": Check(checks_errors.check_timeout, _ONE_HOST, _ONE, min_ranks=2),
}


def checks_and_cases() -> Iterator[tuple[str, str]]:
    """Name every check with each of its cases."""
    for name, check in CHECKS.items():
        for case in check.cases(1):
            yield name, case


def run_check(group: Any, check: str, case: str, target: Target) -> str:
    """Run one check in one case on this rank; call it on every rank of a torch process group.

    Returns:
        '' if the backend behaves; else why it could not be judged (`UnsupportedOperation`, too few ranks).

    Raises:
        ContractViolation: the outcome differs from the oracle's.
    """
    from deepep.errors import UnsupportedOperation

    num_ranks = group.size()
    if num_ranks < CHECKS[check].min_ranks:
        return f"needs {CHECKS[check].min_ranks} ranks"
    try:
        CHECKS[check].run(group, target, CHECKS[check].cases(num_ranks)[case])
    except UnsupportedOperation as error:
        return str(error)
    return ""
