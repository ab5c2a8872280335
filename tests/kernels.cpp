// SPDX-License-Identifier: MIT
// Tests of the kernels, the thread pool and the generator: no Python, no framework.
//
//   kernels_test [--quick] [--seed=N] [test ...]     all_tests, at the end, lists their names
//
// The oracles share no code with the kernels: exact integers (products), a scalar loop in the promised order (the
// bits of products), long double formulas with a-priori bounds (ops, losses, update rules), published vectors
// (generator). Every array that a kernel sees ends at an unmapped page and begins behind guard bytes. Before a call
// everything in it is NaN but what the contract says is there, so what is read without having been written shows in
// the result.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

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
    print_case(number == SIGALRM ? "does not come back" : "touched memory outside of its arrays");
    std::printf(" (signal %d)\n%ld passed, %ld failed\n", number, passed, failed + 1);
    std::fflush(stdout);
    _exit(1);
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

struct Mapping {
    unsigned char* end;  // the unmapped page begins here
    std::size_t size;    // usable bytes before it
};

Mapping new_mapping(std::size_t size) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    size = std::max<std::size_t>(size, std::size_t{1} << 16);
    size = (size + page - 1) / page * page;
    void* start = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char* end = static_cast<unsigned char*>(start) + size;
    if (start == MAP_FAILED || mprotect(end, page, PROT_NONE) != 0) {
        std::perror("mmap");
        std::exit(2);
    }
    return {end, size};
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
class Tape {
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
    Tape<T> tape;
    on_each_isa([&] {
        tape.begin_isa();
        f(tape);
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

// ---- matrix products on integers ------------------------------------------------------------------------------------

// A (rows x depth), B (depth x cols) and a bias row of integers up to 64, and the product of the first k columns of A
// with the first k rows of B for the depths k asked for. Partial sums stay below 64 * 64 * 1026 + 64 < 2^23: all
// exact.
template <class T>
class Integers {
   public:
    const Index rows, cols;
    const std::vector<Index> depths;
    Integers(Index m, Index n, std::vector<Index> ks) : rows(m), cols(n), depths(std::move(ks)), depth_(depths.back()) {
        Random random = begin_case<T>("integers", m, n, depth_);
        const auto draw = [&](std::vector<T>& to, Index count) {
            for (Index i = 0; i < count; ++i) to.push_back(static_cast<T>(random.integer(-64, 64)));
        };
        draw(a_, rows * depth_);
        draw(b_, depth_ * cols);
        draw(bias_, cols);
        for (Index k = 0; k < depth_; ++k)
            for (Index i = 0; i < rows; ++i) at_.push_back(a_[index(i * depth_ + k)]);
        multiply();
    }
    const T* a(Index i) const { return a_.data() + i * depth_; }  // row i of A
    const T* at(Index k) const { return at_.data() + k * rows; }  // row k of its transpose
    const T* b(Index k) const { return b_.data() + k * cols; }
    const T* bias() const { return bias_.data(); }
    const T* product(std::size_t k, bool bias) const { return products_[2 * k + bias].data(); }

   private:
    Index depth_;
    std::vector<T> a_, at_, b_, bias_;
    std::vector<std::vector<T>> products_;
    static std::size_t index(Index i) { return static_cast<std::size_t>(i); }
    void multiply() {
        std::vector<T> sum(index(rows * cols));
        std::size_t next = 0;
        for (Index k = 0; k <= depth_; ++k) {
            if (depths[next] == k) {
                ++next;
                products_.push_back(sum);
                products_.push_back(sum);
                for (Index i = 0; i < rows * cols; ++i) products_.back()[index(i)] += bias_[index(i % cols)];
            }
            for (Index i = 0; k < depth_ && i < rows; ++i)
                for (Index j = 0; j < cols; ++j) sum[index(i * cols + j)] += a(i)[k] * b(k)[j];
        }
    }
};

// Packs a matrix, given as element(k, j), as the comment at multiply_panels says: panels of four cache lines of
// columns; panel p begins at p * (its width) * rows, and its rows are as wide as its columns, rounded up to a line.
template <class T, class F>
void pack(const Fenced<T>& to, Index rows, Index cols, T padding, F element) {
    constexpr Index panel = 4 * line<T>;
    std::fill(to.data(), to.data() + to.size(), padding);
    for (Index start = 0; start < cols; start += panel) {
        const Index columns = std::min(panel, cols - start), width = padded<T>(columns);
        T* base = to.data() + start * rows;
        for (Index k = 0; k < rows; ++k)
            for (Index j = 0; j < columns; ++j) base[k * width + j] = element(k, start + j);
    }
}

struct Selection {  // which of the shapes m x n x k to try
    Index every;
    bool has(Index m, Index n, Index k) const { return (m * 1681 + n * 41 + k) % every == 0; }
};

// One depth and width of B; all heights of A.
template <class T>
class ProductCase {
   public:
    ProductCase(const Integers<T>& data, std::size_t k_index, Index n)
        : data_(data),
          k_index_(k_index),
          k_(data.depths[k_index]),
          n_(n),
          // NaN in the columns that pad a panel must stay in the columns that pad the result, zeros must give zeros.
          zeros_((n + k_) % 2 == 0),
          plain_(k_ * padded<T>(n)),
          biased_((k_ + 1) * padded<T>(n)),
          b_(k_, n, k_ % 2) {
        const T padding = zeros_ ? T{0} : poison<T>();
        const auto element = [&](Index k, Index j) { return k < k_ ? data.b(k)[j] : data.bias()[j]; };
        pack(plain_, k_, n, padding, element);
        pack(biased_, k_ + 1, n, padding, element);
        b_.fill([&](Index k, Index j) { return data.b(k)[j]; });
        if (zeros_) b_.clear_padding();
        plain_.freeze();
        biased_.freeze();
        b_.freeze();
    }
    ~ProductCase() {
        check(plain_.unchanged() && biased_.unchanged() && b_.unchanged(), "the right-hand matrix is only read");
    }

    void run(Index m) const {
        Matrix<T> a(m, k_, m % 3);  // NaN beyond the k-th column
        for (Index i = 0; i < m; ++i) std::copy_n(data_.a(i), k_, a.row(i));
        a.freeze();
        forward("linear_forward", a, false);
        forward("linear_forward with bias", a, true);
        backward(a);
        check(a.unchanged(), "the left-hand matrix is only read");
        weight(m);
    }

   private:
    const Integers<T>& data_;
    const std::size_t k_index_;
    const Index k_, n_;
    const bool zeros_;
    Fenced<T> plain_, biased_;
    Matrix<T> b_;

    void verify(const Matrix<T>& c, bool bias) const {
        check_bits("exact on integers", c.rows, c.cols, c.data(), c.stride, data_.product(k_index_, bias), data_.cols);
        check(c.gaps_hold(), "nothing written beyond the padded rows");
        if (zeros_) check(c.padding_is_zero(), "zero padding in, zero padding out");
    }
    void forward(const char* name, const Matrix<T>& a, bool bias) const {
        begin_case<T>(name, a.rows, n_, k_);
        const Matrix<T> c(a.rows, n_, n_ % 2);
        kernels<T>().linear_forward(a.rows, k_, n_, bias, a.data(), a.stride, (bias ? biased_ : plain_).data(),
                                    c.data(), c.stride);
        verify(c, bias);
    }
    void backward(const Matrix<T>& a) const {
        begin_case<T>("linear_vjp_input", a.rows, n_, k_);
        const Matrix<T> c(a.rows, n_, (n_ + 1) % 2);
        kernels<T>().linear_vjp_input(a.rows, n_, k_, a.data(), a.stride, plain_.data(), c.data(), c.stride);
        verify(c, false);
    }
    // The batch is the sum's index. A tile is at most a panel wide, so wide matrices are cut as the trainer cuts them.
    void weight(Index m) const {
        Matrix<T> x(k_, m, m % 2);
        for (Index k = 0; k < k_; ++k) std::copy_n(data_.at(k), m, x.row(k));
        x.freeze();
        constexpr Index panel = 4 * line<T>;
        for (Index column = 0; column < std::max<Index>(n_, 1); column += panel) {
            begin_case<T>("linear_vjp_weight", m, n_, k_);
            const Index width = std::min(panel, n_ - column);
            const Matrix<T> tile(m, width);
            kernels<T>().linear_vjp_weight(k_, m, tile.stride, x.data(), x.stride, b_.data() + column, b_.stride,
                                           tile.data());
            check_bits("exact on integers", m, width, tile.data(), tile.stride, data_.product(k_index_, false) + column,
                       data_.cols);
            if (zeros_) check(tile.padding_is_zero(), "zero padding in, zero padding out");
            check(tile.fence_holds(), "nothing written before the tile");
        }
        check(x.unchanged(), "x is only read");
    }
};

template <class T>
void try_products(const Integers<T>& data, const std::vector<Index>& ms, const std::vector<Index>& ns,
                  Selection selection) {
    for (std::size_t k = 0; k < data.depths.size(); ++k)
        for (const Index n : ns) {
            const ProductCase<T> product(data, k, n);
            for (const Index m : ms)
                if (selection.has(m, n, data.depths[k])) product.run(m);
        }
}

std::vector<Index> range(Index first, Index last) {
    std::vector<Index> list;
    for (Index n = first; n <= last; ++n) list.push_back(n);
    return list;
}

// Every combination of tile heights, vector counts and tails: what is off by one anywhere is off by an integer here.
// Size 0 is among them: no rows, no columns, and a sum of nothing, which is the bias and not what the buffer held.
void small_products() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        const Integers<T> data(40, 40, range(0, 40));
        const Isa best = isas_here().front();
        on_each_isa([&] {
            const Index every = quick ? (context.isa == best ? 23 : 61) : 1;
            try_products(data, range(0, 40), range(0, 40), {every});
        });
    });
}

