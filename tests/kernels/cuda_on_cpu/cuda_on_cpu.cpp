// SPDX-License-Identifier: MIT
// See cuda_runtime.h beside this file.
#undef _FORTIFY_SOURCE  // it takes a jump to another stack for a mistake
#include "cuda_runtime.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;

// A thread of a block. It runs on a fiber of its own from its first barrier on; threads that meet none share one fiber. A context
// begins it, jumps go on from there: they leave out a call of the system, which would be half of all time.
struct Fiber {
    Fiber()
        : stack(::mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                       0)) {
        if (stack == MAP_FAILED) throw std::bad_alloc();
    }
    ~Fiber() { (void)::munmap(stack, kStackBytes); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    jmp_buf at;
    void* const stack;
    void* fake_stack = nullptr;
    enum class State { running, at_barrier, at_exchange, at_cluster, done } state = State::running;
    unsigned thread = 0, barriers = 0, warp_barriers = 0, arrivals = 0, waits = 0;
    bool waited = false;
    const char* file = nullptr;
    int line = 0;
};

struct Warp {
    std::vector<unsigned char> bytes[2];  // two, so that nobody overwrites what a slower lane still reads
    int turn = 0;
    unsigned arrived = 0;
};

class Block;
thread_local Block* current = nullptr;

[[noreturn]] void die(const std::string& text) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", text.c_str());
    std::abort();
}

bool backward() {
    const char* order = std::getenv("CHAINRULE_EMULATOR_ORDER");
    return order != nullptr && std::strcmp(order, "backward") == 0;
}

std::vector<std::unique_ptr<Fiber>>& idle_fibers() {
    thread_local std::vector<std::unique_ptr<Fiber>> fibers;
    return fibers;
}

// What the blocks of a cluster share: their memory, and a barrier.
struct Cluster {
    Cluster(unsigned blocks, unsigned threads_of_block, std::size_t shared)
        : ranks(blocks),
          threads(blocks * threads_of_block),
          bytes(shared),
          memory(std::malloc(std::max<std::size_t>(blocks * shared, 1))) {
        std::memset(memory, 0xff, blocks * shared);
    }
    ~Cluster() { std::free(memory); }
    Cluster(const Cluster&) = delete;
    Cluster& operator=(const Cluster&) = delete;

    const unsigned ranks, threads;
    const std::size_t bytes;  // of a block
    void* const memory;
    unsigned arrived = 0, phase = 0;  // how many at the barrier, and how often all of them
};

