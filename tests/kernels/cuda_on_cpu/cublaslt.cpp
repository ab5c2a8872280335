// SPDX-License-Identifier: MIT
// cuBLASLt on the CPU, as far as cpp/cuda/library.cuh uses it: column-major products of float32, float64 and bfloat16, and the
// bias epilogue. It refuses what the real one refuses: misaligned matrices, a leading dimension shorter than a column.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "cuda/cublaslt.hpp"
#include "cuda_runtime.h"

// For the tests, which find it by its name.
extern "C" {
__attribute__((visibility("default"))) long chainrule_products_in_graphs = 0;
}

namespace {

using namespace chainrule::cuda;

constexpr int kInvalid = 7;  // CUBLAS_STATUS_INVALID_VALUE

struct Product {
    int compute, scale;
    std::int32_t transpose_a = 0, transpose_b = 0;
    std::uint32_t epilogue = 1;
    const void* bias = nullptr;
};
struct Layout {
    int type;
    std::uint64_t rows, cols;
    std::int64_t ld;
};

std::size_t size_of(int type) { return type == lt::kReal64 ? 8 : type == lt::kReal32 ? 4 : 2; }

double element(const void* data, const Layout& layout, std::uint64_t row, std::uint64_t col, bool tf32) {
    const std::uint64_t at = col * static_cast<std::uint64_t>(layout.ld) + row;
    if (layout.type == lt::kReal64) return static_cast<const double*>(data)[at];
    std::uint32_t bits;
    if (layout.type == lt::kBfloat16) {
        bits = static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(data)[at]) << 16;
    } else {
        std::memcpy(&bits, static_cast<const float*>(data) + at, 4);
        if (tf32) bits = (bits + 0x1000u) & 0xffffe000u;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return static_cast<double>(value);
}

void put(void* data, const Layout& layout, std::uint64_t row, std::uint64_t col, double value) {
    const std::uint64_t at = col * static_cast<std::uint64_t>(layout.ld) + row;
    const float rounded = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &rounded, 4);
    if (layout.type == lt::kReal64)
        static_cast<double*>(data)[at] = value;
    else if (layout.type == lt::kReal32)
        static_cast<float*>(data)[at] = rounded;
    else
        static_cast<std::uint16_t*>(data)[at] =
            static_cast<std::uint16_t>(rounded != rounded ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

bool aligned(const void* data, const Layout& layout) {
    const std::size_t step = static_cast<std::size_t>(layout.ld) * size_of(layout.type);
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && step % 16 == 0 &&
           static_cast<std::uint64_t>(layout.ld) >= layout.rows;
}

void multiply(const Product& p, const void* a, const Layout& la, const void* b, const Layout& lb, void* d,
              const Layout& ld) {
    const bool tf32 = p.compute == lt::kComputeTf32;
    const std::uint64_t depth = p.transpose_a ? la.rows : la.cols;
    const Layout vector = {ld.type, ld.rows, 1, static_cast<std::int64_t>(ld.rows)};
    for (std::uint64_t j = 0; j < ld.cols; ++j)
        for (std::uint64_t i = 0; i < ld.rows; ++i) {
            double sum = p.epilogue == lt::kBias ? element(p.bias, vector, i, 0, false) : 0;
            for (std::uint64_t k = 0; k < depth; ++k)
                sum += (p.transpose_a ? element(a, la, k, i, tf32) : element(a, la, i, k, tf32)) *
                       (p.transpose_b ? element(b, lb, j, k, tf32) : element(b, lb, k, j, tf32));
            put(d, ld, i, j, sum);
        }
}

void touch(const void* data, const Layout& layout, bool writes) {
    const std::size_t size = size_of(layout.type);
    for (std::uint64_t col = 0; col < layout.cols; ++col)
        cuda_on_cpu::races::touch(static_cast<const char*>(data) + col * static_cast<std::uint64_t>(layout.ld) * size,
                                  layout.rows * size, writes);
}

int create(void** handle) { return *handle = new int(0), 0; }
int destroy(void* handle) { return delete static_cast<int*>(handle), 0; }
int product_create(void** product, int compute, int scale) { return *product = new Product{compute, scale}, 0; }
int product_destroy(void* product) { return delete static_cast<Product*>(product), 0; }
int product_set(void* product, int attribute, const void* value, std::size_t size) {
    Product& p = *static_cast<Product*>(product);
    const auto take = [&](auto& to) { return size == sizeof to ? (std::memcpy(&to, value, size), 0) : kInvalid; };
    switch (attribute) {
        case lt::kTransposeA: return take(p.transpose_a);
        case lt::kTransposeB: return take(p.transpose_b);
        case lt::kEpilogue: return take(p.epilogue);
        case lt::kBiasPointer: return take(p.bias);
        default: return kInvalid;
    }
}
int layout_create(void** layout, int type, std::uint64_t rows, std::uint64_t cols, std::int64_t ld) {
    return *layout = new Layout{type, rows, cols, ld}, 0;
}
int layout_destroy(void* layout) { return delete static_cast<Layout*>(layout), 0; }
int preference_create(void** preference) { return create(preference); }
int preference_destroy(void* preference) { return destroy(preference); }
int preference_set(void* preference, int attribute, const void* value, std::size_t size) {
    if (attribute == lt::kWorkspaceBytes) return size == 8 ? 0 : kInvalid;
    if (size != 4) return kInvalid;
    if (attribute == lt::kReductionSchemes) return 0;
    std::uint32_t alignment;
    std::memcpy(&alignment, value, sizeof alignment);
    for (int operand = 0; operand < 4; ++operand)
        if (attribute == lt::kAlignments[operand])
            return *static_cast<int*>(preference) |= (alignment <= 16) << operand, 0;
    return kInvalid;
}
// Whoever does not say how its matrices are aligned gets what needs 256 bytes: here, nothing.
int heuristic(void*, void*, void*, void*, void*, void*, void* preference, int, lt::Heuristic* found, int* count) {
    if (*static_cast<int*>(preference) != 15)
        std::abort();  // an attribute that we set is missing; any answer would do for our side
    if (cuda_on_cpu::makes_a_graph()) return 14;  // an internal error, as version 13.3 has it then
    const char* algorithms = std::getenv("CHAINRULE_EMULATOR_ALGORITHMS");
    static std::atomic<int> asked{0};
    const auto there = [&](const char* which) { return algorithms && std::strcmp(algorithms, which) == 0; };
    return *found = lt::Heuristic{}, *count = there("some") ? ++asked % 2 : !there("none"), 0;
}
int matmul(void*, void* product, const void*, const void* a, void* a_layout, const void* b, void* b_layout, const void*,
           const void*, void*, void* d, void* d_layout, const lt::Algorithm*, void* workspace, std::size_t,
           void* stream) {
    const Product p = *static_cast<Product*>(product);
    const Layout la = *static_cast<Layout*>(a_layout), lb = *static_cast<Layout*>(b_layout);
    const Layout ld = *static_cast<Layout*>(d_layout);
    if (!aligned(a, la) || !aligned(b, lb) || !aligned(d, ld) || la.type != lb.type) return kInvalid;
    const std::uint64_t m = p.transpose_a ? la.cols : la.rows, n = p.transpose_b ? lb.rows : lb.cols;
    const std::uint64_t k = p.transpose_a ? la.rows : la.cols, other = p.transpose_b ? lb.cols : lb.rows;
    if (m != ld.rows || n != ld.cols || k != other) return kInvalid;
    if (cuda_on_cpu::makes_a_graph()) ++chainrule_products_in_graphs;
    cuda_on_cpu::enqueue(static_cast<cudaStream_t>(stream), [=] {
        touch(a, la, false);
        touch(b, lb, false);
        touch(d, ld, true);
        cuda_on_cpu::races::touch(workspace, 1, true);  // for all of it
        if (p.epilogue == lt::kBias) cuda_on_cpu::races::touch(p.bias, ld.rows * size_of(ld.type), false);
        multiply(p, a, la, b, lb, d, ld);
    });
    return 0;
}

}  // namespace

void* cuda_on_cpu::library_symbol(const char* name) {
    static const std::map<std::string, void*> functions = {
        {"cublasLtCreate", reinterpret_cast<void*>(create)},
        {"cublasLtDestroy", reinterpret_cast<void*>(destroy)},
        {"cublasLtMatmul", reinterpret_cast<void*>(matmul)},
        {"cublasLtMatmulDescCreate", reinterpret_cast<void*>(product_create)},
        {"cublasLtMatmulDescDestroy", reinterpret_cast<void*>(product_destroy)},
        {"cublasLtMatmulDescSetAttribute", reinterpret_cast<void*>(product_set)},
        {"cublasLtMatrixLayoutCreate", reinterpret_cast<void*>(layout_create)},
        {"cublasLtMatrixLayoutDestroy", reinterpret_cast<void*>(layout_destroy)},
        {"cublasLtMatmulPreferenceCreate", reinterpret_cast<void*>(preference_create)},
        {"cublasLtMatmulPreferenceDestroy", reinterpret_cast<void*>(preference_destroy)},
        {"cublasLtMatmulPreferenceSetAttribute", reinterpret_cast<void*>(preference_set)},
        {"cublasLtMatmulAlgoGetHeuristic", reinterpret_cast<void*>(heuristic)},
    };
    const auto found = functions.find(name);
    return found == functions.end() ? nullptr : found->second;
}
