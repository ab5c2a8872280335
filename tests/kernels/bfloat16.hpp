// SPDX-License-Identifier: MIT
// The products on operands rounded to bfloat16. Integers up to 64 are bfloat16 numbers and their sums exact in float32,
// so most of this is judged to the bit. None of it enters the digest: how a pair of terms is rounded is the processor's.
#pragma once

#include "products.hpp"
#include "train.hpp"

namespace chainrule {
namespace {

constexpr Index kBlockPairs = kDepth / 2;  // of one column, packed for a block of the sum
constexpr Index kPanelColumns = 4 * line<float>;
constexpr Index kWhole = 1 << 20;

// Rows of weights that are packed at once: by the trainer for small and for large batches, when weights are set, and the
// least there can be.
constexpr std::array<Index, 4> kPackedRows = {48, 512, kWhole, 16};

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
float first_of(Pair pair) { return from_bits(pair << 16); }
float second_of(Pair pair) { return from_bits(pair & 0xffff0000u); }
float canonical(float x) { return std::isnan(x) ? poison<float>() : x; }  // which NaN is left to chance

// The master copy of a layer's weights, and the paired copies made of it tile by tile as network.cpp and train.cpp do.
// element(i, o) is the weight from input i to output o, element(inputs, o) the bias.
class PairedWeights {
   public:
    template <class F>
    PairedWeights(Index inputs, Index outputs, bool bias, Index tile, float padding, F element)
        : rows_(inputs + bias),
          master_(rows_ * padded<float>(outputs)),
          forward_((inputs + 1) / 2 * padded<Pair>(outputs)),
          backward_((outputs + 1) / 2 * padded<Pair>(inputs)) {
        pack(master_, rows_, outputs, padding, element);
        master_.freeze();
        if (padding == 0) std::fill_n(backward_.data(), backward_.size(), 0);  // as the engine's copies begin
        copy(inputs, outputs, tile, backward_.data());
        const std::vector<Pair> forward = contents(forward_), backward = contents(backward_);
        std::fill_n(forward_.data(), forward_.size(), poison<Pair>());
        copy(inputs, outputs, tile, nullptr);
        check(contents(forward_) == forward && contents(backward_) == backward,
              "the forward copy alone is the same, and no other is written then");
        check(master_.unchanged() && forward_.fence_holds() && backward_.fence_holds(),
              "the master copy is only read, nothing is written outside of the copies");
        forward_.freeze();
        backward_.freeze();
    }
    const float* master() const { return master_.data(); }
    const Pair* forward() const { return forward_.data(); }
    const Pair* backward() const { return backward_.data(); }
    bool unchanged() const { return master_.unchanged() && forward_.unchanged() && backward_.unchanged(); }

   private:
    const Index rows_;
    Fenced<float> master_;
    Fenced<Pair> forward_, backward_;

    static std::vector<Pair> contents(const Fenced<Pair>& copy) { return {copy.data(), copy.data() + copy.size()}; }
    void copy(Index inputs, Index outputs, Index tile, Pair* backward) {
        for (Index column = 0; column < outputs; column += kPanelColumns)
            for (Index first = 0; first < rows_; first += tile)
                bfloat16_kernels().pack(
                    inputs, outputs, first, std::min(tile, inputs - first), column, master_.data() + column * rows_,
                    padded<float>(std::min(kPanelColumns, outputs - column)), forward_.data(), backward);
    }
};

// ---- products on integers -------------------------------------------------------------------------------------------

// One depth and width of B; all heights of A. See ProductCase, of which this is the image in pairs.
class PairedCase {
   public:
    PairedCase(const Integers<float>& data, std::size_t k_index, Index n, Index tile)
        : data_(data),
          k_index_(k_index),
          k_(data.depths[k_index]),
          n_(n),
          // Nothing that pads the weights may reach a result, but for the columns that pad it: NaN shows what does.
          zeros_((n + k_) % 2 == 0),
          plain_(k_, n, false, tile, padding(), [&](Index k, Index j) { return data.b(k)[j]; }),
          biased_(k_, n, true, tile, padding(),
                  [&](Index k, Index j) { return (k < k_ ? data.b(k) : data.bias())[j]; }),
          turned_(n, k_, k_ % 3 == 0, tile, padding(),
                  [&](Index j, Index k) { return j < n_ ? data.b(k)[j] : poison<float>(); }),
          b_(k_, n, k_ % 2) {
        b_.fill([&](Index k, Index j) { return data.b(k)[j]; });
        if (zeros_) b_.clear_padding();
        b_.freeze();
    }
    ~PairedCase() {
        check(plain_.unchanged() && biased_.unchanged() && turned_.unchanged() && b_.unchanged(),
              "the right-hand matrix is only read");
    }