class Block {
   public:
    Block(const std::function<void()>& kernel, Cluster& cluster, unsigned rank, unsigned threads, dim3 where,
          bool reversed)
        : kernel_(kernel),
          cluster_(cluster),
          shared_(static_cast<unsigned char*>(cluster.memory) + rank * cluster.bytes),
          where_(where),
          count_(threads),
          reversed_(reversed),
          fibers_(threads, nullptr),
          warps_((threads + 31) / 32) {}
    ~Block() { std::move(own_.begin(), own_.end(), std::back_inserter(idle_fibers())); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    bool done() const { return done_ == count_; }
    // As far as it comes by itself. Whether that was any way at all.
    bool advance() {
        Block* const before = std::exchange(current, this);
        blockIdx = where_;
        races::now.block = (where_.z * gridDim.y + where_.y) * gridDim.x + where_.x;
        races::now.cluster = races::now.block / cluster_.ranks;
        races::now.shared = static_cast<const unsigned char*>(cluster_.memory);
        races::now.shared_bytes = cluster_.ranks * cluster_.bytes;
        bool moved = next_ < count_;
        while (next_ < count_) start();
        while (done_ < count_) {
            if (!move() && !release()) break;
            moved = true;
        }
        current = before;
        return moved;
    }

    void arrive() {
        if (active_->arrivals++ != active_->waits) die("a thread arrives twice at the cluster's barrier");
        races::now.arrivals = active_->arrivals;
        if (++cluster_.arrived < cluster_.threads) return;
        cluster_.arrived = 0;
        ++cluster_.phase;
    }
    void wait() {
        if (active_->arrivals != active_->waits + 1) die("a thread waits at the cluster's barrier before it arrives");
        if (cluster_.phase < active_->arrivals) leave(Fiber::State::at_cluster);
        races::now.waits = ++active_->waits;
    }
    void* shared_of(const void* own, unsigned rank) const {
        if (rank >= cluster_.ranks) die("a block of a rank that the cluster does not have");
        return static_cast<unsigned char*>(cluster_.memory) + rank * cluster_.bytes +
               (static_cast<const unsigned char*>(own) - shared_);
    }

    void barrier(const char* file, int line) {
        active_->file = file;
        active_->line = line;
        ++waiting_;
        leave(Fiber::State::at_barrier);
    }
    const unsigned char* exchange(const void* mine, std::size_t size) {
        const unsigned lane = active_->thread % 32, first = active_->thread - lane;
        Warp& warp = warps_[first / 32];
        std::vector<unsigned char>& bytes = warp.bytes[warp.turn];
        if (bytes.size() < 32 * size) bytes.resize(32 * size);
        std::memcpy(bytes.data() + lane * size, mine, size);
        const unsigned lanes = count_ - first < 32 ? count_ - first : 32;
        if (++warp.arrived == lanes) {
            warp.arrived = 0;
            warp.turn ^= 1;
            for (unsigned t = first; t < first + lanes; ++t)
                if (fibers_[t] && fibers_[t]->state == Fiber::State::at_exchange)
                    fibers_[t]->state = Fiber::State::running;
        } else {
            leave(Fiber::State::at_exchange);
        }
        return bytes.data();
    }
    void warp_barrier() { races::now.warp_barriers = ++active_->warp_barriers; }
    void* shared() const { return shared_; }

    // What a fiber does: threads, one after the other, until one of them has to wait; then that one alone.
    void live() {
        Fiber* self = active_;
        for (;;) {
            kernel_();
            ++done_;
            if (next_ == count_ || self->waited) return leave(Fiber::State::done);
            take(self);
        }
    }

   private:
    void become(Fiber* fiber) {
        active_ = fiber;
        threadIdx = dim3(fiber->thread % blockDim.x, fiber->thread / blockDim.x, 0);
        races::now.thread = fiber->thread;
        races::now.barriers = fiber->barriers;
        races::now.warp_barriers = fiber->warp_barriers;
        races::now.arrivals = fiber->arrivals;
        races::now.waits = fiber->waits;
    }
    void take(Fiber* fiber) {
        const unsigned thread = reversed_ ? count_ - 1 - next_ : next_;
        ++next_;
        fiber->thread = thread;
        fiber->barriers = fiber->warp_barriers = fiber->arrivals = fiber->waits = 0;
        fiber->waited = false;
        fiber->state = Fiber::State::running;
        fibers_[thread] = fiber;
        become(fiber);
    }
    void start() {
        if (idle_fibers().empty()) return begin();
        own_.push_back(std::move(idle_fibers().back()));
        idle_fibers().pop_back();
        take(own_.back().get());
        enter(active_);
    }
    // All that can, once.
    bool move() {
        bool moved = false;
        for (unsigned t = 0; t < count_; ++t) {
            Fiber* fiber = fibers_[reversed_ ? count_ - 1 - t : t];
            if (fiber->state == Fiber::State::at_cluster && cluster_.phase >= fiber->arrivals)
                fiber->state = Fiber::State::running;
            if (fiber->state != Fiber::State::running) continue;
            enter(fiber);
            moved = true;
        }
        return moved;
    }
    // A new fiber, and its first thread. It lives on, block after block.
    void begin() {
        own_.push_back(std::make_unique<Fiber>());
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = own_.back()->stack;
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(
            &context,
            [] {
#if defined(__SANITIZE_ADDRESS__)
                __sanitizer_finish_switch_fiber(nullptr, &current->host_stack_, &current->host_stack_size_);
#endif
                for (;;) current->live();
            },
            0);
        take(own_.back().get());
        go([&] { setcontext(&context); });
    }
    void enter(Fiber* fiber) {
        become(fiber);
        go([&] { _longjmp(fiber->at, 1); });
    }
    // To the active fiber, and back when it leaves.
    template <class Jump>
    void go(Jump jump) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&host_fake_stack_, active_->stack, kStackBytes);
#endif
        if (_setjmp(host_) == 0) jump();
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(host_fake_stack_, nullptr, nullptr);
#endif
    }
    void leave(Fiber::State state) {
        Fiber* fiber = active_;
        fiber->state = state;
        fiber->waited = true;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fiber->fake_stack, host_stack_, host_stack_size_);
