"""The FP8 cast against a formulation of its own: a table of e4m3 numbers, nearest by float64 distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepep_reference import fp8

BLOCK = 128


def all_e4m3() -> np.ndarray:
    """float64 ``[127]``: the value of every code from 0 to 126, ascending (127 is NaN)."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """uint8 codes of float32 values: nearest, ties to the even code, no larger than 448."""
    table = all_e4m3()
    magnitude = np.abs(values.astype(np.float64))
    upper = np.clip(np.searchsorted(table, magnitude), 1, 126)
    to_upper, to_lower = table[upper] - magnitude, magnitude - table[upper - 1]
    is_lower = (to_lower < to_upper) | ((to_lower == to_upper) & ((upper - 1) % 2 == 0))
    return (np.where(is_lower, upper - 1, upper) | (np.signbit(values) << 7)).astype(np.uint8)


def finite_bf16() -> torch.Tensor:
    """All finite bf16 values, by bit pattern."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return every[every.isfinite()]


def blocks_around(values: torch.Tensor, *, shuffled: bool) -> torch.Tensor:
    """``[n, 128]`` blocks that together hold all ``values``, sorted by magnitude or mixed."""
    order = torch.randperm(values.shape[0], generator=torch.Generator().manual_seed(1)) if shuffled else slice(None)
    return values[order].unflatten(0, (-1, BLOCK))


def test_table_of_e4m3_agrees_with_torch() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert np.array_equal(codes.double().numpy(), all_e4m3())


@pytest.mark.parametrize("round_scale", [False, True], ids=["exact-scale", "power-of-two-scale"])
@pytest.mark.parametrize("shuffled", [False, True], ids=["one-exponent-per-block", "mixed-exponents"])
def test_every_finite_bf16_value_is_cast_as_defined(round_scale: bool, shuffled: bool) -> None:
    x = blocks_around(finite_bf16(), shuffled=shuffled)
    q, scale = fp8.cast(x, round_scale=round_scale)
    values = x.float().numpy()
    amax = np.maximum(np.abs(values).max(axis=1), np.float32(1e-4))
    expected_scale = amax * np.float32(1 / 448)
    factor = np.float32(448) / amax
    if round_scale:
        expected_scale = 2.0 ** np.ceil(np.log2(expected_scale.astype(np.float64)))
        factor = (1 / expected_scale).astype(np.float32)
    assert np.array_equal(scale[:, 0].double().numpy(), expected_scale.astype(np.float64))
    expected = nearest_e4m3(values * factor[:, None])
    assert np.array_equal(q.view(torch.uint8).numpy(), expected)


def test_scale_of_every_amax_is_the_least_power_of_two_that_suffices() -> None:
    amax = finite_bf16()
    amax = amax[amax > 0]
    x = torch.zeros((amax.shape[0], BLOCK), dtype=torch.bfloat16)
    x[:, 77] = amax
    exact = fp8.cast(x)[1].double().flatten()
    rounded = fp8.cast(x, round_scale=True)[1].double().flatten()
    assert bool((rounded >= exact).all()) and bool((rounded / 2 < exact).all())
    assert bool((rounded.log2() == rounded.log2().round()).all())


def test_worst_relative_error_is_that_of_e4m3() -> None:
    x = torch.randn(64, 4 * BLOCK, generator=torch.Generator().manual_seed(1)).bfloat16()
    for round_scale in (False, True):
        q, scale = fp8.cast(x, round_scale=round_scale)
        back = (q.double().unflatten(1, (-1, BLOCK)) * scale[..., None].double()).flatten(1)
        # 3 bits of mantissa: half a step is 1/16 of the value; below the smallest normal number half of 2^-9.
        bound = x.double().abs() / 16 + (scale.double() * 2.0**-10).repeat_interleave(BLOCK, dim=1)
        assert bool(((back - x.double()).abs() <= bound * 1.0001).all())


def test_rows_do_not_influence_each_other() -> None:
    x = torch.randn(5, 2 * BLOCK, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, scale = fp8.cast(x)
    for row in range(5):
        q_alone, scale_alone = fp8.cast(x[row : row + 1])
        assert torch.equal(q[row].view(torch.uint8), q_alone[0].view(torch.uint8))
        assert torch.equal(scale[row], scale_alone[0])


def test_no_rows_give_no_rows() -> None:
    q, scale = fp8.cast(torch.empty(0, 512, dtype=torch.bfloat16), round_scale=True)
    assert q.shape == (0, 512) and scale.shape == (0, 4)
    assert fp8.pack_ue8m0(scale).shape == (0, 1)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("round_scale", [False, True])
def test_block_that_is_not_finite_decodes_to_nan_and_spares_its_neighbour(wrong: float, round_scale: bool) -> None:
    x = torch.ones(1, 2 * BLOCK, dtype=torch.bfloat16)
    x[0, 3] = wrong
    q, scale = fp8.cast(x, round_scale=round_scale)
    back = q.float() * scale.repeat_interleave(BLOCK, dim=1)
    assert bool(back[0, :BLOCK].isnan().all())
    assert torch.allclose(back[0, BLOCK:], torch.ones(BLOCK))


def test_ue8m0_packs_exponents_lowest_byte_first() -> None:
    scale = torch.tensor([[1.0, 2.0, 4.0, 0.5, 2.0**-22, 2.0**119, 1.0, 1.0]])
    packed = fp8.pack_ue8m0(scale)
    assert packed.dtype == torch.int32 and packed.shape == (1, 2)
    assert packed[0, 0].item() == 0x7E81807F
    assert packed.view(torch.uint8).tolist() == [[127, 128, 129, 126, 105, 246, 127, 127]]


def test_ue8m0_of_every_amax_holds_the_exponent_of_its_scale() -> None:
    amax = finite_bf16()
    amax = amax[amax > 0]
    amax = amax[: amax.shape[0] // 4 * 4]
    x = torch.zeros((amax.shape[0] // 4, 4, BLOCK), dtype=torch.bfloat16)
    x[:, :, 5] = amax.view(-1, 4)
    scale = fp8.cast(x.flatten(1), round_scale=True)[1]
    unpacked = fp8.pack_ue8m0(scale).view(torch.uint8).double()
    assert torch.equal(2.0 ** (unpacked - 127), scale.double())
