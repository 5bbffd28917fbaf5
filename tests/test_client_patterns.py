"""How frameworks call the library, in our own words: one function for each habit, with results that are exact.

Numbers are small integers and powers of two, so that every sum is exact in bf16 and the expected result is the
same layer computed in one process, bit for bit.

Symbols: ``T`` tokens of a rank, ``K`` choices per token, ``H`` hidden size, ``R`` received rows.
"""

from __future__ import annotations

import json
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from deep_ep import Buffer, Config, EventHandle, EventOverlap
from deep_ep.launch import RankContext

HIDDEN = 128
NUM_EXPERTS = 8
NUM_TOPK = 3
MAX_TOKENS = 8


class Layer:
    """A routed layer on one rank: its tokens, its choices, and what has to come out.

    Expert ``e`` multiplies by ``e + 1``; weights are 1, 1/2 or 1/4.
    """

    def __init__(self, context: RankContext, num_tokens: int = 6, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(100 * seed + context.rank)
        self.x = torch.randint(-4, 5, (num_tokens, HIDDEN), generator=random).to(torch.bfloat16)
        scores = torch.rand((num_tokens, NUM_EXPERTS), generator=random)
        self.topk_idx = scores.topk(NUM_TOPK, dim=1).indices
        self.topk_idx[torch.rand((num_tokens, NUM_TOPK), generator=random) < 0.2] = -1
        exponents = torch.randint(0, 3, (num_tokens, NUM_TOPK), generator=random)
        self.topk_weights = torch.ldexp(torch.ones(num_tokens, NUM_TOPK), -exponents)
        self.num_local_experts = NUM_EXPERTS // context.num_ranks
        self.first_expert = context.rank * self.num_local_experts

    def expected(self, x: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The layer in one process, float32: differentiable in ``x`` and ``weights``."""
        factors = torch.where(self.topk_idx >= 0, self.topk_idx + 1, 0).float()
        gains = ((self.topk_weights if weights is None else weights) * factors).sum(dim=1, keepdim=True)
        return (self.x.float() if x is None else x) * gains

    def experts(self, rows: torch.Tensor, local_idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What this rank's experts make of received rows ``[R, H]``, weighted and summed over its own choices."""
        factors = torch.where(local_idx >= 0, local_idx + self.first_expert + 1, 0).float()
        return (rows.float() * (weights * factors).sum(dim=1, keepdim=True)).to(torch.bfloat16)

    def low_latency_experts(self, rows: torch.Tensor) -> torch.Tensor:
        """``[L, M, H]``: each local expert's output, unweighted."""
        numbers = torch.arange(self.num_local_experts) + self.first_expert + 1
        return (rows.float() * numbers[:, None, None]).to(torch.bfloat16)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.detach().float(), rtol=0, atol=0)


# --- training with autograd: Megatron-LM, Automodel -----------------------------------------------------------------

_buffer: Buffer | None = None


def cached_buffer(group: Any, hidden_bytes: int) -> Buffer:
    """One buffer for the process, rebuilt when the group changes or the hints outgrow it."""
    global _buffer
    num_nvl_bytes = num_rdma_bytes = 0
    size = group.size()
    for config in (Buffer.get_dispatch_config(size), Buffer.get_combine_config(size)):
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, size), num_nvl_bytes)
        num_rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, size), num_rdma_bytes)
    if (
        _buffer is None
        or _buffer.group != group
        or _buffer.num_nvl_bytes < num_nvl_bytes
        or _buffer.num_rdma_bytes < num_rdma_bytes
    ):
        _buffer = Buffer(group, num_nvl_bytes, num_rdma_bytes)
    return _buffer


