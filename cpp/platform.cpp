// SPDX-License-Identifier: MIT
#include "platform.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#endif

namespace chainrule {

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::neon: return "neon";
        case Isa::baseline: break;
    }
    return "baseline";
}

bool runs_here(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    switch (isa) {
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("fma");
        case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::baseline: return true;
        case Isa::neon: return false;
    }
    return false;
#elif defined(__aarch64__)
    return isa == Isa::neon;  // part of the architecture's base
#else
    return isa == Isa::baseline;
#endif
}

namespace {

// Processors that a container's CPU quota allows (cgroup v2, then v1), or `limit` where none is set.
int quota_processors(int limit) {
    double quota = -1, period = -1;
    if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re")) {
        char text[64] = {};
        if (std::fscanf(file, "%63s %lf", text, &period) == 2 && std::strcmp(text, "max") != 0) quota = std::atof(text);
        std::fclose(file);
    } else {
        const char* paths[2] = {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"};
        double* values[2] = {&quota, &period};
        for (int i = 0; i < 2; ++i)
            if (std::FILE* value = std::fopen(paths[i], "re")) {
                if (std::fscanf(value, "%lf", values[i]) != 1) *values[i] = -1;
                std::fclose(value);
            }
    }
    if (quota <= 0 || period <= 0) return limit;
    const int allowed = static_cast<int>(quota / period);  // rounded down: a part of a core is no core to spin on
    return allowed < 1 ? 1 : (allowed < limit ? allowed : limit);
}

}  // namespace

int usable_processors() {
    int count = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
    return quota_processors(count < 1 ? 1 : count);
}

namespace {
constexpr std::size_t kHugePage = std::size_t{2} << 20;
}

void* allocate_bytes(std::size_t bytes) {
    const std::size_t alignment = bytes >= kHugePage ? kHugePage : static_cast<std::size_t>(kLineBytes);
    const std::size_t size = (bytes + alignment - 1) / alignment * alignment;
    if (size < bytes) throw std::bad_alloc();  // the sum wrapped around
    void* memory = std::aligned_alloc(alignment, size == 0 ? alignment : size);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // Large arenas are walked with large strides; 4 KiB pages would miss the TLB at every row.
    if (alignment == kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
    std::memset(memory, 0, size);
    return memory;
}

void free_bytes(void* memory, std::size_t) { std::free(memory); }

}  // namespace chainrule
