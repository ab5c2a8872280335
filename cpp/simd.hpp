// SPDX-License-Identifier: MIT
// L1: one vector type per instruction set from the compiler's vector extensions, and the elementary functions on it.
//
// Everything here is built once per instruction set inside namespace chainrule::CHAINRULE_ISA. Arithmetic never relies
// on the compiler's contraction (-ffp-contract=off): a fused multiply-add is written fma(), so 4, 8 and 16 lanes, GCC
// and Clang give the same bits. The exception is the baseline x86-64 set, which has no FMA instruction.
#pragma once

#include <utility>  // integer_sequence: a type, so nothing of it can leak between instruction sets

#include "platform.hpp"

#if defined(CHAINRULE_DEVICE)
#include "lane.hpp"
#else

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define CHAINRULE_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define CHAINRULE_NOINLINE static __attribute__((noinline))
#else
#define CHAINRULE_NOINLINE static __attribute__((noinline, noclone))  // nor a copy for each constant argument
#endif
#if defined(__AVX2__) || !defined(__x86_64__)
#define CHAINRULE_CURVE CHAINRULE_INLINE
#else
#define CHAINRULE_CURVE CHAINRULE_NOINLINE  // for processors from before 2013 one copy of each: 30 kB less
#endif
#define CHAINRULE_PRAGMA(text) _Pragma(#text)
#define CHAINRULE_UNROLL(times) CHAINRULE_PRAGMA(GCC unroll times)

namespace chainrule {
namespace CHAINRULE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Vector types: `Vec<T>` of the working width and the integer vector its comparisons give.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    typedef float Vector __attribute__((vector_size(kVectorBytes)));
    typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef std::int32_t Mask __attribute__((vector_size(kVectorBytes)));
    typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    using Integer = std::int32_t;
    static constexpr int mantissa_bits = 23, exponent_bias = 127;
};

template <>
struct Lanes<double> {
    typedef double Vector __attribute__((vector_size(kVectorBytes)));
    typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef std::int64_t Mask __attribute__((vector_size(kVectorBytes)));
    typedef std::uint64_t Bits __attribute__((vector_size(kVectorBytes)));
    using Integer = std::int64_t;
    static constexpr int mantissa_bits = 52, exponent_bias = 1023;
};

template <>
struct Lanes<Pair> {
    typedef Pair Vector __attribute__((vector_size(kVectorBytes)));
    typedef Pair Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};

template <class T>
using Vec = typename Lanes<T>::Vector;
template <class T>
using Mask = typename Lanes<T>::Mask;
template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
CHAINRULE_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}
template <class T>
CHAINRULE_INLINE void store(T* p, Vec<T> v) {
    *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v;
}
// The only intrinsics: the fused multiply-add a b + c, rounded once.
#if defined(__AVX512F__)
CHAINRULE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
CHAINRULE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
CHAINRULE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
CHAINRULE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
CHAINRULE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
CHAINRULE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
CHAINRULE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
CHAINRULE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
#endif

// a b + c for a term of a product. Of pairs: both products, a.first b.first first. The processor's own instruction takes
// subnormal numbers for zero and rounds its own way; so bfloat16 results differ between machines with it and without.
CHAINRULE_INLINE Vec<float> add_term(Vec<float> a, Vec<float> b, Vec<float> c) { return fma(a, b, c); }
CHAINRULE_INLINE Vec<double> add_term(Vec<double> a, Vec<double> b, Vec<double> c) { return fma(a, b, c); }
#if defined(__AVX512F__)
CHAINRULE_INLINE Vec<float> add_term(Vec<Pair> a, Vec<Pair> b, Vec<float> c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));  // AVX512_BF16; dispatch.cpp asks the processor first
    return c;
}
#else
CHAINRULE_INLINE Vec<float> add_term(Vec<Pair> a, Vec<Pair> b, Vec<float> c) {
    const Pair high = 0xffff0000u;
    const Vec<float> low = fma((Vec<float>)(a << 16), (Vec<float>)(b << 16), c);
    return fma((Vec<float>)(a & high), (Vec<float>)(b & high), low);
}
#endif

