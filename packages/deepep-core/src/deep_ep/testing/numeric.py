"""Comparison of bits, and of the one format that is not exact. A failure shows the first difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bitwise_equal(
    actual: torch.Tensor | None,
    expected: torch.Tensor | np.ndarray[Any, Any],
    what: str,
    *,
    rank: int,
    axes: Sequence[str] = ("row", "column"),
    origin: Callable[[int], str] | None = None,
) -> None:
    """Raise `AssertionError` unless shape, dtype and every bit agree.

    Args:
        actual: what the library gave, any device; ``None`` fails.
        expected: what it has to be.
        what: name of the tensor.
        rank: where this happens.
        axes: what the dimensions are called.
        origin: says for an index along the first axis where that row comes from, such as ``"token 3 of rank 1"``.
    """
    if actual is None:
        raise AssertionError(f"rank {rank}: {what} is None, expected a tensor of shape {list(expected.shape)}")
    wanted = expected if isinstance(expected, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(expected))
    if tuple(actual.shape) != tuple(wanted.shape):
        raise AssertionError(f"rank {rank}: {what} has shape {list(actual.shape)}, expected {list(wanted.shape)}")
    if actual.dtype != wanted.dtype:
        raise AssertionError(f"rank {rank}: {what} has dtype {actual.dtype}, expected {wanted.dtype}")
    # Via numpy and flattened: bit patterns compare equal where NaN would not, and signed zeros do not.
    given, wanted = actual.detach().cpu().contiguous(), wanted.detach().cpu().contiguous()
    integer = _INTEGER_OF_SIZE[given.element_size()]
    bits, wanted_bits = (_bits(t, integer) for t in (given, wanted))
    differing = np.argwhere(bits != wanted_bits)
    if not len(differing):
        return
    place = tuple(int(i) for i in differing[0])
    where = ", ".join(f"{name} {i}" for name, i in zip(_names(axes, len(place)), place, strict=True))
    source = f" ({origin(place[0])})" if origin is not None and place else ""
    digits = 2 * given.element_size()
    mask = (1 << (8 * given.element_size())) - 1
    shown = [
        f"{_value(tensor, place)} ({int(integers[place]) & mask:#0{digits + 2}x})"
        for tensor, integers in ((given, bits), (wanted, wanted_bits))
    ]
    raise AssertionError(
        f"rank {rank}: {what} differs in {len(differing)} of {bits.size} elements, first at {where}{source}: "
        f"{shown[0]}, expected {shown[1]}"
    )


def assert_within(
    actual: torch.Tensor,
    expected: np.ndarray[Any, Any],
    tolerance: np.ndarray[Any, Any],
    what: str,
    *,
    rank: int,
    axes: Sequence[str] = ("row", "column"),
) -> None:
    """Raise `AssertionError` unless ``|actual - expected| <= tolerance`` everywhere (which NaN fails)."""
    given = actual.detach().to(torch.float32).cpu().numpy()
    if given.shape != expected.shape:
        raise AssertionError(f"rank {rank}: {what} has shape {list(given.shape)}, expected {list(expected.shape)}")
    beyond = np.argwhere(~(np.abs(given - expected) <= tolerance))
    if len(beyond):
        place = tuple(int(i) for i in beyond[0])
        where = ", ".join(f"{name} {i}" for name, i in zip(_names(axes, len(place)), place, strict=True))
        raise AssertionError(
            f"rank {rank}: {what} is off in {len(beyond)} of {given.size} elements, first at {where}: "
            f"{given[place]}, expected {expected[place]} within {tolerance[place]:.3g}"
        )


def _bits(tensor: torch.Tensor, integer: torch.dtype) -> np.ndarray[Any, Any]:
    if tensor.dtype is torch.bool:
        return tensor.numpy().view(np.uint8)
    bits: np.ndarray[Any, Any] = (
        tensor.view(integer).numpy() if tensor.ndim else tensor.reshape(1).view(integer).numpy()
    )
    return bits.reshape(tensor.shape)


def _value(tensor: torch.Tensor, place: tuple[int, ...]) -> str:
    return str(float(tensor[place])) if tensor.dtype.is_floating_point else repr(tensor[place].item())


def _names(axes: Sequence[str], count: int) -> list[str]:
    return [axes[i] if i < len(axes) else f"axis {i}" for i in range(count)]