    void run(Index m) const {
        Matrix<float> a(m, k_, m % 3);  // NaN beyond the k-th column
        for (Index i = 0; i < m; ++i) std::copy_n(data_.a(i), k_, a.row(i));
        a.freeze();
        forward("bfloat16 forward", a, plain_, false);
        forward("bfloat16 forward with bias", a, biased_, true);
        vjp_input(a);
        check(a.unchanged(), "the left-hand matrix is only read");
        vjp_weight(m);
    }

   private:
    const Integers<float>& data_;
    const std::size_t k_index_;
    const Index k_, n_;
    const bool zeros_;
    const PairedWeights plain_, biased_, turned_;
    Matrix<float> b_;

    float padding() const { return zeros_ ? 0.0f : poison<float>(); }

    void verify(const Matrix<float>& c, const Fenced<Pair>& scratch, bool bias) const {
        check_bits("exact on integers", c.rows, c.cols, c.data(), c.stride, data_.product(k_index_, bias), data_.cols);
        check(c.gaps_hold() && scratch.fence_holds(), "nothing written beyond the padded rows");
        if (zeros_) check(c.padding_is_zero(), "zero padding in, zero padding out");
    }
    void forward(const char* name, const Matrix<float>& a, const PairedWeights& weights, bool bias) const {
        begin_case<float>(name, a.rows, n_, k_);
        const Matrix<float> c(a.rows, n_, n_ % 2);
        const Fenced<Pair> scratch(a.rows * kPairRoom);
        bfloat16_kernels().forward(a.rows, k_, n_, bias, a.data(), a.stride, bias ? weights.master() : nullptr,
                                   weights.forward(), c.data(), c.stride, scratch.data());
        verify(c, scratch, bias);
    }
    // A layer with the n columns of C as its inputs and the k terms as its outputs.
    void vjp_input(const Matrix<float>& a) const {
        begin_case<float>("bfloat16 vjp_input", a.rows, n_, k_);
        const Matrix<float> c(a.rows, n_, (n_ + 1) % 2);
        const Fenced<Pair> scratch(a.rows * kPairRoom);
        bfloat16_kernels().vjp_input(a.rows, n_, k_, a.data(), a.stride, turned_.backward(), c.data(), c.stride,
                                     scratch.data());
        verify(c, scratch, false);
    }
    // The batch is the sum's index; see ProductCase::weight.
    void vjp_weight(Index m) const {
        begin_case<float>("bfloat16 pair_rows", m, n_, k_);
        Matrix<float> x(k_, m, m % 2);
        for (Index k = 0; k < k_; ++k) std::copy_n(data_.at(k), m, x.row(k));
        x.freeze();
        Matrix<Pair> pairs((k_ + 1) / 2, m, m % 3);
        bfloat16_kernels().pair_rows(k_, padded<float>(m), x.data(), x.stride, pairs.data(), pairs.stride);
        check(x.unchanged() && pairs.gaps_hold(), "x is only read, nothing is written beyond the padded rows");
        pairs.freeze();
        for (Index column = 0; column < std::max<Index>(n_, 1); column += kPanelColumns) {
            begin_case<float>("bfloat16 vjp_weight", m, n_, k_);
            const Index width = std::min(kPanelColumns, n_ - column);
            const Matrix<float> tile(m, width);
            const Fenced<Pair> packed(kBlockPairs * tile.stride);
            bfloat16_kernels().vjp_weight(k_, m, tile.stride, pairs.data(), pairs.stride, b_.data() + column, b_.stride,
                                          packed.data(), tile.data());
            check_bits("exact on integers", m, width, tile.data(), tile.stride, data_.product(k_index_, false) + column,
                       data_.cols);
            if (zeros_) check(tile.padding_is_zero(), "zero padding in, zero padding out");
            check(tile.fence_holds() && packed.fence_holds(), "nothing written before the tile");
        }
        check(pairs.unchanged(), "the pairs of x are only read");
    }
};

void try_paired(const Integers<float>& data, const std::vector<Index>& ms, const std::vector<Index>& ns,
                Selection selection) {
    for (std::size_t k = 0; k < data.depths.size(); ++k)
        for (const Index n : ns) {
            const PairedCase product(data, k, n, kPackedRows[(k + static_cast<std::size_t>(n)) % kPackedRows.size()]);
            for (const Index m : ms)
                if (selection.has(m, n, data.depths[k])) product.run(m);
        }
}

// As small_products: every combination of tile heights, vector counts, tails and odd terms; size 0 is among them.
void small_bfloat16() {
    const Integers<float> data(40, 40, range(0, 40));
    on_each_isa([&] { try_paired(data, range(0, 40), range(0, 40), {quick ? 61 : 1}); });
}

// As large_products: the edges of panels (64), of the gradient's tiles (48, 512) and of the blocks of sums (512).
void large_bfloat16() {
    const std::vector<Index> edges = {47, 49, 63, 65, 97, 127, 129, 193, 255, 257};
    const Integers<float> odd(257, 257, edges), skinny(19, 257, {1, 2, 511, 512, 513, 514, 1023, 1024, 1025});
    const Integers<float> tall(7, 577, {1, 2, 3, 385, 513});
    const Integers<float> deep(193, 65, {513, 1024, 1025, 1537, 2049});  // rows in pieces, of even and of odd heights
    on_each_isa([&] {
        try_paired(odd, edges, edges, {quick ? 31 : 2});
        try_paired(skinny, {1, 2, 3, 5, 6, 7, 11, 12, 13, 19}, {1, 2, 15, 17, 31, 33, 64, 65, 257}, {quick ? 17 : 1});
        try_paired(deep, {48, 95, 96, 97, 145, 191, 192, 193}, {1, 64, 65}, {quick ? 7 : 1});
        try_paired(tall, {1, 6, 7}, {511, 512, 513, 559, 561, 577}, {1});
    });
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// The nearest bfloat16, of two the even one, by exact arithmetic in double. Subnormal numbers are kept.
float nearest_bfloat16(float x) {
    if (x == 0 || !std::isfinite(x)) return canonical(x);
    int exponent;
    std::frexp(static_cast<double>(x), &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent - 8, -133));                // from one bfloat16 to the next
    return static_cast<float>(std::nearbyint(static_cast<double>(x) / unit) * unit);  // too large: infinity
}

// All 2^16 upper halves, which are all bfloat16 numbers, each with lower halves that make it a tie (0x8000), next to one
// and random. Odd rows are the seconds of a pair; the last has nobody beside it.
void bfloat16_rounding() {
    constexpr std::array<std::uint32_t, 6> lows = {0, 0x8000, 1, 0x7fff, 0x8001, 0xffff};
    constexpr Index rows = 13, cols = 1 << 16;
    Random random = begin_case<float>("bfloat16 pair_rows", rows, cols);
    Matrix<float> x(rows, cols);
    x.fill([&](Index i, Index j) {
        const std::uint32_t high = static_cast<std::uint32_t>((j + 7 * i) % cols) << 16;
        const std::uint32_t low = i < 12 ? lows[static_cast<std::size_t>(i / 2)] : random.next() & 0xffffu;
        return from_bits(high | low);
    });
    x.freeze();
    const Matrix<float> want(rows + 1, cols), got(rows + 1, cols);
    want.fill([&](Index i, Index j) { return i < rows ? nearest_bfloat16(x.at(i, j)) : 0.0f; });
    on_each_isa([&] {
        const Matrix<Pair> pairs((rows + 1) / 2, cols, 1);
        bfloat16_kernels().pair_rows(rows, cols, x.data(), x.stride, pairs.data(), pairs.stride);
        got.fill([&](Index i, Index j) {
            return canonical(i % 2 ? second_of(pairs.at(i / 2, j)) : first_of(pairs.at(i / 2, j)));
        });
        check_bits("rounded to nearest, ties to even, NaN to NaN", got, want);
        check(x.unchanged() && pairs.gaps_hold(), "x is only read, nothing is written beyond the rows");
    });
}

// The other ways in, through products with the unit matrix: z = x I, dx = dz I and dWᵀ = I dZ, rounded and exact else.
// Without subnormal numbers, which the multiplication may take for zero, and without ∞, for 0 ∞ is NaN.
void bfloat16_operands() {
    constexpr Index n = 70;
    Random random = begin_case<float>("bfloat16 operands", n, n, n);
    const Matrix<float> x(n, n), want(n, n), c(n, n);
    x.fill([&](Index, Index) {
        const std::uint32_t exponent = static_cast<std::uint32_t>(random.integer(64, 191)) << 23;
        const std::uint32_t bits = static_cast<std::uint32_t>(random.next() >> 32) & 0x807fffffu;
        return from_bits(exponent | (random.integer(0, 1) ? bits : (bits & 0xffff0000u) | 0x8000u));  // half are ties
    });
    want.fill([&](Index i, Index j) { return nearest_bfloat16(x.at(i, j)); });
    const auto unit = [](Index i, Index j) { return i == j ? 1.0f : 0.0f; };
    Matrix<float> ones(n, n);
    ones.fill(unit);
    on_each_isa([&] {
        const Bfloat16Kernels& k = bfloat16_kernels();
        const PairedWeights identity(n, n, false, 48, 0, unit);
        const PairedWeights weights(n, n, false, 48, 0, [&](Index i, Index o) { return x.at(i, o); });
        const Fenced<Pair> scratch(n * kPairRoom);
        k.forward(n, n, n, false, x.data(), x.stride, nullptr, identity.forward(), c.data(), c.stride, scratch.data());
        check_bits("forward rounds x to nearest", c, want);
        k.vjp_input(n, n, n, x.data(), x.stride, identity.backward(), c.data(), c.stride, scratch.data());
        check_bits("vjp_input rounds dz to nearest", c, want);
        k.forward(n, n, n, false, ones.data(), ones.stride, nullptr, weights.forward(), c.data(), c.stride,
                  scratch.data());
        check_bits("pack rounds the forward copy to nearest", c, want);
        k.vjp_input(n, n, n, ones.data(), ones.stride, weights.backward(), c.data(), c.stride, scratch.data());
        for (Index i = 0; i < n; ++i)
            for (Index j = 0; j < i; ++j) std::swap(c.at(i, j), c.at(j, i));
        check_bits("pack rounds the backward copy to nearest", c, want);

        const Matrix<Pair> pairs(n / 2, n);
        k.pair_rows(n, padded<float>(n), ones.data(), ones.stride, pairs.data(), pairs.stride);
        for (Index column = 0; column < n; column += kPanelColumns) {
            const Index width = std::min(kPanelColumns, n - column);
            const Matrix<float> tile(n, width);
            const Fenced<Pair> packed(kBlockPairs * tile.stride);
            k.vjp_weight(n, n, tile.stride, pairs.data(), pairs.stride, x.data() + column, x.stride, packed.data(),
                         tile.data());
            check_bits("vjp_weight rounds dz to nearest", n, width, tile.data(), tile.stride, want.data() + column,
                       want.stride);
        }
    });
}

// ---- one pair of terms ----------------------------------------------------------------------------------------------

// c + a₀ b₀ + a₁ b₁ for all rows a and columns (b, c), against extended precision. The products are exact; two additions
// round once each, in whatever order, results of at most S (1 + u), S = |c| + |a₀ b₀| + |a₁ b₁|, u = 2^-24: 2 u (1 + u) S.
// The instruction takes subnormal numbers for zero: operands cost their product, c, two products and two sums 2^-126 each.
class Terms {
   public:
    std::vector<std::array<float, 2>> a, b;
    std::vector<float> c;  // one for each b

