"""Native side of the backend ``nvshmem``; ``csrc/internode`` describes every call. Addresses and streams are ints.

The extension loads without NVSHMEM, if it is opened with ``RTLD_LAZY``. What calls NVSHMEM's host library (the two
``network`` functions, ``Runtime``) needs ``libnvshmem_host.so.3`` in the process, loaded with ``RTLD_GLOBAL``, and
raises ``NativeError`` without it.

``T`` tokens here, ``K`` choices, ``S`` scales per row, ``N`` ranks, ``D`` nodes, ``P = N / D``, ``E`` experts, ``R``
rows received here, ``F`` rows that this rank forwards (rows of ``send_nvl_head``).
"""

from collections.abc import Sequence

MAX_NODE_RANKS: int
MAX_TOPK: int
NUM_HEADER_FIELDS: int

class NativeError(RuntimeError): ...
class DriverError(NativeError): ...  # the driver or the runtime refused; the text holds its words
class ArgumentError(NativeError): ...  # an argument that the kernels cannot take

def is_sm90_compiled() -> bool: ...
def architectures() -> list[int]: ...
def network_attach(*, device: int) -> int: ...  # gives the kernels NVSHMEM's state; NVSHMEM's status, 0 is success
def network_quiet() -> None: ...  # the host waits until what this rank has put is delivered

class Counts:
    num_recv_tokens: int
    num_forward_rows: int
    num_recv_tokens_per_expert: list[int]
    headers: list[tuple[int, ...]]  # by rank: status, num_experts, num_bad_indices, reason, then the fields
    mismatch_mask: int  # bit r: rank r's header differs from mine or is INVALID (N bits)
    bad_count_mask: int

class ErrorRecord:
    kind: str
    op: str
    phase: str
    rank: int  # of the group, like peer
    peer: int
    epoch: int
    seen: int
    expected: int
    elapsed_ns: int

