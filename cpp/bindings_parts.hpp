// SPDX-License-Identifier: MIT
// L4, a part of bindings.cpp and bindings_calculus.cpp: a network, its users' layers and losses, and data sets.
#pragma once

#include <pybind11/functional.h>

#include <atomic>
#include <limits>

#include "bindings_arrays.hpp"
#include "calculus.hpp"
#include "train.hpp"

namespace chainrule {

// ---- names ----------------------------------------------------------------------------------------------------------

inline const std::vector<std::string> op_names = {
#define CHAINRULE_ELEMENTWISE(name, type, saves) #name,
#define CHAINRULE_ROWWISE(name, type, saves) #name,
#include "ops/ops.def"
};
inline const std::vector<std::string> loss_names = {
#define CHAINRULE_LOSS(name, type) #name,
#include "ops/ops.def"
};
inline const std::vector<std::string> optimizer_names = {
#define CHAINRULE_OPTIMIZER(name, type) #name,
#include "ops/ops.def"
};

template <class Enum>
Enum lookup(const std::vector<std::string>& names, const std::string& name, const char* what) {
    for (std::size_t i = 0; i < names.size(); ++i)
        if (names[i] == name) return static_cast<Enum>(i);
    throw py::value_error(std::string("[_core] unknown ") + what + ": expected one of " +
                          std::string(py::str(py::cast(names))) + ", got " + name);
}

// ---- users' layers and losses ---------------------------------------------------------------------------------------

// What a user's map returned, as an array of T with this shape.
template <class T>
NumpyArray<T> returned(const py::handle& object, const std::string& map, const std::vector<Index>& shape) {
    const auto array = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(object);
    if (!array) {
        PyErr_Clear();
        throw py::type_error(text("[%s] must return an array: expected shape %s, got %s", map.c_str(),
                                  text_of(py::cast(shape)).c_str(), text_of(py::type::of(object)).c_str()));
    }
    bool right = static_cast<std::size_t>(array.ndim()) == shape.size();
    for (std::size_t d = 0; right && d < shape.size(); ++d)
        right = array.shape(static_cast<py::ssize_t>(d)) == shape[d];
    if (!right)
        throw py::value_error(text("[%s] returned the wrong shape: expected %s, got %s", map.c_str(),
                                   text_of(py::cast(shape)).c_str(), shape_text(array).c_str()));
    return py::reinterpret_borrow<NumpyArray<T>>(array);
}

// Writes `array` into a view and zeros into the padding of its rows.
template <class T>
void fill(MatrixView<T> view, const NumpyArray<T>& array) {
    const Index padded = round_up(view.cols, kLine<T>);
    for (Index i = 0; i < view.rows; ++i) {
        std::copy_n(array.data() + i * view.cols, view.cols, view.data + i * view.stride);
        std::fill(view.data + i * view.stride + view.cols, view.data + i * view.stride + padded, T{0});
    }
}

template <class T>
class PythonLayer final : public ExternalLayer<T> {
   public:
    using Tangent = typename ExternalLayer<T>::Tangent;
    explicit PythonLayer(py::object layer)
        : layer_(std::move(layer)), name_(py::str(py::getattr(layer_, "name", py::type::of(layer_).attr("__name__")))) {
        if (!py::hasattr(layer_, "params")) return;
        const py::dict params = layer_.attr("params");
        for (const auto& item : params) {
            const auto array = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(item.second);
            if (!array) throw py::error_already_set();
            own_.emplace_back(py::str(item.first), array);
        }
        for (const Own& own : own_) params[py::str(own.name)] = own.array;
    }
    std::vector<typename ExternalLayer<T>::Parameter> parameters() override {
        std::vector<typename ExternalLayer<T>::Parameter> list;
        for (const Own& own : own_) list.push_back({own.name, own.shape, own.size});
        return list;
    }
    void bind(T* const* storage) override {
        for (Own& own : own_) std::copy_n(own.data, own.size, own.engine = *storage++);
    }
    // The arrays are Python's own, not windows into the engine: nobody can be left with a dangling one.
    void publish() override {
        for (const Own& own : own_) std::copy_n(own.engine, own.size, own.data);
    }
    void forward(MatrixView<const T> x, MatrixView<T> y) override {
        const Locked lock;
        demand_own_arrays();
        publish();
        fill(y, returned<T>(ask("forward", {copy_of(x)}), name_ + ".forward", {y.rows, y.cols}));
    }
    void vjp(MatrixView<const T> x, MatrixView<const T> y, MatrixView<const T> dy, MatrixView<T> dx,
             T* const* gradients) override {
        const Locked lock;
        take("vjp", ask("vjp", {copy_of(x), copy_of(y), copy_of(dy)}), dx, gradients);
    }
    void jvp(MatrixView<const T> x, MatrixView<const T> y, const Tangent& dot, MatrixView<T> dy) override {
        const Locked lock;
        publish();
        fill(dy, returned<T>(ask("jvp", {copy_of(x), copy_of(y), tangent(dot.x), named(dot.parameters)}),
                             name_ + ".jvp", {dy.rows, dy.cols}));
    }
    void vjp_jvp(MatrixView<const T> x, MatrixView<const T> y, MatrixView<const T> c, MatrixView<const T> dc,
                 const Tangent& dot, MatrixView<T> out, T* const* gradients) override {
        const Locked lock;
        publish();
        take("vjp_jvp",
             ask("vjp_jvp", {copy_of(x), copy_of(y), copy_of(c), tangent(dot.x), copy_of(dc), named(dot.parameters)}),
             out, gradients);
    }
    void jvp_jvp(MatrixView<const T> x, MatrixView<const T> y, MatrixView<const T> dx, MatrixView<const T> ddx,
                 MatrixView<T> out) override {
        const Locked lock;
        publish();
        fill(out, returned<T>(ask("jvp_jvp", {copy_of(x), copy_of(y), copy_of(dx), copy_of(ddx)}), name_ + ".jvp_jvp",
                              {out.rows, out.cols}));
    }

