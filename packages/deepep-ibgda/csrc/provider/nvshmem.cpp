#include "provider/nvshmem.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nvshmem_host.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "deepep/memory/symmetric.hpp"
#include "provider/device_tables.hpp"
#include "provider/gpudirect.hpp"
#include "provider/nvshmem_tables.hpp"

namespace deepep::ibgda {
namespace {

constexpr size_t kArenaAlignment = size_t{2} << 20;
constexpr int64_t kHeapBesideArena = int64_t{256} << 20;  // what NVSHMEM itself keeps in the symmetric heap

// NVSHMEM's host library, opened by name: this extension loads without it.
class NvshmemApi {
public:
    explicit NvshmemApi(const std::string& path) {
        library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
        if (library_ == nullptr) throw DriverError("opening NVSHMEM (" + path + "): " + dlerror());
        find("nvshmemx_get_uniqueid", get_uniqueid);
        find("nvshmemx_set_attr_uniqueid_args", set_attr_uniqueid_args);
        find("nvshmemx_hostlib_init_attr", hostlib_init_attr);
        find("nvshmemx_hostlib_finalize", hostlib_finalize);
        find("nvshmemx_init_status", init_status);
        find("nvshmemx_cumodule_init", cumodule_init);
        find("nvshmemx_cumodule_finalize", cumodule_finalize);
        find("nvshmemx_vendor_get_version_info", vendor_get_version_info);
        find("nvshmem_align", align);
        find("nvshmem_free", free);
        find("nvshmem_ptr", ptr);
        int major = 0, minor = 0, patch = 0;
        vendor_get_version_info(&major, &minor, &patch);
        if (major != NVSHMEM_VENDOR_MAJOR_VERSION || minor < NVSHMEM_VENDOR_MINOR_VERSION)
            throw DriverError("NVSHMEM " + std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch) +
                              " is installed, and deepep-ibgda was built against " + std::to_string(NVSHMEM_VENDOR_MAJOR_VERSION) + "." +
                              std::to_string(NVSHMEM_VENDOR_MINOR_VERSION) + ". Install that release or a newer one of the same major version.");
    }

    decltype(&::nvshmemx_get_uniqueid) get_uniqueid;
    decltype(&::nvshmemx_set_attr_uniqueid_args) set_attr_uniqueid_args;
    decltype(&::nvshmemx_hostlib_init_attr) hostlib_init_attr;
    decltype(&::nvshmemx_hostlib_finalize) hostlib_finalize;
    decltype(&::nvshmemx_init_status) init_status;
    decltype(&::nvshmemx_cumodule_init) cumodule_init;
    decltype(&::nvshmemx_cumodule_finalize) cumodule_finalize;
    decltype(&::nvshmemx_vendor_get_version_info) vendor_get_version_info;
    decltype(&::nvshmem_align) align;
    decltype(&::nvshmem_free) free;
    decltype(&::nvshmem_ptr) ptr;

private:
    template <class Function>
    void find(const char* name, Function& function) {
        void* const address = dlsym(library_, name);
        if (address == nullptr) throw DriverError(std::string("this NVSHMEM has no ") + name + "; deepep-ibgda needs 3.4 or newer.");
        function = reinterpret_cast<Function>(address);
    }

    void* library_ = nullptr;  // never closed: NVSHMEM starts threads and registers handlers
};

// The driver's calls that link and load code.
struct LinkApi {
    decltype(&::cuLinkCreate) create;
    decltype(&::cuLinkAddFile) add_file;
    decltype(&::cuLinkComplete) complete;
    decltype(&::cuLinkDestroy) destroy;
    decltype(&::cuModuleLoadData) load;
    decltype(&::cuModuleUnload) unload;
    decltype(&::cuModuleGetGlobal) get_global;