class Runtime:
    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        ranks_per_node: int,
        device: int,
        arena_ptrs: Sequence[int],  # of the node's ranks, by local rank
        num_arena_bytes: int,
        network_ptr: int,  # network_bytes(...) of NVSHMEM's symmetric memory
        max_local_experts: int,
        num_ring_bytes: int,  # the same on all ranks, like num_chunk_bytes
        num_chunk_bytes: int = 0,  # 0: chosen
    ) -> None: ...  # zeroes its own words; then all ranks must pass a host barrier before any of them launches anything
    @staticmethod
    def window_bytes(*, ranks_per_node: int) -> int: ...  # at the start of the arena; the heap lies behind it
    @staticmethod
    def network_bytes(*, num_ranks: int, ranks_per_node: int, max_local_experts: int, num_ring_bytes: int) -> int: ...
    @staticmethod
    def least_ring_bytes(*, num_row_bytes: int, num_scales: int, num_topk: int, ranks_per_node: int) -> int: ...
    def is_symmetric(self, address: int, num_bytes: int) -> bool: ...
    def set_timeout_ns(self, timeout_ns: int) -> None: ...
    def abort(self) -> None: ...
    def clear_abort(self) -> None: ...
    def error(self) -> ErrorRecord | None: ...
    def clear_error(self) -> None: ...
    def reset(self, *, stream: int) -> None: ...  # between two host barriers, network_quiet() before the first
    def close(self) -> None: ...
    def layout(
        self,
        *,
        topk_idx: int,
        topk_idx_bits: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_tokens_per_rank: int,  # int32 [N]
        num_tokens_per_node: int,  # int32 [D]
        num_tokens_per_expert: int,  # int32 [E]
        is_token_in_rank: int,  # bool [T, N]
        num_bad_indices: int,
        stream: int,
    ) -> None: ...
    def notify(  # counts to and from all ranks, then who goes where; int32 unless said otherwise
        self,
        *,
        fields: Sequence[int],
        num_tokens: int,
        num_experts: int,
        expert_alignment: int,
        num_tokens_per_rank: int,
        num_tokens_per_node: int,
        num_tokens_per_expert: int,
        is_token_in_rank: int,  # bool
        # written: parts of the handle ...
        rdma_channel_prefix: int,  # [D]
        gbl_channel_prefix: int,  # [N]
        recv_rdma_channel_prefix: int,  # [D]
        recv_rdma_rank_prefix: int,  # [D]
        recv_gbl_channel_prefix: int,  # [N]
        recv_gbl_rank_prefix: int,  # [N]
        send_rdma_head: int,  # [T, D]
        # ... and what only the dispatch behind it reads (scratch on the communication stream)
        dst_rows: int,  # [T, N]
        tokens_to_node: int,  # [D, T]
        recv_tokens_per_expert: int,  # [L], or 0
        num_bad_indices: int,  # or 0
        ticket: int,  # 0: nothing for the host
        stream: int,
    ) -> None: ...
    def refuse(self, *, fields: Sequence[int], num_experts: int, reason: int, ticket: int, stream: int) -> None: ...
    def wait_counts(self, ticket: int, timeout_s: float) -> Counts | None: ...
    def dispatch(
        self,
        *,
        x: int,
        num_row_bytes: int,
        scales: int,
        num_scales: int,
        scales_stride_token: int,
        scales_stride_col: int,
        topk_idx: int,
        topk_idx_bits: int,
        topk_weights: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        # A cached dispatch reads send_nvl_head and has no topk_idx, topk_weights, dst_rows and recv_src_meta (0).
        is_cached: bool,
        dst_rows: int,
        tokens_to_node: int,  # from notify; scratch for a cached dispatch
        unlisted_rdma_head: int,  # send_rdma_head, where tokens_to_node is to be made from it; else 0
        rdma_channel_prefix: int,
        recv_rdma_rank_prefix: int,
        recv_gbl_rank_prefix: int,
        # Written by a fresh dispatch; rows behind F become -1 with fill_unused, and stay untouched without.
        send_nvl_head: int,  # [forward_capacity, 8]
        forward_capacity: int,
        # outputs, all in the arena (is_symmetric), aligned to 16 bytes; ArgumentError otherwise
        recv_x: int,
        recv_scales: int,  # [R, S]
        recv_topk_idx: int,  # int64 [R, K]
        recv_topk_weights: int,
        recv_src_meta: int,  # int32 [R, 2]
        # With 0 nothing is received here and peers report overflow: it keeps ranks in step where memory is short.
        capacity: int,
        fill_unused: bool,
        num_sms: int,
        stream: int,
        use_bulk: bool = True,
        num_warps: int = 0,
        num_stages: int = 0,
        num_send_warps: int = 0,
        # Blocks that send for each one that delivers, the same on all ranks; 0: all do both; None: chosen.
        num_team_senders: int | None = None,
        may_send_directly: bool = True,
        ticket: int = 0,  # of a notify: first wait for its counts, as wait_counts does
        # Then launch only if all agree, least_rows to capacity rows come, and F <= forward_capacity; else False.
        least_rows: int = 0,
        timeout_s: float = 0.0,
    ) -> bool: ...
    def combine(
        self,
        *,
        x: int,  # [R, row] bfloat16, in the arena, like topk_weights; ArgumentError otherwise
        num_recv_tokens: int,
        num_row_bytes: int,
        topk_weights: int,  # float32 [R, K], or 0
        num_topk: int,
        bias_0: int,
        bias_1: int,
        recv_rdma_rank_prefix: int,
        send_rdma_head: int,
        send_nvl_head: int,
        num_forward_rows: int,  # rows of send_nvl_head
        num_tokens: int,
        out: int,
        out_topk_weights: int,
        num_sms: int,
        stream: int,
        num_warps: int = 0,
        num_stages: int = 0,
        num_source_warps: int = 0,
        num_source_stages: int = 0,
        has_teams: bool | None = None,
        may_send_directly: bool = True,
    ) -> None: ...
