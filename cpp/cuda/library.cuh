// SPDX-License-Identifier: MIT
// L2: large matrix products by cuBLASLt. The operands are brought into the form that it is fast with (gathered, rounded to
// bfloat16, with their column of ones, in rows of whole 16 bytes) unless they have it; a bias alone goes into its own epilogue, any
// other of ours runs over its result. Each shape's algorithm is chosen once, among those that sum in a fixed order.
#pragma once

#include <map>
#include <tuple>

#include "cublaslt.hpp"
#include "maps.cuh"

namespace chainrule {
namespace cuda {

inline void check_library(int status, const char* what) {
    if (status != 0)
        throw std::runtime_error(std::string("[cuda] cuBLASLt: ") + what + " failed with status " +
                                 std::to_string(status));
}

// An operand as the library has it: rows of `stride` elements, zeros beside the last column.
template <class T, class Out>
struct Pack {
    Operand<T> from;
    Index cols, stride;
    Out* to;
    __device__ void operator()(Index i, Index j) const {
        const T value = j < cols ? from.at(static_cast<int>(i), static_cast<int>(j)) : T{0};
        if constexpr (sizeof(Out) == 2)
            to[i * stride + j] = static_cast<Out>(round_to_bfloat16(Vec<float>(static_cast<float>(value)))[0] >> 16);
        else
            to[i * stride + j] = value;
    }
};

// An epilogue over a product that lies in memory, by tiles as the small ones of our own.
template <class T, class Epilogue>
__global__ void __launch_bounds__(kThreads, 4)
    finish_product(int m, int n, const T* c, Index stride, Epilogue epilogue) {
    CHAINRULE_SHARED(T, memory);
    const int row = static_cast<int>(blockIdx.x) * static_cast<int>(kSmallTile);
    const int col = static_cast<int>(blockIdx.y) * static_cast<int>(kSmallTile);
    for (int e = static_cast<int>(threadIdx.x); e < kSmallTile * kSmallTile; e += kThreads) {
        const int i = row + e / static_cast<int>(kSmallTile), j = col + e % static_cast<int>(kSmallTile);
        if (i < m && j < n) epilogue(i, j, c[i * stride + j]);
    }
    epilogue.finish(memory);
}

// Products on one stream, with the memory that they take; a second stream has a library of its own.
template <class T>
class Library {
   public:
    Library(int device, Precision precision) : device_(device), precision_(precision), lt_(*lt::functions()) {
        check_library(lt_.Create(&handle_), "beginning");
        workspace_ = Buffer<unsigned char>(device, kWorkspace, "the workspace of cuBLASLt");
    }
    ~Library() {
        for (auto& [shape, plan] : plans_) destroy(plan);
        (void)lt_.Destroy(handle_);
    }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    // Memory for products of `rows` rows with a layer of these sizes, in any form; before a graph is made of them.
    void reserve(Index rows, Index inputs, Index outputs) {
        const Index most = std::max({rows * padded(inputs + 1), rows * padded(outputs), outputs * padded(inputs + 1)});
        a_.grow(device_, most, "the operands of a product");
        b_.grow(device_, most, "the operands of a product");
        c_.grow(device_, most, "a product");
    }

    template <bool ADownK, bool BDownK, class Epilogue>
    void multiply(Index m, Index n, Index k, const Operand<T>& a, const Operand<T>& b, const Epilogue& epilogue,
                  cudaStream_t stream) {
        const Ready x = ready(a, ADownK ? k : m, ADownK ? m : k, a_, stream);
        const Ready y = ready(b, BDownK ? k : n, BDownK ? n : k, b_, stream);
        const Direct direct = direct_of(epilogue);
        const Index c_stride = direct.to ? direct.stride : padded(n);
        const Shape shape = {ADownK, BDownK, m, n, k, x.stride, y.stride, c_stride, direct.bias != nullptr};
        T* const c = direct.to ? direct.to : c_.data();
        run(plan_of(shape), x.data, y.data, direct.bias, c, stream);
        if (direct.to) return;
        launch(finish_product<T, Epilogue>,
               dim3(static_cast<unsigned>(tiles_across(m, kSmallTile)),
                    static_cast<unsigned>(tiles_across(n, kSmallTile))),
               kThreads, kThreads * sizeof(double), stream, static_cast<int>(m), static_cast<int>(n),
               static_cast<const T*>(c), c_stride, epilogue);
    }

