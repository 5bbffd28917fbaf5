// What sysfs would say of the device. A process that has this library preloaded asks us first; every other path is looked up as usual.
#include <fcntl.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <cstring>
#include <string>

#include <dirent.h>
#include <dlfcn.h>

#include "device.hpp"

namespace standin {
namespace {

// A GPU's PCI device: one device is as far from it as another.
std::string pci_device() {
    const char* chosen = std::getenv("STANDIN_VERBS_PCI");
    if (chosen != nullptr) return chosen;
    std::string found = "/sys/devices/pci0000:00/0000:00:00.0";
    const std::string drivers = "/sys/bus/pci/drivers/nvidia";
    if (DIR* const folder = opendir(drivers.c_str())) {
        while (const dirent* entry = readdir(folder))
            if (std::strlen(entry->d_name) == 12 && entry->d_name[4] == ':') {
                char path[PATH_MAX];
                const ssize_t length = readlink((drivers + "/" + entry->d_name).c_str(), path, sizeof(path) - 1);
                const std::string link(path, length > 0 ? static_cast<size_t>(length) : 0);  // ../../../../devices/pci...
                const size_t start = link.find("devices/");
                if (start != std::string::npos) found = "/sys/" + link.substr(start);
                break;
            }
        closedir(folder);
    }
    return found;
}

bool is_our_device(const char* path) {
    static const std::string ours = std::string("/sys/class/infiniband/") + kDeviceName + "/device";
    return path == ours;
}

// Modules of the kernel that let a NIC reach memory of GPUs; we need none.
bool is_peer_memory(const char* path) {
    return std::strcmp(path, "/sys/module/nvidia_peermem/version") == 0;
}

}  // namespace
}  // namespace standin

extern "C" char* realpath(const char* path, char* resolved) noexcept {
    static const auto next = reinterpret_cast<char* (*)(const char*, char*)>(dlsym(RTLD_NEXT, "realpath"));
    if (!standin::is_our_device(path)) return next(path, resolved);
    const std::string device = standin::pci_device();
    return resolved == nullptr ? strdup(device.c_str()) : std::strcpy(resolved, device.c_str());
}

extern "C" int access(const char* path, int mode) noexcept {
    if (mode == F_OK && standin::is_peer_memory(path)) return 0;
    return faccessat(AT_FDCWD, path, mode, 0);
}
