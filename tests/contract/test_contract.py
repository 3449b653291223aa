"""CONTRACT as tests: every check of the kit, in every case, on every backend and number of ranks asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deepep.testing import contract

if TYPE_CHECKING:
    from conftest import Ranks


_PAIRS = [pytest.param(*pair, id="-".join(pair)) for pair in contract.checks_and_cases()]


@pytest.mark.parametrize(("check", "case"), _PAIRS)
def test_contract(ranks: Ranks, check: str, case: str) -> None:
    reasons = ranks.run(contract.run_check, check, case, ranks.target)
    if any(reasons):
        pytest.skip(next(filter(None, reasons)))