class FusedDispatch(torch.autograd.Function):
    """Dispatch forward, combine backward; the gradient of the weights travels beside that of the rows."""

    @staticmethod
    def forward(ctx, x, topk_idx, topk_weights, group):
        before = EventOverlap(EventHandle())
        buffer = cached_buffer(group, x.size(1) * max(x.element_size(), 2))
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx, NUM_EXPERTS, previous_event=before, async_finish=True, allocate_on_comm_stream=True
        )
        recv_x, recv_idx, recv_weights, counts, handle, after = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        after.current_stream_wait()
        ctx.group, ctx.handle = group, handle
        return recv_x, recv_idx, recv_weights, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad_x, _grad_idx, grad_weights, _grad_counts, _grad_handle):
        buffer = cached_buffer(ctx.group, grad_x.size(1) * 2)
        combined, combined_weights, event = buffer.combine(
            grad_x.contiguous(),
            ctx.handle,
            topk_weights=grad_weights.float(),
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return combined, None, combined_weights, None


class FusedCombine(torch.autograd.Function):
    """Combine forward, replayed dispatch backward."""

    @staticmethod
    def forward(ctx, x, group, handle):
        combined, _, event = cached_buffer(group, x.size(1) * 2).combine(
            x,
            handle=handle,
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        ctx.group, ctx.handle = group, handle
        return combined

    @staticmethod
    def backward(ctx, grad):
        recv, _, _, _, _, event = cached_buffer(ctx.group, grad.size(1) * 2).dispatch(
            grad.contiguous(),
            handle=ctx.handle,
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return recv, None, None


def train(context: RankContext) -> None:
    global _buffer
    layer = Layer(context, seed=1)
    for step in range(2):
        x = layer.x.clone().requires_grad_()
        weights = layer.topk_weights.clone().requires_grad_()
        recv_x, recv_idx, recv_weights, counts, handle = FusedDispatch.apply(x, layer.topk_idx, weights, context.group)
        assert int(counts.sum()) == int((recv_idx >= 0).sum())
        factors = torch.where(recv_idx >= 0, recv_idx + layer.first_expert + 1, 0).float()
        outputs = (recv_x.float() * (recv_weights * factors).sum(dim=1, keepdim=True)).to(torch.bfloat16)
        combined = FusedCombine.apply(outputs, context.group, handle)
        same(combined, layer.expected())
        combined.sum().backward()

        x_alone = layer.x.float().requires_grad_()
        weights_alone = layer.topk_weights.clone().requires_grad_()
        layer.expected(x_alone, weights_alone).sum().backward()
        same(x.grad, x_alone.grad)
        same(weights.grad, torch.where(layer.topk_idx >= 0, weights_alone.grad, 0))
        first = cached_buffer(context.group, HIDDEN * 2)
        assert cached_buffer(context.group, HIDDEN * 2) is first, "hints that still fit must not rebuild the buffer"
        if step == 0:
            # A wider model comes along: the new buffer is built while the old one is alive.
            assert cached_buffer(context.group, HIDDEN * 64) is not first
    _buffer = None


def train_and_destroy_explicitly(context: RankContext) -> None:
    """Automodel's variant: an explicit end, and the RDMA hint asked for only if NVSHMEM seems to be there."""
    config = Buffer.get_dispatch_config(context.num_ranks)
    rdma = config.get_rdma_buffer_size_hint(HIDDEN * 2, context.num_ranks) if Buffer.is_sm90_compiled() else 0
    nvl = config.get_nvl_buffer_size_hint(HIDDEN * 2, context.num_ranks)
    buffer = Buffer(context.group, nvl, rdma, explicitly_destroy=True)
    layer = Layer(context, seed=2)
    layout = buffer.get_dispatch_layout(layer.topk_idx, NUM_EXPERTS)
    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        layer.x, None, *layout[:2], layout[3], layout[2], layer.topk_idx, layer.topk_weights
    )
    combined, _, _ = buffer.combine(layer.experts(recv_x, recv_idx, recv_weights), handle)
    same(combined, layer.expected())
    buffer.destroy()
    assert buffer.runtime is None


# --- serving: vLLM --------------------------------------------------------------------------------------------------


def serve_prefill(context: RankContext) -> None:
    """Keywords only, a cache of weak references, inference mode, expert numbers made global again."""
    cache: weakref.WeakValueDictionary[str, Buffer] = weakref.WeakValueDictionary()
    arguments = {
        "group": context.group,
        "num_nvl_bytes": 1024 * 1024 * 1024,
        "num_rdma_bytes": 0,
        "low_latency_mode": False,
        "num_qps_per_rank": 1,
        "explicitly_destroy": True,
    }
    buffer = Buffer(**arguments)
    cache["high_throughput"] = buffer
    assert cache["high_throughput"] is buffer
    Buffer.set_num_sms(20)
    buffer.set_num_sms(20)
    with torch.inference_mode():
        for num_tokens in (6, 0, 3) if context.rank else (6, 2, 0):
            layer = Layer(context, num_tokens, seed=3)
            previous = buffer.capture()
            per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
                topk_idx=layer.topk_idx,
                num_experts=NUM_EXPERTS,
                previous_event=previous,
                async_finish=False,
                allocate_on_comm_stream=False,
            )
            recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
                x=layer.x,
                handle=None,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=layer.topk_idx,
                topk_weights=layer.topk_weights,
                expert_alignment=1,
                config=Buffer.get_dispatch_config(context.num_ranks),
                previous_event=previous,
                async_finish=True,
                allocate_on_comm_stream=False,
            )
            if event.event is not None:
                event.current_stream_wait()
            unused = NUM_EXPERTS - 1 if layer.first_expert == 0 else 0
            global_idx = torch.where(recv_idx == -1, unused, recv_idx + layer.first_expert)
            assert global_idx.dtype == torch.int64
            assert len(counts) == layer.num_local_experts and len(recv_x) == len(recv_idx)
            combined, _, event = buffer.combine(
                x=layer.experts(recv_x, recv_idx, recv_weights),
                handle=handle,
                topk_weights=None,
                config=None,
                previous_event=None,
                async_finish=False,
                allocate_on_comm_stream=False,
            )
            assert event.event is None
            same(combined, layer.expected())
    buffer.destroy()
    del buffer
    assert "high_throughput" not in cache


