// SPDX-License-Identifier: MIT
// CUDA on the CPU, for tests: what cpp/cuda.cu needs of CUDA's run time, so that a host compiler builds it and its kernels
// really run. It is slow, and strict where a GPU is lax:
//   blocks run one after the other, those of a cluster in turns, a block's threads as fibers that change at barriers, shuffles and
//   products of a warp;
//   a barrier that part of a block has left, or that its threads reach at different places, ends the process with a word;
//   built with CHAINRULE_CUDA_RACES, it ends the process at two accesses that nothing orders (races.hpp);
//   device and shared memory are of the exact size and full of NaN, so that AddressSanitizer and plain sums see misuse;
//   CHAINRULE_EMULATOR_ORDER=backward runs blocks and threads from the last to the first: a missing barrier, or a block that
//   waits for another one, then changes the results; CHAINRULE_EMULATOR_MEMORY is how many bytes the device has;
//   CHAINRULE_EMULATOR_CAPTURE=lost ends every graph that is being made as another thread's wait for the device would;
//   CHAINRULE_EMULATOR_PROCESSORS is how many it has, 132 if nothing is said;
//   CHAINRULE_EMULATOR_CLUSTERS=none: kernels are as compiled for a GPU that has no clusters;
//   CHAINRULE_EMULATOR_ALGORITHMS=none: cuBLASLt finds no algorithm for any product, =some: for every other one.
#pragma once

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

#include "races.hpp"

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- what a kernel sees -----------------------------------------------------------------------------------------------

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
void* shared_memory();
void block_barrier(const char* file, int line);
// Gives all lanes of the warp this one's bytes: lane l's are at `all + l * size`; they stay until the next exchange.
const unsigned char* exchange(const void* mine, std::size_t size);
void warp_barrier();  // what the lanes did before their last exchange comes before what they do next
// Of the cluster's barrier: where a thread's own work is done, and where it waits for all others' to be. They take turns.
void cluster_arrive();
void cluster_wait();
void* shared_memory_of(const void* own,
                       unsigned rank);  // where the cluster's block of that rank has what lies there in ours
void run(const std::function<void()>& kernel, dim3 grid, dim3 block, std::size_t shared, unsigned cluster);
}  // namespace cuda_on_cpu

inline int lane_number() { return static_cast<int>((threadIdx.y * blockDim.x + threadIdx.x) % 32); }

#define __syncthreads() cuda_on_cpu::block_barrier(__FILE__, __LINE__)
inline void __cluster_barrier_arrive() { cuda_on_cpu::cluster_arrive(); }
inline void __cluster_barrier_wait() { cuda_on_cpu::cluster_wait(); }
inline void* __cluster_map_shared_rank(const void* own, unsigned rank) {
    return cuda_on_cpu::shared_memory_of(own, rank);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    const int lane = lane_number();
    return reinterpret_cast<const T*>(cuda_on_cpu::exchange(&value, sizeof(T)))[lane ^ mask];
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
    const int lane = lane_number();
    return reinterpret_cast<const T*>(
        cuda_on_cpu::exchange(&value, sizeof(T)))[lane + delta < 32 ? lane + delta : lane];
}
inline void __syncwarp() {
    const char nothing = 0;
    cuda_on_cpu::exchange(&nothing, 1);
    cuda_on_cpu::warp_barrier();
}

// ---- what the host calls ----------------------------------------------------------------------------------------------

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNotReady = 600,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureImplicit = 906
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrClusterLaunch
};
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0;

struct CudaStream;
struct CudaEvent;
struct CudaGraph;
using cudaStream_t = CudaStream*;
using cudaEvent_t = CudaEvent*;
using cudaGraph_t = CudaGraph*;
using cudaGraphExec_t = CudaGraph*;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaFuncAttributes {
    int ptxVersion;
};
struct cudaDeviceProp {
    char name[256];
};
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
};

const char* cudaGetErrorString(cudaError_t code);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, std::size_t) {
    *blocks = 2;
    return cudaSuccess;
}

namespace cuda_on_cpu {
bool has_clusters();
// Now, or as a node of the graph that the stream is making.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);
bool makes_a_graph();  // somebody
// cuBLASLt's function of that name, as cublaslt.cpp beside this file has it.
void* library_symbol(const char* name);
constexpr std::size_t kSharedBytes = 227 * 1024;
}  // namespace cuda_on_cpu

template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
    attributes->ptxVersion = cuda_on_cpu::has_clusters() ? 90 : 80;
    return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...), const cudaLaunchConfig_t* config) {
    // Of 132 processors, in six groups of 16 and two of 18.
    const int ranks = static_cast<int>(config->attrs[0].val.clusterDim.x);
    *clusters = config->dynamicSmemBytes <= cuda_on_cpu::kSharedBytes ? 6 * (16 / ranks) + 2 * (18 / ranks) : 0;
    return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    if (config->dynamicSmemBytes > cuda_on_cpu::kSharedBytes || config->blockDim.x * config->blockDim.y > 1024)
        return cudaErrorInvalidValue;
    const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
    if (cluster == 0 || cluster > 8 || config->gridDim.x % cluster != 0) return cudaErrorInvalidValue;
    if (cluster > 1 && !cuda_on_cpu::has_clusters()) return cudaErrorInvalidValue;
    const std::tuple<P...> kept(std::forward<A>(arguments)...);
    return cuda_on_cpu::enqueue(config->stream, [=, shape = *config] {
        cuda_on_cpu::run([&] { std::apply(kernel, kept); }, shape.gridDim, shape.blockDim, shape.dynamicSmemBytes,
                         cluster);
    });
}