// The edges of panels (64, 32 columns), of tiles of the gradient, and of the blocks that sums are cut into (512).
void large_products() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        const std::vector<Index> edges = {47, 63, 65, 97, 127, 129, 193, 255, 257};
        const Integers<T> odd(257, 257, edges), skinny(19, 257, {1, 2, 511, 512, 513, 1023, 1024, 1025});
        const Integers<T> narrow(257, 3, {1, 2, 3, 511, 512, 513, 1025});
        on_each_isa([&] {
            try_products(odd, edges, edges, {quick ? 31 : 2});
            try_products(skinny, {1, 2, 3, 5, 6, 7, 11, 12, 13, 19}, {1, 2, 15, 17, 31, 33, 64, 65, 257},
                         {quick ? 17 : 1});
            try_products(narrow, {1, 2, 97, 256, 257}, {1, 2, 3}, {quick ? 5 : 1});
        });
    });
}

// ---- the bits of products -------------------------------------------------------------------------------------------

// gemm.hpp promises the order: over k within blocks of 512, blocks added in order, each term by a fused multiply-add
// where the set has one. Being a plain loop per element, it also says that no bit depends on the tile, the number of
// rows or columns, or the instruction set.
template <class T>
T ordered_sum(Index depth, const T* a, const T* b, Index b_stride, T start) {
    T total = 0;
    for (Index first = 0; first == 0 || first < depth; first += 512) {
        T sum = first == 0 ? start : T{0};
        for (Index k = first; k < std::min(depth, first + 512); ++k)
            sum = fused() ? std::fma(a[k], b[k * b_stride], sum) : a[k] * b[k * b_stride] + sum;
        total = first == 0 ? sum : total + sum;
    }
    return total;
}

template <class T>
class OrderedCase {
   public:
    explicit OrderedCase(Index k)
        : k_(k), a_(kRows, k), at_(k, kRows), b_(k + 1, kCols), want_(kRows, kCols), biased_(kRows, kCols) {
        Random random = begin_case<T>("ordered sums", kRows, kCols, k);
        a_.fill([&](Index, Index) { return random.uniform(-1, 1); });
        b_.fill([&](Index, Index) { return random.uniform(-1, 1); });
        at_.fill([&](Index i, Index j) { return a_.at(j, i); });
        b_.clear_padding();
        want_.fill([&](Index i, Index j) { return ordered_sum(k, a_.row(i), &b_.at(0, j), b_.stride, T{0}); });
        biased_.fill([&](Index i, Index j) { return ordered_sum(k, a_.row(i), &b_.at(0, j), b_.stride, b_.at(k, j)); });
    }
    void run(Index m, Index n) const {
        const auto element = [&](Index k, Index j) { return b_.at(k, j); };
        const Fenced<T> plain(k_ * padded<T>(n)), with_bias((k_ + 1) * padded<T>(n));
        pack(plain, k_, n, T{0}, element);
        pack(with_bias, k_ + 1, n, T{0}, element);
        const Index skip = kRows - m;  // the last m rows: they were in other tiles when there were more of them
        // A is read element by element, so its rows may begin anywhere; rows of C need room for whole lines, no more.
        const Index stride = padded<T>(n) + 3;
        const Fenced<T> c(m * stride + 1);
        const auto verify = [&](const char* op, const Matrix<T>& want) {
            begin_case<T>(op, m, n, k_);
            check_bits("the promised order of additions, to the bit", m, n, c.data() + 1, stride, want.row(skip),
                       want.stride);
        };
        kernels<T>().linear_forward(m, k_, n, false, a_.row(skip), a_.stride, plain.data(), c.data() + 1, stride);
        verify("linear_forward", want_);
        kernels<T>().linear_forward(m, k_, n, true, a_.row(skip), a_.stride, with_bias.data(), c.data() + 1, stride);
        verify("linear_forward with bias", biased_);
        kernels<T>().linear_vjp_input(m, n, k_, a_.row(skip), a_.stride, plain.data(), c.data() + 1, stride);
        verify("linear_vjp_input", want_);
        weight(m, n, skip);
    }

   private:
    static constexpr Index kRows = 14, kCols = 139;
    const Index k_;
    const Matrix<T> a_, at_, b_, want_, biased_;

    void weight(Index m, Index n, Index skip) const {
        constexpr Index panel = 4 * line<T>;
        for (Index column = 0; column < n; column += panel) {
            begin_case<T>("linear_vjp_weight", m, n, k_);
            const Index width = std::min(panel, padded<T>(n - column));
            const Fenced<T> tile(m * width);
            kernels<T>().linear_vjp_weight(k_, m, width, at_.data() + skip, at_.stride, b_.data() + column, b_.stride,
                                           tile.data());
            check_bits("the promised order of additions, to the bit", m, std::min(width, n - column), tile.data(),
                       width, want_.row(skip) + column, want_.stride);
        }
    }
};

void ordered_products() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa([] {
            for (const Index k : {1, 2, 31, 511, 512, 513, 1024, 1025, 1100}) {
                const OrderedCase<T> product(k);
                for (Index m = 1; m <= 14; m += quick ? 4 : 1)
                    for (const Index n : {1, 7, 8, 9, 16, 17, 33, 63, 64, 65, 100, 128, 139}) product.run(m, n);
            }
        });
    });
}

// ---- the transposed copy of the weights -----------------------------------------------------------------------------

template <class T>
void transpose_case(Index inputs, Index outputs, Index tile) {
    begin_case<T>("linear_transpose", inputs, outputs, tile);
    constexpr Index panel = 4 * line<T>;
    const auto weight = [](Index i, Index o) { return static_cast<T>(1000 * i + o + 1); };
    Fenced<T> forward(inputs * padded<T>(outputs));
    const Fenced<T> backward(outputs * padded<T>(inputs)), want(outputs * padded<T>(inputs));
    pack(forward, inputs, outputs, poison<T>(), weight);  // padding must neither be copied nor overwritten
    pack(want, outputs, inputs, poison<T>(), [&](Index o, Index i) { return weight(i, o); });
    forward.freeze();
    for (Index column = 0; column < outputs; column += panel)
        for (Index first = 0; first < inputs; first += tile)
            kernels<T>().linear_transpose(inputs, outputs, first, std::min(tile, inputs - first), column,
                                          forward.data() + column * inputs,
                                          padded<T>(std::min(panel, outputs - column)), backward.data());
    check_bits("a plain transposition", 1, want.size(), backward.data(), 0, want.data(), 0);
    check(forward.unchanged() && backward.fence_holds(), "the master copy is only read, nothing is written outside");
}

void transposes() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa([] {
            const Index step = quick ? 3 : 1;
            for (const Index tile : {16, 48, 64, 1000})  // 48 is the trainer's; 1000 is the whole matrix
                for (Index inputs = 1; inputs <= 70; inputs += step)
                    for (Index outputs = 1; outputs <= 70; outputs += step) transpose_case<T>(inputs, outputs, tile);
            for (const Index inputs : {127, 128, 129, 200})
                for (const Index outputs : {96, 129, 200}) transpose_case<T>(inputs, outputs, 48);
        });
    });
}

// ---- ops: the oracle ------------------------------------------------------------------------------------------------

struct OpRow {
    const char* name;
    Op op;
    Saves saves;
    bool rowwise;
    int index() const { return static_cast<int>(op); }
};
constexpr OpRow all_ops[] = {
#define CHAINRULE_ELEMENTWISE(name, type, saves) {#name, Op::name, Saves::saves, false},
#define CHAINRULE_ROWWISE(name, type, saves) {#name, Op::name, Saves::saves, true},
#include "ops/ops.def"
};

double parameter_of(Op op) { return op == Op::leaky_relu ? 0.25 : op == Op::elu ? 1.5 : 0; }

Real sigmoid(Real x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
Real normal_cdf(Real x) { return std::erfc(-x / std::sqrt(Real{2})) / 2; }
Real normal_density(Real x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(Real{-1})); }
Real times(Real x, Real factor) { return factor == 0 ? 0 : x * factor; }  // the limit where the factor vanishes faster

// How many epsilons a result may be off, relative to its size: what the header of each op states. Without FMA a step
// of a polynomial rounds twice, each time something that is at most half as large as the result: 4 more cover that.
// In gelu the rounding error of x² then goes uncorrected: x²/2 units in the exponent of e^(-x²/2).
Real stated_epsilons(Op op, Real x) {
    const Real extra = fused() ? 0 : 4;
    switch (op) {
        case Op::sigmoid: return 3 + extra;
        case Op::tanh: return 4 + extra;
        case Op::elu: return 3 + extra;
        case Op::gelu: return 9 + extra + (fused() || std::isinf(x) ? 0 : x * x / 2);
        case Op::silu: return 4 + extra;
        case Op::softplus: return 3 + extra;
        default: return 0.5L;  // at most one rounding
    }
}

Real forward_value(Op op, Real x, Real p) {
    switch (op) {
        case Op::sigmoid: return sigmoid(x);
        case Op::tanh: return std::tanh(x);
        case Op::relu: return x > 0 ? x : 0;
        case Op::leaky_relu: return x > 0 ? x : p * x;
        case Op::elu: return x > 0 ? x : p * std::expm1(x);
        case Op::gelu: return times(x, normal_cdf(x));
        case Op::silu: return times(x, sigmoid(x));
        case Op::softplus: return std::fmax(x, Real{0}) + std::log1p(std::exp(-std::fabs(x)));
        default: return x;
    }
}

// The derivative from what the op saves, with its error: sums bound their terms, which may cancel.
Bounded derivative_of(Op op, Real saved, Real p) {
    const Real extra = fused() ? 0 : 4, s = saved;
    switch (op) {
        case Op::sigmoid: return {s * (1 - s), 2 * s * (1 - s)};
        case Op::tanh: return {(1 - s) * (1 + s), 2 * (1 - s) * (1 + s)};
        case Op::relu: return {s > 0 ? 1.0L : 0, 0};
        case Op::leaky_relu: return {s > 0 ? 1 : p, 0};
        case Op::elu: return {s > 0 ? 1 : s + p, s > 0 ? 0 : s + p};
        case Op::gelu: {  // the density's exponent is rounded twice
            const Real tail = times(s, normal_density(s)), square = tail == 0 ? 0 : s * s;
            return {normal_cdf(s) + tail, (10 + extra + square) * (normal_cdf(s) + std::fabs(tail))};
        }
        case Op::silu: {
            const Real y = sigmoid(s), tail = times(s, y * sigmoid(-s));
            return {y + tail, (9 + extra) * (y + std::fabs(tail))};
        }
        case Op::softplus: return {sigmoid(s), (3 + extra) * sigmoid(s)};
        default: return {1, 0};
    }
}

