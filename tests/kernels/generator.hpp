// SPDX-License-Identifier: MIT
// Random numbers, permutations, dropout.
#pragma once

#include "harness.hpp"

namespace chainrule {
namespace {

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

}  // namespace
}  // namespace chainrule
