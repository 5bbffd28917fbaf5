"""Native side of the backend ``ibgda``; ``csrc/README.md`` describes every call. Addresses and streams are ints.

Symbols: ``N`` ranks, ``X`` most tokens of a rank, ``T <= X`` tokens of this rank, ``K`` choices, ``E`` experts,
``L = E / N`` experts of a rank, ``M = N X`` rows of a local expert, ``H`` hidden size (bf16 columns).
"""

from collections.abc import Sequence

MAX_TOPK: int
MAX_TOKENS: int  # of one rank in one call
MAX_LOCAL_EXPERTS: int
SEND: int  # phases of a call: SEND, RECEIVE or both added
RECEIVE: int

class NativeError(RuntimeError): ...
class DriverError(NativeError): ...  # the driver or the runtime refused; the text holds its words
class ArgumentError(NativeError): ...  # an argument that the kernels cannot take

def is_sm90_compiled() -> bool: ...
def architectures() -> list[int]: ...
def capture_id(*, stream: int) -> int: ...  # of the capture that the stream is in; 0: in none

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

class ErrorRecord:
    kind: str  # timeout, aborted, peer_failed, mismatch, bad_count, overflow, layout_mismatch
    op: str  # dispatch, combine
    phase: str  # credit, index, row, weights, post
    rank: int
    peer: int
    epoch: int  # counts this rank's kernels of that operation
    seen: int
    expected: int
    elapsed_ns: int

class Runtime:
    """One rank. All ranks pass the same ``num_ranks``, ``num_arena_bytes``, ``ll_reduce`` and ``enable_shrink``.

    The constructor fills the window: peers may start only after every rank's constructor has returned.
    """

    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        device: int,
        arena_ptrs: Sequence[int],  # every rank's arena as mapped here; 0: not mapped, reached by RDMA
        num_arena_bytes: int,
        ll_reduce: str,  # "rank" or "expert"
        enable_shrink: bool,
        rdma_view: int = 0,  # address of an RdmaView (a provider's view_ptr) where any arena is 0
    ) -> None: ...
    @staticmethod
    def window_bytes(
        *,
        num_ranks: int,
        max_tokens: int,
        hidden: int,
        num_experts: int,
        num_topk: int,
        ll_reduce: str,
        has_remote: bool = False,
    ) -> int: ...  # calls of this shape fit where this is <= num_arena_bytes; monotone in each number
    @staticmethod
    def handle_words(*, num_ranks: int, max_tokens: int, num_experts: int, num_topk: int) -> int: ...
    # int32 words of a handle. The first E * X of them are src_info [L, M]; what lies behind belongs to the kernels.
    # No initial values are needed. Aligned to 16 bytes.
    @staticmethod
    def ticket_words(*, num_ranks: int) -> int: ...  # int32 words of a combine's ticket
    def set_timeout_ns(self, timeout_ns: int) -> None: ...
    def set_least_divided_blocks(self, num_blocks: int) -> None: ...
    # From so many blocks on, those of a large batch either send or receive (96 unless set). For tests and measurements.
    def abort(self) -> None: ...
    def clear_abort(self) -> None: ...
    def error(self) -> ErrorRecord | None: ...
    def clear_error(self) -> None: ...
    def reset(self, *, stream: int) -> None: ...
    # With no operation outstanding anywhere: empties the window, forgets masks, errors and aborts, and waits
    # for the stream. Peers may start only after every rank's call has returned.
    def close(self) -> None: ...
    def dispatch(
        self,
        *,
        x: int,  # bf16 [T, H]; used by SEND
        topk_idx: int,  # [T, K]; used by SEND
        topk_idx_bits: int,  # 32 or 64
        topk_weights: int,  # float32 [T, K]; used by SEND where they travel
        has_weights: bool,  # they travel; the same on every rank and in both phases
        num_tokens: int,  # T; used by SEND
        hidden: int,
        num_topk: int,
        max_tokens: int,
        num_experts: int,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        recv_x: int,  # [L, M, H] bf16 or e4m3; 0: discard (take what arrives, write nothing but the handle)
        recv_scales: int,  # storage [L, H/128, M] float32 or [L, H/512, M] int32; 0 for bf16
        recv_count: int,  # int32 [L]
        layout_range: int,  # int64 [L, N]
        handle: int,  # int32 [handle_words]; SEND leaves the ticket in it, RECEIVE the routes
        cumulative_stats: int,  # int32 [L] or 0
        wait_stats: int,  # int64 [N] or 0
        phases: int,
        num_sms: int,  # at most; 0: the default
        stream: int,
    ) -> None: ...
    def combine(
        self,
        *,
        x: int,  # bf16 [L, M, row_stride], H columns used; used by SEND
        row_stride: int,  # elements, a multiple of 8
        topk_idx: int,  # of this rank's tokens; both phases
        topk_idx_bits: int,
        topk_weights: int,  # float32 [T, K]; both phases
        handle: int,  # of a dispatch that has been received; both phases
        ticket: int,  # int32 [ticket_words]; SEND writes, RECEIVE reads; 0 where one call does both
        num_tokens: int,
        hidden: int,
        num_topk: int,
        max_tokens: int,
        num_experts: int,
        use_logfmt: bool,
        out: int,  # bf16 [T, H]; 0: discard
        wait_stats: int,
        phases: int,
        num_sms: int,  # at most; 0: the default
        stream: int,
    ) -> None: ...

    # Masks (enable_shrink only). They take effect for operations enqueued on `stream` afterwards.
    def update_mask(self, rank: int, masked: bool, *, stream: int) -> None: ...
    def query_mask(self, out: int, *, stream: int) -> None: ...  # int32 [N] on the device
    def clean_mask(self, *, stream: int) -> None: ...