// A sum of n terms is taken in 16 (8) lanes, then in halves: so many roundings on the way of each term.
template <class T>
Real roundings(Index n) {
    return static_cast<Real>(padded<T>(n) / line<T>) + 4;
}

using Row = std::vector<Bounded>;

// softmax and its logarithm. An error of the exponent x - m is a relative one of e^(x - m). What the other terms add to
// the 1 of the largest is bounded on its own, as `rest`: the digits of confident predictions are in it.
struct SoftmaxRow {
    Row p, logs;
    Bounded rest{0, 0};
};

template <class T>
SoftmaxRow softmax_row(Index n, const T* x) {
    const Index largest = std::max_element(x, x + n) - x;
    const Real m = static_cast<Real>(x[largest]), extra = fused() ? 0 : 4;
    SoftmaxRow row;
    Real moment = 0;
    for (Index j = 0; j < n; ++j) {
        const Real e = j == largest ? 0 : std::exp(x[j] - m);
        row.rest.value += e;
        moment += times(m - x[j], e);
    }
    const Real rest = row.rest.value, spread = roundings<T>(n) + 2 + extra, log_total = std::log1p(rest);
    row.rest.epsilons = moment + rest * spread;
    const Real sum_error = rest > 0 ? moment / rest + spread : 0;  // relative
    for (Index j = 0; j < n; ++j) {
        const Real below = x[j] - m, y = std::exp(below) / (1 + rest);
        row.p.push_back({y, y * (times(-below, y) / (y > 0 ? y : 1) + row.rest.epsilons / (1 + rest) + 3 + extra)});
        row.logs.push_back({below - log_total, log_total * (sum_error + 4 + extra) - 2 * below});
    }
    return row;
}

template <class T>
Row forward_row(const OpRow& op, Index n, const T* x) {
    if (op.op == Op::softmax) return softmax_row(n, x).p;
    if (op.op == Op::log_softmax) return softmax_row(n, x).logs;
    Row row;
    for (Index j = 0; j < n; ++j) {
        const Real y = forward_value(op.op, x[j], parameter_of(op.op));
        row.push_back({y, std::fabs(y) * stated_epsilons(op.op, x[j])});
    }
    return row;
}

// d J for the row d (vjp), or J d (jvp).
template <class T>
Row derivative_row(const OpRow& op, bool reverse, Index n, const T* d, const T* saved) {
    const Real extra = fused() ? 0 : 4, depth = roundings<T>(n) + 4 + extra;
    Row row;
    Real inner = 0, inner_size = 0;
    for (Index j = 0; j < n; ++j) {
        const Real y = saved[j], dj = d[j], p = op.op == Op::softmax ? y : std::exp(y);
        const Real term = op.op == Op::log_softmax && reverse ? dj : p * dj;
        inner += term;
        inner_size += std::fabs(term);
        if (!op.rowwise) {
            const Bounded g = derivative_of(op.op, y, parameter_of(op.op));
            row.push_back({dj * g.value, std::fabs(dj) * (g.epsilons + std::fabs(g.value))});
        } else if (op.op == Op::softmax) {
            row.push_back({p * dj, p * (2 * std::fabs(dj))});
        } else {
            row.push_back({dj, 2 * std::fabs(dj)});
        }
    }
    for (Index j = 0; op.rowwise && j < n; ++j) {
        const Real y = saved[j];
        const Real factor = op.op == Op::softmax ? y : reverse ? std::exp(y) : 1;
        Bounded& b = row[static_cast<std::size_t>(j)];
        b.value -= factor * inner;
        b.epsilons += factor * depth * inner_size;
    }
    return row;
}

// ---- ops: the tests -------------------------------------------------------------------------------------------------

constexpr Index kRows = 3;

// Mostly what networks see, some of it far out, and (`limits`) the values at which formulas break.
template <class T>
T draw_input(Random& random, bool limits) {
    using L = std::numeric_limits<T>;
    const T special[] = {0,           -T{0},           L::infinity(),    -L::infinity(), L::max(),
                         L::lowest(), L::denorm_min(), -L::denorm_min(), L::min(),       -L::min()};
    switch (random.integer(0, 15)) {
        case 0: return limits ? special[random.integer(0, 9)] : T{0};
        case 1: return static_cast<T>(random.uniform(-1e-4, 1e-4));
        case 2:
        case 3: return static_cast<T>(random.uniform(-85, 85));
        default: return static_cast<T>(random.uniform(-6, 6));
    }
}

template <class T>
void run_map(const OpRow& op, const Matrix<T>& x, const Matrix<T>& y) {
    kernels<T>().forward[op.index()](x.rows, x.cols, x.data(), x.stride, y.data(), y.stride,
                                     static_cast<T>(parameter_of(op.op)));
}

template <class T>
void run_derivative(const OpRow& op, bool reverse, const Matrix<T>& d, const Matrix<T>& saved, const Matrix<T>& out) {
    const auto kernel = reverse ? kernels<T>().vjp[op.index()] : kernels<T>().jvp[op.index()];
    kernel(d.rows, d.cols, d.data(), d.stride, saved.data(), saved.stride, out.data(), out.stride,
           static_cast<T>(parameter_of(op.op)));
}

template <class T>
void forward_case(const OpRow& op, Index cols, Tape<T>& tape) {
    Random random = begin_case<T>(op.name, kRows, cols);
    Matrix<T> x(kRows, cols);  // its padding is NaN
    const Matrix<T> y(kRows, cols, 1);
    x.fill([&](Index, Index) { return draw_input<T>(random, !op.rowwise); });
    x.freeze();
    run_map(op, x, y);
    for (Index i = 0; i < kRows; ++i)
        check_within("forward agrees with the formula", cols, y.row(i), forward_row(op, cols, x.row(i)).data());
    check(x.unchanged(), "forward only reads x");
    check(y.gaps_hold(), "forward writes nothing beyond the padded rows");
    tape.same(y);
    x.pad_with_maximum();
    run_map(op, x, x);
    check_bits("the same in place and with other padding", x, y);
}

template <class T>
void derivative_case(const OpRow& op, bool reverse, Index cols, Tape<T>& tape) {
    Random random = begin_case<T>(op.name, kRows, cols, reverse);
    const char* name = reverse ? "vjp agrees with the formula" : "jvp agrees with the formula";
    Matrix<T> d(kRows, cols, 1), saved(kRows, cols);
    const Matrix<T> out(kRows, cols, 2);
    d.fill([&](Index, Index) { return random.uniform(-2, 2); });
    saved.fill([&](Index, Index) { return draw_input<T>(random, !op.rowwise); });
    if (op.saves == Saves::output) run_map(op, saved, saved);
    d.freeze();
    saved.freeze();
    run_derivative(op, reverse, d, saved, out);
    for (Index i = 0; i < kRows; ++i)
        check_within(name, cols, out.row(i), derivative_row(op, reverse, cols, d.row(i), saved.row(i)).data());
    check(d.unchanged() && saved.unchanged(), "a derivative only reads its inputs");
    check(out.gaps_hold(), "a derivative writes nothing beyond the padded rows");
    tape.same(out);
    d.pad_with_maximum();
    saved.pad_with_maximum();
    run_derivative(op, reverse, d, saved, d);
    check_bits("the same in place and with other padding", d, out);
}

// The padding of every cotangent stays zero, since the gradient of the weights' padding is read off it. The engine
// runs vjp in place. What is saved has in its padding what forward passes leave there: g(0), and a 1 where a bias
// multiplies it.
template <class T>
void padding_case(const OpRow& op, Index cols) {
    Random random = begin_case<T>(op.name, kRows, cols);
    const Matrix<T> d(kRows, cols), saved(kRows, cols);
    d.fill([&](Index, Index) { return random.uniform(-2, 2); });
    saved.fill([&](Index, Index) { return random.uniform(-2, 2); });
    d.clear_padding();
    saved.clear_padding();
    for (Index i = 0; i < kRows && cols < saved.stride; ++i) saved.at(i, cols) = 1;
    if (op.saves == Saves::output) run_map(op, saved, saved);
    for (Index i = 0; i < kRows && cols < saved.stride; ++i) saved.at(i, cols) = 1;
    run_derivative(op, true, d, saved, d);
    check(d.padding_is_zero(), "vjp in place keeps zero padding zero");
}

void ops_agree() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa_same_bits<T>([](Tape<T>& tape) {
            for (const OpRow& op : all_ops)
                for (const Index cols : widths()) {
                    forward_case(op, cols, tape);
                    derivative_case(op, true, cols, tape);
                    derivative_case(op, false, cols, tape);
                    padding_case<T>(op, cols);
                }
        });
    });
}

// NaN in lane j and nowhere else: out_j is NaN, and elementwise ops leave every other lane as it was. A maximum with
// its operands the wrong way round swallows NaN; a wrong mask in the tail swallows it at some widths only.
template <class T>
void check_one_nan(const OpRow& op, const char* rule, Index j, const Matrix<T>& got, const Matrix<T>& clean) {
    bool others = true;
    for (Index l = 0; l < got.cols && !op.rowwise; ++l)
        others = others && (l == j || std::memcmp(&got.at(0, l), &clean.at(0, l), sizeof(T)) == 0);
    check(std::isnan(got.at(0, j)) && others, rule);
}

