// SPDX-License-Identifier: MIT
// L2: large matrix products by cuBLASLt. The operands are packed into the form that it is fast with (gathered, rounded to
// bfloat16, with their column of ones, in whole lines) unless they have it: each matrix once a step, or by the epilogue that makes
// it, and then as nothing else if nobody reads more. A bias alone goes into the library's own epilogue, any other of ours is one
// pass over its result. Each shape's algorithm is chosen once, among those that sum in a fixed order.
#pragma once

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "cublaslt.hpp"
#include "maps.cuh"

namespace chainrule {
namespace cuda {

inline void check_library(int status, const char* what) {
    if (status != 0)
        throw std::runtime_error(std::string("[cuda] cuBLASLt: ") + what + " failed with status " +
                                 std::to_string(status));
}

template <class T, class Out>
struct Pack {
    Operand<T> from;
    Packed<T, Out> packed;
    __device__ void operator()(Index i, Index j) const {
        packed.put(i, j, j < packed.cols ? from.at(static_cast<int>(i), static_cast<int>(j)) : T{0});
    }
};

template <class T>
struct Unpack {
    const std::uint16_t* from;
    Index from_stride;
    T* to;
    Index stride;
    __device__ void operator()(Index i, Index j) const { to[i * stride + j] = real_of<T>(from[i * from_stride + j]); }
};

// Sums of columns: what a column of ones would give Aᵀ B. A thread adds up every 32nd row of its column, then one the 32.
constexpr int kColumnsOfBlock = 32, kRowsAtOnce = 32;
template <class T, class In>
__global__ void __launch_bounds__(kColumnsOfBlock* kRowsAtOnce)
    sum_columns(int rows, int cols, const In* from, Index stride, T* sums) {
    CHAINRULE_SHARED(T, memory);
    const int j = static_cast<int>(blockIdx.x) * kColumnsOfBlock + static_cast<int>(threadIdx.x);
    const int first = static_cast<int>(threadIdx.y);
    T sum = 0;
    CHAINRULE_UNROLL(8)
    for (int i = first; i < rows && j < cols; i += kRowsAtOnce) sum += real_of<T>(from[i * stride + j]);
    memory[first * kColumnsOfBlock + static_cast<int>(threadIdx.x)] = sum;
    __syncthreads();
    if (first > 0 || j >= cols) return;
    for (int r = 1; r < kRowsAtOnce; ++r) sum += memory[r * kColumnsOfBlock + static_cast<int>(threadIdx.x)];
    sums[j] = sum;
}

// A product in memory, its last column elsewhere if that is not null.
template <class T, class C>
struct Product {
    const C* c;
    Index stride;
    const T* last;
    __device__ T at(int i, int j, int n) const { return last && j == n - 1 ? last[i] : real_of<T>(c[i * stride + j]); }
};

// An epilogue over such a product, by tiles as the small ones of our own; what it makes is packed beside.
template <class T, class C, class Epilogue>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    finish_product(int m, int n, Product<T, C> c, Epilogue epilogue, Packed<T, std::uint16_t> packed) {
    CHAINRULE_SHARED(T, memory);
    constexpr int tile = static_cast<int>(kSmallTile), down = kThreads / tile, N = 4;
    const int blocks_down = (m + tile - 1) / tile, block = static_cast<int>(blockIdx.x);
    const int first = block % blocks_down * tile + static_cast<int>(threadIdx.x) / tile;
    const int j = block / blocks_down * tile + static_cast<int>(threadIdx.x) % tile;
    for (int r = 0; r < tile; r += N * down) {
        Several<T, N> v = {};
        int rows[N];
        CHAINRULE_UNROLL(4)
        for (int d = 0; d < N; ++d) rows[d] = first + r + d * down < m ? first + r + d * down : -1;
        if (j < n) {
            each_there(rows, [&](int d) { v.at[d] = c.at(rows[d], j, n); });
            epilogue(rows, j, v);
        }
        if (packed.to && j < packed.stride) each_there(rows, [&](int d) { packed.put(rows[d], j, v.at[d]); });
    }
    epilogue.finish(memory);
}

// Products on two streams, with the memory that they take.
template <class T>
class Library {
   public:
    Library(int device, Precision precision, cudaStream_t side)
        : device_(device), precision_(precision), side_(side), lt_(*lt::functions()) {
        check_library(lt_.Create(&handle_), "beginning");
        for (Room& room : rooms_)
            room.workspace = Buffer<unsigned char>(device, kWorkspace, "the workspace of cuBLASLt");
    }
    ~Library() {
        for (auto& [shape, plan] : plans_) destroy(plan);
        const std::lock_guard<std::recursive_mutex> alone(graph_in_making());  // it may wait for the device
        (void)lt_.Destroy(handle_);
    }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    // Memory for the products of a step of `rows` rows; before a graph is made of them.
    void reserve(Index rows, const std::vector<Layer<T>>& layers) {
        forget();
        Index product = 0, packed = 0, outputs = 0;
        for (const Layer<T>& g : layers) {
            if (g.kind != Layer<T>::Kind::linear) continue;
            const Index in = padded(g.inputs + 1), out = padded(g.outputs);
            product = std::max({product, rows * in, rows * out, g.outputs * in});
            outputs = std::max(outputs, g.outputs);
            // W, and on either side an activation and a cotangent.
            packed += (g.outputs + 2 * rows) * packed_stride(g.inputs) + 2 * rows * packed_stride(g.outputs);
        }
        for (Room& room : rooms_) {
            room.product.grow(device_, product, "a product");
            room.sums.grow(device_, outputs, "sums of cotangents");
        }
        arena_.grow(device_, packed * element_bytes(), "the operands of products");
    }

