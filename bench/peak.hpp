// SPDX-License-Identifier: MIT
// What this machine can do at most: fused multiply-adds per second, bytes read per second, clock.
//
// The denominators of every "share of peak" in this directory. Each number is the best of many short trials, because
// whatever else runs on the machine only ever makes a trial slower. Used by micro.cpp, by bandwidth.cpp, and by timing.py,
// which compiles this file alone:   c++ -std=c++17 -O2 -pthread -x c++ -DCHAINRULE_PEAK_MAIN peak.hpp -o peak
#ifndef CHAINRULE_BENCH_PEAK_HPP  // no #pragma once: timing.py compiles this header as a program
#define CHAINRULE_BENCH_PEAK_HPP

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>

namespace peak {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// The loops below are written in instructions, not expressions: a compiler that folds or reorders them would measure
// itself. Twelve independent accumulators cover the latency of every core with up to three FMA pipes of latency four.
#define CHAINRULE_TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

template <int Bytes>
struct VectorOf {
    typedef float type __attribute__((vector_size(Bytes)));
};
template <int Bytes>
using Vector = typename VectorOf<Bytes>::type;

// Named variables, not an array, which the compiler would keep in memory.
#define CHAINRULE_ZERO_16(k) Vector<16> sum##k = {};
#define CHAINRULE_ZERO_32(k) Vector<32> sum##k = {};
#define CHAINRULE_ZERO_64(k) Vector<64> sum##k = {};

// Each returns floating-point operations done. The operands are not zero: zeros draw less power and may clock higher.
#define CHAINRULE_FMA_LOOP(name, target_list, bytes, code)                     \
    target_list inline double name(long rounds) {                              \
        const Vector<bytes> a = Vector<bytes>{} + 1.5f, b = a / 1.7f;          \
        CHAINRULE_TWELVE(CHAINRULE_ZERO_##bytes)                               \
        for (long i = 0; i < rounds; ++i) { CHAINRULE_TWELVE(code) }           \
        asm volatile("" ::CHAINRULE_REGISTER(b));                              \
        return static_cast<double>(rounds) * 12 * 2 * (bytes / sizeof(float)); \
    }

// Eight vectors at a time, written out: a loop around one took between 1 and 4 cycles a vector, as its code happened to lie.
#define CHAINRULE_EIGHT(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define CHAINRULE_READ(k) asm volatile("" ::CHAINRULE_REGISTER(line[k]));

// Each reads `bytes` (a multiple of 1 KiB) from memory without using what it read.
#define CHAINRULE_READ_LOOP(name, target_list, width)                              \
    target_list inline void name(const char* memory, std::size_t bytes) {          \
        for (std::size_t i = 0; i < bytes; i += 8 * width) {                       \
            const auto* line = reinterpret_cast<const Vector<width>*>(memory + i); \
            CHAINRULE_EIGHT(CHAINRULE_READ)                                        \
        }                                                                          \
    }

#if defined(__x86_64__)
#define CHAINRULE_REGISTER "x"
#define CHAINRULE_FMA(k) asm volatile("vfmadd231ps %1, %2, %0" : "+x"(sum##k) : "x"(a), "x"(b));
#define CHAINRULE_MULADD(k) asm volatile("mulps %1, %0\n\taddps %1, %0" : "+x"(sum##k) : "x"(a));
CHAINRULE_FMA_LOOP(fma_avx512, __attribute__((target("avx512f"))), 64, CHAINRULE_FMA)
CHAINRULE_FMA_LOOP(fma_avx2, __attribute__((target("avx2,fma"))), 32, CHAINRULE_FMA)
CHAINRULE_FMA_LOOP(fma_baseline, , 16, CHAINRULE_MULADD)
CHAINRULE_READ_LOOP(read_avx512, __attribute__((target("avx512f"))), 64)
CHAINRULE_READ_LOOP(read_avx2, __attribute__((target("avx2"))), 32)
CHAINRULE_READ_LOOP(read_baseline, , 16)
#define CHAINRULE_ONE_ADD "add $1, %0\n\t"
#elif defined(__aarch64__)
#define CHAINRULE_REGISTER "w"
#define CHAINRULE_FMA(k) asm volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum##k) : "w"(a), "w"(b));
CHAINRULE_FMA_LOOP(fma_neon, , 16, CHAINRULE_FMA)
CHAINRULE_READ_LOOP(read_neon, , 16)
#define CHAINRULE_ONE_ADD "add %0, %0, #1\n\t"
#else
#error "peak.hpp knows x86-64 and AArch64"
#endif

struct Rates {
    const char* isa;
    double (*fma)(long rounds);
    void (*read)(const char* memory, std::size_t bytes);
};

inline Rates rates() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return {"avx512", fma_avx512, read_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", fma_avx2, read_avx2};
    return {"baseline", fma_baseline, read_baseline};
#else
    return {"neon", fma_neon, read_neon};
#endif
}

// Best of `trials` of work done per second, `threads` at a time: work(k) returns what thread k did. All threads start
// together and the slowest counts, so a core that another process holds shows up as a bad trial and is dropped.
template <class Work>
double best_rate(int threads, int trials, const Work& work) {
    double best = 0;
    for (int trial = 0; trial < trials; ++trial) {
        std::atomic<int> waiting{threads};
        std::vector<double> done(static_cast<std::size_t>(threads)), took(done);
        const auto run = [&](std::size_t k) {
            waiting.fetch_sub(1);
            while (waiting.load() > 0) std::this_thread::yield();
            const auto start = Clock::now();
            done[k] = work(k);
            took[k] = seconds_since(start);
        };
        std::vector<std::thread> others;
        for (std::size_t k = 1; k < done.size(); ++k) others.emplace_back(run, k);
        run(0);
        for (std::thread& other : others) other.join();
        double total = 0;
        for (double amount : done) total += amount;
        best = std::max(best, total / *std::max_element(took.begin(), took.end()));
    }
    return best;
}

// float32 FLOP/s of `threads` cores together.
inline double flops(int threads, int trials = 10) {
    const Rates r = rates();
    return best_rate(threads, trials, [&](std::size_t) { return r.fma(400000); });
}

// Touched memory in huge pages where the system gives them: 4 KiB pages would measure the page tables.
class Memory {
   public:
    explicit Memory(std::size_t bytes) {
        constexpr std::size_t huge = std::size_t{2} << 20;
        const std::size_t whole = (bytes + huge - 1) / huge * huge;
        data_.reset(static_cast<char*>(std::aligned_alloc(huge, whole)));
#ifdef MADV_HUGEPAGE
        madvise(data_.get(), whole, MADV_HUGEPAGE);
#endif
        std::memset(data_.get(), 1, whole);
    }
    char* data() const { return data_.get(); }

   private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    std::unique_ptr<char, Free> data_;
};

// A cache or the memory: how much it holds, and the size of a working set that is surely in it and in nothing smaller.
struct Level {
    const char* name;
    std::size_t bytes, probe;
    bool shared;  // by all cores
};

// Size of a data cache as Linux's sysfs has it. Not sysconf: for the third level of a Zen 4 its answer is the sum over the
// socket, 320 MiB where a core has 32.
inline std::size_t cache_bytes(int level, std::size_t otherwise) {
    for (int index = 0; index < 8; ++index) {
        const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
        std::ifstream level_file(folder + "level"), type_file(folder + "type"), size_file(folder + "size");
        int its_level = 0;
        std::size_t kibibytes = 0;  // followed by K
        std::string type;
        if (level_file >> its_level && type_file >> type && size_file >> kibibytes && its_level == level &&
            type != "Instruction")
            return kibibytes << 10;
    }
    return otherwise;
}

inline std::vector<Level> levels() {
    const std::size_t l1 = cache_bytes(1, 32 << 10), l2 = cache_bytes(2, 1 << 20);
    const std::size_t l3 = std::max(cache_bytes(3, 8 << 20), 2 * l2);
    return {{"L1", l1, l1 / 2, false},
            {"L2", l2, l2 / 2, false},
            {"L3", l3, 2 * l2, true},
            {"memory", SIZE_MAX, 8 * l3, true}};
}

// Bytes/s that each of `threads` cores reads from a working set of its own, summed.
inline double read_rate(int threads, std::size_t bytes, int trials = 5) {
    const Rates r = rates();
    const std::size_t repeats = std::max<std::size_t>(1, (std::size_t{256} << 20) / bytes);
    std::vector<Memory> memory;
    for (int k = 0; k < threads; ++k) memory.emplace_back(bytes);
    return best_rate(threads, trials, [&](std::size_t k) {
        for (std::size_t i = 0; i < repeats; ++i) r.read(memory[k].data(), bytes);
        return static_cast<double>(bytes) * static_cast<double>(repeats);
    });
}

// Clock in Hz: a chain of dependent additions takes one cycle each.
inline double clock_rate(int trials = 10) {
    return best_rate(1, trials, [](std::size_t) {
        std::uint64_t x = 0;
        for (int i = 0; i < 400000; ++i)
            asm volatile(CHAINRULE_ONE_ADD CHAINRULE_ONE_ADD CHAINRULE_ONE_ADD CHAINRULE_ONE_ADD CHAINRULE_ONE_ADD
                             CHAINRULE_ONE_ADD CHAINRULE_ONE_ADD CHAINRULE_ONE_ADD
                         : "+r"(x));
        return 8.0 * 400000;
    });
}

}  // namespace peak

#endif  // CHAINRULE_BENCH_PEAK_HPP

#ifdef CHAINRULE_PEAK_MAIN
#include <cstdio>

// peak [threads]: one line of JSON.
int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    std::printf("{\"isa\": \"%s\", \"gflops\": %.2f, \"ghz\": %.3f}\n", peak::rates().isa, peak::flops(threads) / 1e9,
                peak::clock_rate() / 1e9);
}
#endif
