// SPDX-License-Identifier: MIT
// L1: CUDA's run time as the engine wants it: every call checked, everything owned, and nothing that needs a compiler of
// CUDA's: with tests/kernels/cuda_on_cpu before it in the include path, the same text runs on any computer.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "memory.hpp"

namespace chainrule {
namespace cuda {

// The one place that looks at what a call returned. What a failed kernel left behind is taken up, too.
inline void check(cudaError_t code, const char* what) {
    if (code == cudaSuccess) return;
    (void)cudaGetLastError();
    if (code == cudaErrorMemoryAllocation)  // a stream, a graph or a kernel needs some, too
        throw OutOfMemory(std::string("[cuda] out of memory: expected enough for ") + what + ", got less");
    throw std::runtime_error(std::string("[cuda] ") + what + " failed: " + cudaGetErrorString(code));
}

inline int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "asking the device");
    return value;
}

// Whether somebody in this process works on the device. The runtime cannot say; the driver can, and is there already.
inline bool is_in_use(int device) {
    using Ask = int (*)(int device, unsigned* flags, int* active);
    static const auto ask = [] {
        void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
        return reinterpret_cast<Ask>(driver ? dlsym(driver, "cuDevicePrimaryCtxGetState") : nullptr);
    }();
    unsigned flags = 0;
    int active = 1;
    return !ask || ask(device, &flags, &active) != 0 || active != 0;
}

// While it lives, the calling thread may ask for memory and give it back although another thread makes a graph. Both would otherwise
// fail, and end that: PyTorch's is a global one. What CUDA says here, it says to the next call as well.
class BesideGraphs {
   public:
    BesideGraphs() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~BesideGraphs() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
    BesideGraphs(const BesideGraphs&) = delete;
    BesideGraphs& operator=(const BesideGraphs&) = delete;

