// SPDX-License-Identifier: MIT
#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

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

class Pool {
   public:
    void run(Task task, void* context, int parts) {
        // Work inside work (a callback that predicts) and concurrent callers fall through to the serial loop.
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock() || parts <= 1 || !grow(parts - 1)) {
            for (int part = 0; part < parts; ++part) task(context, part, parts);
            return;
        }
        task_ = task;
        context_ = context;
        parts_ = parts;
        pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        task(context, 0, parts);
        for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
            relax();
            // Somebody else has our worker's core: give them ours rather than burn it.
            if (spins > 4096) sched_yield();
        }
    }

    void stop() {
        std::lock_guard<std::mutex> owner(owner_);
        quit_.store(true);
        generation_.fetch_add(1);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        quit_.store(false);
    }

   private:
    // Brings the pool to `count` workers; false where the system refuses threads.
    bool grow(int count) {
        try {
            while (static_cast<int>(workers_.size()) < count) {
                const int part = static_cast<int>(workers_.size()) + 1;
                workers_.emplace_back(&Pool::work, this, part, generation_.load());
            }
        } catch (...) { return false; }
        return true;
    }

    void work(int part, unsigned seen) {
        for (;;) {
            wait_past(seen);
            seen = generation_.load(std::memory_order_acquire);
            if (quit_.load()) return;
            if (part < parts_) task_(context_, part, parts_);
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    void wait_past(unsigned seen) {
        const auto limit = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int spin = 0; spin < kSpinsPerLook; ++spin) {
                if (generation_.load(std::memory_order_acquire) != seen) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() < limit);
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }

    std::mutex owner_;
    std::vector<std::thread> workers_;
    Task task_ = nullptr;
    void* context_ = nullptr;
    int parts_ = 0;
    alignas(kLineBytes) std::atomic<unsigned> generation_{0};
    alignas(kLineBytes) std::atomic<int> pending_{0};
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

int initial_thread_count() {
    for (const char* name : {"CHAINRULE_NUM_THREADS", "OMP_NUM_THREADS"})
        if (const char* text = std::getenv(name)) {
            const int count = std::atoi(text);
            if (count >= 1) return count;
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