    // Nothing is packed; what is enqueued from here on may run again and again.
    void forget() {
        packed_.clear();
        used_ = 0;
    }
    // Where somebody may put a matrix that products of this step will take; null: it is taken as it is.
    Packed<T, std::uint16_t> packing(const MatrixView<T>& m) { return packed_of(m.data, m.rows, m.cols, 0, false); }

    // Matrices have changed, but for the weights that an update has packed for the step to come.
    void begin_step() { ++step_; }

    // Shapes of products met so far: those that it has an algorithm for, and all.
    std::pair<int, int> shapes() const {
        const auto found = [](const auto& plan) { return plan.second.found; };
        return {static_cast<int>(std::count_if(plans_.begin(), plans_.end(), found)), static_cast<int>(plans_.size())};
    }

    // Whether it could: for some shapes the library may have no algorithm.
    template <bool ADownK, bool BDownK, class Epilogue>
    bool multiply(Index m, Index n, Index k, const Operand<T>& a, const Operand<T>& b, const Epilogue& epilogue,
                  cudaStream_t stream) {
        Operand<T> right = b;
        const bool apart = b.ones >= 0 && sums_apart(half() || !lies_ready(b), m, b.ones, k);
        if (apart) right.ones = -1;
        // A column of ones would make an odd width, for which tensor cores are slow; the zeros beside it do no harm.
        const Index width = apart ? b.ones : b.ones >= 0 ? padded(n) : n;
        const Ready x = ready(a, ADownK ? k : m, ADownK ? m : k, stream);
        const Ready y = ready(right, BDownK ? k : width, BDownK ? width : k, stream);
        const Room& room = rooms_[stream == side_];
        const Direct direct = direct_of(epilogue);
        const Index c_stride = direct.to ? direct.stride : padded(n);
        const bool bias = direct.bias != nullptr, halved = half() && rounds_before(epilogue);
        const Shape shape = {ADownK, BDownK, m, width, k, x.stride, y.stride, c_stride, bias, halved};
        const Plan& plan = plan_of(shape);
        if (!plan.found) {
            unpack(a.data, a.stride, stream);
            unpack(b.data, b.stride, stream);
            unpack_saved(epilogue, stream);
            return false;
        }
        void* const c = direct.to ? direct.to : room.product.data();
        if (apart) half() ? sum<std::uint16_t>(x, k, m, room, stream) : sum<T>(x, k, m, room, stream);
        run(plan, x.data, y.data, direct.bias, c, room, stream);
        if (direct.to) return true;
        Epilogue end = epilogue;
        find_saved(end);
        const Packed<T, std::uint16_t> packed = result(end, m);
        const auto finish = [&](auto type) {
            using C = decltype(type);
            launch(finish_product<T, C, Epilogue>,
                   dim3(static_cast<unsigned>(tiles_of(m, std::max(n, packed.stride), kSmallTile))), kThreads,
                   kThreads * sizeof(double), stream, static_cast<int>(m), static_cast<int>(n),
                   Product<T, C>{static_cast<const C*>(c), c_stride, apart ? room.sums.data() : nullptr}, end, packed);
        };
        if constexpr (std::is_same_v<Epilogue, Differentiate<float>>)
            if (halved) return finish(std::uint16_t{}), true;
        finish(T{});
        return true;
    }

