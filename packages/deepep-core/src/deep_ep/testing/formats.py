"""The number formats that travel, in numpy: bf16, FP8 e4m3 with block scales, UE8M0.

Written for the tests, independently of any backend: bit patterns and float32 arithmetic, one operation at a time.
numpy has neither bf16 nor FP8, so both are kept as bit patterns (``uint16``, ``uint8``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Bits16 = npt.NDArray[np.uint16]
Bits8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

FP8_BLOCK = 128
FP8_MAX = np.float32(448.0)
FP8_MIN_AMAX = np.float32(1e-4)


def bf16_to_float32(bits: Bits16) -> Float32:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: Float32) -> Bits16:
    """To nearest, ties to even. NaN is not expected."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def round_to_bf16(values: Float32) -> Float32:
    """The nearest bf16, as float32."""
    return bf16_to_float32(float32_to_bf16(values))


def float32_to_e4m3(values: Float32) -> Bits8:
    """To nearest, ties to even, saturating at 448: sign, 4 exponent bits (bias 7), 3 mantissa bits."""
    magnitude = np.minimum(np.abs(values), FP8_MAX)
    mantissa, exponent = np.frexp(magnitude)  # magnitude = mantissa * 2**exponent, mantissa in [1/2, 1)
    normal = ((exponent + 6) << 3) + (np.rint(mantissa * 16).astype(np.int32) - 8)
    subnormal = np.rint(magnitude * np.float32(512)).astype(np.int32)
    codes = np.where(magnitude < np.float32(2.0**-6), subnormal, normal)
    return (codes | (np.signbit(values).astype(np.int32) << 7)).astype(np.uint8)


def quantise_fp8(x: Bits16, *, round_scale: bool = False) -> tuple[Bits8, Float32]:
    """Cast rows to e4m3 with one scale per 128 columns.

    Args:
        x: bf16 ``[T, H]``, ``H`` a multiple of 128.
        round_scale: take the next power of two at or above the scale instead.

    Returns:
        Codes ``[T, H]`` and scales float32 ``[T, H / 128]``; ``code * scale`` approximates ``x``.
    """
    num_tokens, hidden = x.shape
    blocks = bf16_to_float32(x).reshape(num_tokens, hidden // FP8_BLOCK, FP8_BLOCK)
    amax = np.maximum(np.abs(blocks).max(axis=2), FP8_MIN_AMAX) if num_tokens else np.zeros(blocks.shape[:2], "f4")
    scale = amax * (np.float32(1) / FP8_MAX)
    if round_scale:
        bits = scale.view(np.uint32)
        exponent = (bits >> 23).astype(np.int32) - 127 + ((bits & 0x7FFFFF) != 0)
        scale = np.ldexp(np.float32(1), exponent).astype(np.float32)
        multiplier = np.ldexp(np.float32(1), -exponent).astype(np.float32)
    else:
        multiplier = FP8_MAX / amax if num_tokens else amax
    codes = float32_to_e4m3(blocks * multiplier[:, :, None])
    return codes.reshape(num_tokens, hidden), scale


def pack_ue8m0(scales: Float32) -> npt.NDArray[np.int32]:
    """Exponent bytes of powers of two ``[T, S]``, four to an int32, the first in the lowest byte: ``[T, S / 4]``."""
    exponents = (np.ascontiguousarray(scales).view(np.uint32) >> 23).astype(np.uint8)
    return exponents.view("<i4")


# --- to and from torch ----------------------------------------------------------------------------------------------


def bf16_tensor(bits: Bits16, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16).copy()).view(torch.bfloat16).to(device)


def bf16_bits(tensor: torch.Tensor) -> Bits16:
    return tensor.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def e4m3_tensor(codes: Bits8, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(codes).copy()).view(torch.float8_e4m3fn).to(device)
