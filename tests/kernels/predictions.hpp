// SPDX-License-Identifier: MIT
// Predicting a few rows: no memory is asked for, and threads that call at once do not meet.
#pragma once

#include <new>

#include "harness.hpp"
#include "network.hpp"

inline std::atomic<long> allocations{0};

// All of C++'s allocations in this program, counted: std::vector's, and so those of new Activations. Out of line, or GCC
// sees new without malloc and free without delete, and warns.
[[gnu::noinline]] void* operator new(std::size_t size) {
    ++allocations;
    if (void* memory = std::malloc(size > 0 ? size : 1)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace chainrule {
namespace {

template <class T>
std::vector<Layer<T>> three_layers() {
    using Kind = typename Layer<T>::Kind;
    Layer<T> first{Kind::linear, 3, 70}, op{Kind::op, 70, 70}, last{Kind::linear, 70, 2};
    first.bias = last.bias = true;
    op.op = Op::tanh;
    return {first, op, last};
}

void predictions() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        Random random = begin_case<T>("predictions", 3, 70, 2);
        const Network<T> net(three_layers<T>());
        for (Index i = 0; i < net.size(); ++i) net.theta()[i] = static_cast<T>(random.uniform(-1, 1));
        std::vector<T> x(64 * 3), want(64 * 2), got(64 * 2);
        for (T& value : x) value = static_cast<T>(random.uniform(-1, 1));
        const auto one_by_one = [&](std::vector<T>& f) {
            for (Index row = 0; row < 64; ++row) net.predict(1, x.data() + row * 3, f.data() + row * 2);
        };
        const long start = allocations;
        net.predict(64, x.data(), want.data());
        const long first = allocations;
        check(first > start, "the first call allocates, and is counted");
        one_by_one(got);
        check(got == want, "rows one by one give the bits of a batch");
        net.predict(64, x.data(), got.data());
        check(allocations == first, "few rows allocate nothing");

        std::atomic<int> wrong{0};
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 4; ++caller)
            callers.emplace_back([&] {
                std::vector<T> mine(64 * 2);
                for (int round = 0; round < (quick ? 20 : 200); ++round) {
                    one_by_one(mine);
                    wrong += mine != want;
                }
            });
        for (std::thread& caller : callers) caller.join();
        check(wrong == 0, "callers at the same time have memory of their own");
    });
}

}  // namespace
}  // namespace chainrule