#endif
        if (_setjmp(fiber->at) == 0) _longjmp(host_, 1);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fiber->fake_stack, &current->host_stack_, &current->host_stack_size_);
#endif
    }
    // Nobody can move: a barrier that all have reached, the cluster's, which other blocks have not, or a mistake.
    bool release() {
        if (std::any_of(fibers_.begin(), fibers_.end(),
                        [](const Fiber* fiber) { return fiber->state == Fiber::State::at_cluster; }))
            return false;
        if (waiting_ != count_)
            die("__syncthreads reached by " + std::to_string(waiting_) + " of " + std::to_string(count_) +
                " threads of a block; the others have ended or wait for their warp");
        for (Fiber* fiber : fibers_)
            if (fiber->line != fibers_[0]->line || std::strcmp(fiber->file, fibers_[0]->file) != 0)
                die("threads of a block wait at different barriers: " + std::string(fiber->file) + ":" +
                    std::to_string(fiber->line) + " and " + fibers_[0]->file + ":" + std::to_string(fibers_[0]->line));
        waiting_ = 0;
        for (Fiber* fiber : fibers_) {
            fiber->state = Fiber::State::running;
            ++fiber->barriers;
        }
        return true;
    }

    const std::function<void()>& kernel_;
    Cluster& cluster_;
    unsigned char* const shared_;
    const dim3 where_;
    const unsigned count_;
    const bool reversed_;
    std::vector<std::unique_ptr<Fiber>> own_;
    std::vector<Fiber*> fibers_;  // by thread
    std::vector<Warp> warps_;
    Fiber* active_ = nullptr;
    unsigned next_ = 0, done_ = 0, waiting_ = 0;
    jmp_buf host_;
    void* host_fake_stack_ = nullptr;
    const void* host_stack_ = nullptr;
    std::size_t host_stack_size_ = 0;
};

}  // namespace

void* shared_memory() { return current->shared(); }
void block_barrier(const char* file, int line) { current->barrier(file, line); }
const unsigned char* exchange(const void* mine, std::size_t size) { return current->exchange(mine, size); }
void warp_barrier() { current->warp_barrier(); }
void cluster_arrive() { current->arrive(); }
void cluster_wait() { current->wait(); }
void* shared_memory_of(const void* own, unsigned rank) { return current->shared_of(own, rank); }

bool has_clusters() {
    const char* which = std::getenv("CHAINRULE_EMULATOR_CLUSTERS");
    return which == nullptr || std::strcmp(which, "none") != 0;
}

void run(const std::function<void()>& kernel, dim3 grid, dim3 block, std::size_t shared, unsigned ranks) {
    const bool reversed = backward();
    const unsigned count = grid.x * grid.y * grid.z, threads = block.x * block.y;
    blockDim = block;
    gridDim = grid;
    for (unsigned n = 0; n < count; n += ranks) {
        Cluster cluster(ranks, threads, shared);
        std::vector<std::unique_ptr<Block>> blocks;
        for (unsigned r = 0; r < ranks; ++r) {
            const unsigned b = reversed ? count - 1 - n - r : n + r;
            blocks.push_back(std::make_unique<Block>(kernel, cluster, b % ranks, threads,
                                                     dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y),
                                                     reversed));
        }
        for (bool moved = true; moved;) {
            moved = false;
            for (const auto& one : blocks) moved = one->advance() || moved;
        }
        for (const auto& one : blocks)
            if (!one->done()) die("a barrier of a cluster that part of it has left");
    }
}

}  // namespace cuda_on_cpu

// ---- the host's side --------------------------------------------------------------------------------------------------

namespace {

using cuda_on_cpu::races::Clock;

// What a stream is given: work, or the recording of an event or the wait for one. Streams and events go by their numbers.
struct Item {
    unsigned stream, event;
    enum class Kind { work, record, wait } kind;
    std::function<void()> work;
};
// How far each stream is, and where each event was recorded.
struct Clocks {
    std::map<unsigned, Clock> streams, events;
};

}  // namespace

