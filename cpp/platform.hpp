// SPDX-License-Identifier: MIT
// L0: what everything else stands on: real types, matrix views, checks with messages, aligned memory, the instruction set.
//
// kernels.cpp includes this file once per instruction set, so it holds only plain data and declarations: an inline
// function here would be emitted by every such translation unit, the linker would keep one copy, and that copy could
// run AVX-512 code on a machine without it.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

// Functions that the GPU runs as well; see lane.hpp.
#ifdef __CUDACC__
#define CHAINRULE_HD __host__ __device__
#else
#define CHAINRULE_HD
#endif

// What runs once for a network or a fit, in files that are built to be fast: this is built to be small.
#define CHAINRULE_COLD [[gnu::cold]]

namespace chainrule {

using Index = std::ptrdiff_t;  // every size and offset; never 32 bits

// Two bfloat16 numbers in one 32-bit element, the first in the low half.
using Pair = std::uint32_t;

// Rows of every matrix inside the engine are padded to whole cache lines, whatever the instruction set, so that one
// memory layout serves all kernels and vectors may read and write past the last column.
constexpr Index kLineBytes = 64;

template <class T>
constexpr Index kLine = kLineBytes / static_cast<Index>(sizeof(T));  // elements in a cache line

// Weights are packed in column panels this wide: four AVX-512 vectors, the widest register tile.
template <class T>
constexpr Index kPanel = 4 * kLine<T>;

// Sums of products are taken in blocks of this many terms; see gemm.hpp.
constexpr Index kDepth = 512;

CHAINRULE_HD static constexpr Index round_up(Index n, Index multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Width of the panel that begins at column `start`.
template <class T>
static constexpr Index panel_width(Index columns, Index start) {
    return round_up(columns - start < kPanel<T> ? columns - start : kPanel<T>, kLine<T>);
}

// A layer of so few outputs keeps its weights the other way round; see ops/linear.hpp.
constexpr Index kNarrowOutputs = 4;

// A row-major matrix that somebody else owns; row i starts at data + i * stride.
template <class T>
struct MatrixView {
    T* data;
    Index rows, cols, stride;
};

// Row stride of an activation matrix. Strides that are multiples of 1 KiB map every row onto the same few cache sets
// (measured: 63 % of peak instead of 94 % at 1024 columns), so those get one line more.
template <class T>
static constexpr Index padded_stride(Index cols) {
    const Index stride = round_up(cols > 0 ? cols : 1, kLine<T>);
    return stride * static_cast<Index>(sizeof(T)) % 1024 == 0 ? stride + kLine<T> : stride;
}

// The instruction sets a binary carries; kernels.cpp is compiled once for each.
enum class Isa { baseline, avx2, avx512, neon };

const char* name_of(Isa isa);
bool runs_here(Isa isa);  // asks the processor
bool multiplies_pairs();  // whether it has AVX512_BF16
int usable_processors();  // on Linux, those of the affinity mask and the CPU quota

// Whole processors, at least one, that a CPU quota allows; `limit` is the text of a cgroup's cpu.max, "quota period".
constexpr int kNoQuota = INT_MAX;
int quota_processors(const char* limit);
// The smallest quota from a process's cgroup up to the root. `membership` is the text of /proc/self/cgroup, `mount` where
// the cgroups are mounted.
int cgroup_processors(const char* membership, const char* mount);

// The calling thread's floating-point mode: rounding and the treatment of subnormal numbers.
std::uint64_t float_mode();
void set_float_mode(std::uint64_t mode);

// While one lives, subnormal operands and results of its thread (and of the pool's workers for it) count as zero. Moments
// of units that died decay to subnormals and stay there; where these take a microcode assist, a step of training would
// become many times slower. Arm tests for tiny results before rounding, x86 after: only results that would round up to the
// smallest normal number can tell.
class FlushSubnormals {
   public:
    explicit FlushSubnormals(bool wanted);
    ~FlushSubnormals();
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

   private:
    const std::uint64_t before_;
};

// Zero-initialised memory aligned to a cache line, or to 2 MiB with huge pages requested when it is large.
void* allocate_bytes(std::size_t bytes);
void free_bytes(void* memory, std::size_t bytes);

}  // namespace chainrule
