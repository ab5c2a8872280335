// SPDX-License-Identifier: MIT
// Tests of the kernels, the thread pool, the generator, the processor, the memory that predictions use and the GPU engine's
// plans: no Python, no framework.
//
//   kernels_test [--quick] [--seed=N] [--without=TEST] [test ...]     all_tests, at the end, lists their names
//
// The digest that it ends with is over what AVX2, AVX-512 and NEON agree on to the bit: machines that ran the same tests
// print the same one. Not in it: the baseline set, which rounds twice where they round once, and bfloat16, whose products
// are rounded as the processor does it.
//
// The oracles share no code with the kernels: exact integers (products), a scalar loop in the promised order (the
// bits of products), long double formulas with a-priori bounds (ops, losses, update rules), published vectors
// (generator). Every array that a kernel sees ends at an unmapped page and begins behind guard bytes. Before a call
// everything in it is NaN but what the contract says is there, so what is read without having been written shows in
// the result.
#include "kernels/bfloat16.hpp"
#include "kernels/cuda_plans.hpp"
#include "kernels/fits.hpp"
#include "kernels/generator.hpp"
#include "kernels/losses.hpp"
#include "kernels/ops.hpp"
#include "kernels/predictions.hpp"
#include "kernels/processors.hpp"
#include "kernels/products.hpp"
#include "kernels/rules.hpp"
#include "kernels/threads.hpp"

namespace chainrule {
namespace {

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
    {"small_bfloat16", small_bfloat16},
    {"large_bfloat16", large_bfloat16},
    {"bfloat16_rounding", bfloat16_rounding},
    {"bfloat16_operands", bfloat16_operands},
    {"bfloat16_terms", bfloat16_terms},
    {"bfloat16_bits", bfloat16_bits},
    {"ops", ops_agree},
    {"ops_nan", ops_nan},
    {"ops_limits", ops_limits},
    {"losses", losses},
    {"loss_limits", loss_limits},
    {"optimizers", optimizers},
    {"penalties", penalties},
    {"fits_float32", fits<float>},
    {"fits_float64", fits<double>},
    {"generator", generator},
    {"draws", draws},
    {"permutations", permutations},
    {"dropouts", dropouts},
    {"instruction_sets", instruction_sets},
    {"quota_texts", quota_texts},
    {"quota_paths", quota_paths},
    {"cuda_strides", cuda_strides},
    {"cuda_tiles", cuda_tiles},
    {"cuda_programs", cuda_programs},
    {"cuda_predictions", cuda_predictions},
    {"predictions", predictions},
    {"pool_parts", pool_parts},
    {"pool_nested", pool_nested},
    {"pool_callers", pool_callers},
    {"pool_many", pool_many},
    {"pool_wakes", pool_wakes},
    {"pool_float_mode", pool_float_mode},
    {"pool_distance", pool_distance},
    {"pool_affinity", pool_affinity},
    {"pool_fork", pool_fork},
};

using Names = std::vector<std::string>;

bool is_among(const Names& names, const Test& test) {
    return std::find(names.begin(), names.end(), test.name) != names.end();
}

int run_all(const Names& names, const Names& without) {
    for (const int number : kFaults) signal(number, on_signal);
    std::printf("instruction sets:");
    for (const Isa isa : isas_here()) std::printf(" %s", name_of(isa));
    std::printf("\n");
    for (const Test& test : all_tests) {
        if ((!names.empty() && !is_among(names, test)) || is_among(without, test)) continue;
        const long before = passed;
        const auto start = std::chrono::steady_clock::now();
        context = {};
        context.op = test.name;
        end_hang_after(300);
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
    chainrule::Names names, without;
    for (int i = 1; i < count; ++i) {
        const std::string argument = arguments[i];
        if (argument == "--quick")
            chainrule::quick = true;
        else if (argument.rfind("--seed=", 0) == 0)
            chainrule::base_seed = std::strtoull(argument.c_str() + 7, nullptr, 10);
        else if (argument.rfind("--without=", 0) == 0)
            without.push_back(argument.substr(10));
        else
            names.push_back(argument);
    }
    return chainrule::run_all(names, without);
}
