// Memory that a thread keeps from step to step.
#pragma once

#include <cstdint>
#include <memory>

namespace tokendance {

// Memory that starts where a cache line does.
struct alignas(64) CacheLine {
    char bytes[64];
};

// Each thread's scratch memory for one `Use`, not initialised, kept from step to step: for many threads, to map new
// pages takes longer than a step of few rows. It lies near the core that writes it first.
template <class Use>
char* thread_scratch(int64_t bytes) {
    thread_local std::unique_ptr<CacheLine[]> memory;
    thread_local int64_t lines = 0;
    const int64_t needed = (bytes + sizeof(CacheLine) - 1) / sizeof(CacheLine);
    if (needed > lines) {
        lines = 0;
        memory.reset(new CacheLine[needed]);
        lines = needed;
    }
    return reinterpret_cast<char*>(memory.get());
}

}  // namespace tokendance
