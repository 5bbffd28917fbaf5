"""The names, argument orders and defaults that programs written for DeepEP V1 rely on, written out here once more.

The table is this repository's own record of that surface. Changing a line of it breaks programs in the field.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deep_ep
from deep_ep import Buffer, Config, EventHandle, EventOverlap

PACKAGES = Path(__file__).parent.parent / "packages"
REQUIRED = inspect.Parameter.empty

OVERLAP = [("previous_event", None), ("async_finish", False), ("allocate_on_comm_stream", False)]
DISPATCH = [
    ("x", REQUIRED),
    ("handle", None),
    ("num_tokens_per_rank", None),
    ("num_tokens_per_rdma_rank", None),
    ("is_token_in_rank", None),
    ("num_tokens_per_expert", None),
    ("topk_idx", None),
    ("topk_weights", None),
    ("expert_alignment", 1),
    ("num_worst_tokens", 0),
    ("config", None),
    *OVERLAP,
]
COMBINE = [("x", REQUIRED), ("handle", REQUIRED), ("topk_weights", None), ("bias", None), ("config", None), *OVERLAP]
LOW_LATENCY_SIZE = [
    ("num_max_dispatch_tokens_per_rank", REQUIRED),
    ("hidden", REQUIRED),
    ("num_ranks", REQUIRED),
    ("num_experts", REQUIRED),
]

# Of instances, without self; positional arguments in V1's order, then what this library adds by keyword only.
METHODS = {
    "__init__": (
        [
            ("group", REQUIRED),
            ("num_nvl_bytes", 0),
            ("num_rdma_bytes", 0),
            ("low_latency_mode", False),
            ("num_qps_per_rank", 24),
            ("allow_nvlink_for_low_latency_mode", True),
            ("allow_mnnvl", False),
            ("use_fabric", False),
            ("explicitly_destroy", False),
            ("enable_shrink", False),
            ("comm", None),
        ],
        [("backend", None), ("ll_reduce", None), ("timeout_s", None)],
    ),
    "destroy": ([], []),
    "get_comm_stream": ([], []),
    "get_local_buffer_tensor": (
        [("dtype", REQUIRED), ("size", None), ("offset", 0), ("use_rdma_buffer", False)],
        [],
    ),
    "get_dispatch_layout": ([("topk_idx", REQUIRED), ("num_experts", REQUIRED), *OVERLAP], []),
    "dispatch": (DISPATCH, []),
    "combine": (COMBINE, []),
    "internode_dispatch": (DISPATCH, []),
    "internode_combine": (COMBINE, []),
    "clean_low_latency_buffer": (
        [("num_max_dispatch_tokens_per_rank", REQUIRED), ("hidden", REQUIRED), ("num_experts", REQUIRED)],
        [],
    ),
    "low_latency_dispatch": (
        [
            ("x", REQUIRED),
            ("topk_idx", REQUIRED),
            ("num_max_dispatch_tokens_per_rank", REQUIRED),
            ("num_experts", REQUIRED),
            ("cumulative_local_expert_recv_stats", None),
            ("dispatch_wait_recv_cost_stats", None),
            ("use_fp8", True),
            ("round_scale", False),
            ("use_ue8m0", False),
            ("async_finish", False),
            ("return_recv_hook", False),
        ],
        [("topk_weights", None)],
    ),
    "low_latency_combine": (
        [
            ("x", REQUIRED),
            ("topk_idx", REQUIRED),
            ("topk_weights", REQUIRED),
            ("handle", REQUIRED),
            ("use_logfmt", False),
            ("zero_copy", False),
            ("async_finish", False),
            ("return_recv_hook", False),
            ("out", None),
            ("combine_wait_recv_cost_stats", None),
        ],
        [],
    ),
    "get_next_low_latency_combine_buffer": ([("handle", REQUIRED)], []),
    "low_latency_update_mask_buffer": ([("rank_to_mask", REQUIRED), ("mask", False)], []),
    "low_latency_query_mask_buffer": ([("mask_status", REQUIRED)], []),
    "low_latency_clean_mask_buffer": ([], []),
    # Not in V1.
    "abort": ([], []),
    "reset": ([], []),
    "placement": ([], []),
    "push_limit_gbps": ([("num_sms", REQUIRED)], []),
    "tuning_space": ([], []),
    "symmetric_memory": ([], []),
}
STATIC_METHODS = {
    "is_sm90_compiled": [],
    "set_num_sms": [("new_num_sms", REQUIRED)],
    "capture": [],
    "get_low_latency_rdma_size_hint": LOW_LATENCY_SIZE,
    "get_dispatch_config": [("num_ranks", REQUIRED)],
    "get_combine_config": [("num_ranks", REQUIRED)],
}
CONFIG = [
    ("num_sms", 20),
    ("num_max_nvl_chunked_send_tokens", 6),
    ("num_max_nvl_chunked_recv_tokens", 256),
    ("num_max_rdma_chunked_send_tokens", 6),
    ("num_max_rdma_chunked_recv_tokens", 256),
]
MODULES = {
    "deep_ep": ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t", "__version__"],
    "deep_ep.buffer": ["Buffer"],
    "deep_ep.utils": ["EventHandle", "EventOverlap", "check_nvlink_connections"],
    "deep_ep_cpp": ["Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"],
}


def signature_of(function) -> tuple[list[tuple[str, object]], list[tuple[str, object]]]:
    """Positional and keyword-only arguments with their defaults; fails on ``*args`` and ``**kwargs``."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    variable = [p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert not variable, f"{function.__qualname__} swallows arguments: {variable}"
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert len(positional) + len(keyword) == len(parameters)
    return positional, keyword