template <class T>
void nan_case(const OpRow& op, Index cols) {
    Random random = begin_case<T>(op.name, 1, cols);
    const Matrix<T> x(1, cols), saved(1, cols), d(1, cols), y(1, cols), dx(1, cols), dy(1, cols), got(1, cols);
    x.fill([&](Index, Index) { return random.uniform(-3, 3); });
    d.fill([&](Index, Index) { return random.uniform(-3, 3); });
    run_map(op, x, y);
    std::copy_n((op.saves == Saves::output ? y : x).data(), cols, saved.data());
    run_derivative(op, true, d, saved, dx);
    run_derivative(op, false, d, saved, dy);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (Index j = 0; j < cols; ++j) {
        const T xj = std::exchange(x.at(0, j), nan);
        run_map(op, x, got);
        check_one_nan(op, "forward passes NaN on", j, got, y);
        x.at(0, j) = xj;
        const T dj = std::exchange(d.at(0, j), nan);
        run_derivative(op, true, d, saved, got);
        check_one_nan(op, "vjp passes a NaN cotangent on", j, got, dx);
        run_derivative(op, false, d, saved, got);
        check_one_nan(op, "jvp passes a NaN tangent on", j, got, dy);
        d.at(0, j) = dj;
        if (op.saves == Saves::none) continue;
        const T sj = std::exchange(saved.at(0, j), nan);
        run_derivative(op, true, d, saved, got);
        check_one_nan(op, "vjp passes a NaN activation on", j, got, dx);
        run_derivative(op, false, d, saved, got);
        check_one_nan(op, "jvp passes a NaN activation on", j, got, dy);
        saved.at(0, j) = sj;
    }
}

void ops_nan() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa([] {
            for (const OpRow& op : all_ops)
                for (Index cols = 1; cols <= 70; cols += quick ? 5 : 1) nan_case<T>(op, cols);
        });
    });
}

// What rounding bounds cannot see: kinks, signs of zero, rows at infinity.
template <class T>
void limit_cases() {
    const T inf = std::numeric_limits<T>::infinity(), zero = 0;
    const auto one = [](Op op, T x) {
        const OpRow& row = all_ops[static_cast<int>(op)];
        begin_case<T>(row.name, 1, 1);
        const Matrix<T> in(1, 1), out(1, 1);
        in.at(0, 0) = x;
        run_map(row, in, out);
        return out.at(0, 0);
    };
    const auto slope = [](Op op, T saved) {
        const OpRow& row = all_ops[static_cast<int>(op)];
        begin_case<T>(row.name, 1, 1);
        const Matrix<T> d(1, 1), in(1, 1), out(1, 1);
        d.at(0, 0) = 1;
        in.at(0, 0) = saved;
        run_derivative(row, true, d, in, out);
        return out.at(0, 0);
    };
    check(slope(Op::relu, zero) == 0 && slope(Op::relu, -zero) == 0, "relu'(0) = relu'(-0) = 0");
    check(slope(Op::leaky_relu, zero) == T(0.25) && slope(Op::leaky_relu, -zero) == T(0.25),
          "leaky_relu'(0) is the slope");
    check(slope(Op::elu, zero) == T(1.5), "elu'(0) = alpha");
    check(one(Op::tanh, -zero) == 0 && std::signbit(one(Op::tanh, -zero)), "tanh keeps the sign of zero");
    check(one(Op::sigmoid, -zero) == T(0.5) && one(Op::sigmoid, zero) == T(0.5), "sigmoid(0) = 1/2");
    check(one(Op::gelu, -inf) == 0 && one(Op::silu, -inf) == 0 && one(Op::softplus, -inf) == 0, "limits at -inf");
    check(one(Op::elu, -inf) == T(-1.5) && one(Op::tanh, -inf) == -1 && one(Op::sigmoid, -inf) == 0, "limits at -inf");
}

// softmax of rows with infinite elements: one +inf is one-hot wherever it stands, all -inf is uniform.
template <class T>
void infinite_rows(Index cols) {
    begin_case<T>("softmax", cols + 1, cols);
    const T inf = std::numeric_limits<T>::infinity();
    const Matrix<T> x(cols + 1, cols), y(cols + 1, cols), logs(cols + 1, cols);
    x.fill([&](Index i, Index j) { return i == cols ? -inf : i == j ? inf : static_cast<T>(j % 5); });
    run_map(all_ops[static_cast<int>(Op::softmax)], x, y);
    run_map(all_ops[static_cast<int>(Op::log_softmax)], x, logs);
    bool hot = true, uniform = true;
    for (Index i = 0; i < cols; ++i)
        for (Index j = 0; j < cols; ++j) hot = hot && y.at(i, j) == (i == j) && logs.at(i, j) == (i == j ? T{0} : -inf);
    for (Index j = 0; j < cols; ++j) uniform = uniform && y.at(cols, j) == 1 / static_cast<T>(cols);
    check(hot, "a row with one +inf is one-hot");
    check(uniform, "a row of -inf is uniform");
}

void ops_limits() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa([] {
            limit_cases<T>();
            for (Index cols = 1; cols <= 70; ++cols) infinite_rows<T>(cols);
        });
    });
}

// ---- losses ---------------------------------------------------------------------------------------------------------

struct LossRow {
    const char* name;
    LossOp op;
};
constexpr LossRow all_losses[] = {
#define CHAINRULE_LOSS(name, type) {#name, LossOp::name},
#include "ops/ops.def"
};

double parameter_of(LossOp op) { return op == LossOp::huber ? 0.75 : op == LossOp::pinball ? 0.3 : 0; }

bool is_mean(LossOp op) { return op != LossOp::least_squares && op != LossOp::cross_entropy; }

struct Term {  // of one output: value and derivative
    Bounded value, grad;
};

Term loss_term(LossOp op, Real f, Real y, Real p) {
    const Real d = f - y, a = std::fabs(d), more = fused() ? 0 : 4;
    switch (op) {
        case LossOp::least_squares: return {{d * d / 2, 2 * d * d}, {d, 2 * a}};
        case LossOp::mse: return {{d * d, 3 * d * d}, {2 * d, 4 * a}};
        case LossOp::mae: return {{a, a}, {d > 0 ? 1.0L : d < 0 ? -1.0L : 0, 0}};
        case LossOp::huber:
            if (a <= p) return {{d * d / 2, 2 * d * d}, {d, a}};
            return {{p * (a - p / 2), 4 * p * a}, {d > 0 ? p : -p, 0}};
        case LossOp::pinball: {
            const Real slope = d < 0 ? p : d > 0 ? p - 1 : 0;
            return {{-slope * d, 3 * a}, {-slope, 1}};
        }
        case LossOp::poisson: {
            const Real rate = std::exp(f), product = times(f, y);
            return {{rate - product, (2 + more) * (rate + std::fabs(product))}, {rate - y, (2 + more) * (rate + y)}};
        }
        default: {  // logistic
            const Real rest = std::log1p(std::exp(-std::fabs(f)));
            const Real right = rest + std::fmax(-f, Real{0}), wrong = rest + std::fmax(f, Real{0});
            const Real value = times(right, y) + times(wrong, 1 - y);
            const Real grad = y == 1 ? -sigmoid(-f) : sigmoid(f) - y;  // at the ends of [0, 1] every digit counts
            return {{value, (6 + more) * value}, {grad, (4 + more) * (y == 1 ? sigmoid(-f) : sigmoid(f) + y)}};
        }
    }
}

// Gaussian negative log-likelihood of output j of k: writes both derivatives, returns the value.
Bounded gaussian_term(Real mean, Real s, Real y, Bounded& dmean, Bounded& ds) {
    const Real d = mean - y, precision = std::exp(-s), q = d * d * precision, more = fused() ? 0 : 4;
    dmean = {d * precision, (4 + more) * std::fabs(d) * precision};
    ds = {(1 - q) / 2, (4 + more) * (1 + q)};
    return {(s + q) / 2, (4 + more) * (std::fabs(s) + q)};
}

// Cross-entropy with probabilities y, or (y null) a label.
template <class T>
Bounded cross_entropy_row(Index n, const T* f, const T* y, std::int64_t label, Row& grad) {
    const SoftmaxRow s = softmax_row(n, f);
    const Real more = roundings<T>(n) + 4;
    const auto target = [&](std::size_t j) {
        return y ? static_cast<Real>(y[j]) : static_cast<Real>(static_cast<Index>(j) == label);
    };
    Real mass = 0;
    Bounded value{0, 0};
    for (std::size_t j = 0; j < s.p.size(); ++j) mass += target(j);
    for (std::size_t j = 0; j < s.p.size(); ++j) {
        value.value -= times(s.logs[j].value, target(j));
        value.epsilons += times(s.logs[j].epsilons - (y ? more : 1) * s.logs[j].value, target(j));
        const Real p = s.p[j].value * mass;
        grad[j] = {p - target(j), s.p[j].epsilons * mass + (more + 2) * (p + target(j))};
    }
    if (!y && f[label] == *std::max_element(f, f + n)) {  // p - 1 is minus the others' share, and as exact as that
        const Real share = s.rest.value / (1 + s.rest.value);
        grad[static_cast<std::size_t>(label)] = {-share, s.rest.epsilons * 2 / (1 + s.rest.value) + 4 * share};
    }
    return value;
}

// One row of a loss: derivatives into `grad`, not yet multiplied by weight and scale; returns the value.
template <class T>
Bounded loss_row(LossOp op, Index n, const T* f, const T* y, std::int64_t label, Row& grad) {
    grad.assign(static_cast<std::size_t>(n), Bounded{0, 0});
    if (op == LossOp::cross_entropy) return cross_entropy_row(n, f, y, label, grad);
    const bool pairs = op == LossOp::gaussian_nll;
    const Index count = pairs ? n / 2 : n;
    const Real share = is_mean(op) ? 1 / static_cast<Real>(count) : 1, more = roundings<T>(n) + 4;
    Real value = 0, bound = 0;
    for (Index j = 0; j < count; ++j) {
        Bounded& g = grad[static_cast<std::size_t>(j)];
        Bounded term;
        if (pairs) {
            term = gaussian_term(f[j], f[count + j], y[j], g, grad[static_cast<std::size_t>(count + j)]);
        } else {
            const Term t = loss_term(op, f[j], y[j], parameter_of(op));
            term = t.value;
            g = t.grad;
        }
        value += term.value;
        bound += term.epsilons + more * std::fabs(term.value);
    }
    for (Bounded& g : grad) g = {g.value * share, (g.epsilons + 2 * std::fabs(g.value)) * share};
    return {value * share, (bound + 2 * std::fabs(value)) * share};
}