// Lane by lane, which compilers turn into the vector instruction.
CHAINRULE_INLINE Vec<float> sqrt(Vec<float> a) {
    for (int i = 0; i < kWidth<float>; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
CHAINRULE_INLINE Vec<double> sqrt(Vec<double> a) {
    for (int i = 0; i < kWidth<double>; ++i) a[i] = __builtin_sqrt(a[i]);
    return a;
}
// The numbers that integers are.
template <class V, class I>
CHAINRULE_INLINE V convert(I integers) {
    return __builtin_convertvector(integers, V);
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
#endif

namespace chainrule {
namespace CHAINRULE_ISA {

// The scalar type of a vector.
template <class V>
using Scalar = decltype(V{}[0] + 0);

template <class V>
CHAINRULE_INLINE V splat(double value) {
    return V{} + static_cast<Scalar<V>>(value);
}
template <class V, class M>
CHAINRULE_INLINE V select(M condition, V yes, V no) {
    return condition ? yes : no;
}
template <class T>
CHAINRULE_INLINE Vec<T> lane_numbers() {
    Vec<T> v;
    for (int i = 0; i < kWidth<T>; ++i) v[i] = static_cast<T>(i);
    return v;
}

// The bits of x rounded to bfloat16, in the upper halves; to nearest, ties to even.
CHAINRULE_INLINE Vec<Pair> round_to_bfloat16(Vec<float> x) {
    const Vec<Pair> bits = (Vec<Pair>)x, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return select(x == x, rounded, Vec<Pair>{} + 0x7fc00000u) & 0xffff0000u;
}
CHAINRULE_INLINE Vec<Pair> pair_up(Vec<float> first, Vec<float> second) {
    return round_to_bfloat16(second) | (round_to_bfloat16(first) >> 16);
}

template <class V>
CHAINRULE_INLINE V fma(V a, V b, double c) {
    return fma(a, b, splat<V>(c));
}
// max and min give the second argument when the first is NaN.
template <class V>
CHAINRULE_INLINE V max(V a, V b) {
    return select(a > b, a, b);
}
template <class V>
CHAINRULE_INLINE V min(V a, V b) {
    return select(a < b, a, b);
}
template <class V>
CHAINRULE_INLINE V abs(V a) {
    using T = Scalar<V>;
    using I = typename Lanes<T>::Integer;
    const Mask<T> magnitude = Mask<T>{} + static_cast<I>(~(I{1} << (8 * sizeof(T) - 1)));
    return (V)((Mask<T>)a & magnitude);
}
// |magnitude| with the sign of `sign`.
template <class V>
CHAINRULE_INLINE V copysign(V magnitude, V sign) {
    using T = Scalar<V>;
    using I = typename Lanes<T>::Integer;
    const Mask<T> bit = Mask<T>{} + static_cast<I>(I{1} << (8 * sizeof(T) - 1));
    return (V)(((Mask<T>)magnitude & ~bit) | ((Mask<T>)sign & bit));
}

// c[0] + c[1] x + ... by Horner's rule.
template <class V, int N>
CHAINRULE_INLINE V polynomial(V x, const double (&c)[N]) {
    V p = splat<V>(c[N - 1]);
    CHAINRULE_UNROLL(32)
    for (int i = N - 2; i >= 0; --i) p = fma(p, x, c[i]);
    return p;
}

// ---- exponentials -------------------------------------------------------------------------------------------------
// x = n ln2 + r with |r| <= ln2/2; e^r - 1 by its Taylor series, whose remainder is below half an ulp at degree 8
// (float) and 14 (double).

template <class V>
struct Reduced {
    V n, q;  // q = e^r - 1
};

CHAINRULE_INLINE Vec<float> expm1_series(Vec<float> r) {
    const double c[] = {1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320};
    return fma(r * r, polynomial(r, c), r);
}
CHAINRULE_INLINE Vec<double> expm1_series(Vec<double> r) {
    const double c[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,         1.0 / 120,     1.0 / 720,
                        1.0 / 5040,      1.0 / 40320,      1.0 / 362880,     1.0 / 3628800, 1.0 / 39916800,
                        1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
    return fma(r * r, polynomial(r, c), r);
}

CHAINRULE_INLINE Vec<float> subtract_ln2(Vec<float> x, Vec<float> n) {
    return fma(n, splat<Vec<float>>(-0x1.7f7d1cp-20), fma(n, splat<Vec<float>>(-0x1.62e4p-1), x));
}
CHAINRULE_INLINE Vec<double> subtract_ln2(Vec<double> x, Vec<double> n) {
    return fma(n, splat<Vec<double>>(-0x1.ef35793c7673p-45), fma(n, splat<Vec<double>>(-0x1.62e42fefa38p-1), x));
}

// To the nearest integer: adding 1.5 * 2^mantissa_bits leaves no bit for a fraction.
template <class V>
CHAINRULE_INLINE V round(V x) {
    const V magic = splat<V>(sizeof(Scalar<V>) == 4 ? 0x1.8p23 : 0x1.8p52);
    return (x + magic) - magic;
}

template <class V>
CHAINRULE_INLINE Reduced<V> reduce_exponent(V x) {
    const V n = round(x * splat<V>(0x1.71547652b82fep+0));
    return {n, expm1_series(subtract_ln2(x, n))};
}

// 2^n for integral n within the normal exponents.
template <class V>
CHAINRULE_INLINE V power_of_two(V n) {
    using T = Scalar<V>;
    using L = Lanes<T>;
    const V magic = splat<V>(sizeof(T) == 4 ? 0x1.8p23 : 0x1.8p52);
    const Mask<T> bits = (Mask<T>)(n + magic) + static_cast<typename L::Integer>(L::exponent_bias);
    return (V)(bits << L::mantissa_bits);
}

// e^x. Error below 1 ulp (subnormal results are rounded twice); e^NaN = NaN, e^-inf = 0, e^inf = inf.
template <class V>
CHAINRULE_CURVE V exp(V x) {
    using T = Scalar<V>;
    const V low = splat<V>(sizeof(T) == 4 ? -104 : -746), high = splat<V>(sizeof(T) == 4 ? 89 : 710);
    const Reduced<V> e = reduce_exponent(min(max(x, low), high));
    // 2^n as two factors: n runs from -1076 to 1025, outside what one normal number holds.
    const V n1 = round(splat<V>(0.5) * e.n), scale = power_of_two(e.n - n1);
    const V y = fma(scale, e.q, scale) * power_of_two(n1);
    return select(x == x, y, x);
}

// e^x - 1 for x <= 88 (float), 709 (double), with full relative accuracy at small x. Error below 2 ulp.
template <class V>
CHAINRULE_CURVE V expm1(V x) {
    const V low = splat<V>(sizeof(Scalar<V>) == 4 ? -20 : -40);  // -1 to rounding from here on
    const Reduced<V> e = reduce_exponent(max(x, low));
    const V scale = power_of_two(e.n);
    const V y = select(e.n == V{}, e.q, fma(scale, e.q, scale - 1));
    return select(x == x, y, x);
}

// ---- logarithms ---------------------------------------------------------------------------------------------------

CHAINRULE_INLINE Vec<float> atanh_series(Vec<float> s2) {
    const double c[] = {2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11};
    return polynomial(s2, c);
}
CHAINRULE_INLINE Vec<double> atanh_series(Vec<double> s2) {
    const double c[] = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11, 2.0 / 13,
                        2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21, 2.0 / 23};
    return polynomial(s2, c);
}

// log x for positive normal x, and the limits at 0 (-inf), inf and NaN; NaN below 0. Error below 2 ulp.
// x = 2^n m with m in [1/sqrt2, sqrt2); log m = 2 atanh(f / (2 + f)), f = m - 1.
template <class V>
CHAINRULE_CURVE V log(V x) {
    using T = Scalar<V>;
    using L = Lanes<T>;
    using I = typename L::Integer;
    const I root_half = sizeof(T) == 4 ? static_cast<I>(0x3f3504f3) : static_cast<I>(0x3fe6a09e667f3bcd);
    const I bias = static_cast<I>(I{L::exponent_bias} << L::mantissa_bits);
    // The sum is unsigned: that of a NaN passes the largest integer.
    const Mask<T> bits = (Mask<T>)((typename L::Bits)x + (typename L::Bits)(Mask<T>{} + (bias - root_half)));
    const Mask<T> exponent = (bits >> L::mantissa_bits) - I{L::exponent_bias};
    const V f = (V)((bits & static_cast<I>((I{1} << L::mantissa_bits) - 1)) + root_half) - 1;
    const V n = convert<V>(exponent);
    const V s = f / (f + 2);
    const V s2 = s * s;
    const V half_square = f * f * splat<V>(0.5);
    // log(1+f) = f - (f²/2 - s (f²/2 + s² R(s²))): fdlibm's arrangement, which keeps f exact.
    const V tail = s * fma(s2, atanh_series(s2), half_square);
    const V ln2_high = splat<V>(sizeof(T) == 4 ? 0x1.62e4p-1 : 0x1.62e42fefa38p-1);
    const V ln2_low = splat<V>(sizeof(T) == 4 ? 0x1.7f7d1cp-20 : 0x1.ef35793c7673p-45);
    V y = fma(n, ln2_high, f - (half_square - fma(n, ln2_low, tail)));
    y = select(x == splat<V>(__builtin_inf()), x, y);
    y = select(x == V{}, splat<V>(-__builtin_inf()), y);
    return select(x >= V{}, y, splat<V>(__builtin_nan("")));
}

// log(1 + x) for x >= 0, with full relative accuracy at small x. Error below 2 ulp.
template <class V>
CHAINRULE_INLINE V log1p(V x) {
    const V u = x + 1;
    const V lost = x - (u - 1);  // what rounding 1 + x dropped, exactly
    return log(u) + select(x < splat<V>(1e30), lost / u, V{});
}

// ---- the functions networks use -----------------------------------------------------------------------------------

// tanh x = m / (m + 2), m = e^(2|x|) - 1: full relative accuracy at small x. Error below 4 ulp.
CHAINRULE_CURVE Vec<double> tanh(Vec<double> x) {
    const Vec<double> m = expm1(2 * min(abs(x), splat<Vec<double>>(20)));  // tanh rounds to 1 from 20 on
    return select(x == x, copysign(m / (m + 2), x), x);
}
// In float x P(x²) / Q(x²), minimax in the relative error (2e-8) up to 9.02, where tanh rounds to 1; half the instructions
// of the exponential. Error below 5 ulp. At 9.4 it is above 1 and is cut there: past 1 its derivative would turn negative.
CHAINRULE_CURVE Vec<float> tanh(Vec<float> x) {
    const double p[] = {0.9999999792107983, 0.13379666410319993, 0.003493972277669472, 2.058242999651169e-05,
                        1.3317595688125745e-08};
    const double q[] = {1.0, 0.46712981728247704, 0.0258708388494013, 0.0003282989634537177, 7.761417897601526e-07};
    const auto clamp = [](Vec<float> v, double limit) {
        return min(max(v, splat<Vec<float>>(-limit)), splat<Vec<float>>(limit));
    };
    const Vec<float> a = clamp(x, 9.4), t = a * a;
    return select(x == x, clamp(a * polynomial(t, p) / polynomial(t, q), 1), x);
}

// 1 / (1 + e^-x), accurate in both tails. Error below 3 ulp.
template <class V>
CHAINRULE_CURVE V sigmoid(V x) {
    const V e = exp(-abs(x));
    return select(x < V{}, e, splat<V>(1)) / (e + 1);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|): no overflow, full relative accuracy in the left tail.
template <class V>
CHAINRULE_CURVE V softplus(V x) {
    return select(x < V{}, V{}, x) + log1p(exp(-abs(x)));
}

// erfcx(z) = e^(z²) erfc(z) for z >= 0: (1 + 2z) erfcx(z) is smooth in t = (z - 3) / (z + 3) on [-1, 1); polynomials that
// interpolate it at Chebyshev points, computed to 50 digits. Relative error 3e-9 (float, z <= 10.5), 3e-17 (double, z <= 27.5);
// beyond those z the factor e^(-z²) is zero. Form: Shepherd and Laframboise, Math. Comp. 36, 1981.
CHAINRULE_INLINE Vec<float> erfcx_series(Vec<float> t) {
    const double c[] = {1.25300805813703754,      -0.135621149059953665,   -0.047562318168041814,
                        0.129646714852946839,     -0.119271919337226563,   0.0682930290552530582,
                        -0.023794664534199443,    0.00257685651680176697,  0.00200177122554426307,
                        -0.000788120753037410585, -0.000273595999263034388};
    return polynomial(t, c);
}
CHAINRULE_INLINE Vec<double> erfcx_series(Vec<double> t) {
    const double c[] = {
        1.25300805826972964,    -0.135621106124580675,     -0.0475622943534467093,   0.129645158702704428,
        -0.119273663415511788,  0.0683080273458418527,     -0.0237705149145542663,   0.00252939178766909222,
        0.00188869031508911369, -0.000779832032546475077,  -0.000105159507120881833, 0.000125098122243763878,
        4.94820186655647948e-6, -0.0000200965299535030067, -7.27688696615789994e-7,  3.46377989167188057e-6,
        3.49088667855040958e-7, -6.04718003444415402e-7,   -1.31133221697872456e-7,  9.16516352984537837e-8,
        3.28706816336942874e-8, -8.4340016556519746e-9,    -4.18258251449267221e-9};
    return polynomial(t, c);
}
template <class V>
CHAINRULE_INLINE V erfcx(V z) {
    const V bounded = min(z, splat<V>(30));
    return erfcx_series((bounded - 3) / (bounded + 3)) / fma(splat<V>(2), bounded, 1.0);
}

// The standard normal distribution function, with full relative accuracy in the left tail. Error below 8 ulp.
// Phi(-z sqrt2) = erfc(z)/2 and erfc(z) = e^(-z²) erfcx(z) for z >= 0.
template <class V>
CHAINRULE_CURVE V normal_cdf(V x) {
    const V z = abs(x) * splat<V>(0x1.6a09e667f3bcdp-1);
    // e^(-x²/2) with the rounding error of the square carried along: at x = 10 it would cost 50 ulp.
    const V square = x * x, dropped = fma(x, x, -square);
    const V gauss =
        select(square < splat<V>(1e30), exp(splat<V>(-0.5) * square) * fma(splat<V>(-0.5), dropped, 1.0), V{});
    const V tail = splat<V>(0.5) * gauss * erfcx(z);
    return select(x < V{}, tail, select(x == x, 1 - tail, x));
}

template <class V>
CHAINRULE_INLINE V normal_density(V x) {
    return splat<V>(0.39894228040143267794) * exp(splat<V>(-0.5) * x * x);
}

#if !defined(CHAINRULE_DEVICE)
// Transposes a square of kWidth vectors in log2(kWidth) stages, each exchanging the off-diagonal blocks of one size.
template <int S, class V, int... L>
CHAINRULE_INLINE void exchange_blocks(V& a, V& b, std::integer_sequence<int, L...>) {
    constexpr int W = sizeof...(L);
    const V upper = __builtin_shufflevector(a, b, ((L & S) ? W + L - S : L)...);
    b = __builtin_shufflevector(a, b, ((L & S) ? W + L : L + S)...);
    a = upper;
}
template <class T, int S = 1>
CHAINRULE_INLINE void transpose_square(Vec<T> (&rows)[kWidth<T>]) {
    if constexpr (S < kWidth<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth<T>; ++i)
            if (!(i & S)) exchange_blocks<S>(rows[i], rows[i + S], std::make_integer_sequence<int, kWidth<T>>{});
        transpose_square<T, 2 * S>(rows);
    }
}

// Two vectors of neighbours to the vector of the even elements and that of the odd ones.
template <class V, int... L>
CHAINRULE_INLINE void split_pairs(V& a, V& b, std::integer_sequence<int, L...>) {
    const V even = __builtin_shufflevector(a, b, (2 * L)...);
    b = __builtin_shufflevector(a, b, (2 * L + 1)...);
    a = even;
}
CHAINRULE_INLINE void split_pairs(Vec<float>& a, Vec<float>& b) {
    split_pairs(a, b, std::make_integer_sequence<int, kWidth<float>>{});
}

// Sum over the elements of an array in an order that does not depend on the vector width: the lanes of a cache line
// are summed down the array, then folded in halves.
template <class T>
struct LineSum {
    static constexpr int vectors = static_cast<int>(kLineBytes) / kVectorBytes;
    Vec<T> v[vectors] = {};

    // The totals of kWidth sums, one a lane; the same order of additions as total().
    CHAINRULE_INLINE Vec<T> totals(LineSum (&sums)[kWidth<T>]) {
        Vec<T> lanes[kWidth<T>];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth<T>; ++i) {
            for (int half = vectors / 2; half > 0; half /= 2)
                for (int k = 0; k < half; ++k) sums[i].v[k] = sums[i].v[k] + sums[i].v[k + half];
            lanes[i] = sums[i].v[0];
        }
        transpose_square<T>(lanes);
        for (int half = kWidth<T> / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
        return lanes[0];
    }

    CHAINRULE_INLINE T total(const LineSum& sum) {
        alignas(kLineBytes) T lane[kLine<T>];
        for (int i = 0; i < vectors; ++i) store(lane + i * kWidth<T>, sum.v[i]);
        for (Index half = kLine<T> / 2; half > 0; half /= 2)
            for (Index i = 0; i < half; ++i) lane[i] += lane[i + half];
        return lane[0];
    }
};

#endif

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
