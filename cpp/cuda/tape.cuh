// SPDX-License-Identifier: MIT
// L3: the sweeps of tape.hpp on a device: the same four quantities and the same formulas, over whole matrices. Their rows are
// dense, nothing is in place; a linear layer and the elementwise op after it are one kernel on the way up, and one on the way
// down, unless every φ is wanted.
#pragma once

#include <algorithm>
#include <atomic>

#include "../cuda.hpp"
#include "library.cuh"

namespace chainrule {
namespace cuda {

template <class T>
class Tape;

template <class T>
struct Network<T>::Runtime {
    explicit Runtime(int device, Precision precision)
        : how{precision, attribute(cudaDevAttrMultiProcessorCount, device)},
          shared_bytes(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
          sum(device, kPieces + 1, "a sum") {}
    std::mutex mutex;  // one caller at a time has the streams
    std::unique_lock<std::mutex> hold() { return cuda::hold(mutex); }
    Arithmetic<T> how;
    Index shared_bytes;
    Stream stream, side;
    Event fork, join;
    const Buffer<double> sum;                      // what a training ends with must not want memory
    std::unique_ptr<Library<T>> library;           // of large predictions, evaluations and gradients
    std::unique_ptr<Tape<T>> predictor;            // with the memory of the largest prediction so far
    std::unique_ptr<typename Step<T>::Work> step;  // of evaluations and gradients
    Buffer<T> rows_in, rows_out;                   // of predictions by blocks, for arrays that lie elsewhere
};

inline std::atomic<Schedule> forced_schedule{Schedule::by_size};
inline std::atomic<int> forced_ranks{0};  // 0: by size

// Whether cuBLASLt makes the products of a step of so many rows.
template <class T>
bool is_for_library(const Network<T>& net, Index rows) {
    const Schedule forced = forced_schedule.load();
    const bool large = wants_library(net.multiplies_per_row() * static_cast<double>(rows));
    return (forced == Schedule::by_size ? large : forced == Schedule::library) && lt::functions();
}
// Products by a library, which begins where there is none yet, with room for a step of so many rows. What it has packed it forgets.
template <class T>
Arithmetic<T> by_library(std::unique_ptr<Library<T>>& library, const Network<T>& net, Index rows) {
    auto& run = net.runtime();
    if (!library) library = std::make_unique<Library<T>>(net.device(), net.precision(), run.side);
    library->reserve(rows, net.layers());
    Arithmetic<T> how = run.how;
    how.library = library.get();
    return how;
}
// Of a sweep over so many rows that no trainer has planned.
template <class T>
Arithmetic<T> arithmetic_of(const Network<T>& net, Index rows) {
    auto& run = net.runtime();
    return is_for_library(net, rows) ? by_library(run.library, net, rows) : run.how;
}

template <class T>
MatrixView<const T> constant(MatrixView<T> m) {
    return {m.data, m.rows, m.cols, m.stride};
}

// Whether the derivative of a layer is read off its output; relu's is off the sign, which rounding keeps (down to 2⁻¹³⁴).
template <class T>
bool reads_output(const Layer<T>& g) {
    switch (g.kind) {
        case Layer<T>::Kind::linear: return false;
        case Layer<T>::Kind::op:
            return is_rowwise(g.op) || (saves_of(g.op) == Saves::output && g.op != Op::relu && g.op != Op::leaky_relu);
        default: return true;
    }
}

template <class T>
class Tape {
   public:
    enum Kind { primal, tangent, cotangent, cotangent_tangent, second_tangent, kinds };
    using LayerKind = typename Layer<T>::Kind;

    // `training`: dropout drops; else it is the identity.
    Tape(const Network<T>& net, bool training)
        : net_(net),
          how_(net.runtime().how),
          training_(training),
          views_(static_cast<std::size_t>(kinds * (net.depth() + 1))) {}