    static const LinkApi& get() {
        static const LinkApi api;
        return api;
    }

private:
    LinkApi() {
        DriverApi::find("cuLinkCreate", create);
        DriverApi::find("cuLinkAddFile", add_file);
        DriverApi::find("cuLinkComplete", complete);
        DriverApi::find("cuLinkDestroy", destroy);
        DriverApi::find("cuModuleLoadData", load);
        DriverApi::find("cuModuleUnload", unload);
        DriverApi::find("cuModuleGetGlobal", get_global);
    }
};

// NVSHMEM's device state in a module of its own (nvshmem_state.cu).
class StateModule {
public:
    StateModule(const NvshmemConfig& config) {
        const auto& link = LinkApi::get();
        char log[4096] = {};
        CUjit_option options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
        void* values[] = {log, reinterpret_cast<void*>(sizeof(log))};
        CUlinkState linker = nullptr;
        DriverApi::get().check(link.create(2, options, values, &linker), "starting to link NVSHMEM's device state");
        void* image = nullptr;
        size_t num_bytes = 0;
        CUresult result = link.add_file(linker, CU_JIT_INPUT_FATBINARY, config.state_module.c_str(), 0, nullptr, nullptr);
        if (result == CUDA_SUCCESS) result = link.add_file(linker, CU_JIT_INPUT_LIBRARY, config.device_library.c_str(), 0, nullptr, nullptr);
        if (result == CUDA_SUCCESS) result = link.complete(linker, &image, &num_bytes);
        if (result == CUDA_SUCCESS) result = link.load(&module_, image);
        link.destroy(linker);
        DriverApi::get().check(result, "linking " + config.state_module + " with " + config.device_library + " (" + log + ")");
    }
    StateModule(const StateModule&) = delete;
    StateModule& operator=(const StateModule&) = delete;
    ~StateModule() { LinkApi::get().unload(module_); }

    CUmodule handle() const { return module_; }

    template <class T>
    T read(const char* name, const DeviceReader& reader) const {
        CUdeviceptr address = 0;
        size_t num_bytes = 0;
        DriverApi::get().check(LinkApi::get().get_global(&address, &num_bytes, module_, name), std::string("looking for ") + name);
        if (num_bytes != sizeof(T))
            throw DriverError(std::string("NVSHMEM's ") + name + " has " + std::to_string(num_bytes) + " bytes; deepep-ibgda was built for " +
                              std::to_string(sizeof(T)) + ".");
        return nvshmem_detail::read<T>(reader, reinterpret_cast<const void*>(address));
    }

private:
    CUmodule module_ = nullptr;
};

std::atomic<bool> is_in_use{false};

void set_variable(const char* name, const std::string& value) {
    if (setenv(name, value.c_str(), 1) != 0) throw DriverError(std::string("setting ") + name + " failed.");
}

// NVSHMEM takes its settings from the environment, when it starts.
void set_environment(const NvshmemConfig& config) {
    set_variable("NVSHMEM_IB_ENABLE_IBGDA", "1");
    set_variable("NVSHMEM_IBGDA_NIC_HANDLER", "gpu");
    set_variable("NVSHMEM_IBGDA_NUM_RC_PER_PE", std::to_string(config.num_queue_pairs));
    set_variable("NVSHMEM_QP_DEPTH", std::to_string(config.depth));
    set_variable("NVSHMEM_SYMMETRIC_SIZE", std::to_string(config.num_arena_bytes + kHeapBesideArena));
    if (config.service_level >= 0) set_variable("NVSHMEM_IB_SL", std::to_string(config.service_level));
    if (config.traffic_class >= 0) set_variable("NVSHMEM_IB_TRAFFIC_CLASS", std::to_string(config.traffic_class));
}

void require(bool condition, const std::string& text) {
    if (!condition) throw ArgumentError("NVSHMEM provider: " + text);
}

void check(const NvshmemConfig& config) {
    require(static_cast<int>(config.is_remote.size()) == config.num_ranks && config.num_ranks <= kMaxPeers,
            "is_remote has " + std::to_string(config.is_remote.size()) + " entries for " + std::to_string(config.num_ranks) + " ranks (at most " +
                std::to_string(kMaxPeers) + ").");
    require(config.rank >= 0 && config.rank < config.num_ranks && !config.is_remote[config.rank],
            "rank " + std::to_string(config.rank) + " is none of the group, or remote to itself.");
    require(config.unique_id.size() == sizeof(nvshmemx_uniqueid_t), "unique_id has " + std::to_string(config.unique_id.size()) + " bytes.");
    require(config.num_arena_bytes > 0, "num_arena_bytes is " + std::to_string(config.num_arena_bytes) + "; it must be positive.");
    require(config.num_queue_pairs >= 1 && config.num_queue_pairs <= 64,
            "num_queue_pairs is " + std::to_string(config.num_queue_pairs) + "; 1 to 64 are accepted.");
    require(config.depth >= NVSHMEMI_IBGDA_MIN_QP_DEPTH && config.depth <= rdma::kMaxDepth && (config.depth & (config.depth - 1)) == 0,
            "depth is " + std::to_string(config.depth) + "; powers of two from " + std::to_string(NVSHMEMI_IBGDA_MIN_QP_DEPTH) + " to " +
                std::to_string(rdma::kMaxDepth) + " are accepted.");
    require(config.service_level >= -1 && config.service_level <= 15,
            "service_level is " + std::to_string(config.service_level) + "; 0 to 15 are accepted, and -1 for NVSHMEM's own.");
    require(config.traffic_class >= -1 && config.traffic_class <= 255,
            "traffic_class is " + std::to_string(config.traffic_class) + "; 0 to 255 are accepted, and -1 for NVSHMEM's own.");
    if (const std::string obstacle = gpudirect_obstacle(config.device); !obstacle.empty()) throw DriverError(obstacle);
}

}  // namespace

