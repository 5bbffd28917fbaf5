"""A mixture-of-experts layer on top of `deep_ep.Buffer`, small enough to read and to copy from.

`dispatch` and `combine` are the two calls with gradients. `Gate`, `Experts` and `MoELayer` are a DeepSeek-V3-style
layer built on them; `LocalMoELayer` is the same layer computed in one process, and `OneProcessCheck` says what the
distributed one has to give and how far rounding may take it from that.
"""

from .check import Difference, Expected, OneProcessCheck, dequantise, quantise_fp8_blocks
from .experts import Experts
from .functional import Dispatched, combine, dispatch
from .gate import Gate, Routing, select_experts
from .layer import LocalMoELayer, LowLatencyStep, MoELayer

__all__ = [
    "Difference",
    "Dispatched",
    "Expected",
    "Experts",
    "Gate",
    "LocalMoELayer",
    "LowLatencyStep",
    "MoELayer",
    "OneProcessCheck",
    "Routing",
    "combine",
    "dequantise",
    "dispatch",
    "quantise_fp8_blocks",
    "select_experts",
]
