#pragma once
// The memory of one rank that its peers on other nodes know (allocated by NVSHMEM, the same size and layout on every rank), and the streams
// of messages through it. Nothing here needs CUDA: the protocol's arithmetic is tested on the host.
#include <cstdint>

#include "deepep/layout/arithmetic.hpp"
#include "deepep/layout/signal.hpp"
#include "deepep/layout/status.hpp"

namespace deepep::internode {

constexpr int kMaxNodeRanks = kMaxRanks;       // ranks of one node
constexpr int kMaxSlots = 768;                 // slots of one ring, for each of which words are kept
constexpr int kUsualSlots = 384;               // a multiple of the usual SM counts
constexpr int kMaxChunkRows = 32;              // rows of one chunk: a lane for each
constexpr int64_t kMaxTokens = 1 << 28;        // of one rank
constexpr int64_t kMaxForwardRows = 1 << 29;   // that one rank forwards
constexpr int64_t kMessageAlignment = 128;
constexpr int64_t kUsualChunkBytes = 32 << 10;  // large enough for a NIC's message rate, small enough that a few MiB hold a ring of many slots

// Who is who: rank = node * ranks_per_node + local rank.
struct Group {
    int32_t rank;
    int32_t num_ranks;
    int32_t ranks_per_node;

    DEEPEP_HOST_DEVICE int num_nodes() const { return num_ranks / ranks_per_node; }
    DEEPEP_HOST_DEVICE int node() const { return rank / ranks_per_node; }
    DEEPEP_HOST_DEVICE int local_rank() const { return rank % ranks_per_node; }
    // The rank of that node that this one talks to: the one with the same local number.
    DEEPEP_HOST_DEVICE int peer_of(int node) const { return node * ranks_per_node + local_rank(); }
};

// --- messages -------------------------------------------------------------------------------------------------------

// One row on its way to another node (dispatch), and a row in shared memory.
//
//   row       byte [num_row_bytes]                      a multiple of 16
//   side      scales uint32 [S], to 16 bytes | top-k indices int32 [K] (of the whole group, -1 none) | weights float32 [K] |
//             heads int32 [P] (destination row at each rank of the node, -1 none) | source token int32
//
// A cached dispatch sends the row and its scales alone: the forwarder has the heads in its handle.
struct DispatchMessage {
    int64_t num_row_bytes;
    int32_t num_scales;
    int32_t num_topk;
    int32_t num_heads;  // P
    bool is_cached;

    // Offsets in the side part.
    DEEPEP_HOST_DEVICE int32_t topk_idx_offset() const { return static_cast<int32_t>(align_up(4ll * num_scales, 16)); }
    DEEPEP_HOST_DEVICE int32_t weights_offset() const { return topk_idx_offset() + 4 * num_topk; }
    DEEPEP_HOST_DEVICE int32_t heads_offset() const { return weights_offset() + 4 * num_topk; }
    DEEPEP_HOST_DEVICE int32_t token_offset() const { return heads_offset() + 4 * num_heads; }
    // Of the side part in shared memory, where heads are always kept.
    DEEPEP_HOST_DEVICE int32_t num_side_bytes() const { return static_cast<int32_t>(align_up(token_offset() + 4, 16)); }
    // The same with room for a whole row of the handle's send_nvl_head.
    DEEPEP_HOST_DEVICE int32_t num_shared_side_bytes() const {
        return static_cast<int32_t>(max_of(num_side_bytes(), align_up(heads_offset() + 4 * kMaxNodeRanks, 16)));
    }
    // Of the side part that travels.
    DEEPEP_HOST_DEVICE int32_t num_sent_side_bytes() const { return is_cached ? topk_idx_offset() : num_side_bytes(); }
    DEEPEP_HOST_DEVICE int64_t side_offset() const { return num_row_bytes; }
    DEEPEP_HOST_DEVICE int64_t num_bytes() const { return align_up(num_row_bytes + num_sent_side_bytes(), kMessageAlignment); }
};

// A node's partial sum on its way back (combine).
//
//   row      bfloat16, byte [num_row_bytes]             a multiple of 16
//   weights  float32 [K]                                the node's partial sums
struct CombineMessage {
    int64_t num_row_bytes;
    int32_t num_topk;

    DEEPEP_HOST_DEVICE int64_t weights_offset() const { return num_row_bytes; }
    DEEPEP_HOST_DEVICE int64_t num_bytes() const { return align_up(num_row_bytes + 4ll * num_topk, kMessageAlignment); }
};

// --- streams --------------------------------------------------------------------------------------------------------

// A ring cut into slots; a slot holds one chunk of rows. Both ends of a stream compute the same from numbers that are the same on all ranks
// (ring and chunk bytes, message bytes) and from the number of rows of the stream, which both know.
struct ChunkGeometry {
    int64_t num_message_bytes;
    int32_t num_slot_rows;  // messages that fit in a slot
    int32_t num_slots;      // below 2: the ring is too small