   private:
    static constexpr Index kWorkspace = Index{32} << 20;
    static constexpr std::uint32_t kAlignment =
        16;  // in bytes, of what a product takes; the library would count on 256
    using Shape = std::tuple<bool, bool, Index, Index, Index, Index, Index, Index, bool>;
    struct Ready {
        const void* data;
        Index stride;
    };
    struct Direct {  // where a product may go without an epilogue of ours
        T* to = nullptr;
        Index stride = 0;
        const T* bias = nullptr;
    };
    struct Plan {
        void *product = nullptr, *a = nullptr, *b = nullptr, *c = nullptr;
        lt::Algorithm algorithm{};
    };
    static Index padded(Index cols) { return round_up(cols, 8); }
    static bool aligned(const void* data, Index stride) {
        return reinterpret_cast<std::uintptr_t>(data) % kAlignment == 0 &&
               stride * static_cast<Index>(sizeof(T)) % kAlignment == 0;
    }
    static Direct direct_of(const Activate<T>& e) {
        const bool plain = e.op == Op::identity && !e.add && !e.z.data && aligned(e.y.data, e.y.stride);
        return plain && (!e.bias || aligned(e.bias, 0)) ? Direct{e.y.data, e.y.stride, e.bias} : Direct{};
    }
    static Direct direct_of(const Differentiate<T>& e) {
        return !e.saved.data && !e.add && aligned(e.dx.data, e.dx.stride) ? Direct{e.dx.data, e.dx.stride, nullptr}
                                                                          : Direct{};
    }
    static Direct direct_of(const StoreGradient<T>&) { return {}; }
    static Direct direct_of(const Update<T>&) { return {}; }

    Ready ready(const Operand<T>& from, Index rows, Index cols, const Buffer<T>& scratch, cudaStream_t stream) const {
        const bool plain = from.ones < 0 && !from.rows.order && !from.rows.first && aligned(from.data, from.stride);
        if (plain && precision_ != Precision::bfloat16) return {from.data, from.stride};
        const Index stride = padded(cols);
        if (precision_ == Precision::bfloat16) {
            auto* const to = reinterpret_cast<std::uint16_t*>(scratch.data());
            map_elements(rows, stride, Pack<T, std::uint16_t>{from, cols, stride, to}, stream);
        } else {
            map_elements(rows, stride, Pack<T, T>{from, cols, stride, scratch.data()}, stream);
        }
        return {scratch.data(), stride};
    }