    void run(const char* name) const {
        const Index rows = static_cast<Index>(a.size()), cols = static_cast<Index>(b.size());
        begin_case<float>(name, rows, cols, 2);
        const Matrix<float> x(rows, 2), z(rows, cols);
        x.fill([&](Index i, Index k) { return a[index(i)][index(k)]; });
        const PairedWeights weights(2, cols, true, 48, 0,
                                    [&](Index k, Index j) { return k < 2 ? b[index(j)][index(k)] : c[index(j)]; });
        const Fenced<Pair> scratch(rows * kPairRoom);
        bfloat16_kernels().forward(rows, 2, cols, true, x.data(), x.stride, weights.master(), weights.forward(),
                                   z.data(), z.stride, scratch.data());
        std::vector<float> got;
        std::vector<Bounded> want;
        for (Index i = 0; i < rows; ++i)
            for (Index j = 0; j < cols; ++j)
                if (Bounded sum; judge(i, j, sum)) {
                    got.push_back(z.at(i, j));
                    want.push_back(sum);
                }
        check(2 * got.size() > a.size() * b.size(), "most sums have one right value");
        check_within("two roundings of the sum's terms", static_cast<Index>(got.size()), got.data(), want.data());
    }

   private:
    static std::size_t index(Index i) { return static_cast<std::size_t>(i); }
    static bool subnormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL; }

