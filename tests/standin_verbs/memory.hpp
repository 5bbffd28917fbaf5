#pragma once
// Memory that was registered, and copies between it and the shared segment. Memory of a GPU is reached with the driver's copies on a stream
// of its own; CUDA is opened at run time and may be absent.
#include <infiniband/verbs.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace standin {

constexpr int kHost = -1;

struct Region : ibv_mr {
    uint64_t start;  // as the other side, and the work requests, name it
    uint8_t* local;  // where it is for this process
    uint64_t num_bytes;
    int access;
    int device;  // number of the GPU, or kHost

    uint8_t* at(uint64_t address) const { return local + (address - start); }
};

class Regions {
  public:
    // Keys of different processes differ.
    void set_process(uint32_t process) { process_ = process; }
    Region* add(ibv_pd* pd, void* local, uint64_t start, uint64_t num_bytes, int access, int device);
    // False if there is no such region.
    bool remove(const Region* region);
    // The region if the key is valid, the bytes lie inside and all rights are given; else nullptr.
    const Region* find(uint32_t key, uint64_t address, uint64_t num_bytes, int rights) const;

  private:
    struct Place {
        Region* region = nullptr;
        uint8_t generation = 0;
    };
    mutable std::mutex mutex_;
    std::vector<Place> places_;
    uint32_t process_ = 0;
};

// Number of the GPU whose memory this is, or kHost.
int device_of(const void* address);

// For one thread. Copies to and from host memory are done at once; those of a GPU are in order on its stream until `finish`.
class Copier {
  public:
    // Pins the shared memory for copies of this GPU and makes its stream. Done when memory is registered: later a kernel that waits for
    // our copies could hold it up.
    static void prepare(int device, void* shared, size_t num_bytes);

    void to_region(const Region& region, uint64_t address, const void* shared, uint64_t num_bytes);
    void from_region(const Region& region, uint64_t address, void* shared, uint64_t num_bytes);
    // Waits until all copies have landed. False if one did not; then none that was under way counts.
    bool finish();
    bool has_pending() const { return !pending_.empty(); }

  private:
    void copy(int device, void* destination, const void* source, uint64_t num_bytes, bool is_to_device);
    std::vector<int> pending_;  // GPUs
    bool has_failed_ = false;
};

}  // namespace standin
