"""The FP8 cast of low-latency dispatch: e4m3 with one scale for each block of 128 columns.

Symbols: ``T`` tokens, ``H`` hidden size, a multiple of 128. All arithmetic is float32; each operation rounds once.
Finite inputs give bits that any processor reproduces; a block that holds NaN or infinity decodes to NaN.
"""

from __future__ import annotations

import torch

BLOCK = 128
SCALES_PER_INT32 = 4
MAX_E4M3 = 448.0
MIN_AMAX = 1e-4

_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127


def cast(x: torch.Tensor, *, round_scale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast each block of 128 columns to e4m3.

    ``amax`` is the largest magnitude of the block, at least 1e-4. The scale is ``fl(amax * fl(1 / 448))`` and the
    values are ``saturate(fl(x * fl(448 / amax)))``. With ``round_scale`` the scale is the least power of two that is
    not below that, ``2^e``, and the values are ``saturate(x * 2^-e)``.

    Args:
        x: bf16 ``[T, H]``.

    Returns:
        e4m3 ``[T, H]`` and float32 ``[T, H/128]``; value times scale approximates ``x``.
    """
    blocks = x.float().unflatten(1, (-1, BLOCK))
    amax = blocks.abs().amax(dim=2).clamp(min=MIN_AMAX)
    scale = amax * _float32(1.0 / MAX_E4M3, x.device)
    factor = _float32(MAX_E4M3, x.device) / amax
    if round_scale:
        exponent = _exponent_not_below(scale)
        scale = _power_of_two(exponent)
        factor = _power_of_two(-exponent)
    # Rounding may put a product a little above 448. Torch converts that to 448 anyway, and larger numbers to NaN.
    q = (blocks * factor[..., None]).clamp(-MAX_E4M3, MAX_E4M3)
    return q.flatten(1).to(torch.float8_e4m3fn), scale


def pack_ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two as their float32 exponent bytes (bias 127), four to an int32, the first in the lowest byte.

    ``[T, S]`` float32 gives ``[T, S/4]`` int32: scales 1, 2, 4, 0.5 give the bytes 127, 128, 129, 126, 0x7e81807f.
    """
    exponent_byte = (scale.contiguous().view(torch.int32) >> _MANTISSA_BITS).to(torch.uint8)
    return exponent_byte.view(torch.int32)


def _float32(value: float, device: torch.device) -> torch.Tensor:
    """A float32 tensor, so that the value is rounded to float32 before it is used and not after."""
    return torch.tensor(value, dtype=torch.float32, device=device)


def _exponent_not_below(value: torch.Tensor) -> torch.Tensor:
    """int32 ``e``, the least with ``2^e >= value``; from the bits of positive, normal float32 numbers."""
    bits = value.view(torch.int32)
    has_fraction = (bits & ((1 << _MANTISSA_BITS) - 1)) != 0
    return (bits >> _MANTISSA_BITS) - _EXPONENT_BIAS + has_fraction.to(torch.int32)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """float32 ``2^exponent``, exact for exponents from -126 to 127; 128 gives infinity."""
    return ((exponent + _EXPONENT_BIAS).clamp(0, 2 * _EXPONENT_BIAS + 1) << _MANTISSA_BITS).view(torch.float32)
