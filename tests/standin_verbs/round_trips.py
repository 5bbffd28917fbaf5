"""Two ranks on two nodes: round trips of the backend ``nvshmem``, each of which has to be right. One line per rank."""

from __future__ import annotations

import torch

from deep_ep import Buffer
from deep_ep.launch import RankContext, RankPool

SHAPES = ((4, 128), (64, 512), (512, 7168))  # tokens, hidden size


def round_trips(context: RankContext) -> list[bool]:
    buffer = Buffer(context.group, 1 << 20, backend="nvshmem", timeout_s=20.0)
    num_experts = 2 * context.num_ranks
    are_right = []
    for num_tokens, hidden in SHAPES:
        x = torch.randn((num_tokens, hidden), device=context.device).bfloat16()
        chosen = (torch.arange(num_tokens * 2, device=context.device).view(-1, 2) * 3 + context.rank) % num_experts
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(chosen, num_experts)
        received, _, _, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=chosen,
            topk_weights=torch.ones((num_tokens, 2), device=context.device),
        )
        combined, _, _ = buffer.combine(received, handle)
        # The stand-in moves bytes by CUDA calls of this process. They could wait behind torch's first use of a kernel,
        # which waits for combine.
        torch.cuda.synchronize()
        # One copy of each row comes back from every rank that had it: once or twice the row, which bf16 holds exactly.
        are_right.append(bool(torch.equal(combined, x * in_rank.sum(1, keepdim=True))))
    buffer.destroy()
    return are_right


if __name__ == "__main__":
    with RankPool(2, device="cuda") as pool:
        for rank, are_right in enumerate(pool.run(round_trips, environment={"DEEPEP_RANKS_PER_NODE": "1"})):
            print(f"rank {rank}: {are_right}")
