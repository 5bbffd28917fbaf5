"""What dispatch and combine must give, in plain torch on the CPU. Sums are float32 with two roundings per term."""

from __future__ import annotations

import torch
from low_latency_world import Case, Combining, Inputs, Received

Place = tuple[int, int, int]  # rank, local expert, row; or source, token, expert


def places(case: Case, inputs: list[Inputs], *, left_out: frozenset[int] = frozenset()) -> dict[Place, Place]:
    """Where each (source, token, expert) lies: by expert, then by source, then by token."""
    result: dict[Place, Place] = {}
    used = [[0] * case.num_local for _ in range(case.num_ranks)]
    for source, one in enumerate(inputs):
        if source in left_out:
            continue
        for token, experts in enumerate(one.topk_idx.tolist()):
            for expert in dict.fromkeys(experts):
                if expert < 0 or expert // case.num_local in left_out:
                    continue
                rank, local = divmod(expert, case.num_local)
                result[source, token, expert] = (rank, local, used[rank][local])
                used[rank][local] += 1
    return result


def cast(case: Case, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 rows and their scales as they arrive: float32, or UE8M0 in int32."""
    blocks = x.float().unflatten(1, (-1, 128))
    amax = blocks.abs().amax(dim=2).clamp(min=1e-4)
    scale = amax * torch.tensor(1.0 / 448.0, dtype=torch.float32)
    factor = torch.tensor(448.0, dtype=torch.float32) / amax
    if case.cast != "fp8":
        bits = scale.view(torch.int32)
        exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(torch.int32)
        scale = ((exponent + 127).clamp(0, 255) << 23).view(torch.float32)
        factor = ((127 - exponent).clamp(0, 255) << 23).view(torch.float32)
    rows = (blocks * factor[..., None]).clamp(-448.0, 448.0).flatten(1).to(torch.float8_e4m3fn)
    if case.cast == "ue8m0":
        scale = (scale.view(torch.int32) >> 23).to(torch.uint8).contiguous().view(torch.int32)
    return rows, scale


def check_dispatch(
    case: Case, inputs: list[Inputs], received: list[Received], *, left_out: frozenset[int] = frozenset()
) -> None:
    where = places(case, inputs, left_out=left_out)
    on_cpu = [one.x.cpu() for one in inputs]
    rows = [(x, None) if case.cast == "bf16" else cast(case, x) for x in on_cpu]
    for rank, got in enumerate(received):
        if rank in left_out:
            continue
        counts = torch.zeros((case.num_local, case.num_ranks), dtype=torch.int64)
        mine = [(key, place) for key, place in where.items() if place[0] == rank]
        for (source, _, _), (_, local, _) in mine:
            counts[local, source] += 1
        begins = counts.cumsum(dim=1) - counts
        context = f"{case.name} seed {case.seed} rank {rank}"
        recv_count = counts.sum(dim=1).to(torch.int32)
        assert torch.equal(got.count.cpu(), recv_count), f"{context}: recv_count {got.count.tolist()}"
        taking_part = [r for r in range(case.num_ranks) if r not in left_out]
        layout = got.layout_range.cpu()
        assert torch.equal(layout[:, taking_part], (begins << 32 | counts)[:, taking_part]), f"{context}: layout_range"
        assert not (layout & 0xFFFFFFFF)[:, list(left_out)].any(), f"{context}: rows of ranks that were left out"
        if got.stats is not None:
            assert torch.equal(got.stats.cpu() - 7, recv_count), f"{context}: statistics"
        if got.wait_stats is not None:
            waited = got.wait_stats.tolist()
            assert waited[rank] == 0 and all(0 <= w < 10**11 for w in waited), f"{context}: waits {waited}"
        # Everything that was not written still holds its poison.
        want_x = torch.full(got.x.shape, 0xFF, dtype=torch.uint8).repeat_interleave(got.x.element_size(), dim=2)
        want_src = torch.full((case.num_local, case.num_rows), -1, dtype=torch.int32)
        want_scales = None if got.scales is None else torch.full(got.scales.shape, -1, dtype=torch.int32)
        exact = torch.ones(
            (case.num_local, case.num_rows, case.hidden // 128 if case.cast != "bf16" else 1), dtype=torch.bool
        )
        for (source, token, _), (_, local, row) in mine:
            values, scales = rows[source]
            want_x[local, row] = values[token].view(torch.uint8)
            want_src[local, row] = token
            if scales is not None and want_scales is not None:
                want_scales[local, :, row] = scales[token].view(torch.int32)
                exact[local, row] = on_cpu[source][token].float().unflatten(0, (-1, 128)).isfinite().all(dim=1)
        assert torch.equal(got.src_info(case).cpu(), want_src), f"{context}: src_info"
        got_x = got.x.cpu().view(torch.uint8)
        if case.cast == "bf16":
            _same(got_x, want_x, f"{context}: rows")
            continue
        # Blocks with NaN or infinity decode to NaN, whatever their bits.
        keep = exact.repeat_interleave(128, dim=2)
        _same(torch.where(keep, got_x, 0), torch.where(keep, want_x, 0), f"{context}: rows")
        assert got.scales is not None and want_scales is not None
        got_scales = got.scales.cpu().view(torch.int32)
        if case.cast == "ue8m0":
            exact = exact.unflatten(2, (-1, 4)).all(dim=3)
        keep = exact.transpose(1, 2)
        _same(torch.where(keep, got_scales, 0), torch.where(keep, want_scales, 0), f"{context}: scales")
        if case.cast == "fp8" and not exact.all():
            decoded = got.x.cpu().float().unflatten(2, (-1, 128)) * got.scales.cpu().transpose(1, 2)[..., None]
            assert decoded[~exact].isnan().all(), f"{context}: a block with NaN decodes to numbers"


def _same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    if torch.equal(got, want):
        return
    wrong = (got != want).nonzero()
    first = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{what}: {len(wrong)} differ, first at {first}: {got[first].item()} instead of {want[first].item()}"
    )


def logfmt(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a receiver sees of a bf16 row in LogFMT, and by how much one level more or less would change it."""
    blocks = x.float().unflatten(0, (-1, 128))
    size = blocks.abs()
    high = size.amax(dim=1, keepdim=True)
    lowest = torch.where(size > 0, size, torch.inf).amin(dim=1, keepdim=True)
    low = torch.where(high > 0, torch.maximum(lowest, (high * 2.0**-32).to(torch.bfloat16).float()), 0.0)
    step = torch.where(low > 0, (high.log2() - low.log2()) / 510, 0.0)
    level = torch.where(step > 0, (size.log2() - low.log2()) / step, 0.0).round().clamp(0, 510)
    value = torch.where((size == 0) | (size < low / 2), 0.0, low * (level * step).exp2())
    value = torch.where(blocks < 0, -value, value)
    slack = value.abs() * ((step * 1.01).exp2() - 1)
    # A block that holds NaN or infinity is NaN throughout.
    is_finite = high.isfinite()
    return torch.where(is_finite, value, torch.nan).flatten(), torch.where(is_finite, slack, 0.0).flatten()


def combined(
    case: Case,
    inputs: list[Inputs],
    combining: list[Combining],
    rank: int,
    ll_reduce: str,
    *,
    left_out: frozenset[int] = frozenset(),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of one rank, and by how much they may differ from it (only with LogFMT)."""
    where = places(case, inputs, left_out=left_out)
    y = [one.x[..., : case.hidden].cpu() for one in combining]
    shape = (case.num_tokens[rank], case.hidden)
    out, slack = torch.zeros(shape), torch.zeros(shape)
    idx, weights = inputs[rank].topk_idx.tolist(), inputs[rank].topk_weights.cpu()
    for token in range(case.num_tokens[rank]):
        partials: dict[int, torch.Tensor] = {}
        total = torch.zeros(case.hidden)
        for k, expert in enumerate(idx[token]):
            place = where.get((rank, token, expert))
            if place is None:
                continue
            row, weight = y[place[0]][place[1], place[2]], weights[token, k]
            if ll_reduce == "rank":
                partials[place[0]] = partials.get(place[0], torch.zeros(case.hidden)) + weight * row.float()
                continue
            values, step = logfmt(row) if case.use_logfmt else (row.float(), torch.zeros(case.hidden))
            total = total + weight * values
            slack[token] += weight.abs() * step
        for _, partial in sorted(partials.items()):
            values, step = partial.to(torch.bfloat16).float(), torch.zeros(case.hidden)
            if case.use_logfmt:
                values, step = logfmt(partial.to(torch.bfloat16))
            total = total + values
            slack[token] += step
        out[token] = total
    return out.to(torch.bfloat16), slack


def check_combine(
    case: Case,
    inputs: list[Inputs],
    combining: list[Combining],
    ll_reduce: str,
    *,
    left_out: frozenset[int] = frozenset(),
) -> None:
    for rank, one in enumerate(combining):
        if rank in left_out:
            continue
        want, slack = combined(case, inputs, combining, rank, ll_reduce, left_out=left_out)
        got = one.out.cpu()
        is_nan = want.isnan()
        what = f"{case.name} seed {case.seed} rank {rank}: combined"
        assert torch.equal(got.isnan(), is_nan), f"{what}: NaN elsewhere"
        if case.use_logfmt:
            # Both are rounded: sums that differ by a level may also round apart, by 2^-8 of each.
            rounding = (1 + 2.0**-7) * 2.0**-7 * want.float().abs()
            off = ((got.float() - want.float()).abs() - slack * (1 + 2.0**-7) - rounding)[~is_nan]
            assert off.numel() == 0 or float(off.max()) <= 0, f"{what}: more than a level off, by {float(off.max())}"
        else:
            _same(*(torch.where(is_nan, 0, values.view(torch.int16)) for values in (got, want)), what)