// The arrays of one call.
template <class T>
struct LossCase {
    const LossRow& loss;
    const bool labelled;
    Matrix<T> f, y, df;
    Fenced<T> weight, values;
    Fenced<std::int64_t> labels;

    LossCase(const LossRow& row, bool with_labels, Index rows, Index cols, Random& random)
        : loss(row),
          labelled(with_labels),
          f(rows, cols),
          y(rows, row.op == LossOp::gaussian_nll ? cols / 2 : cols, 1),
          df(rows, cols, 1),
          weight(rows),
          values(rows),
          labels(rows) {
        f.fill(
            [&](Index, Index) { return random.integer(0, 9) == 0 ? random.uniform(-40, 40) : random.uniform(-3, 3); });
        y.fill([&](Index, Index) { return draw_target(random); });
        for (Index i = 0; i < rows; ++i) {
            weight[i] = static_cast<T>(random.uniform(0.1, 2));
            labels[i] = random.integer(0, cols - 1);
        }
    }
    double draw_target(Random& random) const {
        switch (loss.op) {
            case LossOp::poisson: return static_cast<double>(random.integer(0, 5));
            case LossOp::logistic:
            case LossOp::cross_entropy:
                return random.integer(0, 2) == 0 ? static_cast<double>(random.integer(0, 1)) : random.uniform(0, 1);
            default: return random.uniform(-3, 3);
        }
    }
    void freeze() {
        f.freeze();
        y.freeze();
        weight.freeze();
        labels.freeze();
    }
    bool unchanged() const { return f.unchanged() && y.unchanged() && weight.unchanged() && labels.unchanged(); }
    void run(bool weighted, T scale) const {
        const Targets<T> targets = {labelled ? labels.data() : nullptr, labelled ? nullptr : y.data(),
                                    labelled ? 0 : y.stride};
        kernels<T>().loss[static_cast<int>(loss.op)](f.rows, f.cols, f.data(), f.stride, targets,
                                                     weighted ? weight.data() : nullptr, scale, values.data(),
                                                     df.data(), df.stride, static_cast<T>(parameter_of(loss.op)));
    }
};

template <class T>
void loss_case(const LossRow& loss, bool labelled, bool weighted, Index cols, Tape<T>& tape) {
    Random random = begin_case<T>(loss.name, kRows, cols, 2 * labelled + weighted);
    LossCase<T> c(loss, labelled, kRows, cols, random);
    c.freeze();
    const T scale = static_cast<T>(0.3);
    c.run(weighted, scale);
    for (Index i = 0; i < kRows; ++i) {
        Row grad;
        const Bounded value =
            loss_row(loss.op, cols, c.f.row(i), labelled ? nullptr : c.y.row(i), labelled ? c.labels[i] : -1, grad);
        check_within("value agrees with the formula", 1, &c.values[i], &value);
        const Real factor = static_cast<Real>(scale) * (weighted ? static_cast<Real>(c.weight[i]) : 1);
        for (Bounded& g : grad) g = {g.value * factor, (g.epsilons + 3 * std::fabs(g.value)) * factor};
        check_within("gradient agrees with the formula", cols, c.df.row(i), grad.data());
    }
    check(c.unchanged(), "a loss only reads its inputs");
    check(c.df.gaps_hold() && c.values.fence_holds(), "a loss writes nothing beyond its outputs");
    check(c.df.padding_is_zero(), "the padding of the cotangent is zero");
    tape.same(1, kRows, c.values.data(), kRows);
    tape.same(c.df);
    const std::vector<T> values(c.values.data(), c.values.data() + kRows), df(c.df.data(), c.df.data() + c.df.size());
    c.f.pad_with_maximum();
    c.y.pad_with_maximum();
    c.run(weighted, scale);
    check_bits("the same value with other padding", 1, kRows, c.values.data(), 0, values.data(), 0);
    check_bits("the same gradient with other padding", 1, c.df.size(), c.df.data(), 0, df.data(), 0);
}

// NaN in one output, then in one target: the value is NaN, so is the derivative there; where outputs do not interact no
// other derivative changes.
template <class T>
void loss_nan_case(const LossRow& loss, bool labelled, Index cols) {
    Random random = begin_case<T>(loss.name, 1, cols, labelled);
    const LossCase<T> c(loss, labelled, 1, cols, random);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    c.y.at(0, c.y.cols - 1) = T(0.5);  // probabilities that are all 0 ask for nothing
    c.run(false, 1);
    const std::vector<T> clean(c.df.data(), c.df.data() + cols);
    const auto poisoned = [&](T& place, Index j, const char* rule) {
        const T old = std::exchange(place, nan);
        c.run(false, 1);
        bool good = std::isnan(c.values[0]) && std::isnan(c.df[j]);
        const Index partner = loss.op == LossOp::gaussian_nll ? (j + cols / 2) % cols : j;
        for (Index l = 0; l < cols && loss.op != LossOp::cross_entropy; ++l)
            good = good && (l == j || l == partner ||
                            std::memcmp(&c.df[l], &clean[static_cast<std::size_t>(l)], sizeof(T)) == 0);
        check(good, rule);
        place = old;
    };
    for (Index j = 0; j < cols; ++j) poisoned(c.f[j], j, "NaN in one output shows in value and gradient");
    for (Index j = 0; j < c.y.cols && !labelled; ++j)
        poisoned(c.y[j], j, "NaN in one target shows in value and gradient");
}

template <class F>
void over_losses(F f) {
    for (const LossRow& loss : all_losses)
        for (const bool labelled : {false, true})
            if (!labelled || loss.op == LossOp::cross_entropy)
                f(loss, labelled, loss.op == LossOp::gaussian_nll ? 2 : 1);
}

void losses() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa_same_bits<T>([](Tape<T>& tape) {
            over_losses([&](const LossRow& loss, bool labelled, Index even) {
                for (const Index cols : widths())
                    for (const bool weighted : {false, true}) loss_case(loss, labelled, weighted, cols * even, tape);
                for (Index cols = 1; cols <= 70; cols += quick ? 5 : 1) loss_nan_case<T>(loss, labelled, cols * even);
            });
        });
    });
}

// Certain and right costs nothing, certain and wrong costs infinity; neither is NaN.
template <class T>
void loss_limit_cases() {
    const T inf = std::numeric_limits<T>::infinity();
    const auto value = [](LossOp op, T f, T y) {
        Random random = begin_case<T>(all_losses[static_cast<int>(op)].name, 1, 1);
        const LossCase<T> c(all_losses[static_cast<int>(op)], false, 1, 1, random);
        c.f[0] = f;
        c.y[0] = y;
        c.run(false, 1);
        return std::array<T, 2>{c.values[0], c.df[0]};
    };
    using Pair = std::array<T, 2>;
    check(value(LossOp::logistic, inf, 1) == Pair{0, 0} && value(LossOp::logistic, -inf, 0) == Pair{0, 0},
          "logistic: sure and right");
    check(value(LossOp::logistic, inf, 0) == Pair{inf, 1} && value(LossOp::logistic, -inf, 1) == Pair{inf, -1},
          "logistic: sure and wrong");
    check(value(LossOp::logistic, inf, T(0.5))[0] == inf, "logistic: sure where nothing is sure");
    check(value(LossOp::poisson, inf, 3)[0] == inf && value(LossOp::poisson, -inf, 0) == Pair{0, 0},
          "poisson at infinity");
    check(value(LossOp::poisson, -inf, 3)[0] == inf, "poisson: a rate of 0 and a count");
    for (const LossOp op : {LossOp::mae, LossOp::huber, LossOp::pinball, LossOp::mse, LossOp::least_squares})
        check(value(op, T(0.5), T(0.5)) == Pair{0, 0}, "value and gradient 0 where the prediction is right");
}

void loss_limits() {
    in_both_types([](auto zero) { on_each_isa([] { loss_limit_cases<decltype(zero)>(); }); });
}

// ---- update rules ---------------------------------------------------------------------------------------------------

struct RuleCase {
    const char* name;
    OptimizerSettings settings;
    std::int64_t step;
};
constexpr RuleCase all_rules[] = {
    {"sgd", {OptimizerOp::sgd, {0, 0, 0, 0}}, 5},
    {"sgd with decay", {OptimizerOp::sgd, {0, 0, 0, 0.01}}, 5},
    {"sgd with momentum", {OptimizerOp::sgd, {0.9, 0.1, 0, 0.01}}, 5},
    {"sgd with momentum, first step", {OptimizerOp::sgd, {0.9, 0.1, 0, 0}}, 1},
    {"sgd, Nesterov", {OptimizerOp::sgd, {0.9, 0, 1, 0.01}}, 5},
    {"adam", {OptimizerOp::adam, {0.9, 0.999, 1e-8, 0}}, 1},
    {"adam, slow, first step", {OptimizerOp::adam, {0.999, 0.9999, 1e-8, 0}}, 1},
    {"adam with decay", {OptimizerOp::adam, {0.8, 0.99, 1e-3, 0.01}}, 7},
    {"adamw", {OptimizerOp::adamw, {0.9, 0.999, 1e-8, 0.01}}, 1000},
    {"rmsprop", {OptimizerOp::rmsprop, {0.99, 1e-8, 0, 0, 0}}, 3},
    {"rmsprop with momentum", {OptimizerOp::rmsprop, {0.9, 1e-3, 0.01, 0.9, 0}}, 3},
    {"rmsprop, slow, first step", {OptimizerOp::rmsprop, {0.999, 1e-8, 0, 0, 0}}, 1},
    {"rmsprop, centered", {OptimizerOp::rmsprop, {0.9, 1e-3, 0, 0.5, 1}}, 3},
};
constexpr double kRate = 0.05;