    // False where the order of additions decides whether the sum overflows, or subnormal numbers being zero whether there
    // is an infinity.
    bool judge(Index i, Index j, Bounded& sum) const {
        Real value = 0, size = 0, lost = 5 * 0x1p-126L;  // size: of the finite terms
        bool above = false, below = false;
        const auto add = [&](Real term) {
            value += term;
            if (std::isfinite(term)) size += std::fabs(term);
            above = above || term > 0;
            below = below || term < 0;
        };
        add(static_cast<Real>(c[index(j)]));
        for (std::size_t k = 0; k < 2; ++k) {
            const float ak = a[index(i)][k], bk = b[index(j)][k];
            const Real product = static_cast<Real>(ak) * static_cast<Real>(bk);
            add(product);
            if (!subnormal(ak) && !subnormal(bk)) continue;
            if (!std::isfinite(product)) return false;
            lost += std::fabs(product);
        }
        if (size >= static_cast<Real>(std::numeric_limits<float>::max()) && above && below) return false;
        constexpr Real u = 0x1p-24L, epsilon = 0x1p-23L;
        sum = {value, (2 * u * (1 + u) * size + lost) / epsilon};
        return true;
    }
};

// Random operands of either sign and 8 bits (fewer where they are subnormal), their exponents up to `spread` from those
// given; c as large as their products.
Terms random_terms(const char* name, Index a_exponent, Index b_exponent, Index spread) {
    Random random = begin_case<float>(name, a_exponent, b_exponent, spread);
    const auto draw = [&](Index exponent) {
        const double value = std::ldexp(static_cast<double>(random.integer(128, 255)),
                                        static_cast<int>(exponent + random.integer(-spread, spread)) - 7);
        return nearest_bfloat16(static_cast<float>(random.integer(0, 1) ? value : -value));
    };
    const auto draw_two = [&](Index exponent) { return std::array<float, 2>{draw(exponent), draw(exponent)}; };
    Terms terms;
    for (int i = 0; i < 97; ++i) terms.a.push_back(draw_two(a_exponent));
    for (int j = 0; j < 301; ++j) {
        const double product = static_cast<double>(draw(a_exponent)) * static_cast<double>(draw(b_exponent));
        terms.b.push_back(draw_two(b_exponent));
        terms.c.push_back(static_cast<float>(j % 7 ? product * random.uniform(-2, 2) : 0.0));
    }
    return terms;
}

// Every combination of the numbers that may go wrong.
Terms special_terms() {
    constexpr float inf = std::numeric_limits<float>::infinity();
    const std::vector<float> numbers = {0.0f,         -0.0f,         1.0f,     -1.0f,       inf,
                                        -inf,         std::nanf(""), 3.0f,     -0x1.46p-7f, 0x1.fep127f,
                                        -0x1.fep127f, 0x1p-126f,     0x1p-133f};
    Terms terms;
    for (const float first : numbers)
        for (const float second : numbers) {
            terms.a.push_back({first, second});
            for (const float start : numbers) {
                terms.b.push_back({first, second});
                terms.c.push_back(start);
            }
        }
    return terms;
}

void bfloat16_terms() {
    const Terms special = special_terms();
    const Terms near = random_terms("bfloat16 near terms", 0, 0, 1),
                wide = random_terms("bfloat16 wide terms", 0, 0, 60);
    const Terms tiny = random_terms("bfloat16 tiny terms", -65, -65, 10);
    const Terms subnormal = random_terms("bfloat16 subnormal terms", -127, 65, 6);
    on_each_isa([&] {
        special.run("bfloat16 special terms");
        near.run("bfloat16 near terms");
        wide.run("bfloat16 wide terms");
        tiny.run("bfloat16 tiny terms");
        subnormal.run("bfloat16 subnormal terms");
    });
}

// ---- whole networks -------------------------------------------------------------------------------------------------

// Widths that divide no tile: 531 inputs are two of the tall tiles of large batches; the last layer is narrow.
std::unique_ptr<Network<float>> paired_network() {
    using Kind = Layer<float>::Kind;
    std::vector<Layer<float>> layers = {{Kind::linear, 531, 70, true}, {Kind::op, 70, 70, false, Op::gelu},
                                        {Kind::linear, 70, 71, false}, {Kind::dropout, 71, 71},
                                        {Kind::linear, 71, 33, true},  {Kind::op, 33, 33, false, Op::tanh},
                                        {Kind::linear, 33, 3, true}};
    layers[3].param = 0.25;
    for (Layer<float>& layer : layers) layer.bfloat16 = layer.kind == Kind::linear;
    auto net = std::make_unique<Network<float>>(std::move(layers));
    Random random = begin_case<float>("bfloat16 network", 531, 3);
    for (const Parameter& parameter : net->parameters()) {
        std::vector<float> values;
        for (Index i = 0; i < parameter.size; ++i) values.push_back(static_cast<float>(random.uniform(-0.2, 0.2)));
        net->write(parameter, values.data());
    }
    return net;
}

// A network of the same weights, its copies made of them anew.
std::unique_ptr<Network<float>> rebuilt(const Network<float>& net) {
    auto again = paired_network();
    for (const Parameter& parameter : net.parameters()) {
        std::vector<float> values(static_cast<std::size_t>(parameter.size));
        net.read(parameter, net.theta(), values.data());
        again->write(parameter, values.data());
    }
    return again;
}

class PairedTraining {
   public:
    struct Record {
        std::vector<float> numbers;  // gradients, parameters and outputs
        std::vector<double> losses;
    };
    explicit PairedTraining(Index rows) : rows_(rows) {
        Random random = begin_case<float>("bfloat16 training", rows);
        for (Index i = 0; i < rows * kInputs; ++i) x_.push_back(static_cast<float>(random.uniform(-1, 1)));
        for (Index i = 0; i < rows; ++i) labels_.push_back(random.integer(0, kClasses - 1));
    }

