// SPDX-License-Identifier: MIT
// Which accesses to device and shared memory nothing orders: what compute-sanitizer's racecheck asks of one block's shared
// memory, asked also of blocks, of kernels on other streams and of copies. The compiler calls a function at each load and store
// of what is built with -fsanitize=thread; here are those functions, which ask CUDA's rules instead of a CPU's:
//   threads of a block are ordered by __syncthreads, those of a warp also by __syncwarp, not by a shuffle;
//   blocks of a cluster by its barrier, those of a launch by nothing; pieces of work on one stream by their turn, on several by events;
//   what the host gives to a stream comes after all that it has waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_on_cpu {
namespace races {

// Whether anything was built so. If not, nobody asks.
extern bool watching;

// Of each stream, the last piece of its work that is known to be over.
class Clock {
   public:
    std::uint32_t at(unsigned stream) const { return stream < last_.size() ? last_[stream] : 0; }
    void advance(unsigned stream, std::uint32_t piece);
    void join(const Clock& other);

   private:
    std::vector<std::uint32_t> last_;
};

// Where the calling thread is: what it does now is done by this thread of this block of this piece of work.
struct Moment {
    std::uint32_t piece = 0;  // numbered through; 0: the host itself
    unsigned stream = 0;
    const Clock* before = nullptr;
    const unsigned char* shared = nullptr;  // of the whole cluster
    std::size_t shared_bytes = 0;
    std::uint32_t cluster = 0, block = 0, thread = 0;
    std::uint32_t barriers = 0, warp_barriers = 0;  // that the thread has met in this block
    std::uint32_t arrivals = 0, waits = 0;          // at the cluster's
};
extern thread_local Moment now __attribute__((tls_model("initial-exec")));

// Ends the process with a word if something that is not ordered meets it there.
void touch(const void* at, std::size_t bytes, bool writes, const void* code = nullptr);

// Memory of the device while somebody watches.
void* allocate(std::size_t bytes);
// Ends the process if anybody's work may still use it, for all that the host has waited for.
void release(void* memory, std::size_t bytes, const Clock& host);

}  // namespace races
}  // namespace cuda_on_cpu
