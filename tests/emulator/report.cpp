// Who waits where.
#include <algorithm>
#include <cstring>
#include <sstream>

#include "machine.hpp"

namespace emulator {

const char* const kOpNames[] = {"__syncwarp", "__shfl", "__ballot", "__any", "__all", "__match_any", "__reduce_max", "__reduce_min", "__reduce_add", "__reduce_or", "__reduce_and", "__reduce_max", "__reduce_min"};

std::string waits_of(const Fiber& fiber) {
    if (fiber.state == State::kDone) return "ended";
    if (fiber.state == State::kPolling) return "polls";
    if (fiber.state == State::kReady) return "runs";
    if (fiber.barrier >= 0) return "at barrier " + std::to_string(fiber.barrier);
    if (!fiber.in_warp_op) return std::string("at ") + fiber.where;
    std::ostringstream text;
    const char* slash = std::strrchr(fiber.file, '/');
    text << "at " << kOpNames[static_cast<int>(fiber.op)] << "_sync of " << std::hex << fiber.mask << std::dec << " in " << (slash != nullptr ? slash + 1 : fiber.file) << ":"
         << fiber.line;
    return text.str();
}

// Warps that wait alike in one line; those that have ended in none.
std::string describe(const Kernel& kernel) {
    std::map<std::string, std::vector<std::string>> warps;
    for (const auto& block : kernel.blocks) {
        for (size_t first = 0; first < block->fibers.size(); first += 32) {
            std::map<std::string, uint32_t> waits;
            for (size_t thread = first; thread < std::min(first + 32, block->fibers.size()); ++thread) waits[waits_of(block->fibers[thread])] |= 1u << (thread - first);
            if (waits.size() == 1 && waits.begin()->first == "ended") continue;
            std::ostringstream text;
            for (const auto& [what, lanes] : waits) text << (text.tellp() > 0 ? ", " : "") << "lanes " << std::hex << lanes << " " << what;
            warps[text.str()].push_back(std::to_string(block->index.x) + "." + std::to_string(first / 32));
        }
    }
    std::ostringstream text;
    for (const auto& [what, who] : warps) {
        text << "\n  " << kernel.name << ", " << who.size() << " warps (block.warp";
        for (size_t i = 0; i < std::min<size_t>(who.size(), 6); ++i) text << " " << who[i];
        text << (who.size() > 6 ? " ..." : "") << "): " << what;
    }
    return text.str();
}

}  // namespace emulator