    // More slots help combine between two nodes. They do not help dispatch, and combine among four nodes they slow in the simulation.
    DEEPEP_HOST_DEVICE static int most_slots(bool is_combine, int num_nodes) { return is_combine && num_nodes == 2 ? kMaxSlots : kUsualSlots; }

    DEEPEP_HOST_DEVICE static ChunkGeometry of(int64_t num_ring_bytes, int64_t num_message_bytes, int64_t num_chunk_bytes, int most_slots) {
        constexpr int64_t kFewSlots = 16;  // larger chunks are not worth fewer slots than that
        const int64_t num_messages = num_ring_bytes / num_message_bytes;
        const int64_t wanted = min_of(min_of(num_chunk_bytes / num_message_bytes, num_messages / kFewSlots), kMaxChunkRows);
        const int64_t num_rows = max_of(1, wanted);
        return {num_message_bytes, static_cast<int32_t>(num_rows), static_cast<int32_t>(min_of(most_slots, num_messages / num_rows))};
    }

    DEEPEP_HOST_DEVICE bool is_usable() const { return num_slots >= 2; }
    DEEPEP_HOST_DEVICE int64_t slot_offset(int slot) const { return slot * static_cast<int64_t>(num_slot_rows) * num_message_bytes; }
    // Rows of a chunk in a stream of so many rows: few rows are spread over all slots, because each slot is served by a warp of its own.
    DEEPEP_HOST_DEVICE int chunk_rows(int64_t num_rows) const {
        return static_cast<int>(min_of(num_slot_rows, max_of(1, ceil_div(num_rows, num_slots))));
    }
};

// Chunk j of a stream holds rows [j * chunk_rows, (j + 1) * chunk_rows) and uses slot j % num_slots; a slot's chunks are one *context*,
// served in order by one warp at each end.
struct Stream {
    ChunkGeometry geometry;
    int64_t num_rows;
    int32_t num_chunk_rows;

    DEEPEP_HOST_DEVICE static Stream of(const ChunkGeometry& geometry, int64_t num_rows) { return {geometry, num_rows, geometry.chunk_rows(num_rows)}; }
    DEEPEP_HOST_DEVICE int64_t num_chunks() const { return ceil_div(num_rows, num_chunk_rows); }
    DEEPEP_HOST_DEVICE int64_t first_row(int64_t chunk) const { return chunk * num_chunk_rows; }
    DEEPEP_HOST_DEVICE int rows_of(int64_t chunk) const { return static_cast<int>(min_of(num_chunk_rows, num_rows - first_row(chunk))); }
};

// Who serves which slots of dispatch. Slot k of every stream belongs to place k % places, at both ends. Where each block sends and delivers, it is a
// place. In teams some blocks send, each for one place, and the last one delivers for the places of all of them.
enum class BlockRole : int { kBoth, kSender, kDeliverer };

struct BlockPlaces {
    BlockRole role;
    int32_t first;  // of those that this block serves

