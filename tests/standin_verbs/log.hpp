#pragma once
// STANDIN_VERBS_LOG=1: what happens, on stderr.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

namespace standin {

inline bool is_logging() {
    static const bool is_on = std::getenv("STANDIN_VERBS_LOG") != nullptr;
    return is_on;
}

template <class... Arguments>
void say(const char* format, Arguments... arguments) {
    if (!is_logging()) return;
    char line[512];
    if constexpr (sizeof...(arguments) == 0)
        std::snprintf(line, sizeof(line), "%s", format);
    else
        std::snprintf(line, sizeof(line), format, arguments...);
    std::fprintf(stderr, "standin_verbs[%d]: %s\n", static_cast<int>(getpid()), line);
}

}  // namespace standin
