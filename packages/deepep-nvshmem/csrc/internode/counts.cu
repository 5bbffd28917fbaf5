// Counts: every rank tells every other one what it is about to do and how much it sends to whom.
//
// One block. It puts this rank's record to all ranks, waits for theirs, and judges the table: all ranks see the same numbers (but for the
// expert counts, of which each gets its own) and so decide alike.
//   COUNTS {epoch, 1}  every rank -> every rank, behind the record
// Tables and words live twice, by parity of the epoch. A rank writes record e + 2 after its exchange e + 1 has ended, so after each peer posted
// e + 1, which that peer did behind the kernels that read table e, and behind the arrival of this rank's record e there: neither the table
// there nor the outgoing copy here is still in use.
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "internode/kernels.hpp"
#include "internode/network.cuh"

namespace deepep::internode {
namespace {

constexpr int kOp = static_cast<int>(Op::kNotify);
constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / 32;

__device__ uint32_t header_word(const NotifyArgs& args, int word) {
    switch (word) {
        case kHeaderStatus: return args.status;
        case kHeaderNumExperts: return static_cast<uint32_t>(args.num_experts);
        case kHeaderNumBadIndices: return args.num_bad_indices == nullptr ? 0 : static_cast<uint32_t>(*args.num_bad_indices);
        case kHeaderReason: return args.reason;
        default: return args.fields[word - kHeaderFields];
    }
}

// A refused call sends nothing to anybody.
__device__ int32_t record_word(const NotifyArgs& args, int dst_rank, int index) {
    const CountsRecord layout = args.domain.window.record();
    if (index < kNumHeaderWords) return static_cast<int32_t>(header_word(args, index));
    if (index == CountsRecord::kNumTokens) return static_cast<int32_t>(args.num_tokens);
    if (index < CountsRecord::kRankCounts || args.status != kStatusValid) return 0;
    if (index < layout.node_counts()) return args.num_tokens_per_rank[index - CountsRecord::kRankCounts];
    if (index < layout.expert_counts()) return args.num_tokens_per_node[index - layout.node_counts()];
    return args.num_tokens_per_expert[dst_rank * (args.num_experts / args.domain.group.num_ranks) + index - layout.expert_counts()];
}

// A warp writes and sends one record at a time. Each rank starts with the one behind it, so that not all of them put to the same one.
__device__ void put_records(const NotifyArgs& args, uint32_t epoch) {
    const Domain& domain = args.domain;
    const Group& group = domain.group;
    const int num_words = domain.window.record().num_words(args.num_experts / group.num_ranks);
    int32_t* here = domain.window.record(domain.network, epoch, group.rank);
    uint64_t* word = domain.window.counts_ready(domain.network, epoch, group.rank);
    for (int i = threadIdx.x / 32; i < group.num_ranks; i += kNumWarps) {
        const int dst_rank = (group.rank + 1 + i) % group.num_ranks;
        const bool is_own = dst_rank == group.rank;
        int32_t* record = is_own ? here : domain.window.outgoing_record(domain.network, epoch, dst_rank);
        for (int index = threadIdx.x % 32; index < num_words; index += 32) record[index] = record_word(args, dst_rank, index);
        if (!is_own) network::put_chunk(here, record, align_up(4ll * num_words, 16), word, signal_word(epoch, 1), dst_rank);
    }
}

// Waits for the records of all others and compares their headers with this rank's; whether all agree.
__device__ bool collect_records(const NotifyArgs& args, const WaitContext& context, int& first_mismatch) {
    const Domain& domain = args.domain;
    const int num_ranks = domain.group.num_ranks, num_mask_words = static_cast<int>(ceil_div(num_ranks, 32));
    bool any_differs = false;
    for (int first = 0; first < num_ranks; first += kNumThreads) {
        const int src_rank = first + static_cast<int>(threadIdx.x);
        bool differs = false;
        if (src_rank < num_ranks) {
            const bool came = src_rank == domain.group.rank || wait_exact(context, domain.window.counts_ready(domain.network, context.epoch, src_rank),
                                                                          signal_word(context.epoch, 1), Phase::kHeader, src_rank);
            const int32_t* record = domain.window.record(domain.network, context.epoch, src_rank);
            differs = !came;
            for (int word = 0; word < kNumHeaderWords; ++word) {
                const uint32_t value = came ? static_cast<uint32_t>(record[word]) : word == kHeaderStatus ? kStatusInvalid : 0;
                if (word == kHeaderStatus) differs = differs || value != kStatusValid;
                if (word == kHeaderNumExperts || word >= kHeaderFields) differs = differs || value != header_word(args, word);
                if (args.ticket != 0) domain.host_headers[src_rank * kNumHeaderWords + word] = value;
            }
            if (differs) atomicMin(&first_mismatch, src_rank);
        }
        any_differs = any_differs || differs;
        const uint32_t mask = __ballot_sync(~0u, differs);
        const int mask_word = src_rank / 32;
        if (args.ticket != 0 && threadIdx.x % 32 == 0 && mask_word < num_mask_words) {
            domain.host_masks[mask_word] = mask;
            domain.host_masks[num_mask_words + mask_word] = 0;
        }
    }
    any_differs = __syncthreads_or(any_differs);
    if (threadIdx.x == 0 && any_differs) report_error(context, ErrorKind::kMismatch, Phase::kHeader, first_mismatch, first_mismatch, domain.group.rank, 0);
    return !any_differs;
}

// Every number of the table that anybody will use as an index, judged by everybody.
__device__ bool check_counts(const NotifyArgs& args, const WaitContext& context) {
    const Domain& domain = args.domain;
    const Group& group = domain.group;
    const CountsRecord layout = domain.window.record();
    const int num_ranks = group.num_ranks, num_nodes = group.num_nodes(), num_mask_words = static_cast<int>(ceil_div(num_ranks, 32));
    const auto record_of = [&](int rank) { return domain.window.record(domain.network, context.epoch, rank); };
    bool any_bad = false;
    for (int first = 0; first < num_ranks; first += kNumThreads) {
        const int rank = first + static_cast<int>(threadIdx.x);
        bool is_bad = false;
        if (rank < num_ranks) {
            const int32_t* record = record_of(rank);
            const int32_t num_tokens = record[CountsRecord::kNumTokens];
            is_bad = num_tokens < 0 || num_tokens > kMaxTokens;
            for (int node = 0; node < num_nodes; ++node) {
                const int32_t to_node = record[layout.node_counts() + node];
                int64_t sum = 0;
                int32_t most = 0;
                for (int i = 0; i < group.ranks_per_node; ++i) {
                    const int32_t count = record[CountsRecord::kRankCounts + node * group.ranks_per_node + i];
                    is_bad = is_bad || count < 0;
                    sum += count;
                    most = count > most ? count : most;
                }
                is_bad = is_bad || to_node > num_tokens || to_node < most || to_node > sum;
            }
            // What comes to this rank, and what each rank of its column forwards, has to stay in range.
            int64_t num_received = 0, num_forwarded = 0;
            for (int other = 0; other < num_ranks; ++other) {
                num_received += record_of(other)[CountsRecord::kRankCounts + rank];
                if (other % group.ranks_per_node == rank % group.ranks_per_node)
                    num_forwarded += record_of(other)[layout.node_counts() + rank / group.ranks_per_node];
            }
            is_bad = is_bad || num_received < 0 || num_received > 0x7FFFFFFF || num_forwarded < 0 || num_forwarded >= kMaxForwardRows;
            if (is_bad) report_error(context, ErrorKind::kBadCount, Phase::kCounts, rank, num_tokens, kMaxTokens, 0);
        }
        any_bad = any_bad || is_bad;
        const uint32_t mask = __ballot_sync(~0u, is_bad);
        const int mask_word = rank / 32;
        if (args.ticket != 0 && threadIdx.x % 32 == 0 && mask_word < num_mask_words) domain.host_masks[num_mask_words + mask_word] = mask;
    }
    return !__syncthreads_or(any_bad);
}

// Parts of the handle, and what the host waits for. A table that may not be used counts as all zero.
__device__ void publish(const NotifyArgs& args, const WaitContext& context, bool is_good) {
    const Domain& domain = args.domain;
    const Group& group = domain.group;
    const CountsRecord layout = domain.window.record();
    const int num_ranks = group.num_ranks, num_nodes = group.num_nodes();
    const auto word = [&](int rank, int index) { return is_good ? domain.window.record(domain.network, context.epoch, rank)[index] : 0; };
    const HandlePrefixes& prefixes = args.prefixes;
    if (prefixes.gbl_channel_prefix != nullptr) {
        for (int i = threadIdx.x; i < num_ranks; i += kNumThreads) {
            int32_t before = 0;
            for (int rank = 0; rank < i; ++rank) before += word(rank, CountsRecord::kRankCounts + group.rank);
            prefixes.gbl_channel_prefix[i] = word(group.rank, CountsRecord::kRankCounts + i);
            prefixes.recv_gbl_channel_prefix[i] = before;
            prefixes.recv_gbl_rank_prefix[i] = before + word(i, CountsRecord::kRankCounts + group.rank);
        }
        for (int i = threadIdx.x; i < num_nodes; i += kNumThreads) {
            const int index = layout.node_counts() + group.node();
            int32_t before = 0;
            for (int node = 0; node < i; ++node) before += word(group.peer_of(node), index);
            const int32_t here = word(group.peer_of(i), index);
            prefixes.rdma_channel_prefix[i] = word(group.rank, layout.node_counts() + i);
            prefixes.recv_rdma_channel_prefix[i] = here;
            prefixes.recv_rdma_rank_prefix[i] = before + here;
        }
    }
    const int num_local_experts = args.num_experts / num_ranks;
    bool has_bad = false;
    for (int expert = threadIdx.x; expert < num_local_experts; expert += kNumThreads) {
        int64_t sum = 0;
        for (int rank = 0; rank < num_ranks; ++rank) {
            // A token may choose an expert several times, and each choice counts.
            const int32_t count = word(rank, layout.expert_counts() + expert);
            const bool is_bad = count < 0 || count > static_cast<int64_t>(kMaxTopk) * word(rank, CountsRecord::kRankCounts + group.rank);
            if (is_bad) report_error(context, ErrorKind::kBadCount, Phase::kCounts, rank, count, word(rank, CountsRecord::kRankCounts + group.rank), 0);
            has_bad = has_bad || is_bad;
            sum += is_bad ? 0 : count;
        }
        const int32_t rounded = static_cast<int32_t>(align_up(sum, args.expert_alignment));
        if (args.recv_tokens_per_expert != nullptr) args.recv_tokens_per_expert[expert] = rounded;
        if (args.ticket != 0) domain.host_experts[expert] = rounded;
    }
    has_bad = __syncthreads_or(has_bad);
    if (threadIdx.x != 0) return;
    domain.state->are_counts_good = is_good;
    ptx::store_relaxed_gpu(&context.state->epochs[kOp], context.epoch);
    if (args.ticket == 0) return;
    CountsSummary* summary = domain.host_counts;
    int32_t num_received = 0, num_forwarded = 0;
    for (int rank = 0; rank < num_ranks; ++rank) num_received += word(rank, CountsRecord::kRankCounts + group.rank);
    for (int node = 0; node < num_nodes; ++node) num_forwarded += word(group.peer_of(node), layout.node_counts() + group.node());
    summary->num_recv_tokens = num_received;
    summary->num_forward_rows = num_forwarded;
    summary->is_good = is_good && !has_bad;
    // The barrier joined the block's stores to this thread; the release passes them to the host.
    ptx::store_release_sys(&summary->ticket, args.ticket);
}

__global__ void __launch_bounds__(kNumThreads, 1) exchange_counts_kernel(const __grid_constant__ NotifyArgs args) {
    __shared__ int first_mismatch;
    const Domain& domain = args.domain;
    DeviceState* state = domain.local.state();
    const WaitContext context{domain.local.host, state, Op::kNotify, domain.group.rank, ptx::load_relaxed_gpu(&state->epochs[kOp]) + 1};
    if (threadIdx.x == 0) first_mismatch = domain.group.num_ranks;
    put_records(args, context.epoch);
    __syncthreads();  // the own record is in the table
    const bool is_good = collect_records(args, context, first_mismatch) && check_counts(args, context);
    publish(args, context, is_good);
}

}  // namespace

cudaError_t launch_counts(const NotifyArgs& args, cudaStream_t stream) {
    exchange_counts_kernel<<<1, kNumThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

const void* kernel_on_network() { return reinterpret_cast<const void*>(exchange_counts_kernel); }

cudaError_t prepare_counts() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, exchange_counts_kernel);
}

#if DEEPEP_COUNT_PUTS
__device__ PutCounts network::put_counts = {};

cudaError_t read_put_counts(PutCounts& counts) { return cudaMemcpyFromSymbol(&counts, network::put_counts, sizeof(counts)); }
#endif

}  // namespace deepep::internode
