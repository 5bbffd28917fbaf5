"""The options of a buffer: read on each rank, compared with everybody's before anything is reserved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import settings
from .backend import BufferOptions, LowLatencyReduce
from .channel import Channel
from .errors import ArgumentError, DeepEPError, PeerRefusedError, PeersDisagreeError

DEFAULT_TIMEOUT_S = 100.0
_MUST_AGREE = ("low_latency_mode", "ll_reduce", "enable_shrink", "rdma_provider")


def agree_on_options(
    channel: Channel, own_options: Callable[[], tuple[settings.Settings, BufferOptions, dict[str, str]]]
) -> tuple[settings.Settings, BufferOptions, dict[str, str]]:
    """Read this rank's options and compare them with everybody's before anything is reserved. Collective.

    What only the settings say, and no argument, is filled in here.
    """
    result, refusal, own_error = None, "", None
    try:
        own, options, request = own_options()
        options = replace(
            options,
            low_latency_sms=own.low_latency_sms,
            rdma_provider=own.rdma_provider or "auto",
            nvshmem=own.nvshmem,
        )
        result = own, options, request
        text = " ".join(f"{name}={getattr(options, name)}" for name in _MUST_AGREE)
        timeout_s = options.timeout_s
    except DeepEPError as error:
        refusal, own_error, text, timeout_s = str(error), error, "", DEFAULT_TIMEOUT_S
    texts = channel.gather_texts(("!" + refusal) if refusal else text, phase="construction", timeout_s=timeout_s)
    if own_error is not None:
        raise own_error
    refused = [r for r, t in enumerate(texts) if t.startswith("!")]
    if refused:
        raise PeerRefusedError(
            f"Buffer: rank {refused[0]} refused its arguments, so no buffer was built. Its reason: "
            f"{texts[refused[0]][1:]}",
            ranks=refused,
            phase="construction",
        )
    if len(set(texts)) > 1:
        listing = "; ".join(f"rank {r}: {t}" for r, t in enumerate(texts))
        raise PeersDisagreeError(f"Buffer: ranks give different options ({listing}).", phase="construction")
    assert result is not None
    return result


def ll_reduce_of(value: str) -> LowLatencyReduce:
    if value == "rank" or value == "expert":
        return value  # type: ignore[return-value]
    raise ArgumentError(f"Buffer: ll_reduce is {value!r}; accepted: 'rank', 'expert'.")


def timeout_of(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ArgumentError(f"Buffer: timeout_s is {value!r}; it has to be a positive number of seconds.")
    return float(value)