@pytest.mark.parametrize("name", METHODS)
def test_method_has_its_arguments_in_order_with_their_defaults(name):
    assert signature_of(getattr(Buffer, name)) == METHODS[name]


@pytest.mark.parametrize("name", STATIC_METHODS)
def test_static_method_can_be_called_on_the_class(name):
    assert isinstance(inspect.getattr_static(Buffer, name), staticmethod)
    assert signature_of(getattr(Buffer, name)) == (STATIC_METHODS[name], [])


def test_nothing_public_on_the_buffer_is_missing_from_this_table():
    public = {name for name in dir(Buffer) if not name.startswith("_")}
    attributes = {"num_sms", "backends"}
    assert public == {*METHODS, *STATIC_METHODS, *attributes, "for_model"} - {"__init__"}


def test_buffer_is_sized_by_model_facts_with_keywords_only():
    positional, keyword = signature_of(Buffer.for_model)
    assert positional == [("group", REQUIRED)]
    required = {name for name, default in keyword if default is REQUIRED}
    assert required == {"hidden", "num_experts", "num_topk", "max_tokens_per_rank"}
    assert dict(keyword)["mode"] == "normal"


@pytest.mark.parametrize("module", MODULES)
def test_module_has_its_names(module):
    loaded = importlib.import_module(module)
    assert [name for name in MODULES[module] if not hasattr(loaded, name)] == []


def test_names_are_the_same_objects_everywhere():
    import deep_ep.buffer
    import deep_ep.utils
    import deep_ep_cpp

    assert deep_ep.buffer.Buffer is Buffer
    assert deep_ep.utils.EventOverlap is EventOverlap
    assert deep_ep.utils.EventHandle is EventHandle is deep_ep_cpp.EventHandle
    assert deep_ep_cpp.Config is Config
    assert deep_ep.topk_idx_t is torch.int64


@pytest.mark.parametrize("name", ["ElasticBuffer", "EPHandle", "HybridEPBuffer"])
def test_names_by_which_clients_detect_other_versions_are_absent(name):
    assert not hasattr(deep_ep, name)
    with pytest.raises(ImportError):
        exec(f"from deep_ep import {name}", {})
    with pytest.raises(ImportError):
        importlib.import_module("deep_ep.hybrid_ep_buffer")


def test_config_takes_its_five_numbers_by_position_and_by_name():
    assert signature_of(Config) == (CONFIG, [])
    assert isinstance(Config, type)
    assert Config(8, 4, 128, 4, 64) == Config(**{name: n for (name, _), n in zip(CONFIG, (8, 4, 128, 4, 64))})  # noqa: B905
    assert (Config | None) is not None, "clients evaluate the annotation"