std::string nvshmem_unique_id(const std::string& host_library) {
    const NvshmemApi api(host_library);
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (const int status = api.get_uniqueid(&id); status != 0)
        throw DriverError("NVSHMEM could not make a unique id (status " + std::to_string(status) + "). NVSHMEM_DEBUG=INFO says more.");
    return std::string(reinterpret_cast<const char*>(&id), sizeof(id));
}

struct NvshmemRdma::Parts {
    NvshmemConfig config;
    NvshmemApi api;
    cudaStream_t stream = nullptr;
    void* arena = nullptr;
    rdma::QueuePairState* states = nullptr;  // device memory [num_ranks][num_queue_pairs]
    NvshmemTables tables = {};
    std::unique_ptr<StateModule> module = {};
    std::unique_ptr<DeviceTables> device_tables = {};

    explicit Parts(const NvshmemConfig& given) : config(given), api(given.host_library) {}
    ~Parts() {
        device_tables.reset();
        if (module != nullptr) {
            api.cumodule_finalize(module->handle());
            module.reset();
        }
        if (states != nullptr) static_cast<void>(cudaFree(states));
        if (stream != nullptr) static_cast<void>(cudaStreamDestroy(stream));
    }

    void copy(void* destination, const void* source, size_t num_bytes) const {
        check_runtime(cudaMemcpyAsync(destination, source, num_bytes, cudaMemcpyDefault, stream), "copying NVSHMEM's tables");
        check_runtime(cudaStreamSynchronize(stream), "copying NVSHMEM's tables");
    }

    void start_nvshmem() {
        set_environment(config);
        nvshmemx_uniqueid_t id;
        std::memcpy(&id, config.unique_id.data(), sizeof(id));
        nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
        int status = api.set_attr_uniqueid_args(config.rank, config.num_ranks, &id, &attributes);
        if (status == 0) status = api.hostlib_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
        const int reached = api.init_status();
        if (status != 0 || reached < NVSHMEM_STATUS_IS_INITIALIZED || reached == NVSHMEM_STATUS_INVALID)
            throw DriverError("NVSHMEM did not start (status " + std::to_string(status) + ", state " + std::to_string(reached) +
                              "). NVSHMEM_DEBUG=INFO says more.");
        arena = api.align(kArenaAlignment, static_cast<size_t>(config.num_arena_bytes));
        if (arena == nullptr)
            throw DriverError("NVSHMEM has no " + std::to_string(config.num_arena_bytes) + " bytes of symmetric memory.");
    }