    // The gradient, three steps, and again what the copies of the new weights give. The least clip_norm that changes nothing
    // sends the update through the stored gradient.
    Record run(double clip_norm) const {
        Record record;
        const auto owned = paired_network();
        Network<float>& net = *owned;
        Step<float> step(net, loss(), rows_, 0);
        Optimizer<float> optimizer(net, {OptimizerOp::adam, {0.9, 0.999, 1e-8, 0}});
        look(net, step, record);
        for (; optimizer.step_count < 3; ++optimizer.step_count) {
            const Noise noise = {true, 5, static_cast<std::uint64_t>(optimizer.step_count)};
            record.losses.push_back(step.sweep(data(), nullptr, rows_, noise));
            record.losses.push_back(step.update(optimizer, 0.01, {1e-5, 1e-4, 0, clip_norm}));
        }
        record.numbers.insert(record.numbers.end(), net.theta(), net.theta() + net.size());
        look(net, step, record);
        fresh_copies(net, record);
        return record;
    }

    // Rows predicted in pieces are those of the whole: two pieces that meet at each of these rows.
    void split() const {
        const auto owned = paired_network();
        const Network<float>& net = *owned;
        const std::vector<float> whole = predict(net, 0, rows_);
        for (const Index cut : {Index{1}, Index{2}, Index{5}, rows_ / 3, rows_ - 1}) {
            std::vector<float> parts = predict(net, 0, cut);
            const std::vector<float> rest = predict(net, cut, rows_);
            parts.insert(parts.end(), rest.begin(), rest.end());
            compare("a row does not know its batch", parts, whole);
        }
    }