    const Plan& plan_of(const Shape& shape) {
        auto found = plans_.find(shape);
        if (found != plans_.end()) return found->second;
        Plan plan;
        try {
            describe(shape, plan);
        } catch (...) {
            destroy(plan);
            throw;
        }
        return plans_.emplace(shape, plan).first->second;
    }
    // Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ: ours are the library's the other way round.
    void describe(const Shape& shape, Plan& plan) {
        const auto [a_down, b_down, m, n, k, a_stride, b_stride, c_stride, bias] = shape;
        const bool half = precision_ == Precision::bfloat16;
        const int real = sizeof(T) == 8 ? lt::kReal64 : lt::kReal32, type = half ? lt::kBfloat16 : real;
        const int compute = sizeof(T) == 8                  ? lt::kCompute64
                            : precision_ == Precision::tf32 ? lt::kComputeTf32
                                                            : lt::kCompute32;
        check_library(lt_.MatmulDescCreate(&plan.product, compute, real), "describing a product");
        set(plan.product, lt::kTransposeA, b_down ? lt::kPlain : lt::kTransposed);
        set(plan.product, lt::kTransposeB, a_down ? lt::kTransposed : lt::kPlain);
        set(plan.product, lt::kEpilogue, bias ? lt::kBias : lt::kNoEpilogue);
        // Nobody reads there: the choice of an algorithm looks at how the pointer is aligned.
        if (bias) set(plan.product, lt::kBiasPointer, std::uintptr_t{kAlignment});
        const auto layout = [&](void*& made, int of, Index across, Index down, Index stride) {
            check_library(lt_.MatrixLayoutCreate(&made, of, static_cast<std::uint64_t>(across),
                                                 static_cast<std::uint64_t>(down), stride),
                          "describing a matrix");
        };
        layout(plan.a, type, b_down ? n : k, b_down ? k : n, b_stride);
        layout(plan.b, type, a_down ? m : k, a_down ? k : m, a_stride);
        layout(plan.c, real, n, m, c_stride);
        choose(plan);
    }
    template <class V>
    void set(void* product, int attribute, const V& value) const {
        check_library(lt_.MatmulDescSetAttribute(product, attribute, &value, sizeof value), "describing a product");
    }
    void choose(Plan& plan) const {
        void* preference = nullptr;
        check_library(lt_.MatmulPreferenceCreate(&preference), "choosing an algorithm");
        const std::uint64_t bytes = kWorkspace;
        const std::uint32_t in_order = 2 | 4;  // parts of a sum are kept apart and added by one kernel
        const std::uint32_t alignment = kAlignment;
        int status = lt_.MatmulPreferenceSetAttribute(preference, lt::kWorkspaceBytes, &bytes, sizeof bytes);
        if (status == 0)
            status = lt_.MatmulPreferenceSetAttribute(preference, lt::kReductionSchemes, &in_order, sizeof in_order);
        for (const int operand : lt::kAlignments)
            if (status == 0)
                status = lt_.MatmulPreferenceSetAttribute(preference, operand, &alignment, sizeof alignment);
        lt::Heuristic best{};
        int count = 0;
        if (status == 0)
            status = lt_.MatmulAlgoGetHeuristic(handle_, plan.product, plan.a, plan.b, plan.c, plan.c, preference, 1,
                                                &best, &count);
        (void)lt_.MatmulPreferenceDestroy(preference);
        check_library(status, "choosing an algorithm");
        if (count == 0) throw std::runtime_error("[cuda] cuBLASLt has no algorithm for a product");
        plan.algorithm = best.algorithm;
    }
    void run(const Plan& plan, const void* a, const void* b, const T* bias, T* c, cudaStream_t stream) const {
        const T one = 1, zero = 0;
        if (bias) set(plan.product, lt::kBiasPointer, bias);
        check_library(lt_.Matmul(handle_, plan.product, &one, b, plan.a, a, plan.b, &zero, c, plan.c, c, plan.c,
                                 &plan.algorithm, workspace_.data(), static_cast<std::size_t>(kWorkspace), stream),
                      "a product");
    }
    void destroy(Plan& plan) const {
        if (plan.product) (void)lt_.MatmulDescDestroy(plan.product);
        void* const layouts[] = {plan.a, plan.b, plan.c};
        for (void* layout : layouts)
            if (layout) (void)lt_.MatrixLayoutDestroy(layout);
    }

    const int device_;
    const Precision precision_;
    const lt::Functions& lt_;
    void* handle_ = nullptr;
    Buffer<unsigned char> workspace_;
    Buffer<T> a_, b_, c_;
    std::map<Shape, Plan> plans_;
};

// How a network's products are made: by the library of the stream, if there is one, else by our own tiles.
template <class T>
struct Arithmetic {
    Precision precision;
    int processors;
    Library<T>*library = nullptr, *side_library = nullptr;
    cudaStream_t side = nullptr;

    template <bool ADownK, bool BDownK, class Epilogue>
    void multiply(Index m, Index n, Index k, const Operand<T>& a, const Operand<T>& b, const Epilogue& epilogue,
                  cudaStream_t stream) const {
        if (library && k > 0)
            return (stream == side ? side_library : library)
                ->template multiply<ADownK, BDownK>(m, n, k, a, b, epilogue, stream);
        multiply_tiles<ADownK, BDownK>(precision, tile_size(m, n, processors), m, n, k, a, b, epilogue, stream);
    }
};

}  // namespace cuda
}  // namespace chainrule
