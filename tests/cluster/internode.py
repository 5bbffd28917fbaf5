"""Checks normal mode across nodes, then low-latency mode on the same buffer: ``python tests/cluster/internode.py``.

On one machine, nodes are virtual: ``DEEPEP_RANKS_PER_NODE`` ranks each, or two nodes without it. Under torchrun on
several hosts leave it out, and each host is a node.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from common import Inputs, Options, Report, chosen_groups, launch, parse
from low_latency import LowLatencyMode, low_latency_bytes, low_latency_inputs
from normal_mode import run_normal_mode

from deep_ep import Buffer, Config
from deep_ep.launch import RankContext, launched_externally

LOW_LATENCY_TOKENS = 128


def check(context: RankContext, options: Options) -> None:
    num_ranks = context.num_ranks
    config = Config()
    few = replace(options, tokens=min(options.tokens, LOW_LATENCY_TOKENS), groups=0)
    buffer = Buffer(
        context.group,
        config.get_nvl_buffer_size_hint(options.hidden * 2, num_ranks),
        max(config.get_rdma_buffer_size_hint(options.hidden * 2, num_ranks), low_latency_bytes(few, num_ranks)),
        low_latency_mode=True,
        num_qps_per_rank=max(24, options.experts // num_ranks),
        explicitly_destroy=True,
        backend=options.backend,
        ll_reduce=options.ll_reduce,
    )
    num_nodes = buffer.runtime.get_num_rdma_ranks()  # type: ignore[union-attr]
    report = Report(context)
    report.note(
        f"internode: {num_ranks} ranks on {num_nodes} nodes, {context.device.type}, backends {dict(buffer.backends)}"
    )
    if num_nodes == 1:
        raise ValueError("there is only one node. Set DEEPEP_RANKS_PER_NODE, or use tests/cluster/intranode.py.")
    inputs = Inputs(
        seed=options.seed,
        num_tokens=(options.tokens,) * num_ranks,
        hidden=options.hidden,
        num_topk=options.topk,
        num_experts=options.experts,
        num_groups=num_nodes,
        num_chosen_groups=chosen_groups(options, num_nodes),
        device=context.device,
    )
    run_normal_mode(context, buffer, options, inputs, report)

    report.note("low-latency calls on the same buffer")
    buffer.clean_low_latency_buffer(few.tokens, few.hidden, few.experts)
    LowLatencyMode(context, buffer, few, low_latency_inputs(context, few)).check_all(report)
    with report.check("normal mode again"):
        quick = replace(options, tune=False, pressure=0)
        run_normal_mode(context, buffer, quick, inputs, Report(context, silent=True))
    buffer.destroy()
    report.close("internode")


if __name__ == "__main__":
    defaults = {"tokens": 4096, "hidden": 7168, "topk": 8, "experts": 256, "groups": 0}
    chosen = parse("Normal mode across nodes, and low-latency mode on the same buffer.", **defaults)
    if not launched_externally():
        # Two virtual nodes, unless somebody has drawn the borders already.
        os.environ.setdefault("DEEPEP_RANKS_PER_NODE", str(max(1, chosen.processes // 2)))
    sys.exit(launch(check, chosen))
