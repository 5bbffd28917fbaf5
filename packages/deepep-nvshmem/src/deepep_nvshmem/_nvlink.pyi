"""Native side of the backend ``nvlink``; ``csrc/README.md`` describes every call. Addresses and streams are ints."""

from collections.abc import Sequence

MAX_RANKS: int
MAX_TOPK: int
NUM_HEADER_FIELDS: int

class NativeError(RuntimeError): ...
class DriverError(NativeError): ...  # the driver or the runtime refused; the text holds its words
class ArgumentError(NativeError): ...  # an argument that the kernels cannot take

def is_sm90_compiled() -> bool: ...
def architectures() -> list[int]: ...
def set_current_heap(heap: Heap | None) -> Heap | None: ...

class Arena:
    def __init__(self, *, device: int, num_reserved_bytes: int) -> None: ...
    @property
    def base(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def granularity(self) -> int: ...
    def grow(self, num_bytes: int) -> int: ...  # backs the next segment (rounded up to granularity); returns its number
    def export_fd(self, segment: int) -> int: ...
    def segment_bytes(self, segment: int) -> int: ...
    def close(self) -> None: ...

class PeerArena:
    def __init__(self, *, device: int, num_reserved_bytes: int) -> None: ...
    @property
    def base(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def map(self, fd: int, num_bytes: int) -> None: ...  # does not close fd
    def close(self) -> None: ...

class Heap:
    def __init__(self, *, base: int, num_bytes: int, granule: int = ...) -> None: ...
    def allocate(self, num_bytes: int) -> int: ...  # 0 when full
    def free(self, address: int) -> None: ...
    def extend(self, num_bytes: int) -> None: ...  # the arena behind it has grown
    @property
    def base(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_free_bytes(self) -> int: ...
    @property
    def num_largest_free_bytes(self) -> int: ...

class Counts:
    num_recv_tokens: int
    num_recv_tokens_per_expert: list[int]
    headers: list[tuple[int, ...]]
    mismatch_mask: int
    bad_count_mask: int

class ErrorRecord:
    kind: str
    op: str
    phase: str
    rank: int
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
        device: int,
        arena_ptrs: Sequence[int],
        num_arena_bytes: int,
        max_local_experts: int,
        num_staging_bytes: int,
    ) -> None: ...
    @staticmethod
    def window_bytes(*, num_ranks: int, max_local_experts: int, num_staging_bytes: int) -> int: ...
    def set_arena_bytes(self, num_bytes: int) -> None: ...  # after all ranks have grown and mapped
    def is_symmetric(self, address: int, num_bytes: int) -> bool: ...
    def set_timeout_ns(self, timeout_ns: int) -> None: ...
    def abort(self) -> None: ...
    def clear_abort(self) -> None: ...
    def error(self) -> ErrorRecord | None: ...
    def clear_error(self) -> None: ...
    def reset(self, *, stream: int) -> None: ...
    def close(self) -> None: ...
    def layout(
        self,
        *,
        topk_idx: int,
        topk_idx_bits: int,
        num_tokens: int,
        num_topk: int,
        num_experts: int,
        num_tokens_per_rank: int,
        num_tokens_per_expert: int,
        is_token_in_rank: int,
        num_bad_indices: int,
        stream: int,
    ) -> None: ...
    def notify(
        self,
        *,
        fields: Sequence[int],
        num_tokens: int,
        num_experts: int,
        expert_alignment: int,
        num_tokens_per_rank: int,
        num_tokens_per_expert: int,
        is_token_in_rank: int,
        rank_prefix: int,
        send_head: int,
        recv_tokens_per_expert: int,
        num_bad_indices: int,
        ticket: int,
        stream: int,
        first_rows: int = 0,
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
        rank_prefix: int,
        send_head: int,
        has_src_idx: bool | None = None,  # None: recv_src_idx != 0 or num_topk > 0; say it where outputs may be empty
        recv_x: int,
        recv_scales: int,
        recv_topk_idx: int,
        recv_topk_weights: int,
        recv_src_idx: int,
        capacity: int,
        fill_unused: bool,
        num_sms: int,
        stream: int,
        use_bulk: bool = True,
        num_warps: int = 0,
        num_stages: int = 0,
        num_side_warps: int = 0,
        ticket: int = 0,  # of a notify: first wait for its counts, as wait_counts does
        least_rows: int = 0,  # then launch only if all agree and least_rows to capacity rows come; else None
        timeout_s: float = 0.0,
    ) -> str | None: ...
    def combine(
        self,
        *,
        y: int,
        num_recv_tokens: int,
        num_row_bytes: int,
        topk_weights: int,
        num_topk: int,
        bias_0: int,
        bias_1: int,
        rank_prefix: int,
        send_head: int,
        num_tokens: int,
        out: int,
        out_topk_weights: int,
        num_sms: int,
        stream: int,
        relay: int = 0,
        use_bulk: bool = True,
        num_warps: int = 0,
        num_stages: int = 0,
    ) -> str: ...

def fabric_limit(
    *,
    direction: str,  # "push" or "pull", by bulk copies; "push_store" by 16-byte stores
    rank: int,
    arena_ptrs: Sequence[int],  # every rank's buffer as mapped here: num_ranks * num_rows * num_row_bytes each
    local: int,  # this rank's source (push) or destination (pull): (num_ranks - 1) * num_rows * num_row_bytes
    num_rows: int,  # rows for each peer
    num_row_bytes: int,
    num_sms: int,
    stream: int,
) -> None: ...
