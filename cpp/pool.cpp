// SPDX-License-Identifier: MIT
#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

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

using Clock = std::chrono::steady_clock;

// When another process holds a core, a worker may lose it in the middle of a part, and the caller waits 4 or 8 ms for some
// microseconds' work. A wait longer than kStall, and than the caller's own part took, is taken for that: the caller then
// works alone for as long as it waited, and twice as long each time that stalls follow each other closely, up to kRetreat
// times: then waiting costs a sixteenth. (kRetreat at once gave up the second core for 40 % of the time on a virtual
// machine that loses a core for a few ms, five times a second.)
constexpr auto kStall = std::chrono::microseconds(100);
constexpr int kRetreat = 16;
constexpr auto kLongestStall = std::chrono::milliseconds(10);  // a longer one: we were suspended

// Two cores of a virtual machine may be neighbours now and far apart after a nap: a line goes from one to the other and back in
// 50 ns or in 300, and a step of 64-64-64-64 at batch 128 takes two threads 57 µs or 120 (one thread: 86). So the way is
// measured, for 2 to 10 µs, and that again after kFresh.
constexpr auto kFresh = std::chrono::milliseconds(50);
constexpr double kNear = 100;  // ns

// A number that the parts of a task pass round, each adding one in its turn. The shortest lap counts: others hold interrupts.
class Ring {
   public:
    void pass(int part, int parts) {
        Clock::time_point start{};
        for (int lap = 0; lap <= kGroups * kLaps; ++lap) {
            if (!my_turn(lap * parts + part)) return;
            if (part == 0 && lap % kLaps == 0) {
                const auto now = Clock::now();
                if (lap > 0) shortest_ = std::min<Clock::duration>(shortest_, (now - start) / kLaps);
                start = now;
            }
            turn_.store(lap * parts + part + 1, std::memory_order_release);
        }
    }

    // A line's way from one thread to the next and back, in ns; 0 where a thread did not come in time.
    double round_trip(int parts) const {
        if (turn_.load(std::memory_order_relaxed) < 0) return 0;
        return 2 * std::chrono::duration<double, std::nano>(shortest_).count() / parts;
    }

   private:
    static constexpr int kLaps = 8, kGroups = 4;  // a group is long against the clock's own 25 ns
    static constexpr int kPatience = 20000;       // some 20 µs

    bool my_turn(int turn) {
        for (int spins = 0; spins < kPatience; ++spins) {
            const int now = turn_.load(std::memory_order_acquire);
            if (now == turn) return true;
            if (now < 0) return false;
        }
        turn_.store(-1, std::memory_order_release);
        return false;
    }

    alignas(kLineBytes) std::atomic<int> turn_{0};
    alignas(kLineBytes) Clock::duration shortest_ = std::chrono::seconds(1);
};

// Parts are claimed, not assigned: where another process holds a worker's core, the caller runs that worker's part too
// instead of waiting for it to be scheduled (waiting made a step 20 times slower on a busy machine).
class Pool {
   public:
    void run(Task task, void* context, int parts) {
        // Work inside work (a callback that predicts) and concurrent callers fall through to the serial loop.
        if (owned_.exchange(true, std::memory_order_acquire)) return run_alone(task, context, parts);
        const Release release{owned_};
        const auto start = Clock::now();
        if (start < alone_until_ || !grow(parts - 1)) return run_alone(task, context, parts);
        publish(task, context, parts);
        const bool shared = work_off() < parts;
        if (done_.load(std::memory_order_acquire) != parts) wait_for_workers(parts, start);
        if (shared && start > fresh_until()) measure(parts);  // now, while all are awake
    }

    double distance() const {
        const double distance = distance_.load(std::memory_order_relaxed);
        return distance > 1 && Clock::now() < fresh_until() ? distance : 1;
    }

    // Are all workers for so many parts spinning, so that work can be given to them at once?
    bool awake(int parts) const {
        return sleepers_.load(std::memory_order_relaxed) == 0 &&
               worker_count_.load(std::memory_order_relaxed) >= parts - 1;
    }