   private:
    static constexpr Index kWorkspace = Index{32} << 20;
    static constexpr std::uint32_t kAlignment =
        16;  // in bytes, of what a product takes; the library would count on 256
    using Shape = std::tuple<bool, bool, Index, Index, Index, Index, Index, Index, bool, bool>;
    struct Ready {
        const void* data;
        Index stride;
    };
    struct Direct {  // where a product may go without an epilogue of ours
        T* to = nullptr;
        Index stride = 0;
        const T* bias = nullptr;
    };
    struct Room {  // a stream's own
        Buffer<unsigned char> workspace;
        Buffer<T> product, sums;
    };
    struct Place {  // of a packed matrix
        unsigned char* data;
        Index rows, cols;
        std::int64_t last = 0;  // step that it is up to date in
        bool alone = false;     // the matrix itself is not
    };
    struct Plan {
        void *product = nullptr, *a = nullptr, *b = nullptr, *c = nullptr;
        lt::Algorithm algorithm{};
        bool found = false;     // an algorithm
        bool answered = false;  // whether the library has said so
    };
    static Index padded(Index cols) { return round_up(cols, 8); }
    static Index packed_stride(Index cols) { return round_up(cols + 1, 64); }
    bool half() const { return precision_ == Precision::bfloat16; }
    Index element_bytes() const { return half() ? 2 : static_cast<Index>(sizeof(T)); }
    static bool aligned(const void* data, Index stride) {
        return reinterpret_cast<std::uintptr_t>(data) % kAlignment == 0 &&
               stride * static_cast<Index>(sizeof(T)) % kAlignment == 0;
    }
    // Not relu, which the library has as an epilogue, too: by its manual max(x, 0), and CUDA's max of NaN and 0 is 0 (not tried):
    // a network that has diverged would look well.
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

    // Whether it may have a product as bfloat16: rounded, then multiplied by 0 or 1 instead of the other way round.
    template <class Epilogue>
    static bool rounds_before(const Epilogue&) {
        return false;
    }
    static bool rounds_before(const Differentiate<T>& e) { return e.packed_only && !e.add && e.op == Op::relu; }

