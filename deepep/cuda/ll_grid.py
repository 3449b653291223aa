"""How many blocks low-latency kernels run with, how many threads work on a row, and whose rows skip the window."""

from __future__ import annotations

from typing import NamedTuple

from deepep.cuda import driver, jit, ll_structs
from deepep.cuda.ll_structs import Shape

MIN_TEAM, MAX_TEAM = 128, ll_structs.NUM_THREADS
LISTING_THREADS, VECS_PER_WORKER = 32, 2
_MANY_ROWS = 4  # of a token on a rank


class DispatchGrid(NamedTuple):
    """How a dispatch is launched.

    `team` threads work on a row; `keeps_own`: rows that stay skip the window. Where there are few rows, `send_parts`
    blocks share each that is sent, and `recv_parts` teams, of a block each, share each that is laid out.
    """

    num_blocks: int
    team: int
    tokens_per_block: int
    keeps_own: bool
    send_parts: int = 1
    recv_parts: int = 1


class CombineGrid(NamedTuple):
    """The same of a combine.

    Sums of a rank's own tokens do not travel where it `keeps_own`. Where teams have `has_workers`, their first warps
    leave adding up to the others. So many teams share a row to send and a row to add up.
    """

    num_blocks: int
    team: int
    keeps_own: bool
    has_workers: bool
    debt_parts: int
    home_parts: int


