// SPDX-License-Identifier: MIT
// Reports, arrays behind guards, comparisons within a bound, and loops over instruction sets.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"
#include "random.hpp"
#include "system.hpp"

#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER 1
#endif
#endif

namespace chainrule {
namespace {

using Real = long double;  // of the oracles

// ---- reports --------------------------------------------------------------------------------------------------------

bool quick = false;
std::uint64_t base_seed = 1;
long passed = 0, failed = 0;

// What is being tested, for the report of a failure; set by begin_case.
struct Context {
    const char* op = "";
    const char* type = "";
    Isa isa = Isa::baseline;
    std::array<Index, 3> shape{};
} context;

void print_case(const char* rule) {
    std::printf("FAILED %s %s %s shape %td x %td x %td --seed=%llu: %s", context.op,
                *context.type ? name_of(context.isa) : "", context.type, context.shape[0], context.shape[1],
                context.shape[2], static_cast<unsigned long long>(base_seed), rule);
}

// Counts one check. Says whether the caller should print details: a broken kernel fails thousands of checks.
bool fails(bool ok, const char* rule) {
    if (ok) {
        ++passed;
        return false;
    }
    ++failed;
    static std::map<std::string, int> seen;
    const int count = ++seen[std::string(context.op) + context.type + name_of(context.isa) + rule];
    if (count > 3) return false;
    print_case(rule);
    return true;
}

void check(bool ok, const char* rule) {
    if (fails(ok, rule)) std::printf("\n");
}

// A read or write outside of an array ends here, and so does a test that hangs.
void on_signal(int number) {
    print_case(number == kHang ? "does not come back" : "touched memory outside of its arrays");
    std::printf(" (signal %d)\n%ld passed, %ld failed\n", number, passed, failed + 1);
    std::fflush(stdout);
    std::_Exit(1);
}

template <class T>
constexpr const char* type_name = sizeof(T) == 4 ? "float32" : "float64";

// ---- random numbers: splitmix64, so that nothing here depends on the generator under test ---------------------------

class Random {
   public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    double uniform(double low, double high) { return low + (high - low) * static_cast<double>(next() >> 11) * 0x1p-53; }
    Index integer(Index low, Index high) {
        return low + static_cast<Index>(next() % static_cast<std::uint64_t>(high - low + 1));
    }

