// SPDX-License-Identifier: MIT
// The matrix products and the transposed copy of the weights.
#pragma once

#include "harness.hpp"

namespace chainrule {
namespace {

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
        for (const bool bias : {false, true})
            if (n_ > 0 && n_ <= kNarrowOutputs) narrow(a, bias);
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
    // The product, with the bias or without, and the product once more.
    void twice(const Matrix<T>& c, bool bias) const {
        Matrix<T> want(c.rows, c.cols);
        const T *first = data_.product(k_index_, bias), *second = data_.product(k_index_, false);
        want.fill([&](Index i, Index j) { return first[i * data_.cols + j] + second[i * data_.cols + j]; });
        check_bits("added to what is there", c.rows, c.cols, c.data(), c.stride, want.data(), want.stride);
        check(c.gaps_hold(), "nothing written beyond the padded rows");
    }
    void forward(const char* name, const Matrix<T>& a, bool bias) const {
        begin_case<T>(name, a.rows, n_, k_);
        const Matrix<T> c(a.rows, n_, n_ % 2);
        kernels<T>().linear_forward(a.rows, k_, n_, bias, a.data(), a.stride, (bias ? biased_ : plain_).data(),
                                    c.data(), c.stride);
        verify(c, bias);
        const T* weights = (bias ? biased_ : plain_).data();
        kernels<T>().linear_jvp(a.rows, k_, n_, bias, a.data(), a.stride, weights, c.data(), c.stride, true);
        twice(c, bias);
        kernels<T>().linear_jvp(a.rows, k_, n_, bias, a.data(), a.stride, weights, c.data(), c.stride, false);
        verify(c, false);
    }
    void narrow(const Matrix<T>& a, bool bias) const {
        begin_case<T>(bias ? "linear_forward_narrow with bias" : "linear_forward_narrow", a.rows, n_, k_);
        const Index weights = n_ * padded<T>(k_);
        Fenced<T> master(weights + line<T>);
        pack(master, n_, k_, T{0}, [&](Index o, Index i) { return data_.b(i)[o]; });
        std::copy_n(data_.bias(), n_, master.data() + weights);
        master.freeze();
        const Matrix<T> c(a.rows, n_, n_ % 2);
        kernels<T>().linear_forward_narrow(a.rows, k_, n_, bias, a.data(), a.stride, master.data(), c.data(), c.stride);
        check_bits("exact on integers", c.rows, c.cols, c.data(), c.stride, data_.product(k_index_, bias), data_.cols);
        check(c.gaps_hold(), "nothing written beyond the padded rows");
        check(c.padding_is_zero(), "zeros after the last column, whatever pads the left-hand matrix");
        kernels<T>().linear_jvp_narrow(a.rows, k_, n_, bias, a.data(), a.stride, master.data(), c.data(), c.stride,
                                       true);
        twice(c, bias);
        check(master.unchanged(), "the right-hand matrix is only read");
    }
    void backward(const Matrix<T>& a) const {
        begin_case<T>("linear_vjp_input", a.rows, n_, k_);
        const Matrix<T> c(a.rows, n_, (n_ + 1) % 2);
        kernels<T>().linear_vjp_input(a.rows, n_, k_, a.data(), a.stride, plain_.data(), c.data(), c.stride, false);
        verify(c, false);
        kernels<T>().linear_vjp_input(a.rows, n_, k_, a.data(), a.stride, plain_.data(), c.data(), c.stride, true);
        twice(c, false);
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
            const Fenced<T> packed(kDepth * tile.stride);
            kernels<T>().linear_vjp_weight(k_, m, tile.stride, x.data(), x.stride, b_.data() + column, b_.stride,
                                           packed.data(), tile.data(), false);
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

// A product and a sum, rounded once: on x86 by the processor's own instruction, as MinGW's C library rounds twice.
#if defined(__x86_64__)
[[gnu::target("fma")]] float fma_once(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
[[gnu::target("fma")]] double fma_once(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
template <class T>
T fma_once(T a, T b, T c) {
    return std::fma(a, b, c);
}
#endif

// gemm.hpp promises the order: over k within blocks of 512, blocks added in order, each term by a fused multiply-add
// where the set has one. Being a plain loop per element, it also says that no bit depends on the tile, the number of
// rows or columns, or the instruction set.
template <class T>
T ordered_sum(Index depth, const T* a, const T* b, Index b_stride, T start) {
    T total = 0;
    for (Index first = 0; first == 0 || first < depth; first += 512) {
        T sum = first == 0 ? start : T{0};
        for (Index k = first; k < std::min(depth, first + 512); ++k)
            sum = fused() ? fma_once(a[k], b[k * b_stride], sum) : a[k] * b[k * b_stride] + sum;
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
        kernels<T>().linear_vjp_input(m, n, k_, a_.row(skip), a_.stride, plain.data(), c.data() + 1, stride, false);
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
            const Fenced<T> tile(m * width), packed(kDepth * width);
            kernels<T>().linear_vjp_weight(k_, m, width, at_.data() + skip, at_.stride, b_.data() + column, b_.stride,
                                           packed.data(), tile.data(), false);
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

// Without padding: nothing beyond the elements is read or written.
template <class T>
void plain_case(Index rows, Index cols) {
    begin_case<T>("transpose", rows, cols);
    Fenced<T> a(rows * cols), left(rows), right(cols);
    const Fenced<T> b(rows * cols), c(rows * cols), want(rows * cols), product(rows * cols), twice(rows * cols);
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < cols; ++j) {
            a[i * cols + j] = want[j * rows + i] = static_cast<T>(1000 * i + j + 1);
            left[i] = static_cast<T>(i - 3);
            right[j] = static_cast<T>(j + 1);
            product[i * cols + j] = left[i] * right[j];
            twice[i * cols + j] = 2 * product[i * cols + j];
        }
    for (Fenced<T>* f : {&a, &left, &right}) f->freeze();
    second_kernels<T>().transpose(rows, cols, a.data(), cols, b.data(), rows);
    check_bits("a plain transposition", 1, b.size(), b.data(), 0, want.data(), 0);
    second_kernels<T>().outer(rows, cols, left.data(), right.data(), c.data(), false);
    check_bits("a plain outer product", 1, c.size(), c.data(), 0, product.data(), 0);
    second_kernels<T>().outer(rows, cols, left.data(), right.data(), c.data(), true);
    check_bits("added to one", 1, c.size(), c.data(), 0, twice.data(), 0);
    check(b.fence_holds() && c.fence_holds(), "nothing is written outside");
    check(a.unchanged() && left.unchanged() && right.unchanged(), "the inputs are only read");
}

void transposes() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa([] {
            const Index step = quick ? 3 : 1;
            for (Index rows = 1; rows <= 40; rows += step)
                for (Index cols = 1; cols <= 40; cols += step) plain_case<T>(rows, cols);
            for (const Index tile : {16, 48, 64, 1000})  // 48 is the trainer's; 1000 is the whole matrix
                for (Index inputs = 1; inputs <= 70; inputs += step)
                    for (Index outputs = 1; outputs <= 70; outputs += step) transpose_case<T>(inputs, outputs, tile);
            for (const Index inputs : {127, 128, 129, 200})
                for (const Index outputs : {96, 129, 200}) transpose_case<T>(inputs, outputs, 48);
        });
    });
}

}  // namespace
}  // namespace chainrule
