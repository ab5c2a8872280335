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
#include "kernels/generator.hpp"
#include "kernels/losses.hpp"
#include "kernels/ops.hpp"
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