struct CudaGraph {
    std::vector<Item> items;
    unsigned origin = 0;
    bool open = true, lost = false;
};
struct CudaStream {
    unsigned number;
    std::shared_ptr<CudaGraph> capturing;
};
struct CudaEvent {
    unsigned number;
    std::shared_ptr<CudaGraph> capturing;
};

namespace {

std::mutex mutex;
std::map<void*, std::size_t>& allocations() {
    static auto* sizes = new std::map<void*, std::size_t>;
    return *sizes;
}
std::size_t in_use = 0;

int processors() {
    const char* count = std::getenv("CHAINRULE_EMULATOR_PROCESSORS");
    return count ? std::atoi(count) : 132;
}
std::size_t capacity() {
    const char* bytes = std::getenv("CHAINRULE_EMULATOR_MEMORY");
    return bytes ? std::strtoull(bytes, nullptr, 10) : std::size_t{8} << 30;
}

}  // namespace

namespace {

std::atomic<std::uint32_t> pieces{0};
Clocks clocks;  // of what is not in a graph
Clock host;     // what the host has waited for; of all its threads, whose mutexes nobody looks at
std::vector<bool> numbers;

unsigned take_number() {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto free = std::find(numbers.begin(), numbers.end(), false);
    const auto number = static_cast<unsigned>(free - numbers.begin());
    if (free == numbers.end()) numbers.push_back(true);
    return numbers[number] = true, number;
}
void leave_number(unsigned number) {
    const std::lock_guard<std::mutex> lock(mutex);
    numbers[number] = false;
}

void perform(const Item& item, Clocks& at) {
    Clock before;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        Clock& clock = at.streams[item.stream];
        clock.join(host);
        if (item.kind == Item::Kind::record) at.events[item.event] = clock;
        if (item.kind == Item::Kind::wait) clock.join(at.events[item.event]);
        if (item.kind != Item::Kind::work) return;
        before = clock;
    }
    namespace races = cuda_on_cpu::races;
    const races::Moment outside = races::now;
    races::now = {++pieces, item.stream, &before, nullptr, 0, 0, 0, 0, 0};
    const std::uint32_t piece = races::now.piece;
    item.work();
    races::now = outside;
    const std::lock_guard<std::mutex> lock(mutex);
    at.streams[item.stream].advance(item.stream, piece);
}

cudaError_t give(CudaStream& stream, Item item) {
    if (stream.capturing && stream.capturing->open)
        stream.capturing->items.push_back(std::move(item));
    else
        perform(item, clocks);
    return cudaSuccess;
}
// Refused while anybody makes a graph, which is lost then. Under the mutex.
std::weak_ptr<CudaGraph> capture;  // the engine makes one at a time
cudaError_t may_wait() {
    const auto graph = capture.lock();
    if (!graph || !graph->open) return cudaSuccess;
    graph->lost = true;
    return cudaErrorStreamCaptureUnsupported;
}

thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
void expect_relaxed(const char* call) {
    if (mode == cudaStreamCaptureModeRelaxed) return;
    cuda_on_cpu::die(std::string(call) + " in the mode in which it ends another library's graph");
}

}  // namespace

cudaError_t cuda_on_cpu::enqueue(cudaStream_t stream, std::function<void()> work) {
    return give(*stream, {stream->number, 0, Item::Kind::work, std::move(work)});
}