class Grids:
    """Chooses grids for one shape on one device.

    Attributes:
        table_bytes: shared memory of dispatch.
    """

    def __init__(
        self, shape: Shape, device: int, ranks_per_gpu: int, dispatch: jit.Kernel, combine: jit.Kernel
    ) -> None:
        self._shape = shape
        self.table_bytes = 2 * 4 * shape.num_experts
        if self.table_bytes > 48 << 10:
            dispatch.set_max_smem(self.table_bytes)
        self._dispatch_blocks = max(1, dispatch.blocks_per_sm(ll_structs.NUM_THREADS, self.table_bytes))
        self._combine_blocks = max(1, combine.blocks_per_sm(ll_structs.NUM_THREADS, 0))
        # Kernels that wait for peers need all of their blocks to run at once, and all of the peers'.
        self._shares_gpu = ranks_per_gpu > 1
        self._num_sms = driver.device_attribute("CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT", device) / ranks_per_gpu

    def dispatch(self, num_tokens: int, num_sms: int, row_vecs: int, split_phases: bool) -> DispatchGrid:
        """Choose for a dispatch of T tokens whose rows are so many vectors of 16 bytes."""
        most, tokens = self._most_blocks(self._dispatch_blocks, num_sms), self._likely_tokens(num_tokens)
        # While there is a block for each row of each rank, a rank's own ones best go like the others.
        keeps_own = not split_phases and tokens * self._shape.num_ranks > most
        num_rows = tokens * max(self._shape.num_ranks - keeps_own, 1)
        team = _team(most, num_rows, row_vecs)
        # Ranks that share a GPU leave room for kernels that start early, rather than make more than two parts.
        room = most // 2 if self._shares_gpu else most
        recv_parts = max(_parts(most, num_rows, min(team // MIN_TEAM, 2)), _parts(room, num_rows, team // MIN_TEAM))
        team //= recv_parts
        num_blocks = _num_blocks(most, tokens, num_rows * recv_parts, MAX_TEAM if recv_parts > 1 else team)
        send_parts = _parts(num_blocks - 1, tokens, recv_parts)
        tokens_per_block = -(-num_tokens // max(num_blocks - 1, 1))
        return DispatchGrid(num_blocks, team, tokens_per_block, keeps_own, send_parts, recv_parts)

    def combine(self, num_tokens: int, num_sms: int, is_per_copy: bool, split_phases: bool) -> CombineGrid:
        """Choose for a combine that brings T tokens home."""
        most, tokens = self._most_blocks(self._combine_blocks, num_sms), self._likely_tokens(num_tokens)
        num_rows, num_foreign = tokens * self._shape.num_ranks, tokens * max(self._shape.num_ranks - 1, 1)
        usual_team, row_vecs = _team(most, num_foreign), self._shape.hidden // 8
        # Workers are worth it if they are most of a team, and there is no block for each row.
        most_few = most * MAX_TEAM // MIN_TEAM if usual_team == MIN_TEAM else most
        if num_rows <= most_few and not is_per_copy:
            # A rank's own sums go like the others: blocks that wait for other rows anyway would make them late. Teams
            # share a row, and those that add up need not be those that sent.
            team = _team(most, num_rows, row_vecs)
            parts = -(-row_vecs // team)
            num_blocks = _num_blocks(most, tokens, (num_rows + tokens) * parts, team)
            teams_per_token = num_blocks * (MAX_TEAM // team) // max(num_tokens, 1)
            debt_parts, home_parts = (
                max(1, min(parts, teams)) for teams in (teams_per_token // self._shape.num_ranks, teams_per_token)
            )
            return CombineGrid(
                num_blocks, team, keeps_own=False, has_workers=False, debt_parts=debt_parts, home_parts=home_parts
            )
        has_workers = not is_per_copy
        team = usual_team
        if has_workers and usual_team == MIN_TEAM and self._shape.num_topk >= _MANY_ROWS * self._shape.num_ranks:
            # Many tokens for every block, each with many rows here.
            team = _team_of_workers(row_vecs)
        num_blocks = _num_blocks(most, tokens, num_foreign, team)
        # Between two launches the caller may change the rows, so then its own sums travel like the others.
        keeps_own = not is_per_copy and not split_phases
        # Teams draw what they add up. Where each has few tokens it may be half of one, so that all are done together.
        num_teams = num_blocks * (MAX_TEAM // team)
        has_halves = has_workers and _vecs_at_once(team) < row_vecs and num_tokens < 4 * num_teams
        home_parts = 2 if has_halves else 1
        return CombineGrid(num_blocks, team, keeps_own, has_workers, debt_parts=1, home_parts=home_parts)

    def _most_blocks(self, blocks_per_sm: int, num_sms: int) -> int:
        return max(1, int(min(self._num_sms, num_sms or self._num_sms) * blocks_per_sm))

    def _likely_tokens(self, num_tokens: int) -> int:
        """Tokens to choose a grid for: the other ranks may have more than this one."""
        return max(num_tokens, self._shape.num_max_tokens // 16, 1)


def _team(most: int, num_rows: int, row_vecs: int = MAX_TEAM) -> int:
    """Choose threads per team: as many as leave every row a team of its own, and most of them a vector of the row."""
    team = MAX_TEAM
    while team > MIN_TEAM and (team >= 2 * row_vecs or most * (MAX_TEAM // team) < num_rows):
        team //= 2
    return team


def _team_of_workers(row_vecs: int) -> int:
    """Choose threads per team whose first ones only list and wait: the fewest that have all of a row under way.

    Tokens have now two rows to add up, now six: the fewer the teams, the more of this evens out in each.
    """
    team = MIN_TEAM
    while team < MAX_TEAM and _vecs_at_once(team) < row_vecs:
        team *= 2
    return team


def _vecs_at_once(team: int) -> int:
    """Vectors of a row that a team's workers have under way."""
    return VECS_PER_WORKER * (team - LISTING_THREADS)


def _parts(room: int, num_rows: int, most_parts: int) -> int:
    """Choose how many share a row: the most, as a power of two, for which there is room."""
    parts = 1
    while 2 * parts <= most_parts and 2 * parts * num_rows <= room:
        parts *= 2
    return parts


def _num_blocks(most: int, tokens: int, num_items: int, team: int) -> int:
    """As many as there are items for teams, and one more than tokens: it publishes counts."""
    return min(most, max(tokens + 1, -(-num_items // (MAX_TEAM // team))))
