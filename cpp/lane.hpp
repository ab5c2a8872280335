// SPDX-License-Identifier: MIT
// L1, a part of simd.hpp: the vector type of the GPU, a single lane, because there a thread is a lane. With it the formulas
// of ops/, the losses and the update rules compile for the GPU as they stand; and since they use no function of CUDA's
// library beside fma and sqrt, which round correctly, a thread computes the bits that a lane of the CPU does.
// CHAINRULE_DEVICE asks for it. Host compilers take this file, too: the GPU's code runs in tests on any computer.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "platform.hpp"

#define CHAINRULE_PRAGMA(text) _Pragma(#text)
#ifdef __CUDACC__
#define CHAINRULE_INLINE static __host__ __device__ __forceinline__
#define CHAINRULE_UNROLL(times) CHAINRULE_PRAGMA(unroll times)
#else
#define CHAINRULE_INLINE static inline __attribute__((always_inline))
#define CHAINRULE_UNROLL(times) CHAINRULE_PRAGMA(GCC unroll times)
#endif
#define CHAINRULE_NOINLINE CHAINRULE_INLINE  // a call would put what it needs on the stack, in slow memory
#define CHAINRULE_CURVE CHAINRULE_INLINE

namespace chainrule {
namespace CHAINRULE_ISA {

template <class T>
struct Lane;
template <class T>
struct Lanes;
template <>
struct Lanes<float> {
    using Integer = std::int32_t;
    using Bits = Lane<std::uint32_t>;
    static constexpr int mantissa_bits = 23, exponent_bias = 127;
};
template <>
struct Lanes<double> {
    using Integer = std::int64_t;
    using Bits = Lane<std::uint64_t>;
    static constexpr int mantissa_bits = 52, exponent_bias = 1023;
};
template <>
struct Lanes<Pair> {
    using Integer = std::int32_t;
};

// Behaves as a vector of the compiler's with one element: casts reinterpret bits, comparisons give -1 or 0.
template <class T>
struct Lane {
    T value = 0;

    Lane() = default;
    CHAINRULE_HD Lane(T v) : value(v) {}
    template <class U>
    CHAINRULE_HD explicit Lane(Lane<U> other) {
        static_assert(sizeof(T) == sizeof(U), "a cast reinterprets the bits");
        std::memcpy(&value, &other.value, sizeof(T));
    }
    CHAINRULE_HD explicit operator bool() const { return value != 0; }
    CHAINRULE_HD T& operator[](Index) { return value; }
    CHAINRULE_HD T operator[](Index) const { return value; }

    friend CHAINRULE_HD Lane operator+(Lane a, Lane b) { return a.value + b.value; }
    friend CHAINRULE_HD Lane operator-(Lane a, Lane b) { return a.value - b.value; }
    friend CHAINRULE_HD Lane operator*(Lane a, Lane b) { return a.value * b.value; }
    friend CHAINRULE_HD Lane operator/(Lane a, Lane b) { return a.value / b.value; }
    friend CHAINRULE_HD Lane operator-(Lane a) { return -a.value; }
    friend CHAINRULE_HD Lane operator~(Lane a) { return ~a.value; }
    friend CHAINRULE_HD Lane operator&(Lane a, Lane b) { return a.value & b.value; }
    friend CHAINRULE_HD Lane operator|(Lane a, Lane b) { return a.value | b.value; }
    friend CHAINRULE_HD Lane operator<<(Lane a, int n) {  // as a vector's, which has no overflow
        return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a.value) << n);
    }
    friend CHAINRULE_HD Lane operator>>(Lane a, int n) { return a.value >> n; }
};

template <class T>
using Vec = Lane<T>;
template <class T>
using Mask = Lane<typename Lanes<T>::Integer>;
template <class T>
constexpr int kWidth = 1;

#define CHAINRULE_COMPARISON(op)                                                               \
    template <class T>                                                                         \
    CHAINRULE_INLINE Mask<T> operator op(Lane<T> a, Lane<T> b) {                               \
        return static_cast<typename Lanes<T>::Integer>(-static_cast<int>(a.value op b.value)); \
    }
CHAINRULE_COMPARISON(<)
CHAINRULE_COMPARISON(>)
CHAINRULE_COMPARISON(<=)
CHAINRULE_COMPARISON(>=)
CHAINRULE_COMPARISON(==)
#undef CHAINRULE_COMPARISON

template <class T>
CHAINRULE_INLINE Vec<T> load(const T* p) {
    return *p;
}
template <class T>
CHAINRULE_INLINE void store(T* p, Vec<T> v) {
    *p = v.value;
}
CHAINRULE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return ::fmaf(a.value, b.value, c.value); }
CHAINRULE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    return ::fma(a.value, b.value, c.value);
}
CHAINRULE_INLINE Vec<float> sqrt(Vec<float> a) { return ::sqrtf(a.value); }
CHAINRULE_INLINE Vec<double> sqrt(Vec<double> a) { return ::sqrt(a.value); }

// The threads that share a row are those along x of a block with several rows of threads; in any other, each is alone. With more
// than one they are a warp. Loops over columns begin at first_column(), and a join brings together what the threads have.
#if defined(__CUDA_ARCH__) || defined(CUDA_ON_CPU)
CHAINRULE_INLINE Index first_column() { return blockDim.y > 1 ? threadIdx.x : 0; }
template <class T>
CHAINRULE_INLINE Index column_step() {
    return blockDim.y > 1 ? blockDim.x : 1;
}
template <class T>
CHAINRULE_INLINE Vec<T> of_thread(Vec<T> v, Index other) {  // the one `other` is away
    return __shfl_xor_sync(0xffffffffu, v.value, static_cast<int>(other));
}
#else  // for the host, which has none
CHAINRULE_INLINE Index first_column() { return 0; }
template <class T>
CHAINRULE_INLINE Index column_step() {
    return 1;
}
template <class T>
CHAINRULE_INLINE Vec<T> of_thread(Vec<T> v, Index) {
    return v;
}
#endif
template <class T>
CHAINRULE_INLINE Vec<T> join_sum(Vec<T> mine) {  // the same bits in each of them
    for (Index other = column_step<T>() / 2; other > 0; other /= 2) mine = mine + of_thread(mine, other);
    return mine;
}
template <class T>
CHAINRULE_INLINE Vec<T> join_max(Vec<T> mine) {
    for (Index other = column_step<T>() / 2; other > 0; other /= 2) {
        const Vec<T> theirs = of_thread(mine, other);
        if (theirs > mine) mine = theirs;
    }
    return mine;
}
template <class V, class I>
CHAINRULE_INLINE V convert(I integer) {
    return V{static_cast<decltype(V{}.value)>(integer.value)};
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
