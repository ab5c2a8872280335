// SPDX-License-Identifier: MIT
// The thread pool.
#pragma once

#ifdef __linux__
#include <sched.h>
#endif

#include "harness.hpp"
#include "network.hpp"

namespace chainrule {
namespace {

// ---- the pool -------------------------------------------------------------------------------------------------------

using Counters = std::array<std::atomic<int>, 16>;

bool each_once(int parts) {
    Counters counters{};
    std::array<int, 16> plain{};  // written without atomics: what parts wrote is visible when parallel returns
    std::atomic<bool> told{true};
    parallel(parts, [&](int part, int count) {
        ++counters[static_cast<std::size_t>(part)];
        plain[static_cast<std::size_t>(part)] = part + 1;
        if (count != parts) told = false;
    });
    for (int part = 0; part < 16; ++part) {
        const std::size_t i = static_cast<std::size_t>(part);
        if (counters[i] != (part < parts) || plain[i] != (part < parts ? part + 1 : 0)) return false;
    }
    return told;
}

void pool_parts() {
    for (const int threads : {1, 2, 3, 7, 2, 1}) {
        set_thread_count(threads);
        check(thread_count() == threads, "the thread count is what was set");
        for (int round = 0; round < 20; ++round)
            for (int parts = 0; parts <= 9; ++parts) {
                context.shape = {threads, parts, 0};
                check(each_once(parts), "every part once");
            }
    }
}

// Work inside work runs on the thread that asks for it; the outer region must not be disturbed.
void pool_nested() {
    set_thread_count(3);
    for (int outer = 1; outer <= 4; ++outer)
        for (int inner = 1; inner <= 4; ++inner) {
            context.shape = {outer, inner, 0};
            std::array<Counters, 4> counters{};
            parallel(outer, [&](int i, int) {
                parallel(inner,
                         [&](int j, int) { ++counters[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)]; });
            });
            bool good = true;
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j)
                    good = good && counters[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] ==
                                       (i < outer && j < inner);
            check(good, "every inner part of every outer part once");
        }
}

// Several threads at once. While one of them has the workers the others do their parts themselves; `churn` changes the
// number of workers under them.
void run_callers(bool churn) {
    context.shape = {churn, 0, 0};
    std::atomic<int> wrong{0}, running{4};
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c)
        callers.emplace_back([&, c] {
            for (int i = 0; i < (quick ? 500 : 5000); ++i) wrong += !each_once(1 + (c + i) % 5);
            --running;
        });
    for (int count = 1; running > 0; count = count % 4 + 1) {
        if (churn) set_thread_count(count);
        std::this_thread::yield();
    }
    for (std::thread& caller : callers) caller.join();
    check(wrong == 0, "every caller's parts once, whoever else calls");
}

void pool_callers() {
    set_thread_count(3);
    run_callers(false);
    run_callers(true);
}

// Many small regions in a row, of parts that last from nothing to a few microseconds, so that workers come too late,
// in time and in the middle of the next region; pauses let them fall asleep in between. A count that is not reset, a
// part claimed in one region and run in the next, a wake-up lost once in ten thousand times: the sum is wrong or
// nobody comes back.
void pool_many() {
    set_thread_count(2);
    Random random(base_seed);
    for (const int parts : {2, 7}) {
        const auto enough = std::chrono::steady_clock::now() + std::chrono::seconds(4);  // on a busy machine
        context.shape = {parts, 0, 0};
        const int most = (parts == 2 ? 100000 : 20000) / (quick ? 10 : 1);
        int regions = 0;
        std::atomic<long> sum{0};
        while (regions < most && (regions % 100 != 0 || std::chrono::steady_clock::now() < enough)) {
            const std::uint64_t length = random.next() % 4 == 0 ? random.next() % 1000 : 0;
            parallel(parts, [&](int part, int) {
                for (volatile std::uint64_t spin = 0; spin < length;) spin = spin + 1;
                sum.fetch_add(part + 1, std::memory_order_relaxed);
            });
            if (++regions % 1000 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
        check(sum == static_cast<long>(regions) * parts * (parts + 1) / 2, "tiny regions in a row");
    }
}

// Workers that fell asleep are woken: a pool whose caller always does all the work itself would be right, but no pool.
void pool_wakes() {
    set_thread_count(2);
    context.shape = {2, 0, 0};
    bool helped = false;
    for (int attempt = 0; attempt < 20 && !helped; ++attempt) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        std::array<std::thread::id, 2> who;
        parallel(2, [&](int part, int) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            who[static_cast<std::size_t>(part)] = std::this_thread::get_id();
        });
        helped = who[0] != who[1];
    }
    check(helped, "a sleeping worker takes a part of a long region");
}