    DEEPEP_HOST_DEVICE static BlockPlaces of(int block, int num_team_senders) {
        if (num_team_senders == 0) return {BlockRole::kBoth, block};
        const int team_size = num_team_senders + 1, team = block / team_size, member = block - team * team_size;
        const bool is_sender = member < num_team_senders;
        return {is_sender ? BlockRole::kSender : BlockRole::kDeliverer, team * num_team_senders + (is_sender ? member : 0)};
    }
    // The last team may have no deliverer.
    DEEPEP_HOST_DEVICE static int num_places(int num_blocks, int num_team_senders) {
        return num_blocks - (num_team_senders == 0 ? 0 : num_blocks / (num_team_senders + 1));
    }
    DEEPEP_HOST_DEVICE int team(int num_team_senders) const { return first / num_team_senders; }
    DEEPEP_HOST_DEVICE int num_own(int num_team_senders) const { return role == BlockRole::kDeliverer ? num_team_senders : 1; }
    DEEPEP_HOST_DEVICE int num_own_slots(int num_slots, int num_places, int num_team_senders) const {
        const int num_own = this->num_own(num_team_senders), num_last = num_slots % num_places - first;  // places with one slot more
        return num_slots / num_places * num_own + (num_last < 0 ? 0 : num_last < num_own ? num_last : num_own);
    }
    DEEPEP_HOST_DEVICE int slot_of(int index, int num_places, int num_team_senders) const {
        const int num_own = this->num_own(num_team_senders), round = quotient(index, num_own);
        return first + index - round * num_own + round * num_places;
    }
    // A division takes some 50 cycles, and these are on the way of every row; teams of two and two nodes need none.
    DEEPEP_HOST_DEVICE static int quotient(int value, int divisor) { return divisor == 1 ? value : value / divisor; }
};

// --- words ----------------------------------------------------------------------------------------------------------
//
// FULL    {epoch, chunk + 1}   dispatch: sender -> forwarder, behind the chunk's bytes (one put with signal): the chunk is in its slot
// CREDIT  {epoch, chunk + 1}   dispatch: forwarder -> sender, after its loads of the chunk have landed: both slots of the chunk are free
// FULL    {epoch, begin + 1}   combine: forwarder -> source, behind the bytes: the slot holds the answer to the request that begins at `begin`
// REQUEST (below)              combine: source -> forwarder: the receive slot is free, sum these rows into it
// COUNTS  {epoch, 1}           notify: every rank -> every rank, behind the record
// All are compared for equality with what is expected; a word from an earlier operation has another epoch.

DEEPEP_HOST_DEVICE constexpr uint64_t chunk_word(uint32_t epoch, int64_t chunk) { return signal_word(epoch, static_cast<uint32_t>(chunk + 1)); }

// A request for partial sums: rows [begin, begin + count) of those that the forwarder keeps (rows of its send_nvl_head).
//
//    63        40 39            11 10        1 0
//   +------------+----------------+-----------+-+
//   | epoch      |     begin      |   count   |L|    L: the last one of this context; it asks for nothing (count 0)
//   +------------+----------------+-----------+-+
//
// Begins rise within a context and empty requests are not sent, so two requests of one operation never look alike. Every context ends
// with a last request in every operation, so an epoch of 24 bits suffices.
//
// Nobody answers a last request, so the source may be in its next combine before the forwarder has seen it: requests of even and odd epochs
// have words of their own. Two operations ahead the source cannot be: its next combine ends only after last requests of this forwarder, whose
// combine before that has then ended, and so has seen the word that is written anew.
struct Request {
    int64_t begin;
    int32_t count;
    bool is_last;

    DEEPEP_HOST_DEVICE uint64_t word(uint32_t epoch) const {
        return static_cast<uint64_t>(epoch & 0xFFFFFF) << 40 | static_cast<uint64_t>(begin) << 11 | static_cast<uint64_t>(count) << 1 | (is_last ? 1 : 0);
    }
    DEEPEP_HOST_DEVICE static bool is_of(uint64_t word, uint32_t epoch) { return word >> 40 == (epoch & 0xFFFFFF); }
    DEEPEP_HOST_DEVICE static Request of(uint64_t word) {
        return {static_cast<int64_t>(word >> 11 & 0x1FFFFFFF), static_cast<int32_t>(word >> 1 & 0x3FF), (word & 1) != 0};
    }
};
static_assert(kMaxChunkRows < 1 << 10 && kMaxForwardRows <= 1ll << 29, "a request has 10 bits for a chunk's rows and 29 for a row");

// --- memory ---------------------------------------------------------------------------------------------------------

// What a rank tells another one before a dispatch, int32 each:
//   header [16] | number of tokens | 0 [3] | tokens to each rank [N] | tokens to each node [D] | tokens to each expert of the receiver [L]
struct CountsRecord {
    int32_t num_ranks;
    int32_t num_nodes;

    static constexpr int kNumTokens = kNumHeaderWords;
    static constexpr int kRankCounts = kNumHeaderWords + 4;
    DEEPEP_HOST_DEVICE int node_counts() const { return kRankCounts + num_ranks; }
    DEEPEP_HOST_DEVICE int expert_counts() const { return node_counts() + num_nodes; }
    DEEPEP_HOST_DEVICE int num_words(int num_local_experts) const { return expert_counts() + num_local_experts; }
};

// Regions, in this order; "written by node d" means: by its rank with this rank's local number.
//
//   counts_ready  word [2][N]                    COUNTS, by parity of the epoch; written by rank n at [parity][n]
//   full          word [2][D][kMaxSlots]         FULL of dispatch, then of combine; written by node d at [op][d]
//   credit        word [D][kMaxSlots]            CREDIT; written by node d at [d]
//   request       word [2][D][kMaxSlots]         REQUEST, by parity of the epoch; written by node d at [parity][d]
//   records       int32 [2][N][...]              counts records, by parity; written by rank n at [parity][n], the own one locally
//   outgoing      int32 [2][N][...]              this rank's records for rank n, by parity; this rank only, and the network that reads them
//   send rings    byte [D - 1][num_ring_bytes]   this rank only, and the network that reads it
//   receive rings byte [D - 1][num_ring_bytes]   written by node d at ring(d)
struct NetworkWindow {
    int32_t num_ranks = 0;
    int32_t num_nodes = 0;
    int32_t max_local_experts = 0;
    int64_t num_ring_bytes = 0;  // of one ring

