"""LogFMT against the same definition in float64, and its error bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepep_reference import logfmt

BLOCK = 128


def model(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels ``[n, 128]`` (not yet rounded), lows and highs of float64 blocks ``[n, 128]`` without zeros."""
    magnitude = np.abs(values)
    high = magnitude.max(axis=1, keepdims=True)
    low = np.maximum(magnitude.min(axis=1, keepdims=True), high * 2.0**-32)
    step = np.log2(high / low) / 510
    with np.errstate(invalid="ignore", divide="ignore"):
        level = np.where(step > 0, 1 + np.log2(magnitude / low) / step, 1.0)
    return level, low, high


def random_blocks(num_blocks: int, *, octaves: float, seed: int) -> torch.Tensor:
    """bf16 ``[num_blocks, 128]`` of both signs, magnitudes spread evenly over so many octaves."""
    random = np.random.default_rng(seed)
    exponent = random.uniform(-octaves, 0, (num_blocks, BLOCK)) + random.integers(-30, 30, (num_blocks, 1))
    sign = random.choice([-1.0, 1.0], exponent.shape)
    return torch.from_numpy(sign * 2.0**exponent).to(torch.bfloat16)


@pytest.mark.parametrize("octaves", [0.01, 1, 8, 31, 60])
def test_levels_are_nearest_in_the_logarithm(octaves: float) -> None:
    x = random_blocks(200, octaves=octaves, seed=1)
    values = x.double().numpy()
    exact, low, high = model(values)
    encoded = logfmt.encode(x)
    level = encoded.level[:, 0].double().numpy()
    assert np.array_equal(encoded.low.double().numpy(), low)
    assert np.array_equal(encoded.high.double().numpy(), high)
    is_zero = np.abs(values) < low / 2
    assert np.array_equal(level == 0, is_zero)
    # float32 logarithms may tip a value that lies between two levels; they never miss by more.
    nearest = np.clip(exact, 1, 511)
    assert np.abs(level - nearest)[~is_zero].max() <= 0.51
    assert np.array_equal(encoded.is_negative[:, 0].numpy(), values < 0)


@pytest.mark.parametrize("octaves", [0.01, 1, 8, 31, 60])
def test_values_come_back_within_half_a_step(octaves: float) -> None:
    x = random_blocks(200, octaves=octaves, seed=2)
    values = x.double().numpy()
    _, low, high = model(values)
    back = logfmt.round_trip(x).double().numpy()
    half_step = 2.0 ** (np.log2(high / low) / 510 / 2) - 1
    magnitude = np.abs(values)
    above = magnitude >= low
    assert (np.abs(back - values) <= magnitude * (half_step + 1e-4))[above].all()
    assert (np.abs(back - values) <= low)[~above].all()
    assert half_step.max() <= 2.0 ** (32 / 510 / 2) - 1 < 0.022


def test_every_finite_bf16_value_survives_with_its_sign() -> None:
    """Blocks of one binary exponent each: the range is one octave, a step 1/510 of it."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()].unflatten(0, (-1, BLOCK))
    back = logfmt.round_trip(x).double()
    is_normal = x.double().abs() >= 2.0**-126
    error = (back - x.double()).abs() / x.double().abs().clamp(min=2.0**-140)
    assert error[is_normal].max().item() < 2.0 ** (1 / 510 / 2) - 1 + 1e-5
    assert torch.equal(back[is_normal].sign(), x.double()[is_normal].sign())
    assert bool((back[x == 0] == 0).all())


def test_magnitudes_that_are_all_equal_are_exact() -> None:
    x = torch.full((1, BLOCK), 0.3, dtype=torch.bfloat16)
    x[0, ::3] *= -1
    x[0, 5] = 0
    assert torch.equal(logfmt.round_trip(x), x.float())


def test_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 2 * BLOCK, dtype=torch.bfloat16)
    x[1, 0] = -2.5
    assert torch.equal(logfmt.round_trip(x), x.float())


def test_what_is_2_to_the_33_below_the_largest_becomes_zero_and_what_is_near_becomes_the_lowest() -> None:
    x = torch.ones(1, BLOCK, dtype=torch.bfloat16)
    x[0, 1], x[0, 2], x[0, 3] = 2.0**-34, 2.0**-33, 2.0**-32
    back = logfmt.round_trip(x)
    assert back[0, 1].item() == 0.0
    assert back[0, 2].item() == 2.0**-32
    assert back[0, 3].item() == 2.0**-32


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_block_that_is_not_finite_becomes_nan_and_spares_its_neighbour(wrong: float) -> None:
    x = torch.ones(1, 2 * BLOCK, dtype=torch.bfloat16)
    x[0, 7] = wrong
    back = logfmt.round_trip(x)
    assert bool(back[0, :BLOCK].isnan().all())
    assert torch.equal(back[0, BLOCK:], torch.ones(BLOCK))


def test_no_rows_give_no_rows() -> None:
    assert logfmt.round_trip(torch.empty(0, 256, dtype=torch.bfloat16)).shape == (0, 256)