   private:
    std::uint64_t state_;
};

// Names the case and seeds its numbers, which are the same for every instruction set and in every order of tests.
template <class T>
Random begin_case(const char* op, Index a, Index b = 0, Index c = 0) {
    context.op = op;
    context.type = type_name<T>;
    context.shape = {a, b, c};
    std::uint64_t seed = base_seed;
    for (const char* letter = op; *letter; ++letter) seed = seed * 31 + static_cast<unsigned char>(*letter);
    for (const Index n : context.shape) seed = seed * 1000003 + static_cast<std::uint64_t>(n);
    return Random(seed);
}

// ---- arrays that end at an unmapped page ----------------------------------------------------------------------------

template <class T>
constexpr Index line = 64 / static_cast<Index>(sizeof(T));  // platform.hpp: rows are padded to cache lines of 64 bytes
static_assert(line<float> == kLine<float> && line<double> == kLine<double>, "the tests know the layout by heart");

template <class T>
Index padded(Index cols) {
    return (cols + line<T> - 1) / line<T> * line<T>;
}

// A quiet NaN with a payload of its own: an element that still has these bits was not written.
template <class T>
T poison() {
    T value;
    const std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t> bits =
        static_cast<decltype(bits)>(sizeof(T) == 4 ? 0x7fc5a5a5u : 0x7ff85a5a5a5a5a5au);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// n elements between 64 guard bytes and an unmapped page, all of them poison.
template <class T>
class Fenced {
   public:
    explicit Fenced(Index n) : size_(n), bytes_(static_cast<std::size_t>(n) * sizeof(T)) {
        for (std::size_t i = 0; i < spare_.size(); ++i)
            if (spare_[i].size >= bytes_ + kGuard) {
                mapping_ = spare_[i];
                spare_.erase(spare_.begin() + static_cast<std::ptrdiff_t>(i));
                break;
            }
        if (mapping_.end == nullptr) mapping_ = new_mapping(bytes_ + kGuard);
        std::memset(guard(), kGuardByte, kGuard);
        std::fill(data(), data() + n, poison<T>());
    }
    Fenced(const Fenced&) = delete;
    Fenced& operator=(const Fenced&) = delete;
    ~Fenced() { spare_.push_back(mapping_); }

    T* data() const { return reinterpret_cast<T*>(mapping_.end - bytes_); }
    T& operator[](Index i) const { return data()[i]; }
    Index size() const { return size_; }
    // Inputs: remembers the contents, and says later whether they are still the same.
    void freeze() { frozen_.assign(mapping_.end - bytes_, mapping_.end); }
    bool unchanged() const {
        return fence_holds() && (bytes_ == 0 || std::memcmp(data(), frozen_.data(), bytes_) == 0);
    }
    bool fence_holds() const {
        return std::all_of(guard(), guard() + kGuard, [](unsigned char byte) { return byte == kGuardByte; });
    }

   private:
    static constexpr std::size_t kGuard = 64;
    static constexpr unsigned char kGuardByte = 0xA5;
    static inline std::vector<Mapping> spare_;
    Index size_;
    std::size_t bytes_;
    Mapping mapping_{nullptr, 0};
    std::vector<unsigned char> frozen_;
    unsigned char* guard() const { return mapping_.end - bytes_ - kGuard; }
};

// A matrix laid out like the engine's: rows padded to cache lines, and `extra` lines more that no kernel may write to.
template <class T>
class Matrix : public Fenced<T> {
   public:
    const Index rows, cols, stride;
    Matrix(Index r, Index c, Index extra = 0)
        : Fenced<T>(r * (padded<T>(c) + extra * line<T>)), rows(r), cols(c), stride(padded<T>(c) + extra * line<T>) {}
    T* row(Index i) const { return this->data() + i * stride; }
    T& at(Index i, Index j) const { return row(i)[j]; }
    template <class F>
    void fill(F f) const {
        for (Index i = 0; i < rows; ++i)
            for (Index j = 0; j < cols; ++j) at(i, j) = static_cast<T>(f(i, j));
    }
    void clear_padding() const {
        for (Index i = 0; i < rows; ++i) std::fill(row(i) + cols, row(i) + padded<T>(cols), T{0});
    }
    // A value that a sum, a maximum or a count of maxima would notice, unlike NaN, which a comparison passes over.
    void pad_with_maximum() const {
        for (Index i = 0; i < rows; ++i)
            std::fill(row(i) + cols, row(i) + padded<T>(cols), *std::max_element(row(i), row(i) + cols));
    }
    // Nothing was written before the array or between the padded end of a row and the next row.
    bool gaps_hold() const {
        const T bad = poison<T>();
        for (Index i = 0; i < rows; ++i)
            for (Index j = padded<T>(cols); j < stride; ++j)
                if (std::memcmp(&at(i, j), &bad, sizeof bad) != 0) return false;
        return this->fence_holds();
    }
    bool padding_is_zero() const {
        for (Index i = 0; i < rows; ++i)
            for (Index j = cols; j < padded<T>(cols); ++j)
                if (!(at(i, j) == 0)) return false;
        return true;
    }
};

// ---- comparisons ----------------------------------------------------------------------------------------------------

// The same bits in rows x cols. Reports the element that is furthest off.
template <class T>
void check_bits(const char* rule, Index rows, Index cols, const T* got, Index got_stride, const T* want,
                Index want_stride) {
    const std::size_t bytes = static_cast<std::size_t>(cols) * sizeof(T);
    bool same = true;
    for (Index i = 0; i < rows && bytes > 0; ++i)
        same = same && std::memcmp(got + i * got_stride, want + i * want_stride, bytes) == 0;
    if (!fails(same, rule)) return;
    Index worst_i = 0, worst_j = 0;
    Real worst = -1;
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < cols; ++j) {
            const T &g = got[i * got_stride + j], &w = want[i * want_stride + j];
            if (std::memcmp(&g, &w, sizeof g) == 0) continue;
            const Real distance = std::fabs(static_cast<Real>(g) - static_cast<Real>(w));
            if (worst >= 0 && !std::isnan(distance) && distance <= worst) continue;
            worst = std::isnan(distance) ? std::numeric_limits<Real>::infinity() : distance;
            worst_i = i;
            worst_j = j;
        }
    std::printf("; worst element (%td, %td): got %.17g, expected %.17g\n", worst_i, worst_j,
                static_cast<double>(got[worst_i * got_stride + worst_j]),
                static_cast<double>(want[worst_i * want_stride + worst_j]));
}

template <class T>
void check_bits(const char* rule, const Matrix<T>& got, const Matrix<T>& want) {
    check_bits(rule, got.rows, got.cols, got.data(), got.stride, want.data(), want.stride);
}

// A value and how far a correct result may be from it, in units of epsilon.
struct Bounded {
    Real value, epsilons;
};

// Below the smallest normal number precision is absolute; a kernel may lose this many of the smallest numbers there.
constexpr Real kTinyUnits = 256;

template <class T>
Real excess(T got, const Bounded& want) {  // <= 1 where `got` is within the bound
    using Limits = std::numeric_limits<T>;
    const T rounded = static_cast<T>(want.value);  // beyond the largest number, infinity is right
    if (std::isnan(want.value)) return std::isnan(got) ? 0 : 1e30L;
    if (std::isinf(rounded) || std::isinf(got)) return got == rounded ? 0 : 1e30L;
    const Real bound =
        want.epsilons * static_cast<Real>(Limits::epsilon()) + kTinyUnits * static_cast<Real>(Limits::denorm_min());
    const Real error = std::fabs(static_cast<Real>(got) - want.value);
    return std::isnan(error) ? 1e30L : error / bound;
}

template <class T>
void check_within(const char* rule, Index n, const T* got, const Bounded* want) {
    Index worst = 0;
    Real most = -1;
    for (Index j = 0; j < n; ++j)
        if (const Real e = excess(got[j], want[j]); e > most) {
            most = e;
            worst = j;
        }
    if (fails(!(most > 1), rule))
        std::printf("; worst element %td: got %.17g, expected %.17Lg, error %.3Lg of the bound\n", worst,
                    static_cast<double>(got[worst]), want[worst].value, most);
}

// ---- instruction sets -----------------------------------------------------------------------------------------------

std::vector<Isa> isas_here() {
    std::vector<Isa> found;
    for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::neon, Isa::baseline})
        if (select_isa(isa)) found.push_back(isa);
    select_isa(found.front());
    return found;
}

