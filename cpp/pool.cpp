// SPDX-License-Identifier: MIT
#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "platform.hpp"

namespace chainrule {
namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A worker spins this long for the next task, then sleeps. Between the two phases of a training step lie a few
// microseconds, between two calls from Python some tens; waking a sleeper costs about fifty.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kSpinsPerLook = 64;  // spins between two looks at the clock

// Parts are claimed, not assigned: where another process holds a worker's core, the caller runs that worker's part too
// instead of waiting for it to be scheduled (waiting made a step 20 times slower on a busy machine).
class Pool {
   public:
    void run(Task task, void* context, int parts) {
        // Work inside work (a callback that predicts) and concurrent callers fall through to the serial loop.
        if (owned_.exchange(true, std::memory_order_acquire)) return run_alone(task, context, parts);
        const Release release{owned_};
        if (!grow(parts - 1)) return run_alone(task, context, parts);
        task_ = task;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        ticket_.store(static_cast<std::uint32_t>(parts) << kPartBits, std::memory_order_seq_cst);
        if (sleepers_.exchange(0, std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        work_off();
        for (int spins = 0; done_.load(std::memory_order_acquire) != parts; ++spins) {
            relax();
            if (spins > 4096) sched_yield();  // a worker lost its core in the middle of a part: do not hold this one
        }
    }

    void stop() {
        while (owned_.exchange(true, std::memory_order_acquire)) sched_yield();
        const Release release{owned_};
        {
            std::lock_guard<std::mutex> lock(sleep_);
            quit_.store(true);
            wake_.notify_all();
        }
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        quit_.store(false);
    }

   private:
    struct Release {
        std::atomic<bool>& flag;
        ~Release() { flag.store(false, std::memory_order_release); }
    };

    static void run_alone(Task task, void* context, int parts) {
        for (int part = 0; part < parts; ++part) task(context, part, parts);
    }

    // A ticket is the number of parts and the number of those claimed. Task and context are read after a claim: the
    // caller cannot replace them before that part is done.
    static constexpr int kPartBits = 16;

    bool has_work() const {
        const std::uint32_t ticket = ticket_.load(std::memory_order_seq_cst);
        return (ticket & ((1u << kPartBits) - 1)) < ticket >> kPartBits;
    }

    void work_off() {
        std::uint32_t ticket = ticket_.load(std::memory_order_acquire);
        for (;;) {
            const std::uint32_t part = ticket & ((1u << kPartBits) - 1), parts = ticket >> kPartBits;
            if (part >= parts) return;
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            task_(context_, static_cast<int>(part), static_cast<int>(parts));
            done_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    // Brings the pool to `count` workers; false where the system refuses threads.
    bool grow(int count) {
        try {
            while (static_cast<int>(workers_.size()) < count) workers_.emplace_back(&Pool::serve, this);
        } catch (...) { return false; }
        return true;
    }

    void serve() {
        while (!quit_.load()) {
            work_off();
            wait();
        }
    }

    // Until there is work: spinning first, then asleep.
    void wait() {
        const auto limit = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int spin = 0; spin < kSpinsPerLook; ++spin) {
                if (has_work()) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() < limit);
        std::unique_lock<std::mutex> lock(sleep_);
        while (!quit_.load() && !has_work()) {
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            if (has_work()) return;  // came between the two looks, perhaps without seeing us
            wake_.wait(lock);
        }
    }

    std::atomic<bool> owned_{false};
    std::vector<std::thread> workers_;
    Task task_ = nullptr;
    void* context_ = nullptr;
    alignas(kLineBytes) std::atomic<std::uint32_t> ticket_{0};
    alignas(kLineBytes) std::atomic<int> done_{0};
    alignas(kLineBytes) std::atomic<int> sleepers_{0};
    std::atomic<bool> quit_{false};
    std::mutex sleep_;
    std::condition_variable wake_;
};

// Never destroyed: workers may outlive main, and after a fork the child's copy has no threads to join.
std::atomic<Pool*> pool_instance{nullptr};
std::mutex pool_creation;

Pool& pool() {
    Pool* pool = pool_instance.load(std::memory_order_acquire);
    if (pool != nullptr) return *pool;
    std::lock_guard<std::mutex> lock(pool_creation);
    pool = pool_instance.load();
    if (pool == nullptr) {
        // Threads do not survive fork: the child forgets the pool and makes a new one when it needs it.
        static const int registered = pthread_atfork(nullptr, nullptr, [] {
            pool_instance.store(nullptr);
            new (&pool_creation) std::mutex();
        });
        (void)registered;
        pool = new Pool();
        pool_instance.store(pool, std::memory_order_release);
    }
    return *pool;
}

constexpr int kMostThreads = 1024;

int initial_thread_count() {
    for (const char* name : {"CHAINRULE_NUM_THREADS", "OMP_NUM_THREADS"})
        if (const char* text = std::getenv(name)) {
            const int count = std::atoi(text);
            if (count >= 1) return std::min(count, kMostThreads);
        }
    return usable_processors();
}

std::atomic<int>& count_setting() {
    static std::atomic<int> count{initial_thread_count()};
    return count;
}

}  // namespace

int thread_count() { return count_setting().load(std::memory_order_relaxed); }

void set_thread_count(int count) {
    count = std::clamp(count, 1, kMostThreads);
    const int old = count_setting().exchange(count);
    if (count < old && pool_instance.load() != nullptr) pool().stop();
}

void parallel(Task task, void* context, int parts) {
    if (parts <= 1) {
        if (parts == 1) task(context, 0, 1);
        return;
    }
    pool().run(task, context, parts);
}

}  // namespace chainrule