const char* cudaGetErrorString(cudaError_t code) {
    switch (code) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorNotReady: return "not ready";
        default: return "invalid argument";
    }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    std::strcpy(properties->name, "CUDA on the CPU, for tests");
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    switch (which) {
        case cudaDevAttrMultiProcessorCount: *value = processors(); break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(cuda_on_cpu::kSharedBytes); break;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrClusterLaunch: *value = 1; break;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const cudaError_t code = may_wait(); code != cudaSuccess) return code;
    for (const auto& [number, clock] : clocks.streams) host.join(clock);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
    const std::lock_guard<std::mutex> lock(mutex);
    *total = capacity();
    *free = in_use < *total ? *total - in_use : 0;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    expect_relaxed("cudaMalloc");
    const std::lock_guard<std::mutex> lock(mutex);
    if (in_use + bytes > capacity()) return cudaErrorMemoryAllocation;
    if (cuda_on_cpu::races::watching)
        *memory = cuda_on_cpu::races::allocate(bytes);
    else if (::posix_memalign(memory, 256, bytes > 0 ? bytes : 1) != 0)
        *memory = nullptr;
    if (*memory == nullptr) return cudaErrorMemoryAllocation;
    std::memset(*memory, 0xff, bytes);
    allocations()[*memory] = bytes;
    in_use += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    if (memory == nullptr) return cudaSuccess;
    expect_relaxed("cudaFree");
    const std::lock_guard<std::mutex> lock(mutex);
    if (const cudaError_t code = may_wait(); code != cudaSuccess) return code;  // and need not: nobody is waited for
    const auto found = allocations().find(memory);
    if (found == allocations().end()) return cudaErrorInvalidValue;
    in_use -= found->second;
    cuda_on_cpu::races::watching ? cuda_on_cpu::races::release(memory, found->second, host) : std::free(memory);
    allocations().erase(found);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
    expect_relaxed("cudaHostAlloc");
    *memory = std::malloc(bytes);
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* memory) {
    expect_relaxed("cudaFreeHost");
    const std::lock_guard<std::mutex> lock(mutex);
    if (const cudaError_t code = may_wait(); code != cudaSuccess) return code;
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return cuda_on_cpu::enqueue(stream, [=] {
        cuda_on_cpu::races::touch(from, bytes, false);
        cuda_on_cpu::races::touch(to, bytes, true);
        std::memcpy(to, from, bytes);
    });
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
    return cuda_on_cpu::enqueue(stream, [=] {
        cuda_on_cpu::races::touch(to, bytes, true);
        std::memset(to, value, bytes);
    });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex);
    *attributes = {cudaMemoryTypeUnregistered, 0};
    for (const auto& [start, bytes] : allocations())
        if (pointer >= start && pointer < static_cast<char*>(start) + bytes) attributes->type = cudaMemoryTypeDevice;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return *stream = new CudaStream{take_number(), nullptr}, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    leave_number(stream->number);
    return delete stream, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    return host.join(clocks.streams[stream->number]), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (event->capturing && event->capturing->open) stream->capturing = event->capturing;
    return give(*stream, {stream->number, event->number, Item::Kind::wait, nullptr});
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    const std::lock_guard<std::mutex> lock(mutex);
    stream->capturing = std::make_shared<CudaGraph>();
    stream->capturing->origin = stream->number;
    if (const auto other = capture.lock(); other && other->open) cuda_on_cpu::die("two graphs are made at a time");
    capture = stream->capturing;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* with) {
    return std::swap(mode, *with), cudaSuccess;
}
bool cuda_on_cpu::makes_a_graph() {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto graph = capture.lock();
    return graph && graph->open;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const std::lock_guard<std::mutex> lock(mutex);
    stream->capturing->open = false;
    const char* how = std::getenv("CHAINRULE_EMULATOR_CAPTURE");
    if (stream->capturing->lost || (how && std::string_view(how) == "lost")) {
        *graph = nullptr;
        stream->capturing.reset();
        return cudaErrorStreamCaptureInvalidated;
    }
    *graph = new CudaGraph(*stream->capturing);
    stream->capturing.reset();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    return *executable = new CudaGraph(*graph), cudaSuccess;
}
// Its streams are branches of the graph alone: what is on the real ones of their numbers does not wait for them, nor they for it.
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    Clocks branches;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        branches.streams[executable->origin] = clocks.streams[stream->number];
    }
    for (const Item& item : executable->items) perform(item, branches);
    const std::lock_guard<std::mutex> lock(mutex);
    return clocks.streams[stream->number].join(branches.streams[executable->origin]), cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = new CudaEvent{take_number(), nullptr}, cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    leave_number(event->number);
    return delete event, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event->capturing = stream->capturing;
    return give(*stream, {stream->number, event->number, Item::Kind::record, nullptr});
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    const std::lock_guard<std::mutex> lock(mutex);
    return host.join(clocks.events[event->number]), cudaSuccess;
}