def serve_decode(context: RankContext) -> None:
    """Hooks in another thread, the result in ``out`` and the returned one dropped, scratch zeroed after a fault."""
    size = Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MAX_TOKENS,
        hidden=HIDDEN,
        num_ranks=context.num_ranks,
        num_experts=NUM_EXPERTS,
    )
    buffer = Buffer(
        group=context.group,
        num_nvl_bytes=0,
        num_rdma_bytes=size,
        low_latency_mode=True,
        num_qps_per_rank=NUM_EXPERTS // context.num_ranks,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    with torch.inference_mode():
        for num_tokens in (4, 0, 7):
            layer = Layer(context, num_tokens, seed=4)
            rows, counts, handle, _, hook = buffer.low_latency_dispatch(
                layer.x,
                layer.topk_idx,
                MAX_TOKENS,
                NUM_EXPERTS,
                use_fp8=False,
                round_scale=False,
                use_ue8m0=False,
                async_finish=False,
                return_recv_hook=True,
            )
            in_another_thread(hook)
            assert counts.dtype == torch.int32
            out = torch.full((num_tokens, HIDDEN), float("nan"), dtype=torch.bfloat16)
            _, _, hook = buffer.low_latency_combine(
                layer.low_latency_experts(rows),
                layer.topk_idx,
                layer.topk_weights,
                handle,
                async_finish=False,
                zero_copy=False,
                return_recv_hook=True,
                out=out,
            )
            del rows
            in_another_thread(hook)
            same(out, layer.expected())
            mask = torch.empty(context.num_ranks, dtype=torch.int32)
            buffer.low_latency_query_mask_buffer(mask)
            assert not mask.any()
            buffer.get_local_buffer_tensor(dtype=torch.uint8, use_rdma_buffer=True).zero_()
            buffer.low_latency_clean_mask_buffer()
    buffer.destroy()


def in_another_thread(hook: Any) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            hook()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures


# --- serving: SGLang, LMDeploy, LightLLM ----------------------------------------------------------------------------


def switch_modes(context: RankContext) -> None:
    """Prefill and decode on one buffer, a cleaning at each switch, received tensors emptied after the first product."""
    config = Config(**json.loads('{"num_sms": 24, "num_max_nvl_chunked_send_tokens": 8}'))
    hint = Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, context.num_ranks, NUM_EXPERTS)
    buffer = Buffer(
        context.group,
        config.get_nvl_buffer_size_hint(HIDDEN * 2, context.group.size()),
        max(config.get_rdma_buffer_size_hint(HIDDEN * 2, context.group.size()), hint),
        low_latency_mode=True,
        num_qps_per_rank=max(2, NUM_EXPERTS // context.num_ranks),
        allow_mnnvl=True,
    )
    assert buffer.low_latency_mode and buffer.group_size == context.num_ranks
    recorded = torch.zeros(NUM_EXPERTS // context.num_ranks, dtype=torch.int64)
    for step in range(3):
        layer = Layer(context, seed=5 + step)
        previous = Buffer.capture()
        *layout, previous = buffer.get_dispatch_layout(
            layer.topk_idx, NUM_EXPERTS, previous_event=previous, async_finish=True, allocate_on_comm_stream=True
        )
        recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            layer.x,
            topk_idx=layer.topk_idx,
            topk_weights=layer.topk_weights,
            num_tokens_per_rank=layout[0],
            num_tokens_per_rdma_rank=layout[1],
            is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2],
            previous_event=previous,
            async_finish=True,
            allocate_on_comm_stream=True,
            expert_alignment=128,
            config=config,
        )
        event.current_stream_wait()
        assert isinstance(counts, list) and all(count % 128 == 0 for count in counts)
        outputs = layer.experts(recv_x, recv_idx, recv_weights)
        recv_x.set_()
        combined, _, event = buffer.combine(
            outputs,
            handle,
            async_finish=True,
            previous_event=Buffer.capture(),
            allocate_on_comm_stream=True,
            config=config,
        )
        event.current_stream_wait()
        same(combined, layer.expected())

        buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, NUM_EXPERTS)
        (rows, scales), masked_m, handle, event, hook = buffer.low_latency_dispatch(
            layer.x, layer.topk_idx, MAX_TOKENS, NUM_EXPERTS, use_fp8=True, async_finish=True, return_recv_hook=False
        )
        assert hook is None
        event.current_stream_wait()
        recorded += masked_m
        assert scales.stride() == (scales.shape[1] * scales.shape[2], 1, scales.shape[1])
        values = (rows.float() * scales.repeat_interleave(128, dim=2)).to(torch.bfloat16)
        combined, event, hook = buffer.low_latency_combine(
            x=layer.low_latency_experts(values),
            topk_idx=layer.topk_idx,
            topk_weights=layer.topk_weights,
            handle=handle,
            async_finish=True,
            return_recv_hook=False,
        )
        event.current_stream_wait()
        # FP8 with a scale per block: three bits of mantissa.
        tolerance = layer.expected().abs().max() * 2.0**-3
        torch.testing.assert_close(combined.float(), layer.expected(), rtol=0, atol=float(tolerance))
        rows.set_()
    assert recorded.sum() > 0
    buffer.destroy()


