"""Rows of bytes: several tensors with one row per token, laid side by side so that one exchange moves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 ``[n, bytes]``: row ``i`` is row ``i`` of every tensor in ``columns``, one after the other.

    Columns are ``[n, width]`` of any dtype and any strides.
    """
    return torch.cat([_as_bytes(column) for column in columns], dim=1)


def unpack(rows: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that `pack` laid into ``rows``; dtypes and widths are those of ``like``, whatever its rows."""
    columns = []
    begin = 0
    for column in like:
        end = begin + column.shape[1] * column.element_size()
        columns.append(_from_bytes(rows[:, begin:end], column.dtype, column.shape[1]))
        begin = end
    return columns


def _as_bytes(column: torch.Tensor) -> torch.Tensor:
    row_bytes = column.shape[1] * column.element_size()
    if column.shape[0] == 0:
        return torch.empty((0, row_bytes), dtype=torch.uint8, device=column.device)
    if column.stride() != (column.shape[1], 1):
        # Not `contiguous`: it takes a single column with any stride for contiguous, and `view` does not.
        column = torch.empty(column.shape, dtype=column.dtype, device=column.device).copy_(column)
    return column.view(torch.uint8)


def _from_bytes(rows: torch.Tensor, dtype: torch.dtype, width: int) -> torch.Tensor:
    values = torch.empty((rows.shape[0], width), dtype=dtype, device=rows.device)
    if values.numel():
        # Copying into a tensor of the right dtype settles alignment: a slice of packed rows may start anywhere.
        values.view(torch.uint8).copy_(rows)
    return values
