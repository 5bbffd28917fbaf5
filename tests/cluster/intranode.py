"""Checks normal mode inside one node: ``python tests/cluster/intranode.py``, or the same under torchrun.

Layout; dispatch, cached dispatch and combine in every way to call; then times over SM counts; with ``--pressure
ROUNDS`` also that each seed gives the same bits three times. Only the first rank prints; a failed check ends the run
with the rank, the place of the first difference and exit code 1.
"""

from __future__ import annotations

import sys

from common import Inputs, Options, Report, chosen_groups, launch, parse
from normal_mode import run_normal_mode

from deep_ep import Buffer, Config
from deep_ep.launch import RankContext


def check(context: RankContext, options: Options) -> None:
    num_ranks = context.num_ranks
    num_bytes = Config().get_nvl_buffer_size_hint(options.hidden * 2, num_ranks)
    buffer = Buffer(context.group, num_bytes, explicitly_destroy=True, backend=options.backend)
    report = Report(context)
    report.note(f"intranode: {num_ranks} ranks on {context.device.type}, backend {buffer.backends['normal']}")
    inputs = Inputs(
        seed=options.seed,
        num_tokens=(options.tokens,) * num_ranks,
        hidden=options.hidden,
        num_topk=options.topk,
        num_experts=options.experts,
        num_groups=num_ranks,
        num_chosen_groups=chosen_groups(options, num_ranks),
        device=context.device,
    )
    run_normal_mode(context, buffer, options, inputs, report)
    buffer.destroy()
    report.close("intranode")


if __name__ == "__main__":
    defaults = {"tokens": 4096, "hidden": 7168, "topk": 8, "experts": 256, "groups": 0}
    sys.exit(launch(check, parse("Normal mode inside one node.", **defaults)))