def mixed_with_reference_counts(context: RankContext) -> None:
    """LMDeploy: a constructor tried with more arguments first, synchronous layouts, tensors freed by counting."""
    try:
        buffer = Buffer(context.group, 1 << 20, 1 << 20, True, 4, unknown_argument=True)  # type: ignore[call-arg]
    except TypeError:
        buffer = Buffer(context.group, num_nvl_bytes=1 << 20, num_rdma_bytes=1 << 20, low_latency_mode=True)
    assert isinstance(buffer, Buffer)
    layer = Layer(context, seed=8)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(layer.topk_idx, NUM_EXPERTS)
    assert isinstance(event, EventOverlap) and event.event is None
    recv_x, recv_idx, recv_weights, _, handle, event = buffer.dispatch(
        layer.x,
        topk_idx=layer.topk_idx,
        topk_weights=layer.topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event,
        async_finish=False,
        allocate_on_comm_stream=False,
        expert_alignment=128,
    )
    # The local name and the argument: nobody else holds the tensor.
    assert [sys.getrefcount(recv_x), sys.getrefcount(recv_idx), sys.getrefcount(recv_weights)] == [2, 2, 2]
    combined, _, _ = buffer.combine(layer.experts(recv_x, recv_idx, recv_weights), handle, previous_event=event)
    same(combined, layer.expected())
    rows, _, handle, _, _ = buffer.low_latency_dispatch(layer.x, layer.topk_idx, MAX_TOKENS, NUM_EXPERTS, use_fp8=False)
    reference = weakref.ref(rows)
    outputs = layer.low_latency_experts(rows)
    del rows
    assert reference() is None, "the library keeps a reference to a result"
    combined, _, _ = buffer.low_latency_combine(outputs, layer.topk_idx, layer.topk_weights, handle)
    same(combined, layer.expected())
    buffer.destroy()


def huge_hints(context: RankContext) -> None:
    """LightLLM: a round gigabyte, a cleaning after every prefill."""
    hint = Buffer.get_low_latency_rdma_size_hint(256, 7168, context.num_ranks, 256)
    buffer = Buffer(context.group, int(1e9), hint, low_latency_mode=True, num_qps_per_rank=256 // context.num_ranks)
    layer = Layer(context, seed=9)
    layout = buffer.get_dispatch_layout(layer.topk_idx, NUM_EXPERTS)
    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        layer.x,
        topk_idx=layer.topk_idx,
        topk_weights=layer.topk_weights,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
    )
    same(buffer.combine(layer.experts(recv_x, recv_idx, recv_weights), handle)[0], layer.expected())
    buffer.clean_low_latency_buffer(256, HIDDEN, NUM_EXPERTS)
    rows, _, handle, _, hook = buffer.low_latency_dispatch(
        layer.x, layer.topk_idx, 256, NUM_EXPERTS, use_fp8=False, return_recv_hook=True
    )
    hook()
    outputs = layer.low_latency_experts(rows)
    combined, _, _ = buffer.low_latency_combine(outputs, layer.topk_idx, layer.topk_weights, handle)
    same(combined, layer.expected())