# --- the RDMA side (csrc/provider): queue pairs for peers outside the NVLink domain ---

class SoftwareNic:
    """Serves the requests that this rank's kernels post, on a host thread, between arenas of one host.

    ``counters`` has steps, writes, inline_writes, atomics, bytes, doorbells, completions, errors, flushed and
    fault_delay, fault_reorder, fault_drop_completion, fault_error_completion, fault_dead_link.
    """

    def __init__(
        self,
        *,
        rank: int,
        device: int,
        arena_ptrs: Sequence[int],  # as mapped here: this rank's own and those of remote peers
        num_arena_bytes: int,
        is_remote: Sequence[bool],
        num_queue_pairs: int = 1,  # for each remote peer
        depth: int = 1024,
        seed: int = 0,
        faults_per_million: dict[str, int] = ...,  # delay, reorder, drop completion, error completion, dead link
        max_delay_steps: int = 8,
        dead_link_steps: int = 0,  # 0: a dead link stays silent
    ) -> None: ...
    @property
    def view_ptr(self) -> int: ...  # for Runtime(rdma_view=...)
    @property
    def num_queue_bytes(self) -> int: ...
    def start(self) -> None: ...
    def drain(
        self, *, timeout_s: float
    ) -> bool: ...  # everything posted has landed; False at the timeout or after a failure
    def stop(self) -> None: ...  # what is not served stays posted
    def close(self) -> None: ...  # no kernel of this rank is running
    def reset(self) -> None: ...  # likewise; all queue pairs as new
    def register_arenas(self, *, arena_ptrs: Sequence[int], num_arena_bytes: int) -> None: ...
    def inject(
        self, *, peer: int, fault: str, lane: int = 0, request: int | None = None, syndrome: int = 0x14
    ) -> int: ...  # at the next request unless told; returns its number
    def counters(self) -> dict[str, int]: ...
    def first_fault(self, *, peer: int, lane: int = 0) -> str | None: ...

class NvshmemRdma:  # only where is_nvshmem_compiled()
    """Queue pairs of a NIC from NVSHMEM's IBGDA transport, and an arena in its symmetric heap. Collective."""

    def __init__(
        self,
        *,
        rank: int,
        num_ranks: int,
        device: int,
        unique_id: bytes,
        host_library: str,
        device_library: str,
        state_module: str,
        num_arena_bytes: int,
        is_remote: Sequence[bool],
        num_queue_pairs: int = 1,
        depth: int = 1024,
        service_level: int = -1,
        traffic_class: int = -1,
    ) -> None: ...
    @property
    def arena_ptrs(self) -> list[int]: ...
    @property
    def view_ptr(self) -> int: ...
    def close(self) -> None: ...

def nvshmem_unique_id(*, host_library: str) -> bytes: ...  # likewise
def is_nvshmem_compiled() -> bool: ...
def rdma_obstacle(device: int) -> str: ...  # "" or why a NIC cannot write to this GPU
def describe_rdma_failure(*, peer: int, seen: int, expected: int) -> str: ...  # of an ErrorRecord of phase post
def post_probe(*, rank: int, device: int, arena_ptr: int, view_ptr: int, nonce: int, timeout_s: float) -> str: ...
def missing_of_probe(*, rank: int, device: int, arena_ptr: int, view_ptr: int, nonce: int) -> list[tuple[int, int]]: ...
