"""How many blocks low-latency kernels run with, and how many threads work on a row."""

from __future__ import annotations

from deepep.cuda import driver, jit, ll_structs
from deepep.cuda.ll_structs import Shape

MIN_TEAM, MAX_TEAM = 128, ll_structs.NUM_THREADS


class Grids:
    """Chooses grids for one shape on one device.

    Attributes:
        keeps_own: sums of a rank's own tokens fit shared memory without keeping blocks from running side by side.
        table_bytes: shared memory of dispatch.
    """

    def __init__(
        self, shape: Shape, device: int, ranks_per_gpu: int, dispatch: jit.Kernel, combine: jit.Kernel
    ) -> None:
        self.shape = shape
        self._device = device
        self.table_bytes = 4 * shape.num_experts
        if self.table_bytes > 48 << 10:
            dispatch.set_max_smem(self.table_bytes)
        self.keeps_own = self._prepare_own_sums(combine)
        self._blocks_per_sm = {
            kernel.handle: max(1, kernel.blocks_per_sm(ll_structs.NUM_THREADS, smem))
            for kernel, smem in (
                (dispatch, self.table_bytes),
                (combine, self.own_bytes(MIN_TEAM) if self.keeps_own else 0),
            )
        }
        # Kernels that wait for peers need all of their blocks to run at once, and all of the peers'.
        self._num_sms = driver.device_attribute("CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT", device) / ranks_per_gpu

    def own_bytes(self, team: int) -> int:
        """Shared memory for the sums of a rank's own tokens, one row per team."""
        return MAX_TEAM // team * 2 * self.shape.hidden

    def _prepare_own_sums(self, kernel: jit.Kernel) -> bool:
        most = self.own_bytes(MIN_TEAM)
        limit = driver.device_attribute("CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", self._device)
        if most + kernel.shared_bytes > limit:
            return False
        kernel.set_max_smem(most)
        blocks = kernel.blocks_per_sm(ll_structs.NUM_THREADS, most)
        return blocks >= kernel.blocks_per_sm(ll_structs.NUM_THREADS, 0)

    def usual(self, kernel: int, num_tokens: int, num_sms: int) -> tuple[int, int]:
        """Choose blocks and threads per team: as many threads on a row as leave every row a team of its own."""
        max_blocks = self._block_limit(kernel, num_sms)
        tokens = self._likely_tokens(num_tokens)
        num_rows = tokens * max(self.shape.num_ranks - 1, 1)
        team = MAX_TEAM
        while team > MIN_TEAM and max_blocks * (MAX_TEAM // team) < num_rows:
            team //= 2
        rows_per_block = MAX_TEAM // team
        return min(max_blocks, max(tokens + 1, -(-num_rows // rows_per_block))), team

    def has_block_per_row(self, kernel: int, num_tokens: int, num_sms: int) -> bool:
        """Whether each row of each rank can have a block of its own: then a rank's own ones best go like the others."""
        return self._likely_tokens(num_tokens) * self.shape.num_ranks <= self._block_limit(kernel, num_sms)

    def lines(
        self, kernel: int, num_tokens: int, num_sms: int, row_vecs: int, is_combine: bool, keeps_own: bool
    ) -> tuple[int, int]:
        """Choose the same where rows are lines: one vector per thread.

        In combine several teams may share a row, and those that add up need not have sent before.
        """
        max_blocks = self._block_limit(kernel, num_sms)
        tokens = self._likely_tokens(num_tokens)
        num_rows = tokens * max(self.shape.num_ranks - keeps_own, 1)
        team = MAX_TEAM
        while team > MIN_TEAM and (team >= 2 * row_vecs or max_blocks * (MAX_TEAM // team) < num_rows):
            team //= 2
        num_items = (num_rows + tokens) * -(-row_vecs // team) if is_combine else num_rows
        rows_per_block = MAX_TEAM // team
        return min(max_blocks, max(tokens + 1, -(-num_items // rows_per_block))), team

    def _block_limit(self, kernel: int, num_sms: int) -> int:
        return max(1, int(min(self._num_sms, num_sms or self._num_sms) * self._blocks_per_sm[kernel]))

    def _likely_tokens(self, num_tokens: int) -> int:
        """Tokens to choose a grid for: the other ranks may have more than this one."""
        return max(num_tokens, self.shape.num_max_tokens // 16, 1)