    // Wakes the workers for work that will come soon; does not wait for them.
    void rouse(int parts) {
        if (awake(parts) || owned_.exchange(true, std::memory_order_acquire)) return;
        const Release release{owned_};
        if (Clock::now() < alone_until_ || !grow(parts - 1)) return;
        wake_sleepers();
    }

    void stop() {
        while (owned_.exchange(true, std::memory_order_acquire)) std::this_thread::yield();
        const Release release{owned_};
        {
            std::lock_guard<std::mutex> lock(sleep_);
            quit_.store(true);
            wake_.notify_all();
        }
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        worker_count_.store(0);
        distance_.store(1);
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

    void publish(Task task, void* context, int parts) {
        task_ = task;
        context_ = context;
        float_mode_ = float_mode();
        done_.store(0, std::memory_order_relaxed);
        ticket_.store(static_cast<std::uint32_t>(parts) << kPartBits, std::memory_order_seq_cst);
        wake_sleepers();
    }

    // The work may be done before a worker is there: it spins all the same, for what comes next.
    void wake_sleepers() {
        if (sleepers_.exchange(0, std::memory_order_seq_cst) == 0) return;
        keep_workers_off_this_processor();
        {
            std::lock_guard<std::mutex> lock(sleep_);
            ++wakes_;
        }
        wake_.notify_all();
    }

    void measure(int parts) {
        Ring ring;
        publish([](void* context, int part, int count) { static_cast<Ring*>(context)->pass(part, count); }, &ring,
                parts);
        work_off();
        while (done_.load(std::memory_order_acquire) != parts) std::this_thread::yield();
        distance_.store(ring.round_trip(parts) / kNear, std::memory_order_relaxed);
        fresh_until_.store((Clock::now() + kFresh).time_since_epoch().count(), std::memory_order_relaxed);
    }

    Clock::time_point fresh_until() const {
        return Clock::time_point(Clock::duration(fresh_until_.load(std::memory_order_relaxed)));
    }

    void wait_for_workers(int parts, Clock::time_point start) {
        const auto mine = Clock::now();
        for (int spins = 0; done_.load(std::memory_order_acquire) != parts; ++spins) {
            relax();
            if (spins > 4096) std::this_thread::yield();  // a worker lost its core: do not hold this one
        }
        const auto end = Clock::now();
        const auto waited = std::min<Clock::duration>(end - mine, kLongestStall);
        if (waited > std::max<Clock::duration>(kStall, mine - start)) retreat(end, waited);
    }

    void retreat(Clock::time_point now, Clock::duration waited) {
        const bool again = now - alone_until_ < (kRetreat + 1) * waited;
        retreat_ = again ? std::min(2 * retreat_, kRetreat) : 1;
        alone_until_ = now + retreat_ * waited;
    }

    // A ticket is the number of parts and the number of those claimed. Task and context are read after a claim: the
    // caller cannot replace them before that part is done.
    static constexpr int kPartBits = 16;

    bool has_work() const {
        const std::uint32_t ticket = ticket_.load(std::memory_order_seq_cst);
        return (ticket & ((1u << kPartBits) - 1)) < ticket >> kPartBits;
    }

    // Runs parts that nobody has claimed; returns how many.
    int work_off() {
        int mine = 0;
        std::uint32_t ticket = ticket_.load(std::memory_order_acquire);
        for (;;) {
            const std::uint32_t part = ticket & ((1u << kPartBits) - 1), parts = ticket >> kPartBits;
            if (part >= parts) return mine;
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            if (float_mode() != float_mode_) set_float_mode(float_mode_);  // a worker's becomes its caller's
            task_(context_, static_cast<int>(part), static_cast<int>(parts));
            done_.fetch_add(1, std::memory_order_release);
            ++mine;
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    // Linux may start or wake a worker on its caller's own processor though others are idle (on virtual machines it cannot tell
    // that they are), and two threads that compute there stay for some 50 ms.
    void keep_workers_off_this_processor() {
#ifdef __linux__
        const int here = sched_getcpu();
        cpu_set_t others;
        if (here == avoided_ || sched_getaffinity(0, sizeof others, &others) != 0) return;
        avoided_ = here;
        CPU_CLR(static_cast<std::size_t>(here), &others);
        if (CPU_COUNT(&others) == 0) return;
        for (auto& worker : workers_) pthread_setaffinity_np(worker.native_handle(), sizeof others, &others);
#endif
    }

    // Brings the pool to `count` workers; false where the system refuses threads.
    bool grow(int count) {
        if (static_cast<int>(workers_.size()) >= count) return true;
        try {
            while (static_cast<int>(workers_.size()) < count) workers_.emplace_back(&Pool::serve, this);
        } catch (...) { return false; }
        worker_count_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        avoided_ = -1;
        keep_workers_off_this_processor();
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
        const auto limit = Clock::now() + kSpin;
        do {
            for (int spin = 0; spin < kSpinsPerLook; ++spin) {
                if (has_work()) return;
                relax();
            }
        } while (Clock::now() < limit);
        sleep();
    }

    void sleep() {
        std::unique_lock<std::mutex> lock(sleep_);
        const std::uint64_t wakes = wakes_;
        while (!quit_.load() && !has_work() && wakes_ == wakes) {
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            if (has_work()) return;  // came between the two looks, perhaps without seeing us
            wake_.wait(lock);
        }
    }

    std::atomic<bool> owned_{false};
    std::vector<std::thread> workers_;
    std::atomic<int> worker_count_{0};
    int avoided_ = -1;  // the processor that workers keep off; the owner's
    std::atomic<double> distance_{1};
    std::atomic<Clock::rep> fresh_until_{0};
    Clock::time_point alone_until_{};  // the owner's, as the next
    int retreat_ = 1;
    std::uint64_t wakes_ = 0;  // under sleep_
    Task task_ = nullptr;
    void* context_ = nullptr;
    std::uint64_t float_mode_ = 0;
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
#ifndef _WIN32
        // Threads do not survive fork: the child forgets the pool and makes a new one when it needs it.
        static const int registered = pthread_atfork(nullptr, nullptr, [] {
            pool_instance.store(nullptr);
            new (&pool_creation) std::mutex();
        });
        (void)registered;
#endif
        pool = new Pool();
        pool_instance.store(pool, std::memory_order_release);
    }
    return *pool;
}

constexpr int kMostThreads = 1024;

int initial_thread_count() {
    for (const char* name : {"CHAINRULE_NUM_THREADS", "OMP_NUM_THREADS"})
        if (const char* text = std::getenv(name)) {
            const long count = std::strtol(text, nullptr, 10);  // what is too large for it becomes its largest
            if (count >= 1) return static_cast<int>(std::min<long>(count, kMostThreads));
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

bool workers_awake() {
    const Pool* pool = pool_instance.load(std::memory_order_acquire);
    return pool != nullptr && pool->awake(thread_count());
}

void rouse_workers() {
    if (thread_count() > 1) pool().rouse(thread_count());
}

double core_distance() {
    const Pool* pool = pool_instance.load(std::memory_order_acquire);
    return pool != nullptr ? pool->distance() : 1;
}

namespace {
std::atomic<Clock::rep> last_burst{};  // when it ended
}  // namespace

Burst::Burst() {
    const Clock::duration end(last_burst.load(std::memory_order_relaxed));
    if (!workers_awake() && Clock::now().time_since_epoch() - end < kSpin) rouse_workers();
}
Burst::~Burst() { last_burst.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed); }

void parallel(Task task, void* context, int parts) {
    if (parts <= 1) {
        if (parts == 1) task(context, 0, 1);
        return;
    }
    pool().run(task, context, parts);
}

}  // namespace chainrule
