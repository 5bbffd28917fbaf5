"""What `test_mpi.py` runs on every MPI rank: both modes on a buffer built on a communicator, then a refused call."""

from __future__ import annotations

import torch
from mpi4py import MPI

from deep_ep import ArgumentError, Buffer, PeerRefusedError

HIDDEN, NUM_TOPK, MAX_TOKENS = 128, 2, 5


def main() -> None:
    comm = MPI.COMM_WORLD
    rank, num_experts = comm.Get_rank(), 2 * comm.Get_size()
    num_tokens = (5, 0, 3)[rank % 3]
    random = torch.Generator().manual_seed(rank)
    topk_idx = torch.rand((num_tokens, num_experts), generator=random).argsort(dim=1)[:, :NUM_TOPK].contiguous()
    weights = torch.ones(topk_idx.shape)
    x = torch.randint(0, 8, (num_tokens, HIDDEN), generator=random).bfloat16()

    buffer = Buffer(None, low_latency_mode=True, backend="reference", comm=comm)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=in_rank,
        topk_idx=topk_idx,
        topk_weights=weights,
    )
    combined, combined_weights, _ = buffer.combine(recv_x, handle, recv_weights)
    assert torch.equal(combined, x * in_rank.sum(dim=1)[:, None])
    assert torch.equal(combined_weights, weights)

    def low_latency_round_trip() -> None:
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, MAX_TOKENS, num_experts, use_fp8=False)
        combined, _, _ = buffer.low_latency_combine(recv_x, topk_idx, weights, handle)
        assert torch.equal(combined, x * NUM_TOPK)

    low_latency_round_trip()
    try:
        buffer.low_latency_dispatch(x if rank else "no tensor", topk_idx, MAX_TOKENS, num_experts)
    except (ArgumentError, PeerRefusedError) as error:
        assert isinstance(error, PeerRefusedError if rank else ArgumentError)
    else:
        raise AssertionError("a call that rank 0 refused took place")
    low_latency_round_trip()
    buffer.destroy()
    print("agreed", flush=True)


if __name__ == "__main__":
    main()