    Place& place(const T* matrix, Index rows, Index cols) {
        const auto [found, added] = packed_.try_emplace(matrix, Place{arena_.data() + used_, rows, cols});
        if (added) used_ += rows * packed_stride(cols) * element_bytes();
        return found->second;
    }
    template <class Out>
    void pack(const Operand<T>& from, Index rows, Index cols, unsigned char* to, cudaStream_t stream) const {
        const Packed<T, Out> packed = {reinterpret_cast<Out*>(to), cols, packed_stride(cols)};
        map_elements(rows, packed.stride, Pack<T, Out>{from, packed}, stream);
    }
    static bool lies_ready(const Operand<T>& from) { return from.rows.plain() && aligned(from.data, from.stride); }
    template <class In>
    static void sum(const Ready& from, Index rows, Index cols, const Room& room, cudaStream_t stream) {
        launch(sum_columns<T, In>, dim3(static_cast<unsigned>(tiles_across(cols, kColumnsOfBlock))),
               dim3(kColumnsOfBlock, kRowsAtOnce), kColumnsOfBlock * kRowsAtOnce * sizeof(T), stream,
               static_cast<int>(rows), static_cast<int>(cols), static_cast<const In*>(from.data), from.stride,
               room.sums.data());
    }
    Ready ready(const Operand<T>& from, Index rows, Index cols, cudaStream_t stream) {
        if (from.ones < 0 && lies_ready(from) && !half()) return {from.data, from.stride};
        if (from.ones >= 0) cols = from.ones;
        Place& packed = place(from.data, rows, cols);
        if (packed.last < step_) {
            packed.last = step_;
            half() ? pack<std::uint16_t>(from, rows, cols, packed.data, stream)
                   : pack<T>(from, rows, cols, packed.data, stream);
        }
        return {packed.data, packed_stride(cols)};
    }
    // Where an epilogue packs what it makes, if that is an operand of a product of this step or, `later`, of one to come. What is
    // to be packed alone is taken from it.
    Packed<T, std::uint16_t> packed_of(const T* matrix, Index rows, Index cols, int later, bool alone) {
        if (!half()) return {};
        Place& packed = place(matrix, rows, cols);
        packed.last = step_ + later;
        packed.alone = alone;
        return {reinterpret_cast<std::uint16_t*>(packed.data), cols, packed_stride(cols)};
    }
    Packed<T, std::uint16_t> result(Activate<T>& e, Index rows) { return result(e.y, e.packed_only, rows); }
    Packed<T, std::uint16_t> result(Differentiate<T>& e, Index rows) { return result(e.dx, e.packed_only, rows); }
    Packed<T, std::uint16_t> result(StoreGradient<T>&, Index) { return {}; }
    Packed<T, std::uint16_t> result(Update<T>& e, Index rows) {
        return packed_of(e.rule.theta + e.offset, rows, e.inputs, 1, false);
    }
    Packed<T, std::uint16_t> result(MatrixView<T>& made, bool packed_only, Index rows) {
        const Packed<T, std::uint16_t> packed = packed_of(made.data, rows, made.cols, 0, packed_only);
        if (packed.to && packed_only) made.data = nullptr;
        return packed;
    }

    // A matrix of this step that is there as bfloat16 alone, or null.
    Place* alone(const T* matrix) {
        const auto found = packed_.find(matrix);
        const bool it_is = found != packed_.end() && found->second.alone && found->second.last == step_;
        return it_is ? &found->second : nullptr;
    }
    template <class Epilogue>
    void find_saved(Epilogue&) {}
    void find_saved(Differentiate<T>& e) {
        const Place* packed = alone(e.saved.data);
        if (!packed) return;
        e.packed = reinterpret_cast<const std::uint16_t*>(packed->data);
        e.saved.stride = packed_stride(packed->cols);
    }
    // For tiles of ours, where the library has no algorithm. Whoever reads a matrix on the second stream comes after those who do
    // on the first, so that none of them finds it half unpacked.
    void unpack(const T* matrix, Index stride, cudaStream_t stream) {
        Place* packed = alone(matrix);
        if (!packed) return;
        packed->alone = false;
        map_elements(packed->rows, packed->cols,
                     Unpack<T>{reinterpret_cast<const std::uint16_t*>(packed->data), packed_stride(packed->cols),
                               const_cast<T*>(matrix), stride},
                     stream);
    }
    template <class Epilogue>
    void unpack_saved(const Epilogue&, cudaStream_t) {}
    void unpack_saved(const Differentiate<T>& e, cudaStream_t stream) { unpack(e.saved.data, e.saved.stride, stream); }