   private:
    // A parameter: the engine's numbers, and a copy that Python may read. What holders do to the array's shape or dtype is theirs;
    // its memory, which outlives both, is not.
    struct Own {
        Own(std::string the_name, const NumpyArray<T>& from)
            : name(std::move(the_name)),
              shape(from.shape(), from.shape() + from.ndim()),
              size(from.size()),
              data(new T[static_cast<std::size_t>(size)]),
              memory(data, [](void* p) { delete[] static_cast<T*>(p); }),
              array(shape, data, memory) {
            std::copy_n(from.data(), size, data);
            array.attr("setflags")(false);
        }
        std::string name;
        std::vector<Index> shape;
        Index size;
        T* data;
        py::capsule memory;
        NumpyArray<T> array;
        T* engine = nullptr;
    };

    // A number that somebody puts among the parameters would be used, and neither trained nor saved.
    void demand_own_arrays() const {
        if (own_.empty()) return;
        const py::object params = layer_.attr("params");
        bool same = PyDict_Check(params.ptr()) && py::len(params) == own_.size();
        for (const Own& own : own_)
            same = same && PyDict_GetItemString(params.ptr(), own.name.c_str()) == own.array.ptr();
        if (!same)
            throw py::value_error(
                text("[%s] params belong to the network: expected its own arrays and no others, got "
                     "changed ones; use load_state_dict",
                     name_.c_str()));
    }
    // What vjp or vjp_jvp returned: dx, or dx and the parameters' gradients by name.
    void take(const char* map, const py::object& result, MatrixView<T> dx, T* const* gradients) {
        py::object dx_result = result;
        if (!own_.empty()) {
            if (!py::isinstance<py::tuple>(result) || py::len(result) != 2)
                throw py::value_error(
                    text("[%s.%s] a layer with params returns two things: expected (dx, {name: gradient}), got %s",
                         name_.c_str(), map, text_of(py::type::of(result)).c_str()));
            dx_result = result[py::int_(0)];
            const py::object given = result[py::int_(1)];
            for (const Own& own : own_) {
                if (!given.contains(own.name))
                    throw py::value_error(text("[%s.%s] a gradient is missing: expected one for '%s', got %s",
                                               name_.c_str(), map, own.name.c_str(),
                                               text_of(given.attr("keys")()).c_str()));
                const auto gradient =
                    returned<T>(given[py::str(own.name)], name_ + "." + map + ": gradient of " + own.name, own.shape);
                std::copy_n(gradient.data(), own.size, *gradients++);
            }
        }
        fill(dx, returned<T>(dx_result, name_ + "." + map, {dx.rows, dx.cols}));
    }
    py::object ask(const char* map, std::initializer_list<py::object> arrays) const {
        return call(layer_.attr(map), tuple_of(arrays));
    }
    static py::object tangent(MatrixView<const T> view) {
        return view.data == nullptr ? py::object(py::none()) : py::object(copy_of(view));
    }
    py::object named(T* const* parameters) const {
        if (parameters == nullptr) return py::none();
        py::dict named_arrays;
        for (const Own& own : own_) {
            NumpyArray<T> copy(own.shape);
            std::copy_n(*parameters++, own.size, copy.mutable_data());
            named_arrays[py::str(own.name)] = copy;
        }
        return std::move(named_arrays);
    }

