#pragma once
// Two processes with a connection each to the other; a case runs in both, as side 0 and as side 1.
#include <infiniband/verbs.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(condition, ...)                                                                              \
    do {                                                                                                   \
        if (!(condition)) {                                                                                \
            std::fprintf(stderr, "%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition);             \
            std::fprintf(stderr, __VA_ARGS__);                                                             \
            std::fprintf(stderr, "\n");                                                                    \
            std::_Exit(1);                                                                                 \
        }                                                                                                  \
    } while (false)

// What one side tells the other.
struct Card {
    uint32_t number, key, read_only_key;
    uint64_t address;
};

// Memory is that of the GPU that fake_cuda.cpp plays, or of the host.
extern bool is_on_gpu;
uint8_t* new_memory(size_t num_bytes);

class Side {
  public:
    static constexpr size_t kBytes = 4 << 20;
    static constexpr int kAllRights =
        IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;

    Side(int which, int socket) : which(which), socket_(socket) {}
    void open();
    void close();
    ibv_qp* make_pair(uint32_t depth, bool is_shared_receive = true);
    void connect(ibv_qp* pair, uint32_t remote, uint8_t receiver_retries = 7);
    // A connected pair; tells the other side where `memory` is.
    ibv_qp* connected(uint32_t depth = 64, uint8_t receiver_retries = 7);

    template <class T>
    T exchange(const T& own) {
        T theirs;
        transfer(&own, &theirs, sizeof(T));
        return theirs;
    }
    void meet() { exchange<char>('.'); }

    int post(ibv_qp* pair, ibv_wr_opcode opcode, uint64_t id, size_t offset, uint32_t num_bytes, size_t remote_offset,
             unsigned flags = IBV_SEND_SIGNALED);
    int post_atomic(ibv_qp* pair, ibv_wr_opcode opcode, uint64_t id, size_t offset, size_t remote_offset, uint64_t compare_or_add,
                    uint64_t swap = 0, unsigned flags = IBV_SEND_SIGNALED);
    void post_receive(uint64_t id, size_t offset, uint32_t num_bytes);
    ibv_wc wait(ibv_cq* queue);
    void expect(uint64_t id, ibv_wc_status status = IBV_WC_SUCCESS);
    uint64_t& word(size_t offset) { return *reinterpret_cast<uint64_t*>(memory + offset); }
    uint64_t load(size_t offset) { return __atomic_load_n(&word(offset), __ATOMIC_ACQUIRE); }
    void fill(size_t offset, size_t num_bytes, uint32_t seed);
    bool is_filled(size_t offset, size_t num_bytes, uint32_t seed);

    const int which;
    uint8_t* memory = nullptr;
    ibv_context* context = nullptr;
    ibv_pd* pd = nullptr;
    ibv_mr *region = nullptr, *read_only = nullptr;
    ibv_cq *sent = nullptr, *received = nullptr;
    ibv_srq* receives = nullptr;
    Card remote{};
    uint32_t remote_key = 0;   // as remote.key, unless a case changes it
    uint32_t local_key = 0;    // as region->lkey, likewise
    __be32 immediate = 0;

  private:
    void transfer(const void* own, void* theirs, size_t num_bytes);
    int socket_;
    std::vector<ibv_qp*> pairs_;
};