    const Plan& plan_of(const Shape& shape) {
        auto found = plans_.find(shape);
        if (found != plans_.end()) {
            if (!found->second.answered) choose(found->second, std::get<9>(shape));
            return found->second;
        }
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
        const auto [a_down, b_down, m, n, k, a_stride, b_stride, c_stride, bias, halved] = shape;
        const int real = sizeof(T) == 8 ? lt::kReal64 : lt::kReal32, type = half() ? lt::kBfloat16 : real;
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
        layout(plan.c, halved ? lt::kBfloat16 : real, n, m, c_stride);
        choose(plan, halved);
    }
    template <class V>
    void set(void* product, int attribute, const V& value) const {
        check_library(lt_.MatmulDescSetAttribute(product, attribute, &value, sizeof value), "describing a product");
    }
    void choose(Plan& plan, bool halved) const {
        void* preference = nullptr;
        check_library(lt_.MatmulPreferenceCreate(&preference), "choosing an algorithm");
        const std::uint64_t bytes = kWorkspace;
        // Parts of a sum are kept apart and added by one kernel; as float32, too, where the sum is rounded to bfloat16.
        const std::uint32_t in_order = halved ? 2 : 2 | 4;
        const std::uint32_t alignment = kAlignment;
        int status = lt_.MatmulPreferenceSetAttribute(preference, lt::kWorkspaceBytes, &bytes, sizeof bytes);
        if (status == 0)
            status = lt_.MatmulPreferenceSetAttribute(preference, lt::kReductionSchemes, &in_order, sizeof in_order);
        for (const int operand : lt::kAlignments)
            if (status == 0)
                status = lt_.MatmulPreferenceSetAttribute(preference, operand, &alignment, sizeof alignment);
        lt::Heuristic best{};
        int count = 0;
        int answer = status;
        const std::lock_guard<std::recursive_mutex> lock(graph_in_making());  // it may not know what to say meanwhile
        if (status == 0)
            answer = lt_.MatmulAlgoGetHeuristic(handle_, plan.product, plan.a, plan.b, plan.c, plan.c, preference, 1,
                                                &best, &count);
        (void)lt_.MatmulPreferenceDestroy(preference);
        check_library(status, "choosing an algorithm");
        plan.answered = answer == 0 || answer == lt::kNotSupported;  // else it is asked again
        plan.found = answer == 0 && count > 0 && best.state == 0;
        plan.algorithm = best.algorithm;
    }
    void run(const Plan& plan, const void* a, const void* b, const T* bias, void* c, const Room& room,
             cudaStream_t stream) const {
        const T one = 1, zero = 0;
        if (bias) set(plan.product, lt::kBiasPointer, bias);
        check_library(lt_.Matmul(handle_, plan.product, &one, b, plan.a, a, plan.b, &zero, c, plan.c, c, plan.c,
                                 &plan.algorithm, room.workspace.data(), static_cast<std::size_t>(kWorkspace), stream),
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
    const cudaStream_t side_;
    const lt::Functions& lt_;
    void* handle_ = nullptr;
    Room rooms_[2];
    std::map<Shape, Plan> plans_;
    Buffer<unsigned char> arena_;  // of packed matrices
    Index used_ = 0;
    std::map<const T*, Place> packed_;  // by the matrix
    std::int64_t step_ = 1;
};

// How a network's products are made: by the library, if there is one, else by our own tiles.
template <class T>
struct Arithmetic {
    Precision precision;
    int processors;
    Library<T>* library = nullptr;

    void begin_step() const {
        if (library) library->begin_step();
    }
    Packed<T, std::uint16_t> packing(const MatrixView<T>& m) const {
        return library ? library->packing(m) : Packed<T, std::uint16_t>{};
    }
    template <bool ADownK, bool BDownK, class Epilogue>
    void multiply(Index m, Index n, Index k, const Operand<T>& a, const Operand<T>& b, const Epilogue& epilogue,
                  cudaStream_t stream) const {
        if (library && k > 0 && library->template multiply<ADownK, BDownK>(m, n, k, a, b, epilogue, stream)) return;
        multiply_tiles<ADownK, BDownK>(precision, tile_size(m, n, processors), m, n, k, a, b, epilogue, stream);
    }
    // Aᵀ B; our tiles take that much room.
    Index room_of_rows(Index m, Index n, Index k) const {
        const Index slices = cut(m, n, k).slices;
        return slices > 1 ? slices * m * n : 0;
    }
    template <class Epilogue>
    void multiply_rows(Index m, Index n, Index k, const Operand<T>& a, const Operand<T>& b, const Epilogue& epilogue,
                       T* room, cudaStream_t stream) const {
        if (library && k > 0 && library->template multiply<true, true>(m, n, k, a, b, epilogue, stream)) return;
        cuda::multiply_rows(precision, cut(m, n, k), m, n, k, a, b, epilogue, room, stream);
    }

   private:
    Cut cut(Index m, Index n, Index k) const {
        const bool tensors = precision == Precision::tf32 || precision == Precision::bfloat16;
        return cut_of_rows(m, n, k, processors, tensors ? TileSize::tiny : TileSize::mini);
    }
};

}  // namespace cuda
}  // namespace chainrule
