#pragma once
// A test program ends with 0 or names the first thing that does not hold.
#include <cstdio>
#include <cstdlib>

#define CHECK(condition, ...)                                                            \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                           \
            std::fprintf(stderr, "\n");                                                  \
            std::exit(1);                                                                \
        }                                                                                \
    } while (false)
