// SPDX-License-Identifier: MIT
// L2: the choice between the kernel tables, and the hyper-parameters' form for one step.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

// One entry per instruction set in this build, best first, with the one whose float64 maps and maps of second order it
// takes: AVX2's give the bits of AVX-512, and are worth more in the size of the package than in speed.
#if defined(CHAINRULE_X86)
#define CHAINRULE_ISAS(X) X(avx512, avx2) X(avx2, avx2) X(baseline, baseline)
#elif defined(CHAINRULE_ARM)
#define CHAINRULE_ISAS(X) X(neon, neon)
#else
#define CHAINRULE_ISAS(X) X(baseline, baseline)
#endif

namespace chainrule {

#define CHAINRULE_DECLARE(isa, rarer)                  \
    namespace isa {                                    \
    extern const Products<float> float32_products;     \
    extern const Products<double> float64_products;    \
    extern const Maps<float> float32_maps;             \
    extern const Bfloat16Kernels bfloat16_kernels;     \
    }                                                  \
    namespace rarer {                                  \
    extern const Maps<double> float64_maps;            \
    extern const SecondKernels<float> float32_second;  \
    extern const SecondKernels<double> float64_second; \
    }
CHAINRULE_ISAS(CHAINRULE_DECLARE)

namespace {

struct Tables {
    Isa isa;
    Kernels<float> float32;
    Kernels<double> float64;
    const Bfloat16Kernels* bfloat16;
    const SecondKernels<float>* second32;
    const SecondKernels<double>* second64;
};
#define CHAINRULE_ROW(isa, rarer)                  \
    {Isa::isa,                                     \
     {isa::float32_products, isa::float32_maps},   \
     {isa::float64_products, rarer::float64_maps}, \
     &isa::bfloat16_kernels,                       \
     &rarer::float32_second,                       \
     &rarer::float64_second},
const Tables all_tables[] = {CHAINRULE_ISAS(CHAINRULE_ROW)};

const Tables* best_tables() {
    const char* wanted = std::getenv("CHAINRULE_ISA");
    const Tables* best = nullptr;
    for (const Tables& tables : all_tables) {
        if (!runs_here(tables.isa)) continue;
        if (wanted != nullptr && std::strcmp(wanted, name_of(tables.isa)) == 0) return &tables;
        if (best == nullptr) best = &tables;
    }
    return best;  // the baseline runs anywhere
}

std::atomic<const Tables*>& active() {
    static std::atomic<const Tables*> tables{best_tables()};
    return tables;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
    return active().load(std::memory_order_relaxed)->float32;
}
template <>
const Kernels<double>& kernels<double>() {
    return active().load(std::memory_order_relaxed)->float64;
}

template <>
const SecondKernels<float>& second_kernels<float>() {
    return *active().load(std::memory_order_relaxed)->second32;
}
template <>
const SecondKernels<double>& second_kernels<double>() {
    return *active().load(std::memory_order_relaxed)->second64;
}

// Those of AVX-512 use an instruction that not every processor with AVX-512 has; the next table's are right everywhere.
const Bfloat16Kernels& bfloat16_kernels() {
    static const bool pairs = multiplies_pairs();
    const Tables* tables = active().load(std::memory_order_relaxed);
    return *(tables->isa == Isa::avx512 && !pairs ? tables + 1 : tables)->bfloat16;
}

Isa active_isa() { return active().load()->isa; }

bool built_in(Isa isa) {
    for (const Tables& tables : all_tables)
        if (tables.isa == isa) return true;
    return false;
}

bool select_isa(Isa isa) {
    for (const Tables& tables : all_tables)
        if (tables.isa == isa && runs_here(isa)) {
            active().store(&tables);
            return true;
        }
    return false;
}

bool uses_slot(const OptimizerSettings& settings, int slot) {
    const double* v = settings.values;
    switch (settings.rule) {
        case OptimizerOp::sgd: return slot == 0 && v[0] != 0;
        case OptimizerOp::rmsprop: return slot == 0 || (slot == 1 && v[3] != 0) || (slot == 2 && v[4] != 0);
        default: return slot < 2;
    }
}

template <class T>
Hyper<T> prepare_step(const OptimizerSettings& settings, double lr, std::int64_t step) {
    const auto t = [](double value) { return static_cast<T>(value); };
    const double* v = settings.values;
    Hyper<T> h = {};
    h.lr = t(lr);
    switch (settings.rule) {
        case OptimizerOp::sgd:
            h.momentum = t(v[0]);
            h.undamped = t(step == 1 ? 1.0 : 1.0 - v[1]);  // the first gradient enters the buffer whole
            h.nesterov = t(v[2]);
            h.weight_decay = t(v[3]);
            break;
        case OptimizerOp::rmsprop:
            h.alpha = t(v[0]);
            h.rest_alpha = t(1 - v[0]);
            h.eps = t(v[1]);
            h.weight_decay = t(v[2]);
            h.momentum = t(v[3]);
            h.centered = t(v[4]);
            break;
        default:  // adam, adamw
            h.rest1 = t(1 - v[0]);
            h.beta2 = t(v[1]);
            h.rest2 = t(1 - v[1]);
            h.eps = t(v[2]);
            h.weight_decay = t(v[3]);
            h.step_size = t(lr / (1 - std::pow(v[0], static_cast<double>(step))));
            h.root_scale = t(1 / std::sqrt(1 - std::pow(v[1], static_cast<double>(step))));
    }
    return h;
}
template Hyper<float> prepare_step<float>(const OptimizerSettings&, double, std::int64_t);
template Hyper<double> prepare_step<double>(const OptimizerSettings&, double, std::int64_t);

}  // namespace chainrule