    // From now on products are made so. `only_products` and derivatives read what lies between the layers, no code of the caller's.
    void multiply_by(const Arithmetic<T>& how, bool only_products) {
        how_ = how;
        only_products_ = only_products && how.library;
    }
    // Matrices are not what products have seen of them.
    void begin_step() const { how_.begin_step(); }
    // From now on every φ and every cotangent is there after a sweep.
    void keep_all(bool all) { whole_ = all; }
    // Room for these kinds: rows [first, first + rows) of derivatives, `seeds` for each example.
    void shape(Index first, Index rows, Index seeds, std::initializer_list<Kind> wanted);
    Index rows() const { return rows_; }
    Index examples() const { return examples_; }
    Index seeds() const { return seeds_; }
    Index example(Index row) const { return (phase_ + row) / seeds_; }
    MatrixView<T> at(Kind kind, Index l) const { return views_[place(kind, l)]; }
    Operand<T> operand(Kind kind, Index l) const {
        if (kind == primal && l == 0 && input_.data) return input_;
        return {at(kind, l).data, at(kind, l).stride};
    }
    // Where the products below can have cotangents once more that a loss makes.
    Packed<T, std::uint16_t> packing(Index l) const {
        const bool read = l > 0 && layer(l - 1).kind == LayerKind::linear;
        return read ? how_.packing(at(cotangent, l)) : Packed<T, std::uint16_t>{};
    }
    Shared<T> saved(Index l) const { return {constant(at(primal, l)), phase_, seeds_}; }
    const Layer<T>& layer(Index l) const { return net_.layers()[static_cast<std::size_t>(l)]; }

    // φ⁰: rows of somebody's matrix. A linear layer reads them where they lie.
    void input(const T* x, Rows rows, cudaStream_t stream);
    void load(Kind kind, Index l, const T* from, cudaStream_t stream) const;
    void store(Kind kind, Index l, T* to, cudaStream_t stream) const;
    void seed(Kind kind, Index l, cudaStream_t stream) const;

    struct Drawing {  // dropout's masks
        std::uint64_t seed;
        const std::int64_t* drawn;
        std::int64_t step = 0;
    };
    void forward(const Drawing* drawing, cudaStream_t stream) const;
    void tangents(Index moving, const T* direction, cudaStream_t stream) const;
    void tangents_along(Index input, cudaStream_t stream) const;
    void second_tangents(cudaStream_t stream) const;
    // ready(l) comes when the cotangents at the outputs of linear layer l are there and it has pulled through the layer.
    template <class Ready>
    void cotangents(Index to, const Drawing* drawing, cudaStream_t stream, Ready ready) const;
    void cotangents(Index to, cudaStream_t stream) const {
        cotangents(to, nullptr, stream, [](Index) {});
    }
    void cotangent_tangents(Index to, Index moving, const T* direction, cudaStream_t stream) const;

    // dW of linear layer l, from cotangents dz and inputs x of that many rows, and with `bias` its db.
    template <class Epilogue>
    void gradient(Index l, Index rows, const Operand<T>& dz, const Operand<T>& x, bool with_bias,
                  const Epilogue& epilogue, cudaStream_t stream) const;
    // The whole gradient cᵀ x, or its tangent ċᵀ x + cᵀ ẋ with the second term from layer `moving` on.
    void gradients(Kind cotangents, Index moving, T* flat, bool add, cudaStream_t stream) const;
    StoreGradient<T> into(Index l, T* flat, bool add) const {
        return {flat + layer(l).offset, static_cast<int>(layer(l).outputs), static_cast<int>(layer(l).inputs), add};
    }

   private:
    std::size_t place(Kind kind, Index l) const {
        return static_cast<std::size_t>(kind) * static_cast<std::size_t>(net_.depth() + 1) +
               static_cast<std::size_t>(l);
    }
    const T* bias(const Layer<T>& g, const T* flat) const {
        return g.bias ? flat + g.offset + g.outputs * g.inputs : nullptr;
    }
    bool elementwise(Index l) const {
        return l >= 0 && l < net_.depth() && layer(l).kind == LayerKind::op && !is_rowwise(layer(l).op);
    }
    bool identity(Index l) const { return layer(l).kind == LayerKind::dropout && !training_; }
    Index saved_at(Index l) const { return saves_of(layer(l).op) == Saves::input ? l : l + 1; }
    // Whether φˡ, or its cotangent, is read by products alone, and by derivatives that look at its sign.
    bool packed_only(Kind kind, Index l) const {
        if (!only_products_ || l == 0) return false;
        if (kind == cotangent) return layer(l - 1).kind == LayerKind::linear;
        return l < net_.depth() && layer(l).kind == LayerKind::linear && !reads_output(layer(l - 1));
    }
    void product(Index l, const Operand<T>& x, const T* flat, bool with_bias, const Activate<T>& epilogue,
                 cudaStream_t stream) const;
    Activate<T> plain(Kind kind, Index l, bool add) const {
        return {nullptr, {}, at(kind, l + 1), Op::identity, T{0}, add};
    }
    void pull_linear(Kind kind, Index l, Kind to, const T* flat, bool fused, bool add, cudaStream_t stream) const;
    void drop(Kind kind, Index from, Index to, Index l, const Drawing* drawing, cudaStream_t stream) const;
    void push_op(Kind kind, Index l, cudaStream_t stream) const;
    void pull_op(Kind kind, Index l, cudaStream_t stream) const;