// Workers count subnormal numbers as their caller does, and as the next one does.
void pool_float_mode() {
    set_thread_count(2);
    context.shape = {2, 0, 0};
    const std::uint64_t plain = float_mode();
    for (const bool flushing : {true, false, true}) {
        bool helped = false, same = true;
        for (int attempt = 0; attempt < 20 && !helped; ++attempt) {
            const FlushSubnormals flush(flushing);
            std::array<std::thread::id, 2> who;
            std::array<std::uint64_t, 2> modes{};
            parallel(2, [&](int part, int) {
                std::this_thread::sleep_for(std::chrono::milliseconds(20));
                who[static_cast<std::size_t>(part)] = std::this_thread::get_id();
                modes[static_cast<std::size_t>(part)] = float_mode();
            });
            helped = who[0] != who[1];
            same = same && modes[0] == float_mode() && modes[1] == float_mode();
        }
        check(helped && same, "a worker computes in its caller's floating-point mode");
        check(float_mode() == plain, "the caller's mode is as it was");
    }
}

// Work is shared by fewer threads the further apart their cores are, and never by none or by more than there are.
void pool_distance() {
    context.shape = {};
    check(parts_worth(5.9e5, 2, 1) == 1 && parts_worth(6e5, 2, 1) == 2, "two parts from 6e5 multiplications");
    check(parts_worth(4.8e7, 2, 3) == 1 && parts_worth(5e7, 2, 3) == 2,
          "81 times as many on cores three times as far apart");
    for (const int threads : {1, 2, 5})
        for (const double multiplies : {0.0, 1.0, 1e6, 1e9, 1e300}) {
            int before = threads;
            for (const double distance : {0.0, 0.9, 1.0, 1.1, 3.0, 1e3, 1e9}) {
                const int parts = parts_worth(multiplies, threads, distance);
                check(parts >= 1 && parts <= before, "fewer parts on cores further apart");
                before = parts;
            }
        }
    set_thread_count(3);
    for (int i = 0; i < 1000; ++i) check(each_once(3), "every part once, the way measured in between or not");
    check(core_distance() >= 1 && core_distance() < 1e6, "the distance, measured or not, is a sensible number");
    set_thread_count(1);
    check(core_distance() == 1, "without workers there is none");
}

#ifdef __linux__
// The pool moves its own threads about, never its caller; and it works for one that has a single processor.
void pool_affinity() {
    context.shape = {};
    const auto mine = [] {
        cpu_set_t set;
        check(sched_getaffinity(0, sizeof set, &set) == 0, "the caller's processors");
        return set;
    };
    const cpu_set_t all = mine();
    set_thread_count(3);
    const auto used = [] {
        for (int i = 0; i < 20; ++i) {
            each_once(3);
            std::this_thread::sleep_for(std::chrono::microseconds(300));  // workers fall asleep
        }
    };
    used();
    const cpu_set_t after = mine();
    check(CPU_EQUAL(&all, &after), "the caller's processors are as they were");
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<std::size_t>(sched_getcpu()), &one);
    sched_setaffinity(0, sizeof one, &one);
    used();
    check(each_once(3), "every part once, by threads that share one processor");
    sched_setaffinity(0, sizeof all, &all);
}
#else
void pool_affinity() {}
#endif

#if !defined(THREAD_SANITIZER) && !defined(_WIN32)  // the first does not follow a process with threads through fork
// Threads do not survive fork: a child that waits for its parent's workers waits for ever.
int status_of_child() {
    const pid_t child = fork();
    if (child == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(20);  // a hang becomes a signal
        bool good = true;
        for (int i = 0; i < 100; ++i) good = good && each_once(1 + i % 6);
        set_thread_count(2);
        set_thread_count(1);
        _exit(good && each_once(3) ? 0 : 1);
    }
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child ? status : -1;
}

void pool_fork() {
    set_thread_count(3);
    context.shape = {};
    check(each_once(3), "before fork");
    check(status_of_child() == 0, "the pool works in a child");
    check(each_once(3), "the parent's pool works after fork");
    std::atomic<bool> done{false};
    std::thread busy([&] {
        while (!done) each_once(3);
    });
    for (int i = 0; i < 10; ++i) check(status_of_child() == 0, "in a child forked while another thread used the pool");
    done = true;
    busy.join();
}
#else
void pool_fork() {}
#endif

}  // namespace
}  // namespace chainrule
