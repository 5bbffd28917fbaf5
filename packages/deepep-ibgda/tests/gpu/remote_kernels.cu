// Kernels that post real work requests, for test_remote.py: compiled there, called through ctypes. Both ranks run the same kernels, each with
// its own arena and its own software NIC; a rank's arena holds
//
//   flags       uint64 [num_posters]                     credits: messages of ours that the peer has used up
//   counters    uint64 [2]                               peers add to the first; the second is spare
//   results     uint64 [num_posters][num_messages]       old values of our own additions
//   outgoing    row [num_posters][kNumSlots]             what the NIC reads
//   incoming    row [num_posters][kNumSlots]             what the peer's NIC writes; all words 0xFFFFFFFF where nothing has arrived
#include <cuda_runtime.h>

#include <cstring>

#include "remote.cuh"

using namespace deepep;
using namespace deepep::ibgda;

namespace {

constexpr int kNumThreads = 64;
constexpr int kNumSlots = 4;
constexpr uint32_t kEmpty = 0xffffffffu;

struct Args {
    RemotePeers remote;
    WaitContext context;
    uint8_t* arena;
    int peer;
    int num_posters;
    int num_messages;
    int num_row_words;  // a multiple of 4
    int64_t flags_at, counters_at, results_at, outgoing_at, incoming_at;
    uint64_t* num_bad_words;
    int* failed_peer;

    __device__ int64_t row_offset(int64_t region, int poster, int message) const {
        return region + (static_cast<int64_t>(poster) * kNumSlots + message % kNumSlots) * num_row_words * 4;
    }
    // Of the words that `rank` sends; never kEmpty.
    __device__ uint32_t pattern(int rank, int poster, int message, int word) const {
        return (static_cast<uint32_t>(message) * 2654435761u ^ static_cast<uint32_t>((rank * 8 + poster) << 20 | word)) & 0x7fffffffu;
    }
};

__device__ __forceinline__ uint64_t* word_at(const Args& args, int64_t offset) { return reinterpret_cast<uint64_t*>(args.arena + offset); }

// Until `*address` is at least `value`.
__device__ bool wait_at_least(const WaitContext& context, const uint64_t* address, uint64_t value, int peer) {
    uint64_t start_ns = 0;
    while (true) {
        uint64_t seen = 0;
        for (int poll = 0; poll < kPollsPerCheck; ++poll)
            if ((seen = ptx::load_acquire_sys(address)) >= value) return true;
        if (wait_is_hopeless(context, Phase::kSlotFree, peer, seen, value, &start_ns)) return false;
    }
}

__device__ void send_rows(const Args& args, int poster) {
    bool is_alive = true;  // as the first thread knows it
    for (int message = 0; message < args.num_messages; ++message) {
        if (threadIdx.x == 0 && message >= kNumSlots)
            is_alive = wait_at_least(args.context, word_at(args, args.flags_at) + poster, message - kNumSlots + 1, args.peer);
        if (__syncthreads_or(!is_alive)) return;
        const int64_t offset = args.row_offset(args.outgoing_at, poster, message);
        auto* row = reinterpret_cast<uint32_t*>(args.arena + offset);
        for (int i = threadIdx.x; i < args.num_row_words; i += kNumThreads) row[i] = args.pattern(args.context.rank, poster, message, i);
        __syncthreads();
        if (threadIdx.x == 0)
            is_alive = post_write(args.remote, args.context, args.peer, poster, offset, args.row_offset(args.incoming_at, poster, message),
                                  static_cast<uint32_t>(args.num_row_words) * 4);
        if (__syncthreads_or(!is_alive)) return;
    }
}

// Each word is its own flag: taken when it is there, and emptied for the row that comes later.
__device__ void receive_rows(const Args& args, int poster) {
    for (int message = 0; message < args.num_messages; ++message) {
        auto* row = reinterpret_cast<uint32_t*>(args.arena + args.row_offset(args.incoming_at, poster, message));
        bool is_alive = true;
        uint64_t num_bad = 0;
        for (int i = threadIdx.x; i < args.num_row_words && is_alive; i += kNumThreads) {
            uint64_t start_ns = 0;
            uint32_t seen = kEmpty;
            while (seen == kEmpty && is_alive) {
                for (int poll = 0; poll < kPollsPerCheck && seen == kEmpty; ++poll) seen = ptx::load_relaxed_sys(row + i);
                if (seen == kEmpty) is_alive = !wait_is_hopeless(args.context, Phase::kDone, args.peer, seen, i, &start_ns);
            }
            num_bad += is_alive && seen != args.pattern(1 - args.context.rank, poster, message, i);
            ptx::store_relaxed_sys(row + i, kEmpty);
        }
        if (num_bad != 0) atomicAdd(reinterpret_cast<unsigned long long*>(args.num_bad_words), static_cast<unsigned long long>(num_bad));
        if (__syncthreads_or(!is_alive)) return;
        if (threadIdx.x == 0) {
            const uint32_t credit[2] = {static_cast<uint32_t>(message) + 1, 0};
            is_alive = post_inline(args.remote, args.context, args.peer, poster, args.flags_at + 8 * poster, credit, 2);
        }
        if (__syncthreads_or(!is_alive)) return;
    }
}

// The first half of the blocks sends, the second half receives.
__global__ void __launch_bounds__(kNumThreads) exchange_rows(const __grid_constant__ Args args) {
    const int poster = static_cast<int>(blockIdx.x) % args.num_posters;
    if (static_cast<int>(blockIdx.x) < args.num_posters) {
        send_rows(args, poster);
    } else {
        receive_rows(args, poster);
    }
}

// Every poster adds 1 to the peer's counter; the old values land here.
__global__ void add_ones(const __grid_constant__ Args args) {
    const int poster = static_cast<int>(blockIdx.x);
    for (int message = 0; message < args.num_messages; ++message) {
        const int64_t result = args.results_at + 8 * (static_cast<int64_t>(poster) * args.num_messages + message);
        if (!post_add(args.remote, args.context, args.peer, poster, result, args.counters_at, 1)) return;
    }
    wait_posted(args.remote, args.context, args.peer, poster);
}

// Inline writes of every length, side by side.
__global__ void post_words(const __grid_constant__ Args args) {
    uint32_t words[kMaxInlineWords];
    int64_t offset = args.incoming_at;
    for (uint32_t count = 1; count <= kMaxInlineWords; offset += 4 * count++) {
        for (uint32_t i = 0; i < count; ++i) words[i] = 100 * count + i;
        if (!post_inline(args.remote, args.context, args.peer, 0, offset, words, count)) return;
    }
    wait_posted(args.remote, args.context, args.peer, 0);
}

// Posts without ever looking at a completion.
__global__ void post_and_leave(const __grid_constant__ Args args) {
    for (int message = 0; message < args.num_messages; ++message)
        if (!post_write(args.remote, args.context, args.peer, 0, args.outgoing_at, args.incoming_at, 16)) return;
}

__global__ void look_at_completions(const __grid_constant__ Args args) {
    const int failed_peer = poll_all(args.remote, args.context);
    if (threadIdx.x == 7) *args.failed_peer = failed_peer;
}

}  // namespace

