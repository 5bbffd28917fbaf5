"""The formats of `deep_ep.testing.formats` against small cases by hand, and against torch's own conversions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deep_ep.testing.formats import (
    bf16_bits,
    bf16_tensor,
    bf16_to_float32,
    e4m3_tensor,
    float32_to_bf16,
    float32_to_e4m3,
    pack_ue8m0,
    quantise_fp8,
)

ALL_BF16 = np.arange(2**16, dtype=np.uint16)
FINITE_BF16 = ALL_BF16[np.isfinite(bf16_to_float32(ALL_BF16))]


def test_bf16_rounds_ties_to_even():
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001], dtype=np.uint32).view(np.float32)
    assert [hex(b) for b in float32_to_bf16(halfway)] == ["0x3f80", "0x3f82", "0x3f81"]


def test_bf16_agrees_with_torch_on_random_bit_patterns():
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(bf16_tensor(float32_to_bf16(values)).view(torch.int16), expected.view(torch.int16))
    assert np.array_equal(bf16_bits(bf16_tensor(FINITE_BF16)), FINITE_BF16)


def test_e4m3_of_chosen_values():
    values = np.array([0.0, -0.0, 1.0, 448.0, 1e9, -1e9, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 1.0625, 1.1875], np.float32)
    expected = [0x00, 0x80, 0x38, 0x7E, 0x7E, 0xFE, 0x01, 0x00, 0x02, 0x38, 0x3A]
    assert float32_to_e4m3(values).tolist() == expected


def test_e4m3_agrees_with_torch_wherever_torch_does_not_overflow():
    values = bf16_to_float32(FINITE_BF16)
    values = np.concatenate([values, values * np.float32(1.0009765625)])
    values = values[np.abs(values) <= 448]
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn)
    assert torch.equal(e4m3_tensor(float32_to_e4m3(values)).view(torch.uint8), expected.view(torch.uint8))


def test_block_scale_maps_the_largest_value_to_448():
    x = np.zeros((1, 256), dtype=np.float32)
    x[0, 5], x[0, 6], x[0, 200] = -3.0, 1.5, 1e-6
    codes, scales = quantise_fp8(float32_to_bf16(x))
    assert codes[0, 5] == 0xFE
    assert scales[0].tolist() == [
        np.float32(3.0) * (np.float32(1) / np.float32(448)),
        np.float32(1e-4) * (np.float32(1) / np.float32(448)),
    ]


@pytest.mark.parametrize(("amax", "scale"), [(448.0, 1.0), (449.0, 2.0), (224.0, 0.5), (1.0, 2.0**-8), (0.0, 2.0**-22)])
def test_rounded_scale_is_the_next_power_of_two(amax, scale):
    x = np.zeros((1, 128), dtype=np.float32)
    x[0, 0] = amax
    _, scales = quantise_fp8(float32_to_bf16(x + (amax == 449.0)), round_scale=True)
    assert scales[0, 0] == scale


def test_ue8m0_packs_the_first_exponent_into_the_lowest_byte():
    scales = np.array([[1.0, 2.0, 0.5, 4.0]], dtype=np.float32)
    assert pack_ue8m0(scales)[0, 0] == 0x817E807F - 2**32