def test_hints_are_cheap_monotone_and_need_no_gpu():
    config = Config()
    sizes = [config.get_nvl_buffer_size_hint(hidden * 2, 8) for hidden in (128, 2048, 7168, 8192)]
    assert sizes == sorted(set(sizes))
    assert all(size % 128 == 0 for size in sizes)
    assert [config.get_rdma_buffer_size_hint(4096, n) for n in (1, 2, 8)] == [0, 0, 0]
    assert 0 < config.get_rdma_buffer_size_hint(4096, 16) < config.get_rdma_buffer_size_hint(4096, 32)
    low_latency = [Buffer.get_low_latency_rdma_size_hint(tokens, 7168, 8, 256) for tokens in (1, 64, 128, 1024)]
    assert low_latency == sorted(set(low_latency))
    assert all(size % 128 == 0 for size in low_latency)
    import deep_ep_cpp

    assert deep_ep_cpp.get_low_latency_rdma_size_hint(128, 7168, 8, 256) == low_latency[2]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 16, 24, 144, 160, 200])
def test_configs_exist_for_any_rank_count_and_follow_the_sm_count(num_ranks):
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(24)
        for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
            assert isinstance(config, Config)
            assert config.num_sms == 24
    finally:
        Buffer.set_num_sms(before)


@pytest.mark.parametrize("num_sms", [-2, 0, 3, "24", 2.0, True, None])
def test_sm_count_has_to_be_even_and_positive(num_sms):
    before = Buffer.num_sms
    with pytest.raises(deep_ep.ArgumentError, match="new_num_sms"):
        Buffer.set_num_sms(num_sms)
    assert Buffer.num_sms == before


def test_events_are_plain_writable_objects_and_context_managers():
    assert signature_of(EventOverlap) == ([("event", None), ("extra_tensors", None)], [])
    empty = EventOverlap(None)
    assert empty.event is None and empty.extra_tensors is None
    with empty:
        pass
    with pytest.raises(AssertionError):
        empty.current_stream_wait()
    empty.event = EventHandle()
    empty.extra_tensors = (torch.zeros(1),)
    empty.current_stream_wait()
    with EventOverlap(EventHandle()) as overlap:
        assert overlap.event is not None
    captured = Buffer.capture()
    assert isinstance(captured, EventOverlap) and captured.event is not None
    captured.event.current_stream_wait()


def test_errors_are_runtime_errors_under_one_base():
    names = [name for name in deep_ep.__all__ if name.endswith("Error")]
    assert len(names) >= 10
    for name in names:
        assert issubclass(getattr(deep_ep, name), deep_ep.DeepEPError)
    assert issubclass(deep_ep.DeepEPError, RuntimeError)
    assert issubclass(deep_ep.PeerTimeoutError, TimeoutError)


IMPORT_PROGRAM = """
import sys, threading
import torch
threads = threading.active_count()
import deep_ep, deep_ep.utils, deep_ep.buffer, deep_ep_cpp
assert not torch.cuda.is_initialized(), "importing deep_ep initialised CUDA"
loaded = [m for m in sys.modules if m.split(".")[0].startswith("deepep_") or m.split(".")[0] in HEAVY]
assert not loaded, f"importing deep_ep loaded {loaded}"
assert threading.active_count() == threads
deep_ep.Buffer.set_num_sms(24), deep_ep.Buffer.get_dispatch_config(8), deep_ep.Buffer.is_sm90_compiled()
assert not torch.cuda.is_initialized(), "static calls initialised CUDA"
"""


def test_import_touches_no_gpu_and_loads_no_backend_nor_tool():
    heavy = {"typer", "rich", "matplotlib", "pytest", "hypothesis"}
    program = f"HEAVY = {heavy!r}\n{IMPORT_PROGRAM}"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


OBJECTS_ON_THE_WIRE = re.compile(
    r"\b(pickle|cPickle|marshal|dill|cloudpickle|shelve|all_gather_object|broadcast_object_list|gather_object|"
    r"scatter_object_list|send_object_list|recv_object_list|torch\.load|torch\.save)\b"
)


def test_no_rank_unpickles_what_another_sent():
    sources = sorted(PACKAGES.glob("*/src/**/*.py"))
    assert len(sources) > 30
    using = {str(path.relative_to(PACKAGES)) for path in sources if OBJECTS_ON_THE_WIRE.search(code_of(path))}
    # Its pipes lead from a process to the ranks it started itself; ranks do not reach one another through them.
    assert using <= {"deepep-core/src/deep_ep/launch.py"}, f"objects travel pickled in {sorted(using)}"


def code_of(path: Path) -> str:
    """A module without its comments and docstrings, which may say that nothing is pickled."""
    import ast

    return ast.unparse(_without_docstrings(ast.parse(path.read_text())))


def _without_docstrings(tree):
    import ast

    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return tree
