"""Comparisons of `deep_ep.testing.numeric` say where the first difference is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deep_ep.testing.numeric import assert_bitwise_equal, assert_within


def test_equal_bits_pass_even_where_they_mean_nan():
    values = torch.tensor([float("nan"), -0.0, 1.0])
    assert_bitwise_equal(values, values.clone(), "x", rank=0)


def test_message_names_rank_tensor_place_origin_and_both_values():
    expected = torch.zeros((3, 4), dtype=torch.bfloat16)
    actual = expected.clone()
    actual[1, 2], actual[2, 0] = 0.5, 1.0
    with pytest.raises(AssertionError) as caught:
        assert_bitwise_equal(actual, expected, "recv_x", rank=3, origin=lambda row: f"token {row} of rank 7")
    assert str(caught.value) == (
        "rank 3: recv_x differs in 2 of 12 elements, first at row 1, column 2 (token 1 of rank 7): "
        "0.5 (0x3f00), expected 0.0 (0x0000)"
    )


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        pytest.param(torch.tensor([0.0]), torch.tensor([-0.0]), id="sign-of-zero"),
        pytest.param(torch.tensor([1]), torch.tensor([2]), id="integers"),
        pytest.param(torch.tensor([True]), torch.tensor([False]), id="booleans"),
        pytest.param(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), id="dtype"),
        pytest.param(torch.zeros(2, 3), torch.zeros(3, 2), id="shape"),
        pytest.param(torch.zeros(0, 3), torch.zeros(0, 2), id="shape-of-nothing"),
        pytest.param(torch.ones(1), np.zeros(1, dtype=np.float32), id="numpy"),
    ],
)
def test_each_kind_of_difference_is_found(actual, expected):
    with pytest.raises(AssertionError, match="rank 0: x "):
        assert_bitwise_equal(actual, expected, "x", rank=0)


def test_tolerance_is_per_element_and_nan_fails():
    expected, tolerance = np.array([1.0, 2.0], np.float32), np.array([0.1, 0.0], np.float32)
    assert_within(torch.tensor([1.05, 2.0]), expected, tolerance, "x", rank=0)
    with pytest.raises(AssertionError, match="first at row 1"):
        assert_within(torch.tensor([1.05, 2.01]), expected, tolerance, "x", rank=0)
    with pytest.raises(AssertionError, match="first at row 0"):
        assert_within(torch.tensor([float("nan"), 2.0]), expected, tolerance, "x", rank=0)