    static constexpr int64_t kAlignment = 128;
    enum FullOp : int { kDispatchFull = 0, kCombineFull = 1 };

    DEEPEP_HOST_DEVICE static NetworkWindow of(int num_ranks, int num_nodes, int max_local_experts, int64_t num_ring_bytes) {
        return {num_ranks, num_nodes, max_local_experts, num_ring_bytes / kAlignment * kAlignment};
    }

    DEEPEP_HOST_DEVICE CountsRecord record() const { return {num_ranks, num_nodes}; }
    DEEPEP_HOST_DEVICE int64_t num_record_bytes() const {
        return align_up(4ll * record().num_words(max_local_experts), kAlignment);
    }

    DEEPEP_HOST_DEVICE int64_t counts_ready_offset() const { return 0; }
    DEEPEP_HOST_DEVICE int64_t full_offset() const { return counts_ready_offset() + align_up(8ll * 2 * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t credit_offset() const { return full_offset() + 8ll * 2 * num_nodes * kMaxSlots; }
    DEEPEP_HOST_DEVICE int64_t request_offset() const { return credit_offset() + 8ll * num_nodes * kMaxSlots; }
    DEEPEP_HOST_DEVICE int64_t records_offset() const { return request_offset() + 8ll * 2 * num_nodes * kMaxSlots; }
    DEEPEP_HOST_DEVICE int64_t outgoing_offset() const { return records_offset() + 2 * num_ranks * num_record_bytes(); }
    DEEPEP_HOST_DEVICE int64_t send_rings_offset() const { return outgoing_offset() + 2 * num_ranks * num_record_bytes(); }
    DEEPEP_HOST_DEVICE int64_t receive_rings_offset() const { return send_rings_offset() + (num_nodes - 1) * num_ring_bytes; }
    DEEPEP_HOST_DEVICE int64_t num_bytes() const { return receive_rings_offset() + (num_nodes - 1) * num_ring_bytes; }
    // What reset must clear: the words.
    DEEPEP_HOST_DEVICE int64_t num_signal_bytes() const { return records_offset(); }

    // Accessors. `memory` is this rank's memory: the same address plus a PE number names a peer's. `writer` is the node (or rank) that
    // stores there: a rank that addresses its peer's memory passes its own.
    DEEPEP_HOST_DEVICE uint64_t* counts_ready(uint8_t* memory, uint32_t epoch, int writer) const {
        return word(memory, counts_ready_offset()) + static_cast<int64_t>(epoch & 1) * num_ranks + writer;
    }
    DEEPEP_HOST_DEVICE uint64_t* full(uint8_t* memory, FullOp op, int writer) const {
        return word(memory, full_offset()) + (static_cast<int64_t>(op) * num_nodes + writer) * kMaxSlots;
    }
    DEEPEP_HOST_DEVICE uint64_t* credit(uint8_t* memory, int writer) const {
        return word(memory, credit_offset()) + static_cast<int64_t>(writer) * kMaxSlots;
    }
    DEEPEP_HOST_DEVICE uint64_t* request(uint8_t* memory, uint32_t epoch, int writer) const {
        return word(memory, request_offset()) + (static_cast<int64_t>(epoch & 1) * num_nodes + writer) * kMaxSlots;
    }
    DEEPEP_HOST_DEVICE int32_t* record(uint8_t* memory, uint32_t epoch, int writer) const {
        return reinterpret_cast<int32_t*>(memory + records_offset() + (static_cast<int64_t>(epoch & 1) * num_ranks + writer) * num_record_bytes());
    }
    DEEPEP_HOST_DEVICE int32_t* outgoing_record(uint8_t* memory, uint32_t epoch, int reader) const {
        return reinterpret_cast<int32_t*>(memory + outgoing_offset() + (static_cast<int64_t>(epoch & 1) * num_ranks + reader) * num_record_bytes());
    }
    // The send ring of this rank (on node `own`) towards node `peer`.
    DEEPEP_HOST_DEVICE uint8_t* send_ring(uint8_t* memory, int own, int peer) const { return memory + send_rings_offset() + ring_index(own, peer) * num_ring_bytes; }
    // The receive ring of a rank on node `owner` for what node `writer` sends.
    DEEPEP_HOST_DEVICE uint8_t* receive_ring(uint8_t* memory, int owner, int writer) const {
        return memory + receive_rings_offset() + ring_index(owner, writer) * num_ring_bytes;
    }

private:
    // A rank has no ring for its own node.
    DEEPEP_HOST_DEVICE static int64_t ring_index(int own, int peer) { return peer < own ? peer : peer - 1; }
    DEEPEP_HOST_DEVICE static uint64_t* word(uint8_t* memory, int64_t offset) { return reinterpret_cast<uint64_t*>(memory + offset); }
};

}  // namespace deepep::internode