    py::object layer_;
    std::string name_;
    std::vector<Own> own_;
};

template <class T>
class PythonLoss final : public ExternalLoss<T> {
   public:
    explicit PythonLoss(py::object function) : function_(std::move(function)) {}
    double value_grad(MatrixView<const T> f, const Targets<T>& y, Index target_cols, const T* weight, T scale,
                      MatrixView<T> df) override {
        const Locked lock;
        py::object targets;
        if (y.labels) {
            NumpyArray<std::int64_t> labels(f.rows);
            std::copy_n(y.labels, f.rows, labels.mutable_data());
            targets = labels;
        } else {
            targets = copy_of(MatrixView<const T>{y.values, f.rows, target_cols, y.stride});
        }
        const py::object result = call(function_, tuple_of({copy_of(f), targets}));
        if (!py::isinstance<py::tuple>(result) || py::len(result) != 2)
            throw py::value_error(text("[loss] a loss returns two things: expected (value, dL/df), got %s",
                                       text_of(py::type::of(result)).c_str()));
        fill(df, returned<T>(result[py::int_(1)], "loss: dL/df", {f.rows, f.cols}));
        const auto value = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(result[py::int_(0)]);
        if (!value) throw py::error_already_set();
        if (value.ndim() == 0) {
            if (weight)
                throw py::value_error(
                    "[loss] sample weights need the loss of each example: expected a value of shape (B,), got a "
                    "number");
            return *value.data();
        }
        if (value.ndim() != 1 || value.shape(0) != f.rows)
            throw py::value_error(
                text("[loss] value is a number or one per example: expected shape () or (%td,), got %s", f.rows,
                     shape_text(value).c_str()));
        double total = 0;
        for (Index i = 0; i < f.rows; ++i) {
            const T factor = (weight ? weight[i] : T{1}) * scale;
            if (factor != 0) total += static_cast<double>(factor) * value.data()[i];
            for (Index j = 0; j < f.cols; ++j) df.data[i * df.stride + j] *= factor;
        }
        leave_out(f.rows, weight, static_cast<T*>(nullptr), df);
        return total;
    }

   private:
    py::object function_;
};

struct LossSpec {
    LossOp op;
    double param;
    bool mean;
    py::object function;  // None for the built-in ones

