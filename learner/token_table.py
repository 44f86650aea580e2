"""TokenTable: the trained tokens of a batch, however it is cut into micro-batches, as a table [N, K].

N = trajectories of the batch, K = most trained tokens of any of them; B, T as in MicroBatch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.training import MicroBatch


class TokenTable:
    """Row n is trajectory n of the batch, column k its k-th trained token.

    Micro-batches that are not there leave their rows 0, so tables of parts of a batch add up to that of the whole.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], counts_N: Tensor) -> None:
        """counts_N int64: trained tokens of each trajectory of the whole batch."""
        self.num_columns = int(counts_N.max())
        self.mask_NK = torch.arange(self.num_columns) < counts_N.unsqueeze(1)
        self._masks = [micro.loss_mask_BT for micro in micro_batches]
        self._places = [_places(micro) for micro in micro_batches]

    def gather(self, tensors_BT: Sequence[Tensor]) -> Tensor:
        """One tensor per micro-batch -> [N, K]; 0 where no token is trained."""
        table_NK = torch.zeros(self.mask_NK.shape, dtype=torch.float32)
        for tensor_BT, mask_BT, (rows_P, columns_P) in zip(tensors_BT, self._masks, self._places, strict=True):
            table_NK[rows_P, columns_P] = tensor_BT[mask_BT].float()
        return table_NK

    def scatter(self, table_NK: Tensor) -> list[Tensor]:
        """[N, K] -> one tensor [B, T] per micro-batch; 0 where no token is trained."""
        return [
            torch.zeros(mask_BT.shape, dtype=table_NK.dtype).masked_scatter(mask_BT, table_NK[rows_P, columns_P])
            for mask_BT, (rows_P, columns_P) in zip(self._masks, self._places, strict=True)
        ]

    def gather_after_last(self, tensors_BS: Sequence[Tensor]) -> Tensor:
        """[N]: what stands one place after each trajectory's last trained token; 0 for one that has none.

        S = T + 1, because after the last token of a micro-batch there is one more state.
        """
        after_N = torch.zeros(len(self.mask_NK), dtype=torch.float32)
        for tensor_BS, mask_BT, (rows_P, columns_P) in zip(tensors_BS, self._masks, self._places, strict=True):
            is_last_P = columns_P + 1 == self.mask_NK.sum(dim=1)[rows_P]
            shifted_BT = tensor_BS[:, 1:]
            after_N[rows_P[is_last_P]] = shifted_BT[mask_BT][is_last_P].float()
        return after_N


def _places(micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """(rows_P, columns_P) of the table for the P trained tokens of a micro-batch, in the order of its mask."""
    columns_BT = micro.loss_mask_BT.cumsum(dim=1) - 1
    rows_BT = micro.trajectory_index_B.unsqueeze(1).expand_as(columns_BT)
    return rows_BT[micro.loss_mask_BT], columns_BT[micro.loss_mask_BT]
