// SPDX-License-Identifier: MIT
// L3: a network as the chain x = φ⁰ → φ¹ → … → φᴸ = f: its parameters in one flat buffer, its activations in one arena,
// and the two sweeps over rows of a batch. The rows are independent, so any range of them can go through all layers.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace chainrule {

// Aligned, zero-initialised, fixed-size array.
template <class T>
class Array {
   public:
    Array() = default;
    explicit Array(Index size)
        : data_(static_cast<T*>(allocate_bytes(static_cast<std::size_t>(size) * sizeof(T)))), size_(size) {}
    Array(Array&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Array& operator=(Array&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Array() { free_bytes(data_, static_cast<std::size_t>(size_) * sizeof(T)); }

    T* data() const { return data_; }
    Index size() const { return size_; }
    T& operator[](Index i) const { return data_[i]; }

   private:
    T* data_ = nullptr;
    Index size_ = 0;
};

// A layer that lives outside the engine: a user's Python class. Its maps see the whole batch at once, on the calling
// thread, and may throw; the engine has changed no parameter by then.
template <class T>
class ExternalLayer {
   public:
    struct Parameter {
        std::string name;
        std::vector<Index> shape;
        Index size;
    };
    virtual ~ExternalLayer() = default;
    virtual std::vector<Parameter> parameters() = 0;
    virtual void bind(T* const* storage) = 0;  // where the parameters live from now on; fills in their initial values
    virtual void publish() = 0;                // shows the owner their present values
    virtual void forward(MatrixView<const T> x, MatrixView<T> y) = 0;
    virtual void vjp(MatrixView<const T> x, MatrixView<const T> y, MatrixView<const T> dy, MatrixView<T> dx,
                     T* const* gradients) = 0;

    // The rest is for derivatives that no training step needs; see calculus.hpp. A tangent without data is 0.
    struct Tangent {
        MatrixView<const T> x;
        T* const* parameters;  // null: 0
    };
    // The tangent of forward.
    virtual void jvp(MatrixView<const T> x, MatrixView<const T> y, const Tangent& dot, MatrixView<T> dy) = 0;
    // The tangent of vjp, whose c has the tangent dc: that of c J, and those of the gradients.
    virtual void vjp_jvp(MatrixView<const T> x, MatrixView<const T> y, MatrixView<const T> c, MatrixView<const T> dc,
                         const Tangent& dot, MatrixView<T> out, T* const* gradients) = 0;
    // The tangent of J dx along dx, whose own tangent is ddx.
    virtual void jvp_jvp(MatrixView<const T> x, MatrixView<const T> y, MatrixView<const T> dx, MatrixView<const T> ddx,
                         MatrixView<T> out) = 0;
};

template <class T>
struct Layer {
    enum class Kind { linear, op, dropout, external };
    Kind kind;
    Index inputs, outputs;
    bool bias = false;                             // linear
    Op op = Op::identity;                          // op
    double param = 0;                              // op: its parameter; dropout: p
    std::shared_ptr<ExternalLayer<T>> external{};  // external
    bool bfloat16 = false;                         // linear, float32, not narrow: see ops/linear_bfloat16.hpp

    bool narrow() const { return kind == Kind::linear && outputs <= kNarrowOutputs; }

    // Set by Network: where the parameters begin in the flat buffer; whether and where a linear layer's weights have a
    // transposed copy. What comes first needs no cotangent of its input, a narrow layer's master copy serves both ways.
    Index offset = 0, size = 0;
    bool transposed = false;
    Index forward_offset = 0, backward_offset = 0;  // forward: of the paired copy
    Index weight_rows() const { return inputs + bias; }
    Index bias_offset() const { return offset + outputs * round_up(inputs, kLine<T>); }  // of a narrow layer
};

Saves saves_of(Op op);

// One entry of the state dict.
struct Parameter {
    Index layer;
    std::string name;
    std::vector<Index> shape;
    Index offset, size;  // external layers: plain array; linear layers: size only, the weights are in panels
};

// What phase 1 needs to know of a training step; dropout is off where there is none.
struct Noise {
    bool active;
    std::uint64_t seed, step;
};

// The matrices of one batch: φ⁰ … φᴸ, and the cotangents ∂L/∂φˡ. Ops that do not need what they overwrite work in place,
// so several layers may share a buffer.
template <class T>
class Activations {
   public:
    Activations() = default;
    CHAINRULE_COLD Activations(const std::vector<Layer<T>>& layers, Index rows, bool cotangents);
    Index rows() const { return rows_; }
    // Room for bfloat16 operands of the rows from `row`; null where no layer needs it.
    Pair* pairs(Index row) const { return pairs_.size() > 0 ? pairs_.data() + row * kPairRoom : nullptr; }
    MatrixView<T> phi(Index layer) const { return phi_[static_cast<std::size_t>(layer)]; }  // 0 is the input
    MatrixView<T> dphi(Index layer) const {
        return dphi_[static_cast<std::size_t>(layer)];
    }  // 0 exists for external layers only

   private:
    Index rows_ = 0;
    Array<T> arena_;
    Array<Pair> pairs_;
    std::vector<MatrixView<T>> phi_, dphi_;
};

// Rows go through all layers in blocks of this many: enough to use each weight often, few enough to stay in the cache.
// 2048-2048-2048-2048 at batch 2048 on two cores: 829 ms with 96, 725 ms with 192, 776 ms with 384.
constexpr Index kBlockRows = 192;

// Of how many threads so many multiplications are worth the trouble, if their cores are so far apart (core_distance).
int parts_worth(double multiplies, int threads, double distance);

// How many threads so many multiplications are worth now.
int parts_for(double multiplies);

// So few rows are not worth that many.
inline int parts_of_rows(int parts, Index rows) {
    return std::min(parts, static_cast<int>(std::clamp<Index>(rows / 4, 1, 1 << 20)));
}

// f(begin, end) over blocks of rows, on at most so many threads.
template <class F>
void over_rows(Index rows, int most_parts, F f) {
    parallel(parts_of_rows(most_parts, rows), [&](int part, int parts) {
        const Index begin = rows * part / parts, count = rows * (part + 1) / parts - begin;
        const Index blocks = (count + kBlockRows - 1) / kBlockRows;  // of even height
        for (Index block = 0; block < blocks; ++block)
            f(begin + count * block / blocks, begin + count * (block + 1) / blocks);
    });
}

template <class T>
void copy_rows(Index rows, Index cols, const T* from, Index from_stride, T* to, Index to_stride) {
    for (Index i = 0; i < rows; ++i) std::copy_n(from + i * from_stride, cols, to + i * to_stride);
}

// A reference to a callable, which outlives it. What takes one is compiled once, not for each callable.
template <class... Arguments>
class Call {
   public:
    template <class F>
    Call(const F& f)
        : context_(&f), call_([](const void* callable, Arguments... arguments) {
              (*static_cast<const F*>(callable))(arguments...);
          }) {}
    void operator()(Arguments... arguments) const { call_(context_, arguments...); }

   private:
    const void* context_;
    void (*call_)(const void*, Arguments...);
};
using Ranges = Call<Index, Index>;  // (begin, end)

// Whether threads that are awake should share so many numbers, each of which is read or written once: copied, or weights of a
// product with a single row. 32768 take one of them a microsecond.
constexpr Index kLeastShared = 1 << 15;
inline bool worth_sharing(Index numbers) {
    return numbers >= kLeastShared && workers_awake() && static_cast<double>(numbers) >= kLeastShared * core_distance();
}

// f(first, count) for each panel of so many columns, by several threads where `shared`.
void over_panels(Index columns, Index panel, bool shared, const Ranges& f);

// Row-major (rows x cols) from or into panels of kPanel columns; see multiply_panels.
template <class T>
void to_panels(Index rows, Index cols, const T* from, T* panels) {
    over_panels(cols, kPanel<T>, worth_sharing(rows * cols), [&](Index at, Index count) {
        copy_rows(rows, count, from + at, cols, panels + at * rows, panel_width<T>(cols, at));
    });
}
template <class T>
void from_panels(Index rows, Index cols, const T* panels, T* to) {
    over_panels(cols, kPanel<T>, worth_sharing(rows * cols), [&](Index at, Index count) {
        copy_rows(rows, count, panels + at * rows, panel_width<T>(cols, at), to + at, cols);
    });
}

template <class T>
class Network {
   public:
    CHAINRULE_COLD explicit Network(std::vector<Layer<T>> layers);

    const std::vector<Layer<T>>& layers() const { return layers_; }
    const std::vector<Parameter>& parameters() const { return parameters_; }
    Index depth() const { return static_cast<Index>(layers_.size()); }
    Index inputs() const { return layers_.front().inputs; }
    Index outputs() const { return layers_.back().outputs; }
    bool has_external() const { return has_external_; }
    double multiplies_per_row() const { return multiplies_; }   // of one forward pass
    Index first_cotangent() const { return first_cotangent_; }  // below this layer nothing needs a cotangent

    // The flat buffer: for each linear layer its master copy (see ops/linear.hpp), for each external layer its arrays.
    T* theta() const { return theta_.data(); }
    Index size() const { return theta_.size(); }
    T* backward_weights(const Layer<T>& layer) const {
        return layer.narrow() ? theta() + layer.offset : backward_.data() + layer.backward_offset;
    }
    // The same of a wide layer that has none, because training needs no cotangent there: into (outputs x inputs) panels.
    void transpose_weights(const Layer<T>& layer, T* backward) const;
    // Goes up whenever parameters change, so that whoever keeps something made from them knows when it is out of date.
    std::uint64_t changes() const { return changes_.load(std::memory_order_acquire); }
    void count_change() { changes_.fetch_add(1, std::memory_order_release); }
    // After rows [first, first + count) of the panel at `column` of a master copy changed: the copies made from them.
    void copy_tile(const Layer<T>& layer, Index first, Index count, Index column) const;

    // Plain row-major copies of one parameter, out of and into a buffer laid out like theta; `write` into theta itself.
    CHAINRULE_COLD void read(const Parameter& parameter, const T* flat, T* to) const;
    CHAINRULE_COLD void pack(const Parameter& parameter, const T* from, T* flat) const;
    CHAINRULE_COLD void write(const Parameter& parameter, const T* from);
    using Snapshot = Array<T>;
    CHAINRULE_COLD Snapshot snapshot() const;
    CHAINRULE_COLD void restore(const Snapshot& snapshot);
    bool all_finite() const;
    void publish();  // after training: external layers' own copies

    // Rows [begin, end) through layers [from, to). Linear layers get their column of ones where `training`.
    void forward(const Activations<T>& a, Index from, Index to, Index begin, Index end, const Noise& noise,
                 bool training) const;
    // One layer on matrices of the caller's, whose rows are padded. Dropout is the identity.
    // `pairs` is room for bfloat16 operands, x.rows * kPairRoom.
    void forward_layer(Index layer, MatrixView<T> x, MatrixView<T> y, Pair* pairs) const;
    // dphi(to) to dphi(from), same rows.
    void backward(const Activations<T>& a, Index to, Index from, Index begin, Index end, const Noise& noise) const;
    // An op's vjp on matrices of the caller's; `saved` are rows and columns of φ with the number saved_by(layer).
    void backward_op(Index layer, MatrixView<T> dy, MatrixView<T> dx, MatrixView<T> saved) const;
    Index saved_by(Index layer) const;
    void append_ones(const Activations<T>& a, Index layer, Index begin, Index end) const;

    // The same for the first `rows` rows of a whole batch, on several threads, with external layers between. `gradient` is
    // laid out like theta and receives the external layers' parts.
    void forward_all(const Activations<T>& a, Index rows, int most_parts, const Noise& noise, bool training) const;
    void backward_all(const Activations<T>& a, Index rows, int most_parts, const Noise& noise, T* gradient) const;

    // f = φᴸ(x) for plain row-major x and f; any number of rows.
    void predict(Index rows, const T* x, T* f) const;
    // The output of every layer, plain and row-major.
    CHAINRULE_COLD void trace(Index rows, const T* x, T* const* phi) const;

   private:
    std::vector<Layer<T>> layers_;
    std::vector<Parameter> parameters_;
    Array<T> theta_, backward_;
    Array<Pair> forward_pairs_, backward_pairs_;
    bool has_external_ = false;
    double multiplies_ = 0;
    Index first_cotangent_ = 0;
    std::atomic<std::uint64_t> changes_{0};
    // Few rows are predicted in here, so that it costs no allocation; one caller at a time has it.
    mutable std::atomic<bool> scratch_taken_{false};
    mutable Activations<T> scratch_;

    class Scratch;
    void predict_blocks(const Activations<T>& a, Index first, Index end, const T* x, T* f) const;
    void copy_weights(const Layer<T>& layer) const;
    Index next_external(Index layer) const;
};

extern template class Network<float>;
extern template class Network<double>;
extern template class Activations<float>;
extern template class Activations<double>;

}  // namespace chainrule