   private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes a device the calling thread's while it lives. A device that nobody works on is not returned to: CUDA would begin there
// and take some hundred MB of its memory.
class OnDevice {
   public:
    explicit OnDevice(int device) : device_(device) {
        check(cudaGetDevice(&before_), "asking for the device");
        if (before_ != device) check(cudaSetDevice(device), "choosing the device");
        beside_.emplace();
    }
    ~OnDevice() {
        beside_.reset();
        if (before_ != device_ && is_in_use(before_)) (void)cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

   private:
    const int device_;
    int before_ = 0;
    std::optional<BesideGraphs> beside_;
};

// Held while a graph is made, and by whatever waits for a whole device: CUDA refuses that while anybody makes a graph, and ends
// the graph.
inline std::recursive_mutex& graph_in_making() {
    static auto& mutex = *new std::recursive_mutex;  // memory may be released after the end of main
    return mutex;
}

class Stream {
   public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream"); }
    ~Stream() { (void)cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    operator cudaStream_t() const { return stream_; }
    void wait() const { check(cudaStreamSynchronize(stream_), "a kernel"); }

   private:
    cudaStream_t stream_ = nullptr;
};

class Event {
   public:
    Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event"); }
    ~Event() { (void)cudaEventDestroy(event_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    // What `from` has been given by now comes before what `to` is given next.
    void order(cudaStream_t from, cudaStream_t to) const {
        check(cudaEventRecord(event_, from), "recording an event");
        check(cudaStreamWaitEvent(to, event_, 0), "waiting for an event");
    }
    void record(cudaStream_t stream) const { check(cudaEventRecord(event_, stream), "recording an event"); }
    bool reached() const {
        const cudaError_t code = cudaEventQuery(event_);
        if (code == cudaErrorNotReady) return false;
        check(code, "a kernel");
        return true;
    }

   private:
    cudaEvent_t event_ = nullptr;
};

// Another library's wait for the whole device, in another thread, ends a graph that is being made; nothing of it has run.
class GraphLost : public std::runtime_error {
   public:
    GraphLost() : std::runtime_error("[cuda] a graph was lost to another thread's wait for the device") {}
    static bool is(cudaError_t code) {
        return code == cudaErrorStreamCaptureUnsupported || code == cudaErrorStreamCaptureInvalidated ||
               code == cudaErrorStreamCaptureImplicit;
    }
};

// Memory of the host that copies read and write while the host goes on; contents undefined. Others wait for it.
template <class T>
class Pinned {
   public:
    Pinned() = default;
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;
    ~Pinned() { drop(); }
    T* data() const { return data_; }
    T& operator[](Index k) const { return data_[k]; }
    // At least so many.
    void grow(Index size) {
        if (size_ >= size) return;
        drop();
        void* memory = nullptr;
        check(cudaHostAlloc(&memory, static_cast<std::size_t>(size) * sizeof(T), cudaHostAllocDefault),
              "memory of the host for copies");
        data_ = static_cast<T*>(memory);
        size_ = size;
    }

   private:
    void drop() {
        if (!data_) return;
        const std::lock_guard<std::recursive_mutex> alone(graph_in_making());  // it may wait for the device
        const BesideGraphs theirs;
        (void)cudaFreeHost(std::exchange(data_, nullptr));
        size_ = 0;
    }
    T* data_ = nullptr;
    Index size_ = 0;
};

// What a piece of work enqueued, to be enqueued again in one call.
class Graph {
   public:
    // f() enqueues on `stream` and on streams that it forks from it and joins again.
    template <class F>
    Graph(cudaStream_t stream, F f) {
        const std::lock_guard<std::recursive_mutex> alone(graph_in_making());
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "beginning a graph");
        cudaGraph_t graph = nullptr;
        const auto end = [&] {
            const cudaError_t code = cudaStreamEndCapture(stream, &graph);
            if (!GraphLost::is(code)) return code;
            (void)cudaGetLastError();
            throw GraphLost();
        };
        try {
            f();
        } catch (...) {
            (void)end();  // what was lost made f fail
            if (graph) (void)cudaGraphDestroy(graph);
            throw;
        }
        check(end(), "ending a graph");
        const cudaError_t made = cudaGraphInstantiate(&executable_, graph, 0);
        (void)cudaGraphDestroy(graph);
        check(made, "instantiating a graph");
    }
    Graph(Graph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}
    Graph& operator=(Graph&& other) noexcept {
        std::swap(executable_, other.executable_);
        return *this;
    }
    ~Graph() {
        if (executable_) (void)cudaGraphExecDestroy(executable_);
    }
    void launch(cudaStream_t stream) const { check(cudaGraphLaunch(executable_, stream), "launching a graph"); }

   private:
    cudaGraphExec_t executable_ = nullptr;
};

// kernel(arguments...) on blocks x threads with `shared` bytes for each block; nothing where there are no blocks.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 blocks, dim3 threads, std::size_t shared, cudaStream_t stream,
            A&&... arguments) {
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, P(std::forward<A>(arguments))...), "launching a kernel");
}

// Blocks of the kernel may have so much shared memory. All that the device has, whatever a launch takes: another thread's launch
// would not start if this one wanted less.
template <class... P>
void allow_shared(void (*kernel)(P...), Index bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "asking for shared memory");
}

template <class T>
void upload(T* to, const T* from, Index count, cudaStream_t stream) {
    if (count > 0)
        check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDefault, stream),
              "copying to the device");
}
template <class T>
void download(T* to, const T* from, Index count, cudaStream_t stream) {
    if (count > 0)
        check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDefault, stream),
              "copying from the device");
}
template <class T>
void clear(T* to, Index count, cudaStream_t stream) {
    if (count > 0)
        check(cudaMemsetAsync(to, 0, static_cast<std::size_t>(count) * sizeof(T), stream), "clearing memory");
}

}  // namespace cuda
}  // namespace chainrule

// The dynamic shared memory of a block; there is no other, so that tests see all of it.
#ifdef CUDA_ON_CPU
#define CHAINRULE_SHARED(T, name) T* const name = static_cast<T*>(cuda_on_cpu::shared_memory())
#else
#define CHAINRULE_SHARED(T, name)                                  \
    extern __shared__ __align__(16) unsigned char shared_memory[]; \
    T* const name = reinterpret_cast<T*>(shared_memory)
#endif
