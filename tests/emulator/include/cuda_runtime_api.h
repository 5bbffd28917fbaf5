#pragma once
// As much of CUDA's language and runtime as the kernels and their launchers use, over the emulator. Devices are numbers, memory is the host's.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "emulator.hpp"

#define CUDART_VERSION 13000

// --- language -------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

using dim3 = emulator::Index3;
static emulator::Index3 &threadIdx = emulator::thread_index, &blockIdx = emulator::block_index, &blockDim = emulator::block_size, &gridDim = emulator::grid_size;

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    return static_cast<std::common_type_t<A, B>>(b) < static_cast<std::common_type_t<A, B>>(a) ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? b : a;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __vmaxu2(unsigned a, unsigned b) { return std::max(a & 0xffffu, b & 0xffffu) | std::max(a >> 16, b >> 16) << 16; }

// --- warps and blocks -----------------------------------------------------------------------------------------------

namespace emulator {
template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(value));
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
inline int lane() { return static_cast<int>(thread_index.x % 32); }
template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
    return from_bits<T>(warp_op(WarpOp::kShuffle, mask, to_bits(value), source, file, line));
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return emulator::shuffle(mask, value, emulator::lane() / width * width + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const int source = emulator::lane() ^ bits;
    return emulator::shuffle(mask, value, source / width > emulator::lane() / width ? emulator::lane() : source, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const int lane = emulator::lane(), within = lane % width;
    return emulator::shuffle(mask, value, within < static_cast<int>(delta) ? lane : lane - static_cast<int>(delta), file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const int lane = emulator::lane(), within = lane % width;
    return emulator::shuffle(mask, value, within + static_cast<int>(delta) >= width ? lane : lane + static_cast<int>(delta), file, line);
}
inline unsigned __ballot_sync(unsigned mask, int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return static_cast<unsigned>(emulator::warp_op(emulator::WarpOp::kBallot, mask, value != 0, 0, file, line)); }
inline int __any_sync(unsigned mask, int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return emulator::warp_op(emulator::WarpOp::kAny, mask, value != 0, 0, file, line) != 0; }
inline int __all_sync(unsigned mask, int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return emulator::warp_op(emulator::WarpOp::kAll, mask, value != 0, 0, file, line) != 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return static_cast<unsigned>(emulator::warp_op(emulator::WarpOp::kMatchAny, mask, emulator::to_bits(value), 0, file, line));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return static_cast<unsigned>(emulator::warp_op(emulator::WarpOp::kMaxUnsigned, mask, value, 0, file, line)); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return static_cast<unsigned>(emulator::warp_op(emulator::WarpOp::kMinUnsigned, mask, value, 0, file, line)); }
inline int __reduce_max_sync(unsigned mask, int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return static_cast<int>(emulator::warp_op(emulator::WarpOp::kMaxSigned, mask, static_cast<unsigned>(value), 0, file, line));
}
inline int __reduce_min_sync(unsigned mask, int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return static_cast<int>(emulator::warp_op(emulator::WarpOp::kMinSigned, mask, static_cast<unsigned>(value), 0, file, line));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return static_cast<unsigned>(emulator::warp_op(emulator::WarpOp::kAddUnsigned, mask, value, 0, file, line)); }
inline int __reduce_add_sync(unsigned mask, int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return static_cast<int>(emulator::warp_op(emulator::WarpOp::kAddUnsigned, mask, static_cast<unsigned>(value), 0, file, line));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return static_cast<unsigned>(emulator::warp_op(emulator::WarpOp::kOr, mask, value, 0, file, line)); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return static_cast<unsigned>(emulator::warp_op(emulator::WarpOp::kAnd, mask, value, 0, file, line)); }
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { emulator::warp_op(emulator::WarpOp::kSync, mask, 0, 0, file, line); }
inline void __syncthreads() { emulator::barrier(0, 0, true, false); }
inline int __syncthreads_or(int value) { return emulator::barrier(0, 0, true, value != 0); }
inline void __threadfence_block() {}
// What kernels promise about addresses, for the sake of better instructions, is looked at.
inline bool __isShared(const void* address) { return emulator::is_shared(address); }
inline bool __isGlobal(const void* address) { return !emulator::is_shared(address); }
#define __builtin_assume(condition) ((condition) ? void() : emulator::fail(std::string("a promise is not kept: " #condition " in ") + __FILE__))
inline void __threadfence() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emulator::pause(); }

namespace emulator {
template <class T, class Change>
T atomic(T* address, Change changed) {
    const T before = *address;
    *address = changed(before);
    stored();
    return before;
}
}  // namespace emulator
template <class T, class V>
T atomicAdd(T* address, V value) {
    return emulator::atomic(address, [=](T before) { return static_cast<T>(before + value); });
}
template <class T, class V>
T atomicSub(T* address, V value) {
    return emulator::atomic(address, [=](T before) { return static_cast<T>(before - value); });
}
template <class T, class V>
T atomicMax(T* address, V value) {
    return emulator::atomic(address, [=](T before) { return std::max(before, static_cast<T>(value)); });
}
template <class T, class V>
T atomicMin(T* address, V value) {
    return emulator::atomic(address, [=](T before) { return std::min(before, static_cast<T>(value)); });
}
template <class T, class V>
T atomicOr(T* address, V value) {
    return emulator::atomic(address, [=](T before) { return static_cast<T>(before | value); });
}
template <class T, class V>
T atomicExch(T* address, V value) {
    return emulator::atomic(address, [=](T) { return static_cast<T>(value); });
}
template <class T, class C, class V>
T atomicCAS(T* address, C expected, V value) {
    return emulator::atomic(address, [=](T before) { return before == static_cast<T>(expected) ? static_cast<T>(value) : before; });
}

// --- runtime --------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorNotSupported = 801 };
using cudaStream_t = struct EmulatedStream*;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
                      cudaDevAttrGPUDirectRDMASupported, cudaDevAttrGPUDirectRDMAWritesOrdering };