    template <class T>
    static void compare(const char* rule, const std::vector<T>& got, const std::vector<T>& want) {
        check_bits(rule, 1, static_cast<Index>(got.size()), got.data(), 0, want.data(), 0);
    }

   private:
    static constexpr Index kInputs = 531, kClasses = 3;
    const Index rows_;
    std::vector<float> x_;
    std::vector<std::int64_t> labels_;

    static Loss<float> loss() { return {LossOp::cross_entropy, 0, true, nullptr}; }
    Dataset<float> data() const { return {rows_, x_.data(), labels_.data(), nullptr, 0, nullptr}; }
    std::vector<float> predict(const Network<float>& net, Index begin, Index end) const {
        std::vector<float> f(static_cast<std::size_t>((end - begin) * kClasses));
        net.predict(end - begin, x_.data() + begin * kInputs, f.data());
        return f;
    }
    void look(const Network<float>& net, Step<float>& step, Record& record) const {
        record.losses.push_back(step.sweep(data(), nullptr, rows_, Noise{}));
        const float* gradient = step.gradient();
        record.numbers.insert(record.numbers.end(), gradient, gradient + net.size());
        const std::vector<float> f = predict(net, 0, rows_);
        record.numbers.insert(record.numbers.end(), f.begin(), f.end());
    }
    void fresh_copies(const Network<float>& net, const Record& record) const {
        const auto owned = rebuilt(net);
        Network<float>& again = *owned;
        Step<float> step(again, loss(), rows_, 0);
        Record fresh;
        look(again, step, fresh);
        const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(fresh.numbers.size());
        compare("training keeps the copies of the weights as they are made anew",
                {record.numbers.end() - count, record.numbers.end()}, fresh.numbers);
    }
};

void bfloat16_bits() {
    const int before = thread_count();
    for (const Index rows : {7, 150, 520}) {  // beyond 512 rows: tall tiles, and sums in two blocks
        const PairedTraining training(rows);
        on_each_isa([&] {
            set_thread_count(1);
            const PairedTraining::Record alone = training.run(0);
            check(std::isfinite(alone.losses.back()) && alone.losses.back() < alone.losses.front(), "the loss falls");
            for (const int threads : {1, 2, 3, 4, 7}) {
                set_thread_count(threads);
                begin_case<float>("bfloat16 training", rows, threads);
                const PairedTraining::Record record = training.run(threads % 2 ? 1e30 : 0);
                PairedTraining::compare("losses do not depend on threads", record.losses, alone.losses);
                PairedTraining::compare("no bit depends on threads", record.numbers, alone.numbers);
                training.split();
            }
        });
    }
    set_thread_count(before);
}

}  // namespace
}  // namespace chainrule
