"""What a dispatch writes: how its blocks are sized and cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from deep_ep.backend import DispatchRequest

_SIZE_CLASSES_PER_DOUBLING = 8
# Blocks with this much room to spare are used rather than replaced by smaller ones.
_SPARE_SHARE, _SPARE_ROWS = 5, 64


class Outputs(NamedTuple):
    """Blocks of ``capacity`` rows, which `cut` shortens to the rows that came.

    ``src_idx``: the source's token of each row, ``[capacity]``, or its rank and token, ``[capacity, 2]``.
    """

    capacity: int
    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    src_idx: torch.Tensor | None

    @staticmethod
    def allocate(
        request: DispatchRequest,
        capacity: int,
        num_topk: int,
        *,
        source_shape: tuple[int, ...] | None,
        empty: Callable[..., torch.Tensor] = torch.empty,
    ) -> Outputs:
        """New blocks, where torch allocates now.

        Args:
            source_shape: of one entry of ``src_idx``; ``None`` for no such block.
            empty: makes a tensor, as `torch.empty` does.
        """
        x, scales = request.x, request.scales
        device, hidden = x.device, x.shape[1]
        return Outputs(
            capacity,
            empty((capacity, hidden), dtype=x.dtype, device=device),
            empty((capacity, scales.shape[1]), dtype=scales.dtype, device=device) if scales is not None else None,
            empty((capacity, num_topk), dtype=torch.int64, device=device) if num_topk else None,
            empty((capacity, num_topk), dtype=torch.float32, device=device) if num_topk else None,
            empty((capacity, *source_shape), dtype=torch.int32, device=device) if source_shape is not None else None,
        )

    def cut(self, num_rows: int) -> None:
        """Leave the first ``num_rows`` rows of each tensor, which keeps its memory."""
        self.x.resize_(num_rows, self.x.shape[1])
        if self.scales is not None:
            self.scales.resize_(num_rows, self.scales.shape[1])
        if self.topk_idx is not None and self.topk_weights is not None:
            num_topk = self.topk_idx.shape[1]
            self.topk_idx.resize_(num_rows, num_topk)
            self.topk_weights.resize_(num_rows, num_topk)
        if self.src_idx is not None:
            self.src_idx.resize_(num_rows, *self.src_idx.shape[1:])


def size_class(num_rows: int) -> int:
    """``num_rows`` rounded up so that there are only a few sizes per doubling.

    Row counts differ from call to call; of a few sizes torch's allocator can reuse blocks, where exact sizes would
    shatter the heap.
    """
    step = 1 << max(0, (num_rows - 1).bit_length() - _SIZE_CLASSES_PER_DOUBLING.bit_length())
    return -(-num_rows // step) * step


def least_rows(capacity: int) -> int:
    """The fewest rows for which blocks of ``capacity`` rows are not too large."""
    return max(0, capacity - max(capacity // _SPARE_SHARE, _SPARE_ROWS))