extern "C" {

int num_host_bytes() { return sizeof(HostControl); }
int num_state_bytes() { return sizeof(DeviceState); }

void set_timeout(HostControl* host, uint64_t timeout_ns) {
    std::memset(static_cast<void*>(host), 0, sizeof(*host));
    host->timeout_ns = timeout_ns;
}

// kind, phase, rank, peer, seen, expected; kind 0: no error.
void read_error(const HostControl* host, int64_t* out) {
    const ErrorRecord& e = host->error;
    const bool is_valid = e.generation == host->error_generation + 1;
    out[0] = is_valid ? e.kind : 0;
    out[1] = e.phase;
    out[2] = e.rank;
    out[3] = e.peer;
    out[4] = static_cast<int64_t>(e.seen);
    out[5] = static_cast<int64_t>(e.expected);
}
void forget_error(HostControl* host) { host->error_generation = host->error.generation; }

// sizes: rank, peer, num_posters, num_messages, num_row_words, epoch; offsets: as in Args. Returns CUDA's status.
int launch(const char* kernel, uint64_t view_ptr, HostControl* host, DeviceState* state, uint8_t* arena, const int32_t* sizes,
           const int64_t* offsets, uint64_t* num_bad_words, int* failed_peer, cudaStream_t stream) {
    Args args = {};
    args.remote = remote_peers_of(view_ptr);
    args.context = {host, state, Op::kDispatch, sizes[0], static_cast<uint32_t>(sizes[5])};
    args.arena = arena;
    args.peer = sizes[1];
    args.num_posters = sizes[2];
    args.num_messages = sizes[3];
    args.num_row_words = sizes[4];
    args.flags_at = offsets[0];
    args.counters_at = offsets[1];
    args.results_at = offsets[2];
    args.outgoing_at = offsets[3];
    args.incoming_at = offsets[4];
    args.num_bad_words = num_bad_words;
    args.failed_peer = failed_peer;
    const auto is = [&](const char* name) { return std::strcmp(kernel, name) == 0; };
    if (is("exchange_rows")) {
        exchange_rows<<<2 * args.num_posters, kNumThreads, 0, stream>>>(args);
    } else if (is("add_ones")) {
        add_ones<<<args.num_posters, 1, 0, stream>>>(args);
    } else if (is("post_words")) {
        post_words<<<1, 1, 0, stream>>>(args);
    } else if (is("post_and_leave")) {
        post_and_leave<<<1, 1, 0, stream>>>(args);
    } else if (is("look_at_completions")) {
        look_at_completions<<<1, 32, 0, stream>>>(args);
    } else {
        return -1;
    }
    return cudaGetLastError();
}

// Loads every kernel: code that is loaded on first use could wait for a kernel that spins.
int load_kernels() {
    cudaFuncAttributes attributes;
    const void* const kernels[] = {reinterpret_cast<const void*>(exchange_rows), reinterpret_cast<const void*>(add_ones),
                                   reinterpret_cast<const void*>(post_words), reinterpret_cast<const void*>(post_and_leave),
                                   reinterpret_cast<const void*>(look_at_completions)};
    for (const void* kernel : kernels)
        if (const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel); status != cudaSuccess) return status;
    return cudaSuccess;
}

}  // extern "C"
