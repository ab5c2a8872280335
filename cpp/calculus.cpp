// SPDX-License-Identifier: MIT
#include "calculus.hpp"

#include <cmath>
#include <limits>
#include <numeric>

#include "example_clipping.hpp"

namespace chainrule {
namespace {

template <class T>
using LayerKind = typename Layer<T>::Kind;

// Rows of a batch that go through all sweeps before the next ones come, which bounds the memory. Whole blocks of kDepth: a
// gradient that is summed batch by batch then has the bits of one sum.
constexpr Index kBatchRows = 2 * kDepth;

template <class T>
MatrixView<const T> constant(MatrixView<T> m) {
    return {m.data, m.rows, m.cols, m.stride};
}

// The largest |element|.
template <class T>
T largest(MatrixView<const T> m) {
    T most = 0;
    for (Index i = 0; i < m.rows; ++i)
        for (Index j = 0; j < m.cols; ++j) most = std::max(most, std::abs(m.data[i * m.stride + j]));
    return most;
}

}  // namespace

// ---- what is asked: functions of X ----------------------------------------------------------------------------------

// All parts of one derivative are shared, or none, as those of a training step are: about three products with all weights.
template <class T>
int Derivatives<T>::parts(Index rows) const {
    return parts_for(3 * net_.multiplies_per_row() * static_cast<double>(rows));
}

// f(begin, end) over rows, on several threads where it pays. Users' layers want all rows on the calling thread, and few rows
// are not worth dividing: then columns are shared out, product by product.
template <class T>
void Derivatives<T>::over(Index rows, const Ranges& f) {
    constexpr Index few = 8;
    const bool whole = net_.has_external() || rows < few;
    tape_.share_columns(whole);
    if (whole) return f(Index{0}, rows);
    over_rows(rows, parts(rows), f);
}

template <class T>
Index Derivatives<T>::bytes() const {
    const Index own = gradient_.size() + targets_.size() + values_.size();
    return tape_.bytes() + direction_.bytes() + own * static_cast<Index>(sizeof(T));
}

template <class T>
void Derivatives<T>::jvp(Index rows, const T* x, const T* dx, bool along_parameters, T* f, T* df) {
    const Index depth = net_.depth(), moving = dx ? 0 : net_.first_cotangent();
    const Direction<T>* direction = along_parameters ? &direction_ : nullptr;
    for (Index first = 0; first < rows; first += kBatchRows) {
        tape_.shape(first, std::min(rows - first, kBatchRows), 1, {Kind::primal, Kind::tangent});
        over(tape_.rows(), [&](Index begin, Index end) {
            tape_.load(Kind::primal, 0, begin, end, x + first * net_.inputs());
            if (dx) tape_.load(Kind::tangent, 0, begin, end, dx + first * net_.inputs());
            tape_.forward_and_tangents(begin, end, moving, direction);
            tape_.store(Kind::primal, depth, begin, end, f + first * net_.outputs());
            tape_.store(Kind::tangent, depth, begin, end, df + first * net_.outputs());
        });
    }
}

template <class T>
void Derivatives<T>::sensitivity(Index rows, const T* x, Index input, T* f, T* df) {
    const Index depth = net_.depth();
    for (Index first = 0; first < rows; first += kBatchRows) {
        tape_.shape(first, std::min(rows - first, kBatchRows), 1, {Kind::primal, Kind::tangent});
        over(tape_.rows(), [&](Index begin, Index end) {
            tape_.load(Kind::primal, 0, begin, end, x + first * net_.inputs());
            tape_.forward(begin, end);
            tape_.tangents_along(input, begin, end);
            tape_.store(Kind::primal, depth, begin, end, f + first * net_.outputs());
            tape_.store(Kind::tangent, depth, begin, end, df + first * net_.outputs());
        });
    }
}

template <class T>
void Derivatives<T>::vjp(Index rows, const T* x, const T* c, T* f, T* const* dphi, T* const* to) {
    const Index depth = net_.depth(), lowest = dphi[0] ? 0 : tape_.lowest();
    T* flat = to ? flat_gradient() : nullptr;
    for (std::size_t k = 0; to && rows == 0 && k < net_.parameters().size(); ++k)
        std::fill_n(to[k], net_.parameters()[k].size, T{0});
    if (lowest == 0) tape_.prepare_inputs();
    for (Index first = 0; first < rows; first += kBatchRows) {
        tape_.shape(first, std::min(rows - first, kBatchRows), 1, {Kind::primal, Kind::cotangent});
        over(tape_.rows(), [&](Index begin, Index end) {
            tape_.load(Kind::primal, 0, begin, end, x + first * net_.inputs());
            tape_.load(Kind::cotangent, depth, begin, end, c + first * net_.outputs());
            tape_.forward(begin, end);
            tape_.cotangents(begin, end, lowest, flat);
            if (f) tape_.store(Kind::primal, depth, begin, end, f + first * net_.outputs());
            for (Index l = 0; l <= depth; ++l)
                if (dphi[l])
                    tape_.store(Kind::cotangent, l, begin, end, dphi[l] + first * tape_.at(Kind::cotangent, l).cols);
        });
        if (to) leave_gradient(Kind::cotangent, depth, first, rows, to);
    }
}

// All rows of derivatives, example by example, cut into batches without regard to where an example ends.
template <class T>
void Derivatives<T>::jacobian(Index rows, const T* x, bool reverse, T* j) {
    const Index inputs = net_.inputs(), outputs = net_.outputs(), depth = net_.depth();
    const Index seeds = reverse ? outputs : inputs, all = rows * seeds;
    const Kind kind = reverse ? Kind::cotangent : Kind::tangent;
    if (reverse) tape_.prepare_inputs();
    for (Index first = 0; first < all; first += kBatchRows) {
        tape_.shape(first, std::min(all - first, kBatchRows), seeds, {Kind::primal, kind});
        over(tape_.examples(), [&](Index begin, Index end) {
            tape_.load(Kind::primal, 0, begin, end, x + first / seeds * inputs);
            tape_.forward(begin, end);
        });
        over(tape_.rows(), [&](Index begin, Index end) {
            tape_.seed(kind, reverse ? depth : 0, begin, end);
            if (reverse) {
                tape_.cotangents(begin, end, 0, nullptr);
                return tape_.store(kind, 0, begin, end, j + first * inputs);
            }
            tape_.tangents(begin, end);
            const MatrixView<T> df = tape_.at(kind, depth);
            for (Index r = begin; r < end; ++r)
                for (Index o = 0; o < outputs; ++o)
                    j[((first + r) / inputs * outputs + o) * inputs + (first + r) % inputs] =
                        df.data[r * df.stride + o];
        });
    }
}

template <class T>
void Derivatives<T>::parameter_jacobian(Index rows, const T* x, T* const* j) {
    const Index seeds = net_.outputs(), all = rows * seeds;
    std::vector<T*> at(net_.parameters().size());
    for (Index first = 0; first < all; first += kBatchRows) {
        for (std::size_t k = 0; k < at.size(); ++k) at[k] = j[k] + first * net_.parameters()[k].size;
        tape_.shape(first, std::min(all - first, kBatchRows), seeds, {Kind::primal, Kind::cotangent});
        over(tape_.examples(), [&](Index begin, Index end) {
            tape_.load(Kind::primal, 0, begin, end, x + first / seeds * net_.inputs());
            tape_.forward(begin, end);
        });
        over(tape_.rows(), [&](Index begin, Index end) {
            tape_.seed(Kind::cotangent, net_.depth(), begin, end);
            tape_.cotangents(begin, end, net_.first_cotangent(), nullptr);
            example_gradients(begin, end, at.data());
        });
    }
}

template <class T>
void Derivatives<T>::second(Index rows, const T* x, bool sum, T* to) {
    const Index inputs = net_.inputs(), outputs = net_.outputs(), depth = net_.depth(), all = rows * inputs;
    if (sum) std::fill_n(to, rows * outputs, T{0});
    for (Index first = 0; first < all; first += kBatchRows) {
        tape_.shape(first, std::min(all - first, kBatchRows), inputs,
                    {Kind::primal, Kind::tangent, Kind::second_tangent});
        over(tape_.examples(), [&](Index begin, Index end) {
            tape_.load(Kind::primal, 0, begin, end, x + first / inputs * inputs);
            tape_.forward(begin, end);
        });
        over(tape_.rows(), [&](Index begin, Index end) {
            tape_.seed(Kind::tangent, 0, begin, end);
            tape_.tangents(begin, end);
            tape_.second_tangents(begin, end);
        });
        const MatrixView<T> ddf = tape_.at(Kind::second_tangent, depth);
        for (Index r = 0; r < tape_.rows(); ++r)
            for (Index o = 0; o < outputs; ++o) {
                const Index row = (first + r) / inputs * outputs + o;
                const T value = ddf.data[r * ddf.stride + o];
                sum ? to[row] += value : to[row * inputs + (first + r) % inputs] = value;
            }
    }
}

// ---- what is asked: functions of a loss -----------------------------------------------------------------------------

// A user's loss sees all rows at once.
template <class T>
void Derivatives<T>::by_batches(const Dataset<T>& data, const Loss<T>& loss, const Call<const Batch&>& f) {
    double weight = static_cast<double>(data.rows);
    if (data.weight)
        weight = std::accumulate(data.weight, data.weight + data.rows, 0.0,
                                 [](double sum, T next) { return sum + static_cast<double>(next); });
    const T scale = static_cast<T>(!loss.mean ? 1.0 : (weight > 0 ? 1 / weight : 0.0));
    const Index piece = loss.external ? data.rows : kBatchRows;
    for (Index first = 0; first < data.rows; first += piece)
        f(Batch{data, loss, scale, first, std::min(data.rows - first, piece)});
}

template <class T>
void Derivatives<T>::load_targets(const Batch& batch, Index begin, Index end) {
    const Index cols = batch.data.target_cols, stride = padded_stride<T>(cols);
    if (batch.data.y)
        copy_rows(end - begin, cols, batch.data.y + (batch.first + begin) * cols, cols,
                  targets_.data() + begin * stride, stride);
}

template <class T>
Targets<T> Derivatives<T>::targets(const Batch& batch, Index begin) const {
    const Index stride = padded_stride<T>(batch.data.target_cols);
    return {batch.data.labels ? batch.data.labels + batch.first + begin : nullptr, targets_.data() + begin * stride,
            stride};
}

template <class T>
const T* Derivatives<T>::weights(const Batch& batch, Index begin) const {
    return batch.data.weight ? batch.data.weight + batch.first + begin : nullptr;
}

// ∂L/∂f of rows into the cotangents.
template <class T>
void Derivatives<T>::loss_gradient(const Batch& batch, Index begin, Index end) {
    const MatrixView<T> f = tape_.at(Kind::primal, net_.depth()), df = tape_.at(Kind::cotangent, net_.depth());
    if (batch.loss.external) {
        batch.loss.external->value_grad(constant(f), targets(batch, 0), batch.data.target_cols, weights(batch, 0),
                                        batch.scale, df);
        return;
    }
    kernels<T>().loss[static_cast<int>(batch.loss.op)](
        end - begin, f.cols, f.data + begin * f.stride, f.stride, targets(batch, begin), weights(batch, begin),
        batch.scale, values_.data() + begin, df.data + begin * df.stride, df.stride, static_cast<T>(batch.loss.param));
    leave_out(end - begin, weights(batch, begin), values_.data() + begin,
              {df.data + begin * df.stride, end - begin, df.cols, df.stride});
}

// H_L ḟ of rows into `to`.
template <class T>
void Derivatives<T>::loss_hvp(const Batch& batch, Index begin, Index end, Kind to) {
    const auto rows = [&](Kind kind) {
        const MatrixView<T> all = tape_.at(kind, net_.depth());
        return MatrixView<T>{all.data + begin * all.stride, end - begin, all.cols, all.stride};
    };
    if (batch.loss.external) return difference_of_gradients(batch, rows(to));
    second_kernels<T>().loss_hvp[static_cast<int>(batch.loss.op)](
        constant(rows(Kind::primal)), targets(batch, begin), weights(batch, begin), batch.scale,
        constant(rows(Kind::tangent)), rows(to), static_cast<T>(batch.loss.param));
    leave_out(end - begin, weights(batch, begin), static_cast<T*>(nullptr), rows(to));
}

// H ḟ of a loss that we know the gradient of, and no more: (∂L/∂f at f + h ḟ, less that at f - h ḟ) / 2h. Truncation errs
// by h² and rounding by eps/h: h is the cube root of eps, in units in which ḟ moves f by its own size.
template <class T>
void Derivatives<T>::difference_of_gradients(const Batch& batch, MatrixView<T> out) {
    const MatrixView<T> f = tape_.at(Kind::primal, net_.depth()), df = tape_.at(Kind::tangent, net_.depth());
    const T moved = largest(constant(df));
    const T h = std::cbrt(std::numeric_limits<T>::epsilon()) * (1 + largest(constant(f))) / (moved > 0 ? moved : T{1});
    std::vector<T> memory(static_cast<std::size_t>(2 * f.rows * f.stride));
    const MatrixView<T> at = {memory.data(), f.rows, f.cols, f.stride};
    const MatrixView<T> behind = {memory.data() + f.rows * f.stride, f.rows, f.cols, f.stride};
    const auto gradient_at = [&](T step, MatrixView<T> to) {
        for (Index i = 0; i < f.rows; ++i)
            for (Index j = 0; j < f.cols; ++j)
                at.data[i * at.stride + j] = f.data[i * f.stride + j] + step * df.data[i * df.stride + j];
        batch.loss.external->value_grad(constant(at), targets(batch, 0), batch.data.target_cols, weights(batch, 0),
                                        batch.scale, to);
    };
    gradient_at(-h, behind);
    gradient_at(h, out);
    for (Index i = 0; i < f.rows; ++i)
        for (Index j = 0; j < f.cols; ++j) {
            T& ahead = out.data[i * out.stride + j];
            ahead = (ahead - behind.data[i * behind.stride + j]) / (2 * h);
        }
}

// The three parts of a sweep up and down again, over rows; a user's loss needs all rows to have arrived at the top.
template <class T>
void Derivatives<T>::up_and_down(const Batch& batch, const Ranges& up, const Ranges& top, const Ranges& down) {
    const Index target_size = batch.rows * padded_stride<T>(batch.data.target_cols);
    if (targets_.size() < target_size) targets_ = Array<T>(target_size);
    if (values_.size() < batch.rows) values_ = Array<T>(batch.rows);
    const auto begin_rows = [&](Index begin, Index end) {
        load_targets(batch, begin, end);
        tape_.load(Kind::primal, 0, begin, end, batch.data.x + batch.first * net_.inputs());
        up(begin, end);
    };
    if (!batch.loss.external)
        return over(batch.rows, [&](Index begin, Index end) {
            begin_rows(begin, end);
            top(begin, end);
            down(begin, end);
        });
    over(batch.rows, begin_rows);
    top(Index{0}, batch.rows);
    over(batch.rows, down);
}

template <class T>
void Derivatives<T>::input_gradient(const Dataset<T>& data, const Loss<T>& loss, T* dx) {
    tape_.prepare_inputs();
    by_batches(data, loss, [&](const Batch& batch) {
        tape_.shape(batch.first, batch.rows, 1, {Kind::primal, Kind::cotangent});
        up_and_down(
            batch, [&](Index begin, Index end) { tape_.forward(begin, end); },
            [&](Index begin, Index end) { loss_gradient(batch, begin, end); },
            [&](Index begin, Index end) {
                tape_.cotangents(begin, end, 0, nullptr);
                tape_.store(Kind::cotangent, 0, begin, end, dx + batch.first * net_.inputs());
            });
    });
}

// Of a loss that is not a user's.
template <class T>
double Derivatives<T>::gradient(const Dataset<T>& data, const Loss<T>& loss, T* const* to) {
    T* const flat = flat_gradient();
    double value = 0;
    T scale = 0;
    by_batches(data, loss, [&](const Batch& batch) {
        tape_.shape(batch.first, batch.rows, 1, {Kind::primal, Kind::cotangent});
        up_and_down(
            batch, [&](Index begin, Index end) { tape_.forward(begin, end); },
            [&](Index begin, Index end) { loss_gradient(batch, begin, end); },
            [&](Index begin, Index end) { tape_.cotangents(begin, end, tape_.lowest(), flat); });
        for (Index i = 0; i < batch.rows; ++i)
            value += static_cast<double>(values_[i]) *
                     (data.weight ? static_cast<double>(data.weight[batch.first + i]) : 1.0);
        scale = batch.scale;
        leave_gradient(Kind::cotangent, net_.depth(), batch.first, data.rows, to);
    });
    return value * static_cast<double>(scale);
}

template <class T>
void Derivatives<T>::hvp(const Dataset<T>& data, const Loss<T>& loss, T* const* to) {
    const Index low = net_.first_cotangent();
    T* const flat = flat_gradient();
    by_batches(data, loss, [&](const Batch& batch) {
        tape_.shape(batch.first, batch.rows, 1,
                    {Kind::primal, Kind::tangent, Kind::cotangent, Kind::cotangent_tangent});
        up_and_down(
            batch, [&](Index begin, Index end) { tape_.forward_and_tangents(begin, end, low, &direction_); },
            [&](Index begin, Index end) {
                loss_gradient(batch, begin, end);
                loss_hvp(batch, begin, end, Kind::cotangent_tangent);
            },
            [&](Index begin, Index end) { tape_.cotangents_and_tangents(begin, end, direction_, flat); });
        leave_gradient(Kind::cotangent_tangent, low, batch.first, data.rows, to);
    });
}

template <class T>
void Derivatives<T>::gauss_newton(const Dataset<T>& data, const Loss<T>& loss, T* const* to) {
    const Index low = net_.first_cotangent();
    T* const flat = flat_gradient();
    by_batches(data, loss, [&](const Batch& batch) {
        tape_.shape(batch.first, batch.rows, 1, {Kind::primal, Kind::tangent, Kind::cotangent});
        up_and_down(
            batch, [&](Index begin, Index end) { tape_.forward_and_tangents(begin, end, low, &direction_); },
            [&](Index begin, Index end) { loss_hvp(batch, begin, end, Kind::cotangent); },
            [&](Index begin, Index end) { tape_.cotangents(begin, end, tape_.lowest(), flat); });
        leave_gradient(Kind::cotangent, net_.depth(), batch.first, data.rows, to);
    });
}

// Each example's cotangents, down to the first parameters.
template <class T>
void Derivatives<T>::down_to_parameters(const Batch& batch) {
    tape_.shape(batch.first, batch.rows, 1, {Kind::primal, Kind::cotangent});
    up_and_down(
        batch, [&](Index begin, Index end) { tape_.forward(begin, end); },
        [&](Index begin, Index end) { loss_gradient(batch, begin, end); },
        [&](Index begin, Index end) { tape_.cotangents(begin, end, net_.first_cotangent(), nullptr); });
}

template <class T>
void Derivatives<T>::example_gradients(const Dataset<T>& data, const Loss<T>& loss, T* const* to) {
    std::vector<T*> at(net_.parameters().size());
    by_batches(data, loss, [&](const Batch& batch) {
        down_to_parameters(batch);
        for (std::size_t k = 0; k < at.size(); ++k) at[k] = to[k] + batch.first * net_.parameters()[k].size;
        over(batch.rows, [&](Index begin, Index end) { example_gradients(begin, end, at.data()); });
    });
}

template <class T>
void Derivatives<T>::example_norms(const Dataset<T>& data, const Loss<T>& loss, T* norms) {
    by_batches(data, loss, [&](const Batch& batch) {
        down_to_parameters(batch);
        over(batch.rows, [&](Index begin, Index end) {
            for (Index r = begin; r < end; ++r) {
                double sum = 0;
                for (Index l = 0; l < net_.depth(); ++l) sum += square_of_gradient(l, r);
                norms[batch.first + r] = static_cast<T>(std::sqrt(sum));
            }
        });
    });
}

template <class T>
double Derivatives<T>::square_of_gradient(Index l, Index row) const {
    const Layer<T>& layer = net_.layers()[static_cast<std::size_t>(l)];
    if (layer.kind == LayerKind<T>::linear)
        return square_of_product(tape_.at(Kind::cotangent, l + 1), tape_.at(Kind::primal, l), layer.bias, row);
    if (layer.size == 0) return 0;
    std::vector<T> own(static_cast<std::size_t>(layer.size));
    tape_.example_gradient(l, row, own.data());
    return std::inner_product(own.begin(), own.end(), own.begin(), 0.0, std::plus<>(),
                              [](T a, T b) { return static_cast<double>(a) * static_cast<double>(b); });
}

// The gradients of rows, one by one: to[k] has a parameter's size for each row.
template <class T>
void Derivatives<T>::example_gradients(Index begin, Index end, T* const* to) const {
    outer_products(Kind::cotangent, Kind::primal, 0, begin, end, to);
    if (net_.has_external()) own_gradients(begin, end, to);
}

// cᵀ x of rows for the weights of linear layers from `lowest` on, cᵀ times what is appended to x for biases; with tangents for x,
// added to what is there.
template <class T>
void Derivatives<T>::outer_products(Kind cotangents, Kind inputs, Index lowest, Index begin, Index end,
                                    T* const* to) const {
    for (std::size_t k = 0; k < net_.parameters().size(); ++k) {
        const Parameter& parameter = net_.parameters()[k];
        const bool linear = net_.layers()[static_cast<std::size_t>(parameter.layer)].kind == LayerKind<T>::linear;
        if (!linear || parameter.layer < lowest) continue;
        const MatrixView<T> c = tape_.at(cotangents, parameter.layer + 1), x = tape_.at(inputs, parameter.layer);
        const bool bias = parameter.shape.size() == 1, tangents = inputs == Kind::tangent;
        const Index cols = bias ? 1 : x.cols;
        for (Index r = begin; r < end; ++r) {
            const T* xr = x.data + (tangents ? r : tape_.example(r)) * x.stride + (bias ? x.cols : 0);
            over_panels(c.cols, kPanel<T>, worth_sharing(parameter.size), [&](Index first, Index count) {
                second_kernels<T>().outer(count, cols, c.data + r * c.stride + first, xr,
                                          to[k] + r * parameter.size + first * cols, tangents);
            });
        }
    }
}

// The same for users' layers.
template <class T>
void Derivatives<T>::own_gradients(Index begin, Index end, T* const* to) const {
    for (std::size_t k = 0, next; k < net_.parameters().size(); k = next) {
        const Index l = net_.parameters()[k].layer;
        for (next = k; next < net_.parameters().size() && net_.parameters()[next].layer == l;) ++next;
        const Layer<T>& layer = net_.layers()[static_cast<std::size_t>(l)];
        if (layer.kind != LayerKind<T>::external) continue;
        std::vector<T> own(static_cast<std::size_t>(layer.size));
        for (Index r = begin; r < end; ++r) {
            tape_.example_gradient(l, r, own.data());
            for (std::size_t p = k; p < next; ++p) {
                const Parameter& parameter = net_.parameters()[p];
                std::copy_n(own.data() + (parameter.offset - layer.offset), parameter.size, to[p] + r * parameter.size);
            }
        }
    }
}

template <class T>
T* Derivatives<T>::flat_gradient() {
    if (gradient_.size() < net_.size()) gradient_ = Array<T>(net_.size());
    if (net_.has_external()) std::fill_n(gradient_.data(), net_.size(), T{0});
    return gradient_.data();
}

// The gradient of all rows, of which a batch begins with `first`, from their cotangents; see add_gradient. That of one row is
// no sum: outer products make it at its place (H v through 784-256-128-10: 118 µs by way of tiles on one thread, and so 85).
template <class T>
void Derivatives<T>::leave_gradient(Kind cotangents, Index moving, Index first, Index all, T* const* to) {
    if (all == 1 && !net_.has_external()) {
        outer_products(cotangents, Kind::primal, 0, 0, 1, to);
        return outer_products(Kind::cotangent, Kind::tangent, moving, 0, 1, to);
    }
    add_gradient(cotangents, moving, first > 0);
    if (first + tape_.rows() < all) return;
    for (std::size_t k = 0; k < net_.parameters().size(); ++k) net_.read(net_.parameters()[k], gradient_.data(), to[k]);
}

// The linear layers' part of the gradient, from cotangents of all rows: cᵀ x, or its tangent ċᵀ x + cᵀ ẋ, where the second
// term is there from layer `moving` on.
template <class T>
void Derivatives<T>::add_gradient(Kind cotangents, Index moving, bool add) {
    const Index rows = tape_.rows();
    if (!tiles_ || tiles_rows_ < rows) {
        tiles_.emplace(net_, rows);
        tiles_rows_ = rows;
    }
    T* flat = gradient_.data();
    tiles_->over(parts(rows), [&](const Tile& tile, std::size_t, auto& scratch) {
        if (tile.kind == Tile::Kind::external) return;
        const Index l = tile.layer;
        T* to = flat + tile.place;
        tiles_->differentiate(tile, rows, tape_.at(Kind::primal, l), tape_.at(cotangents, l + 1), scratch, to, add);
        if (l >= moving)
            tiles_->differentiate(tile, rows, tape_.at(Kind::tangent, l), tape_.at(Kind::cotangent, l + 1), scratch, to,
                                  true);
    });
}

// ---- one caller at a time -------------------------------------------------------------------------------------------

template <class T>
DerivativesOf<T>::Lease::Lease(DerivativesOf& owner)
    : owner_(owner), borrowed_(!owner.taken_.exchange(true, std::memory_order_acquire)) {
    if (borrowed_) held_ = std::move(owner.kept_);
    if (!held_) try {
            held_ = std::make_unique<Derivatives<T>>(owner.net_);
        } catch (...) {
            if (borrowed_) owner.taken_.store(false);
            throw;
        }
    if (owner.net_.size() >= kLeastShared) burst_.emplace();
}

template <class T>
DerivativesOf<T>::Lease::~Lease() {
    constexpr Index most = 16 << 20;
    if (!borrowed_) return;
    if (held_ && held_->bytes() <= most) owner_.kept_ = std::move(held_);
    owner_.taken_.store(false, std::memory_order_release);
}

template class Derivatives<float>;
template class Derivatives<double>;
template class DerivativesOf<float>;
template class DerivativesOf<double>;

}  // namespace chainrule