    template <class T>
    Loss<T> build() const {
        std::shared_ptr<ExternalLoss<T>> external;
        if (!function.is_none()) external = std::make_shared<PythonLoss<T>>(function);
        return {op, param, mean, external};
    }
};

inline LossSpec make_loss(const std::string& name, double param, const std::string& reduction,
                          const py::object& function) {
    if (reduction != "mean" && reduction != "sum")
        throw py::value_error("[loss] unknown reduction: expected 'mean' or 'sum', got '" + reduction + "'");
    const LossOp op = name == "external" ? LossOp::mse : lookup<LossOp>(loss_names, name, "loss");
    return {op, param, reduction == "mean", function};
}

// ---- networks and data ------------------------------------------------------------------------------------------------

template <class T, class Intake>
struct Data;
struct FromNumpy;

// An engine: the classes that do the work. This is the CPU's; bindings_cuda.cpp has the GPU's, with the same methods.
template <class T>
struct Cpu {
    using Real = T;
    using Network = chainrule::Network<T>;
    using Optimizer = chainrule::Optimizer<T>;
    using Step = chainrule::Step<T>;
    using Trainer = chainrule::Trainer<T>;
    using Direction = chainrule::Direction<T>;
    using DerivativesOf = chainrule::DerivativesOf<T>;
    using Data = chainrule::Data<T, FromNumpy>;
};

enum class Trained { no, by_engine, by_python };

template <class E>
struct PyNetwork {
    template <class... Arguments>
    explicit PyNetwork(Arguments&&... arguments) : net(std::forward<Arguments>(arguments)...), derivatives(net) {
        for (const Parameter& p : net.parameters()) names.emplace_back(std::to_string(p.layer) + "." + p.name);
    }
    typename E::Network net;
    typename E::DerivativesOf derivatives;
    std::vector<py::str> names;  // of the parameters, as in a state dict
    std::atomic<Trained> trained{Trained::no};
};

// An array that has been taken in, and what keeps it.
template <class T>
struct Taken {
    const T* data = nullptr;
    std::vector<Index> shape;
    py::object owner;

    void demand(const char* what, const std::vector<Index>& expected) const {
        if (shape != expected)
            throw py::value_error(text("[_core] %s has the wrong shape: expected %s, got %s", what,
                                       text_of(py::cast(expected)).c_str(),
                                       text_of(py::tuple(py::cast(shape))).c_str()));
    }
};

// Takes NumPy arrays; bindings_cuda.cpp takes arrays on a device, too.
struct FromNumpy {
    template <class T>
    static Taken<T> take(const py::handle& object, const char* what, int dims) {
        const NumpyArray<T> array = require<T>(object, what, dims);
        return {array.data(), std::vector<Index>(array.shape(), array.shape() + array.ndim()), array};
    }
    static bool are_labels(const py::handle& object) { return py::isinstance<py::array_t<std::int64_t>>(object); }
    static NumpyArray<std::int64_t> labels(const py::handle& object, Index rows) {
        const auto given = require_shape<std::int64_t>(object, "y", {rows});
        NumpyArray<std::int64_t> copy(rows);  // they are indices, and the caller can still write to his
        std::copy_n(given.data(), rows, copy.mutable_data());
        return copy;
    }
};

// Arrays of a data set, held as long as it is used.
template <class T, class Intake>
struct Data {
    template <class Net>
    Data(const Net& net, const py::object& X, const py::object& y, const py::object& weight)
        : x(Intake::template take<T>(X, "X", 2)) {
        const Index rows = x.shape[0];
        x.demand("X", {rows, net.inputs()});
        view = {rows, x.data, nullptr, nullptr, 0, nullptr};
        if (Intake::are_labels(y)) {
            take_labels(y, net.outputs());
        } else {
            values = Intake::template take<T>(y, "y", 2);
            view.target_cols = values.shape[1];
            values.demand("y", {rows, view.target_cols});
            if (view.target_cols == 0) throw py::value_error("[_core] y has no columns: expected at least 1, got 0");
            view.y = values.data;
        }
        if (!weight.is_none()) {
            weights = Intake::template take<T>(weight, "weight", 1);
            weights.demand("weight", {rows});
            view.weight = weights.data;
        }
    }
    template <class Net>
    void suits(const Net& net, const Loss<T>& loss) const {
        if (loss.external) return;
        const bool wants_labels = loss.op == LossOp::cross_entropy;
        if (view.labels && !wants_labels)
            throw py::value_error(
                "[_core] this loss takes real targets: expected y of the network's dtype, got labels");
        const Index cols = loss.op == LossOp::gaussian_nll ? 2 * view.target_cols : view.target_cols;
        if (!view.labels && (cols != net.outputs()))
            throw py::value_error(
                text("[_core] y does not fit the network: expected %td outputs' targets, got %td columns",
                     net.outputs(), view.target_cols));
    }
    // ∂y/∂x for Sobolev training; None: there is none.
    template <class Net>
    void add_slopes(const Net& net, const py::object& dy, double dy_weight) {
        if (dy.is_none()) return;
        slopes = Intake::template take<T>(dy, "dy", 3);
        slopes.demand("dy", {view.rows, net.outputs(), net.inputs()});
        view.dy = slopes.data;
        view.dy_weight = dy_weight;
    }
    Dataset<T> view;