bool fused() { return context.isa != Isa::baseline; }

template <class F>
void on_each_isa(F f) {
    for (const Isa isa : isas_here()) {
        select_isa(isa);
        context.isa = isa;
        f();
    }
}

template <class F>
void in_both_types(F f) {
    f(float{});
    f(double{});
}

// A digest of all bits that the sets with FMA agree on, to compare with another machine's; a NaN counts as a NaN.
std::uint64_t digest = 0xcbf29ce484222325u;

template <class T>
void digest_value(T value) {
    std::uint64_t bits = 0;
    if (std::isnan(value))
        bits = ~bits;
    else
        std::memcpy(&bits, &value, sizeof value);
    digest = (digest ^ bits) * 0x100000001b3u;
    digest ^= digest >> 29;
}

// The results of the first instruction set with FMA, in the order of the calls; the later ones must repeat every bit.
template <class T>
class Record {
   public:
    void begin_isa() {
        at_ = 0;
        recording_ = values_.empty();
        on_ = fused();
    }
    void same(Index rows, Index cols, const T* data, Index stride) {
        if (!on_) return;
        for (Index i = 0; i < rows; ++i) {
            const T* row = data + i * stride;
            if (recording_) {
                values_.insert(values_.end(), row, row + cols);
                std::for_each(row, row + cols, digest_value<T>);
            } else {
                check_bits("same bits on every instruction set with FMA", 1, cols, row, cols, values_.data() + at_,
                           cols);
            }
            at_ += cols;
        }
    }
    void same(const Matrix<T>& m) { same(m.rows, m.cols, m.data(), m.stride); }

   private:
    std::vector<T> values_;
    Index at_ = 0;
    bool recording_ = true, on_ = true;
};

template <class T, class F>
void on_each_isa_same_bits(F f) {
    Record<T> record;
    on_each_isa([&] {
        record.begin_isa();
        f(record);
    });
}

// Widths of rows: all short ones, and those around whole numbers of vectors and panels.
std::vector<Index> widths() {
    std::vector<Index> list;
    const Index step = quick ? 3 : 1;
    for (Index n = 1; n <= 70; n += step) list.push_back(n);
    for (const Index n : {127, 128, 129, 191, 192, 193, 255, 256, 257}) list.push_back(n);
    return list;
}

}  // namespace
}  // namespace chainrule
