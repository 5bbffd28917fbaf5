// The same headers in a kernel: posting, waiting and both codecs compile for the device. Not run here.
#include "deepep/codec/fp8.hpp"
#include "deepep/codec/logfmt.hpp"
#include "deepep/ptx/memory.cuh"
#include "deepep/rdma/provider.hpp"

namespace rdma = deepep::rdma;
namespace codec = deepep::codec;

struct DeviceWait {
    uint64_t deadline_ns;
    __device__ rdma::WaitVerdict operator()() const {
        return deepep::ptx::global_timer_ns() < deadline_ns ? rdma::WaitVerdict::kGoOn : rdma::WaitVerdict::kTimeout;
    }
};

extern "C" __global__ void post_row(rdma::RdmaView view, int peer, int64_t offset, uint32_t num_bytes, uint64_t signal,
                                    rdma::QueueStatus* status) {
    const rdma::QueuePair& pair = view.queue_pair(peer, blockIdx.x);
    DeviceWait wait = {deepep::ptx::global_timer_ns() + 1000000};
    uint64_t begin;
    *status = rdma::reserve(pair, 3, wait, &begin);
    if (!status->ok()) return;
    rdma::write_rdma_write(pair.slot(begin), pair.place(begin, false), view.local.at(offset), view.remote[peer].at(offset), num_bytes);
    rdma::write_inline_word(pair.slot(begin + 1), pair.place(begin + 1, false), view.remote[peer].at(0), signal);
    rdma::write_atomic_add(pair.slot(begin + 2), pair.place(begin + 2, true), view.local.at(8), view.remote[peer].at(8), 1);
    *status = rdma::submit(pair, begin, 3, wait);
    if (status->ok()) *status = rdma::wait_completed(pair, begin + 3, wait);
}

extern "C" __global__ void cast_rows(const uint16_t* x, uint8_t* q, float* scale, uint16_t* codes, float* back) {
    const int block = blockIdx.x * blockDim.x + threadIdx.x;
    scale[block] = codec::cast_block(x + block * 128, false, q + block * 128);
    const codec::LogScale log_scale = codec::encode_block(x + block * 128, codes + block * 128);
    for (int i = 0; i < 128; ++i) back[block * 128 + i] = codec::logfmt_value(codes[block * 128 + i], log_scale);
}
