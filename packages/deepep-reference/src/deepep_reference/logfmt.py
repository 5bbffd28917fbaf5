"""LogFMT: rows of bf16 in 10 bits per value, for the way back to the source in low-latency combine.

Sign and the logarithm of the magnitude, measured on a scale that spans the block's own range. This file is the model
that other implementations are compared with; logarithms differ between processors, so a value may differ by one level.

Symbols: ``n`` rows, ``H`` hidden size, a multiple of 128, ``B = H / 128`` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 128
TOP_LEVEL = 511
SPAN_OCTAVES = 32


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Rows in LogFMT.

    Attributes:
        level: int16 ``[n, B, 128]``: 0 for zero, else 1 (the block's lowest magnitude) to 511 (its highest).
        is_negative: bool ``[n, B, 128]``.
        low, high: bf16 ``[n, B]``: the magnitudes of levels 1 and 511.
    """

    level: torch.Tensor
    is_negative: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def encode(x: torch.Tensor) -> Encoded:
    """Encode bf16 ``[n, H]``.

    ``high`` is the largest magnitude of the block, ``low`` the smallest that is not zero, but not below ``2^-32 high``.
    Levels divide the octaves from ``low`` to ``high`` into 510 equal steps; each magnitude takes the nearest level in
    the logarithm. Magnitudes below ``low / 2`` become zero, those between ``low / 2`` and ``low`` become ``low``.
    """
    blocks = x.float().unflatten(1, (-1, BLOCK))
    magnitude = blocks.abs()
    high = magnitude.amax(dim=2)
    lowest = torch.where(magnitude > 0, magnitude, torch.inf).amin(dim=2)
    floor = (high * 2.0**-SPAN_OCTAVES).to(torch.bfloat16).float()
    low = torch.where(high > 0, torch.maximum(lowest, floor), 0.0)
    octaves_above_low = magnitude.log2() - low.log2()[..., None]
    step = _step(low, high)[..., None]
    # Where all magnitudes of a block are equal the step is 0, and they all are level 1.
    level = 1 + torch.where(step > 0, octaves_above_low / step, 0.0).round().clamp(0, TOP_LEVEL - 1)
    is_zero = (magnitude == 0) | (magnitude < low[..., None] / 2)
    # Blocks that hold NaN or infinity have no levels; `decode` sees it from `high`.
    level = torch.where(is_zero | ~high.isfinite()[..., None], 0.0, level)
    return Encoded(
        level=level.to(torch.int16),
        is_negative=blocks < 0,
        low=low.to(torch.bfloat16),
        high=high.to(torch.bfloat16),
    )


def decode(encoded: Encoded) -> torch.Tensor:
    """float32 ``[n, H]``: ``low * 2^((level - 1) * step)`` with its sign, and 0 for level 0.

    A block whose ``high`` is not finite decodes to NaN.
    """
    low, high = encoded.low.float(), encoded.high.float()
    exponent = (encoded.level - 1).float() * _step(low, high)[..., None]
    magnitude = torch.where(encoded.level > 0, low[..., None] * exponent.exp2(), 0.0)
    values = torch.where(encoded.is_negative, -magnitude, magnitude)
    return torch.where(high.isfinite()[..., None], values, torch.nan).flatten(1)


def round_trip(x: torch.Tensor) -> torch.Tensor:
    """The float32 values that a receiver sees of bf16 ``x`` ``[n, H]``."""
    return decode(encode(x))


def _step(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """float32 ``[n, B]``: octaves between two levels."""
    return torch.where(low > 0, (high.log2() - low.log2()) / (TOP_LEVEL - 1), 0.0)