   private:
    void take_labels(const py::object& y, Index classes) {
        labels = Intake::labels(y, view.rows);
        for (Index i = 0; i < view.rows; ++i)
            if (labels.data()[i] < 0 || labels.data()[i] >= classes)
                throw py::value_error(text("[_core] labels out of range: expected 0 to %td, got %lld in row %td",
                                           classes - 1, static_cast<long long>(labels.data()[i]), i));
        view.labels = labels.data();
    }
    Taken<T> x, values, weights, slopes;
    NumpyArray<std::int64_t> labels;
};

template <class T, class Net>
py::list unpack(const Net& net, const T* flat) {
    py::list arrays;
    for (const Parameter& parameter : net.parameters()) {
        NumpyArray<T> array(parameter.shape);
        net.read(parameter, flat, array.mutable_data());
        arrays.append(array);
    }
    return arrays;
}

// ---- targets that fit as they are -----------------------------------------------------------------------------------

// Real targets in [low, high], batch.target_cols of them for each of batch.rows; one column may be a vector.
template <class T>
bool values_as_they_are(const py::object& y, bool vector, std::pair<double, double> domain, Dataset<T>& batch) {
    if (!fits<T>(y)) return false;
    const auto given = py::reinterpret_borrow<NumpyArray<T>>(y);
    const bool column = vector && given.ndim() == 1 && batch.target_cols == 1;
    const bool matrix = given.ndim() == 2 && given.shape(1) == batch.target_cols;
    if (!(column || matrix) || given.shape(0) != batch.rows) return false;
    batch.y = given.data();
    if (!all_finite(batch.y, given.size())) return false;
    constexpr double infinity = std::numeric_limits<double>::infinity();
    return (domain.first == -infinity && domain.second == infinity) ||
           std::all_of(batch.y, batch.y + given.size(),
                       [&](double value) { return domain.first <= value && value <= domain.second; });
}

template <class T>
bool labels_as_they_are(const py::object& y, Index classes, Array<std::int64_t>& labels, Dataset<T>& batch) {
    if (!fits<std::int64_t>(y)) return false;
    const auto given = py::reinterpret_borrow<NumpyArray<std::int64_t>>(y);
    if (given.ndim() != 1 || given.shape(0) != batch.rows) return false;
    if (labels.size() < batch.rows) labels = Array<std::int64_t>(batch.rows);
    // A copy, as in Data: they are indices, and the caller can still write to his.
    std::copy_n(given.data(), batch.rows, labels.data());
    batch.labels = labels.data();
    return std::all_of(batch.labels, batch.labels + batch.rows,
                       [&](std::int64_t label) { return label >= 0 && label < classes; });
}

// Adds to the class of a network what bindings_calculus.hpp has.
template <class E>
void bind_calculus(py::class_<PyNetwork<E>>& network);

}  // namespace chainrule