    void adopt_queue_pairs() {
        module = std::make_unique<StateModule>(config);
        if (const int status = api.cumodule_init(module->handle()); status != 0)
            throw DriverError("NVSHMEM did not fill in its device state (status " + std::to_string(status) + ").");
        const DeviceReader reader = [this](void* destination, const void* source, size_t num_bytes) { copy(destination, source, num_bytes); };
        tables = read_nvshmem_tables(module->read<IbgdaState>("nvshmemi_ibgda_device_state_d", reader),
                                     module->read<NvshmemState>("nvshmemi_device_state_d", reader),
                                     {config.rank, config.num_ranks, config.is_remote, config.num_queue_pairs, reinterpret_cast<uint64_t>(arena),
                                      config.num_arena_bytes},
                                     reader);
        std::vector<rdma::QueuePairState> initial;
        std::vector<rdma::QueuePair> pairs;
        check_runtime(cudaMalloc(&states, sizeof(rdma::QueuePairState) * tables.pairs.size()), "allocating counters of queue pairs");
        for (AdoptedPair& adopted : tables.pairs) {
            adopted.pair.state = states + initial.size();
            initial.push_back(rdma::initial_state(adopted.next_request));
            pairs.push_back(adopted.pair);
            if (adopted.pair.depth == 0) continue;
            // What it says of NVSHMEM's own requests is over; all ones is "invalid", as before the first completion.
            check_runtime(cudaMemsetAsync(const_cast<rdma::CompletionEntry*>(adopted.pair.completion), 0xff, sizeof(rdma::CompletionEntry), stream),
                          "clearing a completion entry");
        }
        copy(states, initial.data(), sizeof(rdma::QueuePairState) * initial.size());
        device_tables = std::make_unique<DeviceTables>(config.device);
        device_tables->update({config.num_ranks, config.num_queue_pairs, pairs.data(), tables.local, tables.remote.data()});
    }

    // NVSHMEM goes on counting where we ended. False when a queue pair has failed.
    bool give_back_queue_pairs() const {
        bool is_healthy = true;
        for (const AdoptedPair& adopted : tables.pairs) {
            if (adopted.pair.depth == 0) continue;
            rdma::QueuePairState state;
            copy(&state, adopted.pair.state, sizeof(state));
            is_healthy &= state.failure == 0 && state.rung == state.reserved;
            const uint64_t counters[4] = {state.rung, state.rung, state.rung, state.completed};  // reserved, ready, posted, completed
            copy(reinterpret_cast<void*>(adopted.counters + offsetof(nvshmemi_ibgda_device_qp_management_t, tx_wq)), counters, sizeof(counters));
        }
        return is_healthy;
    }
};

NvshmemRdma::NvshmemRdma(const NvshmemConfig& config) {
    check(config);
    if (is_in_use.exchange(true)) throw ArgumentError("NVSHMEM provider: this process has one already, and NVSHMEM serves one at a time.");
    try {
        check_runtime(cudaSetDevice(config.device), "selecting CUDA device " + std::to_string(config.device));
        parts_ = std::make_unique<Parts>(config);
        check_runtime(cudaStreamCreateWithFlags(&parts_->stream, cudaStreamNonBlocking), "making a stream to fill tables of queue pairs");
        parts_->start_nvshmem();
        parts_->adopt_queue_pairs();
    } catch (...) {
        parts_.reset();
        is_in_use = false;
        throw;
    }
}

// Without close() NVSHMEM is left running: ending it is collective.
NvshmemRdma::~NvshmemRdma() = default;

std::vector<uint64_t> NvshmemRdma::arena_ptrs() const {
    require(parts_ != nullptr, "it has been closed.");
    std::vector<uint64_t> pointers;
    for (int rank = 0; rank < parts_->config.num_ranks; ++rank)
        pointers.push_back(parts_->config.is_remote[rank] ? 0 : reinterpret_cast<uint64_t>(parts_->api.ptr(parts_->arena, rank)));
    return pointers;
}

uint64_t NvshmemRdma::view_ptr() const {
    require(parts_ != nullptr, "it has been closed.");
    return reinterpret_cast<uint64_t>(&parts_->device_tables->peers());
}

void NvshmemRdma::close() {
    if (parts_ == nullptr) return;
    check_runtime(cudaSetDevice(parts_->config.device), "selecting CUDA device " + std::to_string(parts_->config.device));
    const bool is_healthy = parts_->give_back_queue_pairs();
    const NvshmemApi api = parts_->api;
    void* const arena = parts_->arena;
    parts_.reset();
    if (!is_healthy) return;
    api.free(arena);
    api.hostlib_finalize();
    is_in_use = false;
}

}  // namespace deepep::ibgda