// One parameter after a step. PyTorch's rules in long double, on the hyper-parameters as the user gave them: were
// 1 - beta taken from a beta rounded to float32, it would be off by beta / (1 - beta) epsilons.
struct Updated {
    Bounded w, slot[kSlots];
};

Bounded exactly(Real value) { return {value, 0}; }
Bounded add(Bounded a, Bounded b) {
    return {a.value + b.value, a.epsilons + b.epsilons + std::fabs(a.value) + std::fabs(b.value)};
}
Bounded scaled(Bounded a, Real factor) {  // the factor is rounded, then the product
    return {a.value * factor, (a.epsilons + 2 * std::fabs(a.value)) * std::fabs(factor)};
}
Bounded square(Bounded a) { return {a.value * a.value, 2 * std::fabs(a.value) * a.epsilons + a.value * a.value}; }
Bounded root(Bounded a) {
    const Real r = std::sqrt(a.value);
    return {r, r + (r > 0 ? a.epsilons / (2 * r) : 0)};
}
Bounded over(Bounded a, Bounded b) {
    const Real q = a.value / b.value;
    return {q, (a.epsilons + std::fabs(q) * b.epsilons) / std::fabs(b.value) + std::fabs(q)};
}
Bounded mix(Real mean, Real keep, Bounded g) { return add(scaled(exactly(mean), keep), scaled(g, 1 - keep)); }
// The same as mean + (1 - keep)(g - mean), PyTorch's lerp: the difference is rounded before it is scaled.
Bounded lerp(Real mean, Real keep, Bounded g) {
    Bounded moved = mix(mean, keep, g);
    moved.epsilons += (1 - keep) * (std::fabs(g.value) + std::fabs(mean));
    return moved;
}

template <class T>
Updated sgd_oracle(const OptimizerSettings& s, std::int64_t step, T w, Bounded g, const T* slot) {
    const auto [momentum, dampening, nesterov, decay, unused] = s.values;
    Updated u{};
    g = add(g, scaled(exactly(w), decay));
    if (momentum != 0) {
        u.slot[0] = add(scaled(exactly(slot[0]), momentum), scaled(g, step == 1 ? 1 : 1 - dampening));
        g = nesterov != 0 ? add(g, scaled(u.slot[0], momentum)) : u.slot[0];
    }
    u.w = add(exactly(w), scaled(g, -kRate));
    return u;
}

template <class T>
Updated adam_oracle(const OptimizerSettings& s, std::int64_t step, T w, Bounded g, const T* slot) {
    const auto [beta1, beta2, eps, decay, unused] = s.values;
    const Real correction1 = 1 - std::pow(static_cast<Real>(beta1), static_cast<Real>(step));
    const Real correction2 = 1 - std::pow(static_cast<Real>(beta2), static_cast<Real>(step));
    // beta^t is worked out in float64, whose rounding is seen in this share of the correction.
    const Real cancelled = (sizeof(T) == 8 ? 1 : 1e-8L) / std::fmin(correction1, correction2);
    Updated u{};
    Bounded start = exactly(w);
    if (s.rule == OptimizerOp::adamw)
        start = add(start, scaled(scaled(exactly(w), decay), -kRate));
    else
        g = add(g, scaled(exactly(w), decay));
    u.slot[0] = lerp(slot[0], beta1, g);
    u.slot[1] = mix(slot[1], beta2, square(g));
    const Bounded spread = scaled(root(u.slot[1]), 1 / std::sqrt(correction2));
    Bounded move = over(scaled(u.slot[0], kRate / correction1), add(spread, exactly(eps)));
    move.epsilons += (2 + 2 * cancelled) * std::fabs(move.value);
    u.w = add(start, scaled(move, -1));
    return u;
}

template <class T>
Updated rmsprop_oracle(const OptimizerSettings& s, T w, Bounded g, const T* slot) {
    const auto [alpha, eps, decay, momentum, centered] = s.values;
    Updated u{};
    g = add(g, scaled(exactly(w), decay));
    Bounded spread = u.slot[0] = mix(slot[0], alpha, square(g));
    if (centered != 0) {
        u.slot[2] = lerp(slot[2], alpha, g);
        spread = add(spread, scaled(square(u.slot[2]), -1));
    }
    Bounded move = over(g, add(root(spread), exactly(eps)));
    if (momentum != 0) move = u.slot[1] = add(move, scaled(exactly(slot[1]), momentum));
    u.w = add(exactly(w), scaled(move, -kRate));
    return u;
}

template <class T>
Updated rule_oracle(const RuleCase& rule, T w, T g, T scale, const T* slot) {
    const OptimizerSettings& s = rule.settings;
    const Bounded gradient = scaled(exactly(g), scale);
    if (s.rule == OptimizerOp::sgd) return sgd_oracle(s, rule.step, w, gradient, slot);
    if (s.rule == OptimizerOp::rmsprop) return rmsprop_oracle(s, w, gradient, slot);
    return adam_oracle(s, rule.step, w, gradient, slot);
}

// The arrays of one update: `real` parameters, then padding to whole lines, which is zero.
template <class T>
struct RuleArrays {
    Fenced<T> w, g, slot0, slot1, slot2;
    explicit RuleArrays(Index n) : w(n), g(n), slot0(n), slot1(n), slot2(n) {}
    std::array<const Fenced<T>*, kSlots> slots() const { return {&slot0, &slot1, &slot2}; }
    void run(const RuleCase& rule, T scale) const {
        T* used[kSlots];
        for (int s = 0; s < kSlots; ++s)
            used[s] = uses_slot(rule.settings, s) ? slots()[static_cast<std::size_t>(s)]->data() : nullptr;
        const Hyper<T> hyper = prepare_step<T>(rule.settings, kRate, rule.step);
        kernels<T>().optimize[static_cast<int>(rule.settings.rule)](w.size(), w.data(), g.data(), scale, used, hyper);
    }
    // Before the first step the state is zero, so that each term of it shows in full.
    void fill(const RuleCase& rule, Index real, Random& random) const {
        const OptimizerOp op = rule.settings.rule;
        const bool adam = op == OptimizerOp::adam || op == OptimizerOp::adamw, fresh = rule.step == 1;
        const auto put = [&](const Fenced<T>& to, Index i, double low, double high, bool zero) {
            const double value = random.uniform(low, high);
            to[i] = zero || i >= real ? T{0} : static_cast<T>(value);
        };
        for (Index i = 0; i < w.size(); ++i) {
            put(w, i, -1, 1, false);
            put(g, i, -1, 1, false);
            put(slot0, i, op == OptimizerOp::rmsprop ? 0.5 : -1, 1, fresh);  // a mean square, or a mean
            put(slot1, i, adam ? 0.01 : -1, 1, fresh);
            put(slot2, i, -0.5, 0.5, fresh);
        }
    }
};

template <class T>
void rule_case(const RuleCase& rule, Index lines, Tape<T>& tape) {
    const Index n = lines * line<T>, real = n - line<T> / 2;
    Random random = begin_case<T>(rule.name, n);
    const T scale = static_cast<T>(0.7);
    RuleArrays<T> a(n);
    a.fill(rule, real, random);
    Row w, slots[kSlots];
    for (Index i = 0; i < real; ++i) {
        const T old[kSlots] = {a.slot0[i], a.slot1[i], a.slot2[i]};
        const Updated u = rule_oracle(rule, a.w[i], a.g[i], scale, old);
        w.push_back(u.w);
        for (int s = 0; s < kSlots; ++s) slots[s].push_back(u.slot[s]);
    }
    a.g.freeze();
    a.run(rule, scale);
    check_within("parameters follow the rule", real, a.w.data(), w.data());
    tape.same(1, n, a.w.data(), n);
    bool zero = std::all_of(a.w.data() + real, a.w.data() + n, [](T v) { return v == 0; }), held = a.w.fence_holds();
    for (int s = 0; s < kSlots; ++s) {
        const Fenced<T>& slot = *a.slots()[static_cast<std::size_t>(s)];
        held = held && slot.fence_holds();
        if (!uses_slot(rule.settings, s)) continue;
        check_within("the state follows the rule", real, slot.data(), slots[s].data());
        tape.same(1, n, slot.data(), n);
        zero = zero && std::all_of(slot.data() + real, slot.data() + n, [](T v) { return v == 0; });
    }
    check(zero, "padding of weights and state stays zero");
    check(held && a.g.unchanged(), "the gradient is only read, nothing is written outside");
}

template <class T>
void rule_nan_case(const RuleCase& rule) {
    const Index n = 2 * line<T>;
    for (Index j = 0; j < n; ++j) {
        Random random = begin_case<T>(rule.name, n, j);
        const RuleArrays<T> a(n);
        a.fill(rule, n, random);
        a.g[j] = std::numeric_limits<T>::quiet_NaN();
        a.run(rule, T{1});
        check(std::count_if(a.w.data(), a.w.data() + n, [](T v) { return std::isnan(v); }) == 1 && std::isnan(a.w[j]),
              "a NaN gradient shows in its parameter and in no other");
    }
}

// In exact arithmetic v - mean² is never negative. Rounded it may be, where both come down to a constant gradient's
// values and stop a few ulps short, and the root of it would be NaN for ever.
template <class T>
void centered_case() {
    const Index n = 4 * line<T>;
    for (const double alpha : {0.5, 0.9, 0.99}) {
        const RuleCase rule = {
            "rmsprop, centered, constant gradient", {OptimizerOp::rmsprop, {alpha, 1e-8, 0, 0, 1}}, 1};
        Random random = begin_case<T>(rule.name, n, static_cast<Index>(alpha * 100));
        const RuleArrays<T> a(n);
        for (Index i = 0; i < n; ++i) {
            a.g[i] = static_cast<T>(random.uniform(-1, 1));
            a.w[i] = a.slot0[i] = a.slot1[i] = a.slot2[i] = 0;
        }
        for (int step = 0; step < 3000; ++step) a.run(rule, step < 10 ? T{3} : T{1});
        check(std::none_of(a.w.data(), a.w.data() + n, [](T v) { return std::isnan(v); }),
              "no NaN from a constant gradient");
    }
}

