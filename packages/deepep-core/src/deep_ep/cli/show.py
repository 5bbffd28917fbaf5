"""Small pieces of the commands' tables."""

from __future__ import annotations

_BLOCKS = " ▁▂▃▄▅▆▇█"


def bytes_text(num_bytes: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"


def bar(value: float, most: float) -> str:
    """One character whose height is the share of ``most``; anything above zero is visible."""
    if value <= 0 or most <= 0:
        return _BLOCKS[0]
    return _BLOCKS[max(1, round(value / most * (len(_BLOCKS) - 1)))]


def heat(value: float, most: float) -> str:
    """A style that grows with the share of ``most``."""
    if value <= 0 or most <= 0:
        return "dim"
    share = value / most
    return "bold yellow" if share > 0.9 else "yellow" if share > 0.6 else "cyan" if share > 0.3 else "blue"


def duration(seconds: float) -> str:
    """``0.000123`` as ``123 us``, ``0.0123`` as ``12.3 ms``: three digits."""
    return f"{_three(seconds * 1e6)} us" if seconds < 1e-3 else f"{_three(seconds * 1e3)} ms"


def rate(gbps: float) -> str:
    """GB/s: ``343``, ``12.4``, ``0.13``."""
    return _three(gbps)


def span(low: float, high: float) -> str:
    """Two durations in one unit: ``6.21-14.7 ms``."""
    unit, scale = ("us", 1e6) if high < 1e-3 else ("ms", 1e3)
    return f"{_three(low * scale)}-{_three(high * scale)} {unit}"


def _three(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"