# --- training: XTuner, torchtitan -----------------------------------------------------------------------------------


class SavedHandle(torch.autograd.Function):
    """A dispatch on a low-latency buffer whose handle is saved part by part."""

    @staticmethod
    def forward(ctx, x, topk_idx, topk_weights, buffer, finished):
        layout_event = buffer.capture()
        per_rank, per_node, per_expert, in_rank, layout_event = buffer.get_dispatch_layout(
            topk_idx, NUM_EXPERTS, layout_event, True, True
        )
        recv_x, recv_idx, recv_weights, _, handle, event = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=layout_event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        finished.event = event.event
        ctx.save_for_backward(*handle)
        ctx.buffer = buffer
        return recv_x, recv_idx, recv_weights

    @staticmethod
    def backward(ctx, grad_x, _grad_idx, grad_weights):
        from deep_ep_cpp import EventHandle as NativeHandle

        combined, weights, event = ctx.buffer.combine(
            grad_x.contiguous(),
            ctx.saved_tensors,
            topk_weights=grad_weights.float(),
            previous_event=EventOverlap(NativeHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return combined, None, weights, None, None


def train_with_saved_handles(context: RankContext) -> None:
    buffer = Buffer(context.group, 1 << 20, 1 << 20, low_latency_mode=True, num_qps_per_rank=4)
    layer = Layer(context, seed=10)
    x = layer.x.clone().requires_grad_()
    weights = layer.topk_weights.clone().requires_grad_()
    finished = EventOverlap(None)
    recv_x, _, recv_weights = SavedHandle.apply(x, layer.topk_idx, weights, buffer, finished)
    finished.current_stream_wait()
    (recv_x.float().sum() + 2 * recv_weights.sum()).backward()
    num_ranks_of_token = torch.stack(
        [(layer.topk_idx // layer.num_local_experts == r).any(dim=1) for r in range(context.num_ranks)]
    ).sum(dim=0)
    same(x.grad, num_ranks_of_token[:, None].float().expand(-1, HIDDEN))
    # The gradient of a received weight comes back whether or not its choice was of that rank.
    same(weights.grad, 2.0 * num_ranks_of_token[:, None].float().expand(-1, NUM_TOPK))
    buffer.destroy()


def replay_with_nones(context: RankContext) -> None:
    """torchtitan: every argument by name, handles in a dictionary under numbers, ``None`` for all else on replay."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        buffer = Buffer(context.group, 1 << 20, 0)
    layer = Layer(context, seed=11)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        topk_idx=layer.topk_idx,
        num_experts=NUM_EXPERTS,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    handles: dict[int, Any] = {}
    recv_x, recv_idx, recv_weights, _, handles[7], event = buffer.dispatch(
        x=layer.x,
        topk_idx=layer.topk_idx,
        topk_weights=layer.topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=EventOverlap(EventHandle()),
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    handle = handles.pop(7)
    again, none_idx, none_weights, none_counts, none_handle, event = buffer.dispatch(
        x=layer.x,
        topk_idx=None,
        topk_weights=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        handle=handle,
        previous_event=None,
        async_finish=True,
        allocate_on_comm_stream=False,
    )
    event.current_stream_wait()
    assert (none_idx, none_weights, none_counts, none_handle) == (None, None, None, None)
    same(again, recv_x)
    combined, _, _ = buffer.combine(x=layer.experts(recv_x, recv_idx, recv_weights), handle=handle)
    same(combined, layer.expected())
    buffer.destroy()


PATTERNS = {
    "megatron-autograd-around-a-cached-buffer": train,
    "automodel-explicit-destroy": train_and_destroy_explicitly,
    "vllm-high-throughput-keywords-and-weak-cache": serve_prefill,
    "vllm-low-latency-hooks-in-another-thread": serve_decode,
    "sglang-mode-switch-on-one-buffer": switch_modes,
    "lmdeploy-synchronous-layout-and-reference-counts": mixed_with_reference_counts,
    "lightllm-round-sizes": huge_hints,
    "xtuner-handle-saved-for-backward": train_with_saved_handles,
    "torchtitan-replay-with-nones": replay_with_nones,
}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(rank_pool, pattern, num_ranks):
    rank_pool.run(PATTERNS[pattern], num_ranks=num_ranks)