void optimizers() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa_same_bits<T>([](Tape<T>& tape) {
            for (const RuleCase& rule : all_rules) {
                for (const Index lines : {1, 2, 3, 4, 5, 17}) rule_case(rule, lines, tape);
                rule_nan_case<T>(rule);
            }
            centered_case<T>();
        });
    });
}

// ---- penalty, clipping, norm ----------------------------------------------------------------------------------------

template <class T>
void penalty_case(Index lines, T l1, T l2, Tape<T>& tape) {
    const Index n = lines * line<T>;
    Random random = begin_case<T>("penalize", n, l1 != 0, l2 != 0);
    Fenced<T> w(n);
    const Fenced<T> g(n);
    Row grad;
    Real value = 0;
    for (Index i = 0; i < n; ++i) {
        w[i] = random.integer(0, 7) == 0 ? T{0} : static_cast<T>(random.uniform(-2, 2));
        g[i] = static_cast<T>(random.uniform(-1, 1));
        const Real wi = w[i], sign = wi > 0 ? 1 : wi < 0 ? -1 : 0;
        value += l1 * std::fabs(wi) + static_cast<Real>(l2) * wi * wi / 2;
        grad.push_back(
            {g[i] + l1 * sign + l2 * wi, 2 * (std::fabs(static_cast<Real>(g[i])) + l1 + l2 * std::fabs(wi))});
    }
    w.freeze();
    const T got = kernels<T>().penalize(n, w.data(), g.data(), l1, l2);
    const Bounded want = {value, value * (roundings<T>(n) + 3)};
    check_within("the penalty is l1 |w| + l2 w²/2, summed", 1, &got, &want);
    check_within("its derivative is added to the gradient", n, g.data(), grad.data());
    check(w.unchanged() && g.fence_holds(), "weights are only read");
    tape.same(1, 1, &got, 1);
    tape.same(1, n, g.data(), n);
}

template <class T>
void norm_case(Index lines, Tape<T>& tape) {
    const Index n = lines * line<T>;
    Random random = begin_case<T>("sum_of_squares", n);
    Fenced<T> g(n);
    Real exact = 0;
    for (Index i = 0; i < n; ++i) {
        g[i] = static_cast<T>(random.uniform(-1, 1));
        exact += static_cast<Real>(g[i]) * g[i];
    }
    g.freeze();
    const T got = kernels<T>().sum_of_squares(n, g.data());
    const Bounded want = {exact, exact * (roundings<T>(n) + 1)};
    check_within("the sum of squares", 1, &got, &want);
    check(g.unchanged(), "the gradient is only read");
    tape.same(1, 1, &got, 1);
    const Index j = random.integer(0, n - 1);
    g[j] = std::numeric_limits<T>::quiet_NaN();
    check(std::isnan(kernels<T>().sum_of_squares(n, g.data())), "a NaN in any lane makes the norm NaN");
}

template <class T>
void clip_case(Index lines) {
    const Index n = lines * line<T>;
    const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN(),
            limit = static_cast<T>(0.7);
    Random random = begin_case<T>("clip", n);
    const T special[] = {0, -T{0}, limit, -limit, std::nextafter(limit, inf), inf, -inf};
    const Fenced<T> g(n), want(n);
    for (Index i = 0; i < n; ++i) {
        const T value =
            random.integer(0, 1) == 0 ? special[random.integer(0, 6)] : static_cast<T>(random.uniform(-2, 2));
        g[i] = value;
        want[i] = value > limit ? limit : value < -limit ? -limit : value;
    }
    const Index j = random.integer(0, n - 1);
    g[j] = want[j] = nan;
    kernels<T>().clip(n, g.data(), limit);
    check_bits("clamped to [-limit, limit], NaN stays", 1, n, g.data(), n, want.data(), n);
    check(g.fence_holds(), "nothing is written before the gradient");
}

void penalties() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa_same_bits<T>([](Tape<T>& tape) {
            for (const Index lines : {1, 2, 3, 4, 5, 17, 192}) {
                penalty_case<T>(lines, T(0.1), T(0), tape);
                penalty_case<T>(lines, T(0), T(0.3), tape);
                penalty_case<T>(lines, T(0.1), T(0.3), tape);
                norm_case<T>(lines, tape);
                clip_case<T>(lines);
            }
            begin_case<T>("penalize", 0);
            check(kernels<T>().penalize(0, nullptr, nullptr, T(1), T(1)) == 0,
                  "no weights, no penalty");  // a tile of a bias alone
        });
    });
}

// ---- the generator and what it drives -------------------------------------------------------------------------------

bool same_words(const Philox4& got, const std::array<std::uint32_t, 4>& want) {
    return std::equal(want.begin(), want.end(), got.word);
}

// Known-answer vectors of Random123 (kat_vectors, philox4x32 10), published with the generator.
void generator() {
    begin_case<double>("philox", 4);
    check(same_words(philox(0, 0, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}), "known answer: all zeros");
    const std::uint64_t ones = ~std::uint64_t{0};
    check(same_words(philox(ones, ones, ones), {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}),
          "known answer: all ones");
    check(same_words(philox(0x299f31d0a4093822u, 0x85a308d3243f6a88u, 0x0370734413198a2eu),
                     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}),
          "known answer: digits of pi");
    // Sixteen at a time are the same numbers, also where the counter's first word overflows into the second.
    for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{0xfffffff8u}}) {
        std::uint32_t lanes[4][16];
        philox_lanes(7, first, 9, lanes);
        bool same = true;
        for (std::uint64_t i = 0; i < 16; ++i)
            same = same && same_words(philox(7, first + i, 9), {lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i]});
        check(same, "many counters at once");
    }
}

// Moments of what initial weights are drawn from. A mean of n draws is further than six of its standard deviations from
// the true one with probability 2e-9 (variances: of u 1/12, of u² 1/5 - 1/9, of z² 2).
void draws() {
    constexpr Index n = 100000;
    begin_case<double>("random numbers", n);
    double sum = 0, squares = 0, normal_sum = 0, normal_squares = 0, low = 1, high = 0;
    for (Index i = 0; i < n; ++i) {
        const double u = uniform(base_seed, 3, i), z = normal(base_seed, 3, i);
        low = std::min(low, u);
        high = std::max(high, u);
        sum += u / n;
        squares += u * u / n;
        normal_sum += z / n;
        normal_squares += z * z / n;
    }
    const double six = 6 / std::sqrt(static_cast<double>(n));
    check(low >= 0 && high < 1, "uniform numbers lie in [0, 1)");
    check(std::fabs(sum - 0.5) < six * std::sqrt(1.0 / 12), "uniform: mean 1/2");
    check(std::fabs(squares - 1.0 / 3) < six * std::sqrt(1.0 / 5 - 1.0 / 9), "uniform: mean square 1/3");
    check(std::fabs(normal_sum) < six, "normal: mean 0");
    check(std::fabs(normal_squares - 1) < six * std::sqrt(2.0), "normal: variance 1");
    check(uniform(1, 2, 3) == uniform(1, 2, 3) && uniform(1, 2, 3) != uniform(1, 2, 4) &&
              uniform(1, 2, 3) != uniform(1, 3, 3) && uniform(1, 2, 3) != uniform(2, 2, 3),
          "a function of seed, stream and place");
}

std::vector<std::int64_t> permutation(Index n, std::uint64_t seed, std::uint64_t epoch) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(n));
    permute(n, seed, epoch, order.data());
    return order;
}

// With probability below e^-x a chi-square variable of k degrees of freedom exceeds this (Laurent and Massart, 2000).
double chi_square_bound(double k, double x) { return k + 2 * std::sqrt(k * x) + 2 * x; }

void permutations() {
    for (const Index n : {0, 1, 2, 3, 4, 5, 7, 8, 100, 1001, 65537}) {
        begin_case<double>("permute", n);
        const std::vector<std::int64_t> order = permutation(n, 3, 5);
        std::vector<bool> seen(static_cast<std::size_t>(n));
        for (const std::int64_t i : order)
            if (i >= 0 && i < n) seen[static_cast<std::size_t>(i)] = true;
        check(std::count(seen.begin(), seen.end(), true) == n, "each index once");
        check(order == permutation(n, 3, 5), "a function of seed and epoch");
        if (n >= 100)
            check(order != permutation(n, 3, 6) && order != permutation(n, 4, 5),
                  "another one in another epoch, for another seed");
    }
    // Which of n = 8 stands where, counted over many epochs. Rows and columns of the table have fixed sums, so that
    // (n-1)/n times the statistic has (n-1)² degrees of freedom.
    constexpr Index n = 8, epochs = 8000;
    begin_case<double>("permute", n, epochs);
    double count[n][n] = {}, statistic = 0;
    for (Index epoch = 0; epoch < epochs; ++epoch) {
        const std::vector<std::int64_t> order = permutation(n, base_seed, static_cast<std::uint64_t>(epoch));
        for (Index i = 0; i < n; ++i) ++count[i][order[static_cast<std::size_t>(i)]];
    }
    constexpr double expected = static_cast<double>(epochs) / n;
    for (const auto& row : count)
        for (const double c : row) statistic += (c - expected) * (c - expected) / expected;
    check(statistic * (n - 1) / n < chi_square_bound((n - 1) * (n - 1), std::log(1e9)),
          "every index is everywhere equally often");
}

