// SPDX-License-Identifier: MIT
// L0: our own thread pool. OpenMP's costs microseconds a region, spins without bound, and hangs after fork.
#pragma once

namespace chainrule {

// The number of threads that `parallel` uses: CHAINRULE_NUM_THREADS, else OMP_NUM_THREADS, else the usable processors.
int thread_count();
void set_thread_count(int count);  // 1 to 1024; not from inside a task

// Waking a sleeping worker takes some tens of µs, handing work to one that still spins a fraction of one. Small pieces of
// work that follow each other closely are worth sharing when the workers are awake; whoever has many wakes them first.
bool workers_awake();
void rouse_workers();

// How far apart the threads' cores are: 1 where a cache line goes from one to the next and back within 100 ns, or where nobody
// knows; 3 where it takes 300.
double core_distance();

// Around work that is worth sharing only with workers who are awake. When one follows another within the time that workers
// spin, as calls in a loop do, it wakes them, and they stay awake for the next ones.
class Burst {
   public:
    Burst();
    ~Burst();
    Burst(const Burst&) = delete;
    Burst& operator=(const Burst&) = delete;
};

using Task = void (*)(void* context, int part, int parts);

// Runs task(context, part, parts) for part = 0 .. parts-1 and returns when all are done. Tasks must not throw. `parts`
// fixes the partition of the work; who runs a part is left to chance, and changes no result. If the pool is busy with
// another caller's work the caller runs all parts itself.
void parallel(Task task, void* context, int parts);

// The same for a callable taking (part, parts).
template <class F>
void parallel(int parts, F&& f) {
    parallel([](void* context, int part, int count) { (*static_cast<F*>(context))(part, count); },
             const_cast<void*>(static_cast<const void*>(&f)), parts);
}

}  // namespace chainrule