constexpr int cudaGPUDirectRDMAWritesOrderingOwner = 100;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaFuncAttributes {
    int ptxVersion, numRegs;
    size_t sharedSizeBytes, localSizeBytes;
    int maxThreadsPerBlock;
};
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

inline const char* cudaGetErrorName(cudaError_t status) { return status == cudaSuccess ? "cudaSuccess" : "an error of the emulator"; }
inline const char* cudaGetErrorString(cudaError_t status) { return cudaGetErrorName(status); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
    return cudaSuccess;
}
using cudaFunction_t = void*;
inline cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* kernel) { return *function = const_cast<void*>(kernel), cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
    *attributes = {90, 64, 0, 0, 1024};
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
namespace emulator {
// "... [with Parameters = {a::b::CombineArgs}; ...": the type by which a kernel is known where its name is not.
inline std::string name_of_arguments(const std::string& function) {
    const size_t begin = function.find('{') + 1, end = function.find('}');
    const std::string type = function.substr(begin, end - begin);
    return "kernel(" + type.substr(type.rfind(':') + 1) + ")";
}
}  // namespace emulator
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    emulator::enqueue_kernel(config->stream, emulator::name_of_arguments(__PRETTY_FUNCTION__), config->gridDim, config->blockDim, config->dynamicSmemBytes, [=] { kernel(arguments...); });
    return cudaSuccess;
}
namespace emulator {
// kernel<<<grid, block, bytes, stream>>>(arguments...)
template <class... Parameters>
auto launch(std::string name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t num_dynamic_bytes = 0, cudaStream_t stream = nullptr) {
    return [=](Parameters... arguments) { enqueue_kernel(stream, name, grid, block, num_dynamic_bytes, [=] { kernel(arguments...); }); };
}
}  // namespace emulator
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t num_bytes, cudaStream_t stream) {
    emulator::enqueue_work(stream, [=] { memset(to, value, num_bytes); });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t num_bytes) { return memset(to, value, num_bytes), cudaSuccess; }
// What the host gives may be gone when the stream comes to it: it is taken now.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind == cudaMemcpyHostToDevice) {
        std::string bytes(static_cast<const char*>(from), num_bytes);
        emulator::enqueue_work(stream, [=] { memcpy(to, bytes.data(), num_bytes); });
    } else {
        emulator::enqueue_work(stream, [=] { memcpy(to, from, num_bytes); });
    }
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return emulator::run().empty() ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaHostAlloc(void** memory, size_t num_bytes, unsigned) { return (*memory = aligned_alloc(4096, (num_bytes + 4095) / 4096 * 4096)), cudaSuccess; }
inline cudaError_t cudaFreeHost(void* memory) { return free(memory), cudaSuccess; }
inline cudaError_t cudaMalloc(void** memory, size_t num_bytes) { return cudaHostAlloc(memory, num_bytes, 0); }
inline cudaError_t cudaFree(void* memory) { return free(memory), cudaSuccess; }
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
constexpr unsigned cudaStreamNonBlocking = 1;
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, void*, void*, void*, void*) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = static_cast<cudaStream_t>(malloc(1)), cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
template <class T>
cudaError_t cudaMalloc(T** memory, size_t num_bytes) {
    return cudaMalloc(reinterpret_cast<void**>(memory), num_bytes);
}
template <class T>
cudaError_t cudaHostAlloc(T** memory, size_t num_bytes, unsigned flags) {
    return cudaHostAlloc(reinterpret_cast<void**>(memory), num_bytes, flags);
}
