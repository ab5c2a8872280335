// SPDX-License-Identifier: MIT
// Question   how many bytes a second go through each cache and the memory, by pattern of access?
// Method     as peak.hpp: loops written in instructions, best of several short trials, each thread on memory of its own.
//              read    a
//              copy    b = a
//              triad   c = a + s b
//              update  a = s a, in place, as an update rule goes over weights
// Bytes      those that the program reads and writes. A store to memory that is not in the cache reads it first: copy and
//            triad move half as much again and a third more than is counted, update does not.
// Use        c++ -std=c++17 -O2 -pthread bandwidth.cpp -o bandwidth; bandwidth [threads] prints one line of JSON.
#include <cstdio>

#include "peak.hpp"

namespace {

using peak::Vector;

// The empty instruction keeps the compiler from turning the loop into memcpy.
#define CHAINRULE_STORE(k, expression)                     \
    {                                                      \
        auto result = expression;                          \
        asm volatile("" : "+" CHAINRULE_REGISTER(result)); \
        to[k] = result;                                    \
    }
#define CHAINRULE_COPY(k) CHAINRULE_STORE(k, a[k])
#define CHAINRULE_TRIAD(k) CHAINRULE_STORE(k, a[k] + s * b[k])
#define CHAINRULE_UPDATE(k) CHAINRULE_STORE(k, a[k] * s)

// The factor is 1, which the compiler must not know: numbers neither grow nor vanish.
#define CHAINRULE_STREAM_LOOP(name, target_list, width, line)                                    \
    target_list void name(const char* first, const char* second, char* third, std::size_t n) {   \
        Vector<width> s = Vector<width>{} + 1.0f;                                                \
        asm volatile("" : "+" CHAINRULE_REGISTER(s));                                            \
        for (std::size_t i = 0; i < n; i += 8 * width) {                                         \
            [[maybe_unused]] const auto* a = reinterpret_cast<const Vector<width>*>(first + i);  \
            [[maybe_unused]] const auto* b = reinterpret_cast<const Vector<width>*>(second + i); \
            auto* to = reinterpret_cast<Vector<width>*>(third + i);                              \
            CHAINRULE_EIGHT(line)                                                                \
        }                                                                                        \
    }
#define CHAINRULE_STREAM_LOOPS(isa, target_list, width)                     \
    CHAINRULE_STREAM_LOOP(copy_##isa, target_list, width, CHAINRULE_COPY)   \
    CHAINRULE_STREAM_LOOP(triad_##isa, target_list, width, CHAINRULE_TRIAD) \
    CHAINRULE_STREAM_LOOP(update_##isa, target_list, width, CHAINRULE_UPDATE)

using Loop = void (*)(const char* first, const char* second, char* to, std::size_t n);
struct Loops {
    Loop copy, triad, update;
};

#if defined(__x86_64__)
CHAINRULE_STREAM_LOOPS(avx512, __attribute__((target("avx512f"))), 64)
CHAINRULE_STREAM_LOOPS(avx2, __attribute__((target("avx2,fma"))), 32)
CHAINRULE_STREAM_LOOPS(baseline, , 16)

Loops loops() {
    if (__builtin_cpu_supports("avx512f")) return {copy_avx512, triad_avx512, update_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {copy_avx2, triad_avx2, update_avx2};
    return {copy_baseline, triad_baseline, update_baseline};
}
#else
CHAINRULE_STREAM_LOOPS(neon, , 16)

Loops loops() { return {copy_neon, triad_neon, update_neon}; }
#endif

// Bytes/s of all threads together. Each thread's working set is cut into `arrays` equal ones, of which an element is
// touched `touches` times in all.
double rate(const std::vector<peak::Memory>& memory, std::size_t bytes, std::size_t arrays, std::size_t touches,
            Loop loop) {
    const std::size_t n = bytes / arrays / 1024 * 1024,
                      repeats = std::max<std::size_t>(1, (std::size_t{128} << 20) / bytes);
    return peak::best_rate(static_cast<int>(memory.size()), 7, [&](std::size_t thread) {
        char* const a = memory[thread].data();
        char* const b = arrays > 2 ? a + n : a;
        char* const to = a + (arrays - 1) * n;
        for (std::size_t i = 0; i < repeats; ++i) loop(a, b, to, n);
        return static_cast<double>(touches * n * repeats);
    });
}

void print(const peak::Level& level, int threads) {
    std::vector<peak::Memory> memory;
    for (int k = 0; k < threads; ++k) memory.emplace_back(level.probe);
    const double size =
        level.bytes == SIZE_MAX ? 1e18 : static_cast<double>(level.bytes) * (level.shared ? 1 : threads);
    const Loops l = loops();
    std::printf("{\"name\": \"%s\", \"size\": %.0f, \"read\": %.4g, \"copy\": %.4g, \"triad\": %.4g, \"update\": %.4g}",
                level.name, size, peak::read_rate(threads, level.probe), rate(memory, level.probe, 2, 2, l.copy),
                rate(memory, level.probe, 3, 3, l.triad), rate(memory, level.probe, 1, 2, l.update));
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const char* separator = "{\"levels\": [";
    for (const peak::Level& level : peak::levels()) {
        std::printf("%s", separator);
        print(level, threads);
        separator = ", ";
    }
    std::printf("]}\n");
}