    const Network<T>& net_;
    Arithmetic<T> how_;
    const bool training_;
    bool whole_ = false, only_products_ = false;
    Index phase_ = 0, rows_ = 0, seeds_ = 1, examples_ = 0;
    Operand<T> input_{nullptr, 0};
    std::vector<MatrixView<T>> views_;
    Buffer<T> arena_, slices_[2];  // of long sums, of products on either stream
};

// ---- the matrices ---------------------------------------------------------------------------------------------------

template <class T>
void Tape<T>::shape(Index first, Index rows, Index seeds, std::initializer_list<Kind> wanted) {
    phase_ = first % seeds;
    rows_ = rows;
    seeds_ = seeds;
    examples_ = rows == 0 ? 0 : example(rows - 1) + 1;
    input_ = {nullptr, 0};
    Index total = 0;
    const auto cut = [&](T* memory) {
        total = 0;
        for (const Kind kind : wanted)
            for (Index l = 0; l <= net_.depth(); ++l) {
                if (l > 0 && identity(l - 1)) {
                    views_[place(kind, l)] = at(kind, l - 1);
                    continue;
                }
                const Index cols = l == 0 ? net_.inputs() : layer(l - 1).outputs;
                const Index height = kind == primal ? examples_ : rows;
                views_[place(kind, l)] = {memory ? memory + total : nullptr, height, cols, cols};
                total += round_up(height * cols, kLine<T>);
            }
    };
    cut(nullptr);
    arena_.grow(net_.device(), total, "activations");
    cut(arena_.data());
    if (std::find(wanted.begin(), wanted.end(), cotangent) == wanted.end()) return;  // no gradients either
    Index slices = 0;
    for (const Layer<T>& g : net_.layers())  // with its bias and without, which may take more
        if (g.kind == LayerKind::linear)
            for (Index inputs = g.inputs; inputs <= g.inputs + g.bias; ++inputs)
                slices = std::max(slices, how_.room_of_rows(g.outputs, inputs, rows));
    for (Buffer<T>& room : slices_) room.grow(net_.device(), slices, "slices of gradients");
}

template <class T>
void Tape<T>::input(const T* x, Rows rows, cudaStream_t stream) {
    input_ = {nullptr, 0};
    const MatrixView<T> to = at(primal, 0);
    if (layer(0).kind == LayerKind::linear)
        input_ = {x, to.cols, rows};
    else
        map_elements(to.rows, to.cols, CopyRows<T>{to, {x, to.rows, to.cols, to.cols}, rows}, stream);
}

template <class T>
void Tape<T>::load(Kind kind, Index l, const T* from, cudaStream_t stream) const {
    upload(at(kind, l).data, from, at(kind, l).rows * at(kind, l).cols, stream);
}
template <class T>
void Tape<T>::store(Kind kind, Index l, T* to, cudaStream_t stream) const {
    download(to, at(kind, l).data, at(kind, l).rows * at(kind, l).cols, stream);
}
template <class T>
void Tape<T>::seed(Kind kind, Index l, cudaStream_t stream) const {
    map_elements(rows_, at(kind, l).cols, Unit<T>{at(kind, l), phase_, seeds_}, stream);
}

// ---- sweeps up ------------------------------------------------------------------------------------------------------

template <class T>
void Tape<T>::product(Index l, const Operand<T>& x, const T* flat, bool with_bias, const Activate<T>& epilogue,
                      cudaStream_t stream) const {
    const Layer<T>& g = layer(l);
    Activate<T> end = epilogue;
    if (with_bias) end.bias = bias(g, flat);
    how_.template multiply<false, false>(end.y.rows, g.outputs, g.inputs, x, Operand<T>{flat + g.offset, g.inputs}, end,
                                         stream);
}

template <class T>
void Tape<T>::drop(Kind kind, Index from, Index to, Index l, const Drawing* drawing, cudaStream_t stream) const {
    const MatrixView<T> x = at(kind, from), y = at(kind, to);
    map_elements(y.rows, y.cols,
                 DropoutMap<T>{constant(x), y, DropoutScale<T>(layer(l).param), dropout_key(drawing->seed, l),
                               drawing->drawn, drawing->step},
                 stream);
}

template <class T>
void Tape<T>::forward(const Drawing* drawing, cudaStream_t stream) const {
    for (Index l = 0; l < net_.depth(); ++l) {
        const Layer<T>& g = layer(l);
        const MatrixView<T> y = at(primal, l + 1);
        if (g.kind == LayerKind::linear) {
            const bool fused = elementwise(l + 1) && !whole_;
            Activate<T> end = plain(primal, l, false);
            if (fused) {
                const Layer<T>& op = layer(l + 1);
                if (saves_of(op.op) == Saves::input) end.z = y;
                end.y = at(primal, l + 2);
                end.op = op.op;
                end.param = static_cast<T>(op.param);
            }
            end.packed_only = packed_only(primal, l + 1 + fused);
            product(l, operand(primal, l), net_.theta(), true, end, stream);
            l += fused;
        } else if (g.kind == LayerKind::op) {
            map_op(g.op, y, OpForward<T>{constant(at(primal, l)), y, g.op, static_cast<T>(g.param)}, stream);
        } else if (!identity(l)) {
            drop(primal, l, l + 1, l, drawing, stream);
        }
    }
}

template <class T>
void Tape<T>::push_op(Kind kind, Index l, cudaStream_t stream) const {
    const Layer<T>& g = layer(l);
    const MatrixView<T> y = at(kind, l + 1);
    map_op(g.op, y, OpDerivative<T>{true, constant(at(kind, l)), saved(saved_at(l)), y, g.op, static_cast<T>(g.param)},
           stream);
}

template <class T>
void Tape<T>::tangents(Index moving, const T* direction, cudaStream_t stream) const {
    for (Index l = std::max<Index>(moving - 1, 0); l < net_.depth(); ++l) {
        const Layer<T>& g = layer(l);
        if (g.kind == LayerKind::op) push_op(tangent, l, stream);
        if (g.kind != LayerKind::linear) continue;
        if (direction) product(l, operand(primal, l), direction, true, plain(tangent, l, false), stream);
        if (l >= moving)
            product(l, operand(tangent, l), net_.theta(), false, plain(tangent, l, direction != nullptr), stream);
    }
}

// Every row of the outputs of a first linear layer moves along one column of W.
template <class T>
struct Column {
    MatrixView<T> to;
    const T* from;
    Index stride;
    __device__ void operator()(Index i, Index j) const { to.data[i * to.stride + j] = from[j * stride]; }
};

template <class T>
void Tape<T>::tangents_along(Index input, cudaStream_t stream) const {
    const bool linear = layer(0).kind == LayerKind::linear;
    const MatrixView<T> to = at(tangent, linear ? 1 : 0);
    if (linear)
        map_elements(to.rows, to.cols, Column<T>{to, net_.theta() + layer(0).offset + input, layer(0).inputs}, stream);
    else
        map_elements(to.rows, to.cols, AllUnit<T>{to, input}, stream);
    for (Index l = linear ? 1 : 0; l < net_.depth(); ++l) {
        if (layer(l).kind == LayerKind::op) push_op(tangent, l, stream);
        if (layer(l).kind == LayerKind::linear)
            product(l, operand(tangent, l), net_.theta(), false, plain(tangent, l, false), stream);
    }
}

template <class T>
void Tape<T>::second_tangents(cudaStream_t stream) const {
    clear(at(second_tangent, 0).data, at(second_tangent, 0).rows * at(second_tangent, 0).cols, stream);
    for (Index l = 0; l < net_.depth(); ++l) {
        const Layer<T>& g = layer(l);
        if (g.kind == LayerKind::linear)
            product(l, operand(second_tangent, l), net_.theta(), false, plain(second_tangent, l, false), stream);
        if (g.kind != LayerKind::op) continue;
        const MatrixView<const T> dx = constant(at(tangent, l)), ddx = constant(at(second_tangent, l));
        const MatrixView<T> out = at(second_tangent, l + 1);
        map_op(g.op, out, OpSecond<T>{true, dx, dx, ddx, saved(saved_at(l)), out, g.op, static_cast<T>(g.param)},
               stream);
    }
}

// ---- sweeps down ----------------------------------------------------------------------------------------------------

// c W from the outputs of layer l, to its inputs or, fused, to those of the elementwise op before it.
template <class T>
void Tape<T>::pull_linear(Kind kind, Index l, Kind to, const T* flat, bool fused, bool add, cudaStream_t stream) const {
    const Layer<T>& g = layer(l);
    const Index end_at = fused ? l - 1 : l;
    Differentiate<T> end = {at(to, end_at), {}, nullptr, Op::identity, T{0}, add, packed_only(to, end_at)};
    if (fused) {
        end.saved = constant(at(primal, saved_at(l - 1)));
        end.op = layer(l - 1).op;
        end.param = static_cast<T>(layer(l - 1).param);
    }
    how_.template multiply<false, true>(rows_, g.inputs, g.outputs, operand(kind, l + 1),
                                        Operand<T>{flat + g.offset, g.inputs}, end, stream);
}

template <class T>
void Tape<T>::pull_op(Kind kind, Index l, cudaStream_t stream) const {
    const Layer<T>& g = layer(l);
    const MatrixView<T> dx = at(kind, l);
    map_op(g.op, dx,
           OpDerivative<T>{false, constant(at(kind, l + 1)), saved(saved_at(l)), dx, g.op, static_cast<T>(g.param)},
           stream);
}

template <class T>
template <class Ready>
void Tape<T>::cotangents(Index to, const Drawing* drawing, cudaStream_t stream, Ready ready) const {
    for (Index l = net_.depth(); l-- > 0;) {
        const bool pulls = l >= to;
        if (layer(l).kind == LayerKind::linear) {
            const bool fused = pulls && l > to && elementwise(l - 1) && seeds_ == 1 && !whole_;
            if (pulls) pull_linear(cotangent, l, cotangent, net_.theta(), fused, false, stream);
            ready(l);
            l -= fused;
        } else if (pulls && layer(l).kind == LayerKind::op) {
            pull_op(cotangent, l, stream);
        } else if (pulls && !identity(l)) {
            drop(cotangent, l + 1, l, l, drawing, stream);
        }
    }
}

template <class T>
void Tape<T>::cotangent_tangents(Index to, Index moving, const T* direction, cudaStream_t stream) const {
    for (Index l = net_.depth(); l-- > to;) {
        const Layer<T>& g = layer(l);
        if (g.kind == LayerKind::linear) {
            pull_linear(cotangent_tangent, l, cotangent_tangent, net_.theta(), false, false, stream);
            if (direction) pull_linear(cotangent, l, cotangent_tangent, direction, false, true, stream);
        } else if (g.kind == LayerKind::op && l < moving) {
            pull_op(cotangent_tangent, l, stream);
        } else if (g.kind == LayerKind::op) {
            const MatrixView<T> out = at(cotangent_tangent, l);
            map_op(g.op, out,
                   OpSecond<T>{false, constant(at(cotangent, l + 1)), constant(at(tangent, l)),
                               constant(at(cotangent_tangent, l + 1)), saved(saved_at(l)), out, g.op,
                               static_cast<T>(g.param)},
                   stream);
        }
    }
}

template <class T>
template <class Epilogue>
void Tape<T>::gradient(Index l, Index rows, const Operand<T>& dz, const Operand<T>& x, bool with_bias,
                       const Epilogue& epilogue, cudaStream_t stream) const {
    const Layer<T>& g = layer(l);
    Operand<T> with_ones = x;
    if (g.bias && with_bias) with_ones.ones = static_cast<int>(g.inputs);
    const Index inputs = g.inputs + (g.bias && with_bias);
    const Buffer<T>& room = slices_[stream == net_.runtime().side];
    if (room.size() < how_.room_of_rows(g.outputs, inputs, rows))
        throw std::logic_error("[cuda] a gradient's slices: expected the room that shape() made, got less");
    how_.multiply_rows(g.outputs, inputs, rows, dz, with_ones, epilogue, room.data(), stream);
}

template <class T>
void Tape<T>::gradients(Kind cotangents, Index moving, T* flat, bool add, cudaStream_t stream) const {
    for (Index l = 0; l < net_.depth(); ++l) {
        if (layer(l).kind != LayerKind::linear) continue;
        gradient(l, rows_, operand(cotangents, l + 1), operand(primal, l), true, into(l, flat, add), stream);
        if (l >= moving)
            gradient(l, rows_, operand(cotangent, l + 1), operand(tangent, l), false, into(l, flat, true), stream);
    }
}

}  // namespace cuda
}  // namespace chainrule
