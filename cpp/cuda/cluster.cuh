// SPDX-License-Identifier: MIT
// L1: clusters: blocks on neighbouring processors that meet at a barrier of their own and reach each other's shared memory. GPUs
// have them from compute capability 9.0 on; what is compiled for others is launched in blocks alone.
#pragma once

#include "runtime.cuh"

namespace chainrule {
namespace cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// What all threads of a cluster have done before they arrive comes before what any of them does after it has waited.
static __device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
static __device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
// Where the block of that rank has what lies there in this one's shared memory.
template <class T>
static __device__ __forceinline__ T* in_block(T* place, int rank) {
    return static_cast<T*>(__cluster_map_shared_rank(place, static_cast<unsigned>(rank)));
}
#else
static __device__ __forceinline__ void cluster_arrive() {}
static __device__ __forceinline__ void cluster_wait() {}
template <class T>
static __device__ __forceinline__ T* in_block(T* place, int) {
    return place;
}
#endif

// A launch in clusters of so many blocks beside each other.
class ClusterLaunch {
   public:
    ClusterLaunch(int ranks, dim3 blocks, dim3 threads, std::size_t shared, cudaStream_t stream) {
        cluster_.id = cudaLaunchAttributeClusterDimension;
        cluster_.val.clusterDim.x = static_cast<unsigned>(ranks);
        cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
        config_.gridDim = blocks;
        config_.blockDim = threads;
        config_.dynamicSmemBytes = shared;
        config_.stream = stream;
        config_.attrs = &cluster_;
        config_.numAttrs = ranks > 1 ? 1 : 0;
    }
    ClusterLaunch(const ClusterLaunch&) = delete;
    ClusterLaunch& operator=(const ClusterLaunch&) = delete;

    // How many such clusters of the kernel, as it is compiled for it, the device takes at once. They lie within groups of
    // processors, and so are fewer than those divided by their blocks.
    template <class... P>
    int most(void (*kernel)(P...)) const {
        cudaFuncAttributes compiled{};
        check(cudaFuncGetAttributes(&compiled, kernel), "asking about a kernel");
        int clusters = 0;
        if (compiled.ptxVersion < 90) return 0;
        if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config_) == cudaSuccess) return clusters;
        (void)cudaGetLastError();
        return 0;
    }
    template <class... P, class... A>
    void operator()(void (*kernel)(P...), A&&... arguments) const {
        if (config_.gridDim.x == 0) return;
        check(cudaLaunchKernelEx(&config_, kernel, P(std::forward<A>(arguments))...), "launching a kernel");
    }

   private:
    cudaLaunchAttribute cluster_{};
    cudaLaunchConfig_t config_{};
};

}  // namespace cuda
}  // namespace chainrule
