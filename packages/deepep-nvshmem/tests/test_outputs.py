"""How many rows a dispatch makes room for before it knows how many will come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deep_ep.backend import DispatchRequest
from deepep_nvshmem.outputs import Outputs, least_rows, size_class

ROWS = st.integers(1, 1 << 24)


def test_size_classes_of_a_doubling() -> None:
    assert sorted({size_class(n) for n in range(513, 1025)}) == [576, 640, 704, 768, 832, 896, 960, 1024]
    assert [size_class(n) for n in (1, 2, 3, 15, 16)] == [1, 2, 3, 15, 16]


@given(num_rows=ROWS)
def test_a_size_class_holds_its_rows_and_an_eighth_more_at_most(num_rows: int) -> None:
    assert num_rows <= size_class(num_rows) <= num_rows * 9 // 8


@given(num_rows=ROWS)
def test_blocks_of_the_right_class_are_never_too_large(num_rows: int) -> None:
    assert least_rows(size_class(num_rows)) <= num_rows


@given(num_rows=ROWS)
def test_counts_around_a_border_between_classes_keep_the_larger_one(num_rows: int) -> None:
    """Else counts that waver around the border would allocate twice in every other call."""
    border = size_class(num_rows)
    assert least_rows(size_class(border + 1)) <= border


@given(capacity=st.integers(400, 1 << 24))
def test_blocks_that_waste_a_fifth_are_replaced(capacity: int) -> None:
    assert capacity * 3 // 4 < least_rows(capacity)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 10])
@pytest.mark.parametrize("has_scales", [True, False])
@pytest.mark.parametrize("source_shape", [(), (2,)])
def test_cutting_keeps_memory_and_first_rows(num_rows: int, has_scales: bool, source_shape: tuple[int, ...]) -> None:
    x = torch.zeros((4, 32), dtype=torch.float8_e4m3fn if has_scales else torch.bfloat16)
    request = DispatchRequest(x=x, scales=torch.zeros((4, 2)) if has_scales else None)
    outputs = Outputs.allocate(request, 10, 3, source_shape=source_shape)
    tensors = [t for t in outputs[1:] if t is not None]
    assert len(tensors) == (5 if has_scales else 4)
    for tensor in tensors:
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % 64)
    whole, addresses = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    outputs.cut(num_rows)
    for tensor, before, address in zip(tensors, whole, addresses, strict=True):
        assert tensor.shape == (num_rows, *before.shape[1:]) and tensor.is_contiguous()
        assert tensor.data_ptr() == address or num_rows == 0
        assert torch.equal(tensor.float(), before[:num_rows].float())