// Against a plain loop: sixteen counters give the numbers of 64 columns, word w of counter i that of column 16 w + i.
// Nothing is fused here, so all instruction sets agree to the bit.
template <class T>
void dropout_case(double p, Index cols) {
    constexpr Index rows = 5;
    constexpr std::uint64_t step = 17;
    const std::uint64_t key = dropout_key(base_seed, 2);
    Random random = begin_case<T>("dropout", rows, cols, static_cast<Index>(p * 100));
    Matrix<T> x(rows, cols);
    const Matrix<T> y(rows, cols, 1), want(rows, cols);
    x.fill([&](Index, Index) { return random.uniform(-2, 2); });
    want.fill([&](Index i, Index j) {
        const Index block = j / 64 * 64, word = j % 64 / 16, counter = block / 4 + j % 16;
        const std::uint64_t place = static_cast<std::uint64_t>(i + 7) << 32 | static_cast<std::uint64_t>(counter);
        const bool dropped = philox(key, place, stream_of(kDropout, step)).word[word] < p * 0x1p32;
        return dropped ? T{0} : x.at(i, j) * static_cast<T>(1 / (1 - p));
    });
    x.freeze();
    const auto run = [&](Index first, Index count, const Matrix<T>& to) {
        kernels<T>().dropout(count, cols, x.row(first), x.stride, to.row(first), to.stride, p, key, step, 7 + first);
    };
    run(0, 2, y);  // in two blocks of rows: the mask is the same
    run(2, 3, y);
    check_bits("the mask of the generator, kept values over 1 - p", y, want);
    check(x.unchanged() && y.gaps_hold(), "dropout only reads x, writes nothing beyond the padded rows");
    run(0, rows, x);
    check_bits("dropout in place", x, want);
}

template <class T>
void dropout_share() {
    constexpr Index n = 4096, rows = 25;
    const double p = 0.3;
    begin_case<T>("dropout", rows, n);
    const Matrix<T> x(rows, n), y(rows, n);
    x.fill([](Index, Index) { return 1; });
    kernels<T>().dropout(rows, n, x.data(), x.stride, y.data(), y.stride, p, dropout_key(base_seed, 0), 1, 0);
    const double count = static_cast<double>(std::count(y.data(), y.data() + rows * n, T{0})),
                 total = static_cast<double>(rows * n);
    // Binomial: six standard deviations are exceeded with probability 2e-9.
    check(std::fabs(count - p * total) < 6 * std::sqrt(total * p * (1 - p)), "a share p is dropped");
}

void dropouts() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa([] {
            for (const double p : {0.0, 0.25, 0.3, 0.999})
                for (const Index cols : widths()) dropout_case<T>(p, cols);
            // Exactly the number of one column: dropped is what lies below p.
            const Philox4 words = philox(dropout_key(base_seed, 2), std::uint64_t{8} << 32, stream_of(kDropout, 17));
            dropout_case<T>(words.word[0] * 0x1p-32, 5);
            dropout_share<T>();
        });
    });
}

// ---- the pool -------------------------------------------------------------------------------------------------------

using Counters = std::array<std::atomic<int>, 16>;

bool each_once(int parts) {
    Counters counters{};
    std::array<int, 16> plain{};  // written without atomics: what parts wrote is visible when parallel returns
    std::atomic<bool> told{true};
    parallel(parts, [&](int part, int count) {
        ++counters[static_cast<std::size_t>(part)];
        plain[static_cast<std::size_t>(part)] = part + 1;
        if (count != parts) told = false;
    });
    for (int part = 0; part < 16; ++part) {
        const std::size_t i = static_cast<std::size_t>(part);
        if (counters[i] != (part < parts) || plain[i] != (part < parts ? part + 1 : 0)) return false;
    }
    return told;
}

void pool_parts() {
    for (const int threads : {1, 2, 3, 7, 2, 1}) {
        set_thread_count(threads);
        check(thread_count() == threads, "the thread count is what was set");
        for (int round = 0; round < 20; ++round)
            for (int parts = 0; parts <= 9; ++parts) {
                context.shape = {threads, parts, 0};
                check(each_once(parts), "every part once");
            }
    }
}

// Work inside work runs on the thread that asks for it; the outer region must not be disturbed.
void pool_nested() {
    set_thread_count(3);
    for (int outer = 1; outer <= 4; ++outer)
        for (int inner = 1; inner <= 4; ++inner) {
            context.shape = {outer, inner, 0};
            std::array<Counters, 4> counters{};
            parallel(outer, [&](int i, int) {
                parallel(inner,
                         [&](int j, int) { ++counters[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)]; });
            });
            bool good = true;
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j)
                    good = good && counters[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] ==
                                       (i < outer && j < inner);
            check(good, "every inner part of every outer part once");
        }
}

// Several threads at once. While one of them has the workers the others do their parts themselves; `churn` changes the
// number of workers under them.
void run_callers(bool churn) {
    context.shape = {churn, 0, 0};
    std::atomic<int> wrong{0}, running{4};
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c)
        callers.emplace_back([&, c] {
            for (int i = 0; i < (quick ? 500 : 5000); ++i) wrong += !each_once(1 + (c + i) % 5);
            --running;
        });
    for (int count = 1; running > 0; count = count % 4 + 1) {
        if (churn) set_thread_count(count);
        std::this_thread::yield();
    }
    for (std::thread& caller : callers) caller.join();
    check(wrong == 0, "every caller's parts once, whoever else calls");
}

void pool_callers() {
    set_thread_count(3);
    run_callers(false);
    run_callers(true);
}

// Many small regions in a row, of parts that last from nothing to a few microseconds, so that workers come too late,
// in time and in the middle of the next region; pauses let them fall asleep in between. A count that is not reset, a
// part claimed in one region and run in the next, a wake-up lost once in ten thousand times: the sum is wrong or
// nobody comes back.
void pool_many() {
    set_thread_count(2);
    Random random(base_seed);
    for (const int parts : {2, 7}) {
        const auto enough = std::chrono::steady_clock::now() + std::chrono::seconds(4);  // on a busy machine
        context.shape = {parts, 0, 0};
        const int most = (parts == 2 ? 100000 : 20000) / (quick ? 10 : 1);
        int regions = 0;
        std::atomic<long> sum{0};
        while (regions < most && (regions % 100 != 0 || std::chrono::steady_clock::now() < enough)) {
            const std::uint64_t length = random.next() % 4 == 0 ? random.next() % 1000 : 0;
            parallel(parts, [&](int part, int) {
                for (volatile std::uint64_t spin = 0; spin < length;) spin = spin + 1;
                sum.fetch_add(part + 1, std::memory_order_relaxed);
            });
            if (++regions % 1000 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
        check(sum == static_cast<long>(regions) * parts * (parts + 1) / 2, "tiny regions in a row");
    }
}

// Workers that fell asleep are woken: a pool whose caller always does all the work itself would be right, but no pool.
void pool_wakes() {
    set_thread_count(2);
    context.shape = {2, 0, 0};
    bool helped = false;
    for (int attempt = 0; attempt < 20 && !helped; ++attempt) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        std::array<std::thread::id, 2> who;
        parallel(2, [&](int part, int) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            who[static_cast<std::size_t>(part)] = std::this_thread::get_id();
        });
        helped = who[0] != who[1];
    }
    check(helped, "a sleeping worker takes a part of a long region");
}

#if !defined(THREAD_SANITIZER)  // it does not follow a process with threads through fork
// Threads do not survive fork: a child that waits for its parent's workers waits for ever.
int status_of_child() {
    const pid_t child = fork();
    if (child == 0) {
        signal(SIGALRM, SIG_DFL);
        alarm(20);  // a hang becomes a signal
        bool good = true;
        for (int i = 0; i < 100; ++i) good = good && each_once(1 + i % 6);
        set_thread_count(2);
        set_thread_count(1);
        _exit(good && each_once(3) ? 0 : 1);
    }
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child ? status : -1;
}

void pool_fork() {
    set_thread_count(3);
    context.shape = {};
    check(each_once(3), "before fork");
    check(status_of_child() == 0, "the pool works in a child");
    check(each_once(3), "the parent's pool works after fork");
    std::atomic<bool> done{false};
    std::thread busy([&] {
        while (!done) each_once(3);
    });
    for (int i = 0; i < 10; ++i) check(status_of_child() == 0, "in a child forked while another thread used the pool");
    done = true;
    busy.join();
}
#else
void pool_fork() {}
#endif

// ---- all of them ----------------------------------------------------------------------------------------------------

struct Test {
    const char* name;
    void (*run)();
};
constexpr Test all_tests[] = {
    {"small_products", small_products},
    {"large_products", large_products},
    {"ordered_products", ordered_products},
    {"transposes", transposes},
    {"ops", ops_agree},
    {"ops_nan", ops_nan},
    {"ops_limits", ops_limits},
    {"losses", losses},
    {"loss_limits", loss_limits},
    {"optimizers", optimizers},
    {"penalties", penalties},
    {"generator", generator},
    {"draws", draws},
    {"permutations", permutations},
    {"dropouts", dropouts},
    {"pool_parts", pool_parts},
    {"pool_nested", pool_nested},
    {"pool_callers", pool_callers},
    {"pool_many", pool_many},
    {"pool_wakes", pool_wakes},
    {"pool_fork", pool_fork},
};

bool wanted(const Test& test, const std::vector<std::string>& names) {
    return names.empty() || std::find(names.begin(), names.end(), test.name) != names.end();
}

int run_all(const std::vector<std::string>& names) {
    for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGALRM}) signal(number, on_signal);
    std::printf("instruction sets:");
    for (const Isa isa : isas_here()) std::printf(" %s", name_of(isa));
    std::printf("\n");
    for (const Test& test : all_tests) {
        if (!wanted(test, names)) continue;
        const long before = passed;
        const auto start = std::chrono::steady_clock::now();
        context = {};
        context.op = test.name;
        alarm(300);  // a hang becomes a failure
        test.run();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        std::printf("%-18s %9ld checks %6.2f s\n", test.name, passed - before, seconds.count());
        std::fflush(stdout);
    }
    std::printf("digest %016llx\n%ld passed, %ld failed\n", static_cast<unsigned long long>(digest), passed, failed);
    return failed > 0 || passed == 0 ? 1 : 0;
}

}  // namespace
}  // namespace chainrule

int main(int count, char** arguments) {
    std::vector<std::string> names;
    for (int i = 1; i < count; ++i) {
        const std::string argument = arguments[i];
        if (argument == "--quick")
            chainrule::quick = true;
        else if (argument.rfind("--seed=", 0) == 0)
            chainrule::base_seed = std::strtoull(argument.c_str() + 7, nullptr, 10);
        else
            names.push_back(argument);
    }
    return chainrule::run_all(names);
}
