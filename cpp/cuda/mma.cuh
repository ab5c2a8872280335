// SPDX-License-Identifier: MIT
// L2: products of a warp on tensor cores, D += A B with A 16 x k and B k x 8, and the roundings of their operands.
// Lane 4 g + t holds, of A, rows g and g + 8; of B, column g; of D, rows g and g + 8 and columns 2 t and 2 t + 1.
// Source: PTX ISA, "Matrix fragments for mma.m16n8k8" and "mma.m16n8k16".
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "../simd.hpp"

namespace chainrule {
namespace cuda {
using namespace CHAINRULE_ISA;

static __device__ __forceinline__ std::uint32_t bits_of(float x) { return ((Vec<Pair>)Vec<float>(x))[0]; }
// To the 10 bits of mantissa that tf32 has; to nearest, ties away from zero, as cvt.rna does. The NaN that the GPU computes would
// become -0, and cvt.rna makes infinities of NaN with low bits alone.
static __device__ __forceinline__ float round_to_tf32(float x) {
    const Vec<float> v = x;
    const Vec<Pair> rounded = ((Vec<Pair>)v + 0x1000u) & 0xffffe000u;
    return select(v == v, (Vec<float>)rounded, (Vec<float>)Vec<Pair>(0x7fc00000u))[0];
}
// The GPU has one instruction for what pair_up computes; only NaN comes out with other bits.
static __device__ __forceinline__ std::uint32_t bfloat16_pair(float first, float second) {
#ifdef __CUDA_ARCH__
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return pair_up(Vec<float>(first), Vec<float>(second))[0];
#endif
}

// A bfloat16's value, or that of a number in its own type.
template <class T>
static __device__ __forceinline__ T real_of(std::uint16_t bits) {
    return static_cast<T>(Vec<float>((Vec<Pair>)(static_cast<std::uint32_t>(bits) << 16))[0]);
}
template <class T>
static __device__ __forceinline__ T real_of(T number) {
    return number;
}

#ifdef CUDA_ON_CPU
// The same by the tables of fragments: every lane shows its operands, and takes the products that it holds. Their sum is cut off,
// not rounded, as tensor cores do. Source: Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021.
struct Fragments {
    std::uint32_t a[4], b[2];
};
template <int K, class Term>
inline void products_of_warp(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Term term) {
    Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const auto* all = reinterpret_cast<const Fragments*>(cuda_on_cpu::exchange(&mine, sizeof mine));
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
    for (int c = 0; c < 4; ++c) {
        double sum = static_cast<double>(d[c]);
        for (int k = 0; k < K; ++k) sum += static_cast<double>(term(all, g + c / 2 * 8, 2 * t + c % 2, k));
        d[c] = static_cast<float>(sum);
        if (std::fabs(static_cast<double>(d[c])) > std::fabs(sum)) d[c] = std::nextafter(d[c], 0.0f);
    }
    cuda_on_cpu::exchange(&mine, 1);  // nobody goes on while another one still reads
}
inline float float_of(std::uint32_t bits) { return Vec<float>(Vec<Pair>(bits))[0]; }
inline void multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    products_of_warp<8>(d, a, b, [](const Fragments* all, int row, int col, int k) {
        return float_of(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]) * float_of(all[col * 4 + k % 4].b[k / 4]);
    });
}
inline void multiply_bfloat16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    products_of_warp<16>(d, a, b, [](const Fragments* all, int row, int col, int k) {
        const auto half = [&](std::uint32_t pair) { return float_of(k % 2 ? pair & 0xffff0000u : pair << 16); };
        return half(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2]) * half(all[col * 4 + k % 8 / 2].b[k / 8]);
    });
}
#else
static __device__ __forceinline__ void multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                                     const std::uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
static __device__ __forceinline__ void multiply_bfloat16(float (&d)[4], const std::uint32_t (&a)[4],
                                                         const std::uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif

}  // namespace cuda
}  // namespace chainrule
