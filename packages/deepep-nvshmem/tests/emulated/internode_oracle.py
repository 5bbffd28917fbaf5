"""What kernels across nodes have to answer, in plain tensor arithmetic; sums are those of the reference backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from internode_world import Case, Combined, Rank, Received

from deepep_reference.sums import sum_over_ranks


def same(name: str, rank: int, seen: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit."""
    assert seen.shape == expected.shape, (
        f"{name} of rank {rank}: shape {tuple(seen.shape)}, not {tuple(expected.shape)}"
    )
    a, b = (t.contiguous().view(torch.uint8) if t.numel() else t for t in (seen, expected.to(seen.dtype)))
    if torch.equal(a, b):
        return
    place = tuple((a != b).nonzero()[0].tolist())
    element = (*place[:-1], place[-1] // seen.element_size())
    wrong = int((a != b).flatten(1).any(1).sum()) if a.dim() > 1 else int((a != b).sum())
    raise AssertionError(
        f"{name} of rank {rank} differs first at {element}: {seen[element]}, not {expected[element]}; "
        f"{wrong} of {a.shape[0]} rows differ"
    )


def in_rank(case: Case, rank: Rank) -> torch.Tensor:
    """bool ``[T, N]``."""
    idx = rank.topk_idx.long()
    is_used = (idx >= 0) & (idx < case.num_experts)
    result = torch.zeros((idx.shape[0], case.num_ranks + 1), dtype=torch.bool)
    result.scatter_(1, torch.where(is_used, idx // (case.num_experts // case.num_ranks), case.num_ranks), True)
    return result[:, : case.num_ranks]


def in_node(case: Case, rank: Rank) -> torch.Tensor:
    """bool ``[T, D]``."""
    return in_rank(case, rank).view(-1, case.num_nodes, case.ranks_per_node).any(2)


def row_counts(case: Case, ranks: Sequence[Rank]) -> tuple[list[int], list[int]]:
    """Rows that each rank receives, and that it passes on."""
    to_rank = torch.stack([in_rank(case, r).sum(0) for r in ranks])
    to_node = torch.stack([in_node(case, r).sum(0) for r in ranks])
    p = case.ranks_per_node
    forwarded = [int(to_node[rank % p :: p, rank // p].sum()) for rank in range(case.num_ranks)]
    return to_rank.sum(0).tolist(), forwarded


def check_layout(case: Case, ranks: Sequence[Rank]) -> None:
    for rank, r in enumerate(ranks):
        idx = r.topk_idx.long()
        is_good = (idx >= 0) & (idx < case.num_experts)
        same("is_token_in_rank", rank, r.layout["is_token_in_rank"], in_rank(case, r).to(torch.uint8))
        same("num_tokens_per_rank", rank, r.layout["num_tokens_per_rank"], in_rank(case, r).sum(0).int())
        same("num_tokens_per_node", rank, r.layout["num_tokens_per_node"], in_node(case, r).sum(0).int())
        per_expert = torch.bincount(idx[is_good], minlength=case.num_experts)
        same("num_tokens_per_expert", rank, r.layout["num_tokens_per_expert"], per_expert.int())
        assert int(r.bad) == int((~is_good & (idx != -1)).sum())


def _numbered(is_there: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """``first[d]`` and the numbers that follow it where a token goes to ``d``, else -1; int32."""
    return torch.where(is_there, is_there.cumsum(0) - 1 + first, -1).int()


def check_routing(case: Case, ranks: Sequence[Rank]) -> None:
    """What notify and plan leave in the handle."""
    p = case.ranks_per_node
    to_rank = torch.stack([in_rank(case, r).sum(0) for r in ranks])
    to_node = torch.stack([in_node(case, r).sum(0) for r in ranks])
    for rank, r in enumerate(ranks):
        node, column = rank // p, slice(rank % p, None, p)
        from_node = to_node[column, node]
        received = to_rank[:, rank]
        expected = {
            "rdma_channel_prefix": to_node[rank],
            "gbl_channel_prefix": to_rank[rank],
            "recv_rdma_channel_prefix": from_node,
            "recv_rdma_rank_prefix": from_node.cumsum(0),
            "recv_gbl_channel_prefix": received.cumsum(0) - received,
            "recv_gbl_rank_prefix": received.cumsum(0),
            "send_rdma_head": _numbered(in_node(case, r), to_node[column].cumsum(0)[node] - to_node[rank]),
            "dst_rows": _numbered(in_rank(case, r), to_rank.cumsum(0)[rank] - to_rank[rank]),
        }
        for name, value in expected.items():
            same(name, rank, r.routing[name], value.int())
        local = [_local_choices(case, s, rank)[0] for s in ranks]
        per_expert = torch.bincount(torch.cat([i[i >= 0] for i in local]), minlength=case.num_experts // case.num_ranks)
        same("expert counts", rank, r.expert_counts, (-(-per_expert // case.alignment) * case.alignment).int())
        check_lists(case, rank, r)


def check_lists(case: Case, rank: int, r: Rank) -> None:
    expected = torch.full_like(r.routing["tokens_to_node"], -1)
    for node, goes in enumerate(in_node(case, r).t()):
        tokens = goes.nonzero().flatten()
        expected[node, : len(tokens)] = tokens.int()
    same("tokens_to_node", rank, r.routing["tokens_to_node"], expected)


def _local_choices(case: Case, r: Rank, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_local = case.num_experts // case.num_ranks
    idx = r.topk_idx.long() - rank * num_local
    idx = torch.where((idx >= 0) & (idx < num_local), idx, -1)
    return idx, torch.where(idx < 0, 0.0, r.topk_weights)


def check_dispatch(case: Case, ranks: Sequence[Rank], received: Sequence[Received], *, is_cached: bool = False) -> None:
    """Rows lie by source rank, then by token."""
    for rank, out in enumerate(received):
        picks = [in_rank(case, r)[:, rank].nonzero().flatten() for r in ranks]
        rows = sum(map(len, picks))
        gather = lambda tensors, picks=picks: torch.cat([t[p] for t, p in zip(tensors, picks, strict=True)])  # noqa: E731
        same("recv_x", rank, out.x[:rows], gather([r.x for r in ranks]))
        if out.scales is not None:
            same("recv_scales", rank, out.scales[:rows], gather([r.scales for r in ranks]))
        if is_cached:
            continue
        choices = [_local_choices(case, r, rank) for r in ranks]
        same("recv_topk_idx", rank, out.topk_idx[:rows], gather([idx for idx, _ in choices]))
        same("recv_topk_weights", rank, out.topk_weights[:rows], gather([weights for _, weights in choices]))
        sources = torch.cat([torch.full_like(p, source) for source, p in enumerate(picks)])
        same("recv_src_meta", rank, out.src_meta[:rows], torch.stack([sources, torch.cat(picks)], 1).int())


def check_forwarding(case: Case, ranks: Sequence[Rank]) -> None:
    """A fresh dispatch notes where the rows that a rank passes on went."""
    p = case.ranks_per_node
    for rank, r in enumerate(ranks):
        heads = []
        for source in range(rank % p, case.num_ranks, p):
            rows = ranks[source].routing["dst_rows"].view(-1, case.num_nodes, p)[:, rank // p]
            heads.append(rows[in_node(case, ranks[source])[:, rank // p]])
        expected = torch.nn.functional.pad(torch.cat(heads), (0, 8 - p), value=-1)
        same("send_nvl_head", rank, r.send_nvl_head[: len(expected)], expected)


def check_combine(case: Case, ranks: Sequence[Rank], combined: Sequence[Combined]) -> None:
    for rank, (r, c) in enumerate(zip(ranks, combined, strict=True)):
        dst_rows = r.routing["dst_rows"].long()
        tokens = [(dst_rows[:, owner] >= 0).nonzero().flatten() for owner in range(case.num_ranks)]
        rows = [dst_rows[t, owner] for owner, t in enumerate(tokens)]
        tree = {"num_tokens": r.x.shape[0], "ranks_per_node": case.ranks_per_node}
        expected = sum_over_ranks(
            [o.y[i] for o, i in zip(combined, rows, strict=True)], tokens, biases=c.biases, dtype=torch.bfloat16, **tree
        )
        same("combined", rank, c.out, expected)
        if c.weights is None:
            continue
        weights = [o.weights[i] for o, i in zip(combined, rows, strict=True) if o.weights is not None]
        same("combined weights", rank, c.out_weights, sum_over_ranks(weights, tokens, dtype=torch.float32, **tree))
