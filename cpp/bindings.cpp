// SPDX-License-Identifier: MIT
// L4: with the other bindings the only file that knows Python. It takes arrays in and gives arrays out; it computes nothing
// and has no defaults. Arrays must come with the right dtype, C-contiguous: Python converts them, once, where the user can
// see it. Functions named …_as_is return None instead of converting an array, or of saying what is wrong with it.
#include <pybind11/pybind11.h>

#include <numeric>

#include "bindings_parts.hpp"
#include "random.hpp"
#include "train.hpp"

using namespace chainrule;

namespace {

py::list ops() {
    py::list rows;
    rows.append(py::make_tuple("linear", "linear", "input"));
#define CHAINRULE_ELEMENTWISE(name, type, saves) rows.append(py::make_tuple("elementwise", #name, #saves));
#define CHAINRULE_ROWWISE(name, type, saves) rows.append(py::make_tuple("rowwise", #name, #saves));
#define CHAINRULE_LOSS(name, type) rows.append(py::make_tuple("loss", #name, "none"));
#define CHAINRULE_OPTIMIZER(name, type) rows.append(py::make_tuple("optimizer", #name, "none"));
#include "ops/ops.def"
    rows.append(py::make_tuple("dropout", "dropout", "none"));
    return rows;
}

// ---- single kernels, for tests and benchmarks -----------------------------------------------------------------------

py::object op_forward(const std::string& name, const py::object& x, double param) {
    const Op op = lookup<Op>(op_names, name, "op");
    return with_real_type(x, [&](auto zero) -> py::object {
        using T = decltype(zero);
        const Padded<T> in(require<T>(x, "x", 2)), out(in.rows, in.cols);
        kernels<T>().forward[static_cast<int>(op)](in.rows, in.cols, in.data(), in.stride, out.data(), out.stride,
                                                   static_cast<T>(param));
        return out.numpy();
    });
}

py::object op_derivative(bool reverse, const std::string& name, const py::object& given, const py::object& saved,
                         double param) {
    const Op op = lookup<Op>(op_names, name, "op");
    return with_real_type(given, [&](auto zero) -> py::object {
        using T = decltype(zero);
        const Padded<T> in(require<T>(given, reverse ? "dy" : "dx", 2));
        const Padded<T> kept(require_shape<T>(saved, "saved", {in.rows, in.cols})), out(in.rows, in.cols);
        const auto& table = reverse ? kernels<T>().vjp : kernels<T>().jvp;
        table[static_cast<int>(op)](in.rows, in.cols, in.data(), in.stride, kept.data(), kept.stride, out.data(),
                                    out.stride, static_cast<T>(param));
        return out.numpy();
    });
}

// The map of second order that stands for both: of vjp (v = c, dv = dc), or of jvp (v = dx, dv = ddx).
py::object op_second(bool reverse, const std::string& name, const py::object& v, const py::object& dx,
                     const py::object& dv, const py::object& saved, double param) {
    const Op op = lookup<Op>(op_names, name, "op");
    return with_real_type(v, [&](auto zero) -> py::object {
        using T = decltype(zero);
        const Padded<T> given(require<T>(v, reverse ? "c" : "dx", 2)), out(given.rows, given.cols);
        const std::vector<Index> shape = {given.rows, given.cols};
        const Padded<T> moved(require_shape<T>(dx, "dx", shape)), kept(require_shape<T>(saved, "saved", shape));
        const Padded<T> next(require_shape<T>(dv, reverse ? "dc" : "ddx", shape));
        const auto& table = reverse ? second_kernels<T>().vjp_jvp : second_kernels<T>().jvp_jvp;
        table[static_cast<int>(op)](given.view(), moved.view(), next.view(), kept.view(), out.target(),
                                    static_cast<T>(param));
        return out.numpy();
    });
}

py::object dropout(const py::object& x, double p, std::uint64_t seed, Index layer, std::uint64_t step) {
    return with_real_type(x, [&](auto zero) -> py::object {
        using T = decltype(zero);
        const Padded<T> in(require<T>(x, "x", 2)), out(in.rows, in.cols);
        kernels<T>().dropout(in.rows, in.cols, in.data(), in.stride, out.data(), out.stride, p,
                             dropout_key(seed, layer), step, 0);
        return out.numpy();
    });
}

py::object loss_kernel(const std::string& name, const py::object& f, const py::object& y, const py::object& weight,
                       double param, const std::string& reduction) {
    const LossSpec spec = make_loss(name, param, reduction, py::none());
    return with_real_type(f, [&](auto zero) -> py::object {
        using T = decltype(zero);
        // A network that is the identity: its loss on the data f is the kernel's.
        const NumpyArray<T> x = require<T>(f, "f", 2);
        const Index rows = x.shape(0);
        Layer<T> identity{Layer<T>::Kind::op, x.shape(1), x.shape(1)};
        Network<T> net({identity});
        Dataset<T> data{rows, x.data(), nullptr, nullptr, 0, nullptr};
        if (py::isinstance<py::array_t<std::int64_t>>(y)) {
            data.labels = require_shape<std::int64_t>(y, "y", {rows}).data();
        } else {
            const NumpyArray<T> values = require<T>(y, "y", 2);
            data.y = values.data();
            data.target_cols = values.shape(1);
        }
        if (!weight.is_none()) data.weight = require_shape<T>(weight, "weight", {rows}).data();
        Step<T> step(net, spec.build<T>(), std::max<Index>(rows, 1), data.target_cols);
        const double value = step.sweep(data, nullptr, rows, Noise{});
        const MatrixView<T> df = step.output_cotangent();
        return py::make_tuple(value, copy_of(MatrixView<const T>{df.data, rows, df.cols, df.stride}));
    });
}

py::object loss_hvp(const std::string& name, const py::object& f, const py::object& y, const py::object& t,
                    const py::object& weight, double param, const std::string& reduction) {
    const LossSpec spec = make_loss(name, param, reduction, py::none());
    return with_real_type(f, [&](auto zero) -> py::object {
        using T = decltype(zero);
        const Padded<T> at(require<T>(f, "f", 2)), out(at.rows, at.cols);
        const Padded<T> along(require_shape<T>(t, "t", {at.rows, at.cols}));
        const bool labelled = py::isinstance<py::array_t<std::int64_t>>(y);
        const Padded<T> values = labelled ? Padded<T>(at.rows, 0) : Padded<T>(require<T>(y, "y", 2));
        const auto labels = labelled ? require_shape<std::int64_t>(y, "y", {at.rows}) : NumpyArray<std::int64_t>(0);
        const auto w = weight.is_none() ? NumpyArray<T>(0) : require_shape<T>(weight, "weight", {at.rows});
        double total = static_cast<double>(at.rows);
        if (!weight.is_none()) total = std::accumulate(w.data(), w.data() + at.rows, 0.0);
        const Targets<T> targets = {labelled ? labels.data() : nullptr, values.data(), values.stride};
        second_kernels<T>().loss_hvp[static_cast<int>(spec.op)](
            at.view(), targets, weight.is_none() ? nullptr : w.data(), static_cast<T>(spec.mean ? 1 / total : 1.0),
            along.view(), out.target(), static_cast<T>(param));
        return out.numpy();
    });
}

// "nn": a b + bias, as the forward pass of a linear layer with weights bᵀ. "tn": aᵀ b, as its weight gradient.
py::object gemm(const std::string& form, const py::object& a, const py::object& b, const py::object& bias) {
    if (form != "nn" && form != "tn")
        throw py::value_error("[gemm] unknown form: expected 'nn' or 'tn', got '" + form + "'");
    if (form == "tn" && !bias.is_none()) throw py::value_error("[gemm] form 'tn' has no bias: expected None, got one");
    return with_real_type(a, [&](auto zero) -> py::object {
        using T = decltype(zero);
        const NumpyArray<T> left = require<T>(a, "a", 2), right = require<T>(b, "b", 2);
        const Index depth = right.shape(0), cols = right.shape(1), rows = left.shape(form == "nn" ? 0 : 1);
        if (left.shape(form == "nn" ? 1 : 0) != depth)
            throw py::value_error("[gemm] inner dimensions must match, got " + shape_text(left) + " and " +
                                  shape_text(right));
        const Padded<T> c(rows, cols);
        if (form == "tn") {
            const Padded<T> x(left), dz(right);
            for (Index column = 0; column < cols; column += kPanel<T>) {
                const Index width = round_up(std::min(cols - column, kPanel<T>), kLine<T>);
                const Array<T> tile(rows * width), packed(kDepth * width);
                kernels<T>().linear_vjp_weight(depth, rows, width, x.data(), x.stride, dz.data() + column, dz.stride,
                                               packed.data(), tile.data(), false);
                copy_rows(rows, std::min(cols - column, width), tile.data(), width, c.data() + column, c.stride);
            }
            return c.numpy();
        }
        Layer<T> linear{Layer<T>::Kind::linear, depth, cols};
        linear.bias = !bias.is_none();
        Network<T> net({linear});
        std::vector<T> transposed(static_cast<std::size_t>(depth * cols));
        for (Index k = 0; k < depth; ++k)
            for (Index j = 0; j < cols; ++j)
                transposed[static_cast<std::size_t>(j * depth + k)] = right.data()[k * cols + j];
        net.write(net.parameters()[0], transposed.data());
        if (linear.bias) net.write(net.parameters()[1], require_shape<T>(bias, "bias", {cols}).data());
        NumpyArray<T> result({rows, cols});
        net.predict(rows, left.data(), result.mutable_data());
        return result;
    });
}

template <class F>
py::object random_numbers(Index n, F next) {
    NumpyArray<double> numbers(n);
    for (Index i = 0; i < n; ++i) numbers.mutable_data()[i] = next(i);
    return std::move(numbers);
}

// ---- networks -------------------------------------------------------------------------------------------------------

[[noreturn]] void refuse_second_training() {
    throw std::runtime_error(
        "[fit] a network trains in one place at a time: expected an idle network, got one that is being trained");
}

// One training at a time: a second thread, or a callback, that trains the same network is told so.
template <class T>
class TrainingLock {
   public:
    explicit TrainingLock(PyNetwork<T>& network) : network_(network), held_(!network.training.exchange(true)) {}
    ~TrainingLock() {
        if (held_) network_.training.store(false);
    }
    TrainingLock(const TrainingLock&) = delete;
    TrainingLock& operator=(const TrainingLock&) = delete;
    bool held() const { return held_; }
    void demand() const {
        if (!held_) refuse_second_training();
    }

   private:
    PyNetwork<T>& network_;
    const bool held_;
};

using LayerRow = std::tuple<std::string, Index, Index, double, bool, py::object>;

template <class T>
Layer<T> make_layer(const LayerRow& row) {
    const auto& [name, inputs, outputs, param, bias, external] = row;
    using Kind = typename Layer<T>::Kind;
    if (inputs < 1 || outputs < 1)
        throw py::value_error("[Network] widths are positive: expected ≥ 1, got " + std::to_string(inputs) + " and " +
                              std::to_string(outputs));
    Layer<T> layer{Kind::op, inputs, outputs};
    layer.param = param;
    if (name == "linear") {
        layer.kind = Kind::linear;
        layer.bias = bias;
    } else if (name == "dropout") {
        layer.kind = Kind::dropout;
    } else if (name == "external") {
        layer.kind = Kind::external;
        layer.external = std::make_shared<PythonLayer<T>>(external);
    } else {
        layer.op = lookup<Op>(op_names, name, "layer");
    }
    return layer;
}

template <class T>
std::unique_ptr<PyNetwork<T>> make_network(const std::vector<LayerRow>& rows, bool bfloat16) {
    std::vector<Layer<T>> layers;
    for (const LayerRow& row : rows) {
        layers.push_back(make_layer<T>(row));
        layers.back().bfloat16 = bfloat16 && layers.back().kind == Layer<T>::Kind::linear;
        if (layers.size() > 1 && layers[layers.size() - 2].outputs != layers.back().inputs)
            throw py::value_error("[Network] layer " + std::to_string(layers.size() - 1) + " does not fit: expected " +
                                  std::to_string(layers[layers.size() - 2].outputs) + " inputs, got " +
                                  std::to_string(layers.back().inputs));
    }
    return std::make_unique<PyNetwork<T>>(std::move(layers));
}

template <class T>
const Parameter& parameter_at(const Network<T>& net, Index k) {
    if (k < 0 || k >= static_cast<Index>(net.parameters().size()))
        throw py::index_error("[_core] no such parameter: " + std::to_string(k));
    return net.parameters()[static_cast<std::size_t>(k)];
}

template <class T>
NumpyArray<T> predict(const PyNetwork<T>& self, const py::object& X) {
    const NumpyArray<T> x = require<T>(X, "X", 2);
    require_shape<T>(X, "X", {x.shape(0), self.net.inputs()});
    NumpyArray<T> f({x.shape(0), self.net.outputs()});
    const T* from = x.data();
    T* to = f.mutable_data();
    const Index rows = x.shape(0);
    const Unlocked unlocked;
    self.net.predict(rows, from, to);
    return f;
}

// The same for rows that fit as they are: a matrix, or a single one.
template <class T>
py::object predict_as_is(const PyNetwork<T>& self, const py::object& X) {
    const Network<T>& net = self.net;
    if (!fits<T>(X)) return py::none();
    const auto x = py::reinterpret_borrow<NumpyArray<T>>(X);
    const bool single = x.ndim() == 1;
    if ((!single && x.ndim() != 2) || x.size() == 0 || x.shape(x.ndim() - 1) != net.inputs()) return py::none();
    const Index rows = single ? 1 : x.shape(0);
    NumpyArray<T> f = single ? new_array<T>({net.outputs()}) : new_array<T>({rows, net.outputs()});
    const T* from = x.data();
    T* to = f.mutable_data();
    const Unlocked unlocked(net.multiplies_per_row() * static_cast<double>(rows));
    net.predict(rows, from, to);
    return std::move(f);
}

// The output of every layer, each by a network of its own buffers: nothing works in place here.
template <class T>
py::list trace(const PyNetwork<T>& self, const py::object& X) {
    const Network<T>& net = self.net;
    const NumpyArray<T> x = require<T>(X, "X", 2);
    require_shape<T>(X, "X", {x.shape(0), net.inputs()});
    py::list outputs;
    Padded<T> in(x);
    for (Index l = 0; l < net.depth(); ++l) {
        Padded<T> out(in.rows, net.layers()[static_cast<std::size_t>(l)].outputs);
        const Array<Pair> pairs(net.layers()[static_cast<std::size_t>(l)].bfloat16 ? in.rows * (kDepth / 2) : 0);
        net.forward_layer(l, {in.data(), in.rows, in.cols, in.stride}, {out.data(), out.rows, out.cols, out.stride},
                          pairs.data());
        outputs.append(out.numpy());
        in = std::move(out);
    }
    return outputs;
}

template <class T>
py::tuple value_and_grad(PyNetwork<T>& self, const py::object& X, const py::object& y, const py::object& weight,
                         const LossSpec& spec, const py::object& dy, double dy_weight) {
    Data<T> data(self.net, X, y, weight);
    const Loss<T> loss = spec.build<T>();
    data.suits(self.net, loss);
    data.add_slopes(self.net, dy, dy_weight);
    Step<T> step(self.net, loss, std::max<Index>(data.view.rows, 1), data.view.target_cols,
                 {data.view.dy != nullptr, 0});
    double value;
    const T* gradient;
    {
        const Unlocked unlocked;
        value = step.sweep(data.view, nullptr, data.view.rows, Noise{});
        gradient = step.gradient();
    }
    return py::make_tuple(value, unpack(self.net, gradient));
}

template <class T>
double evaluate_loss(PyNetwork<T>& self, const py::object& X, const py::object& y, const py::object& weight,
                     const LossSpec& spec) {
    const Data<T> data(self.net, X, y, weight);
    const Loss<T> loss = spec.build<T>();
    data.suits(self.net, loss);
    const Unlocked unlocked;
    return evaluate(self.net, loss, data.view);
}

template <class T>
struct PyOptimizer {
    PyOptimizer(const PyNetwork<T>& network, const std::string& name, const std::vector<double>& values)
        : optimizer(network.net, settings(name, values)) {}
    static OptimizerSettings settings(const std::string& name, const std::vector<double>& values) {
        OptimizerSettings settings = {lookup<OptimizerOp>(optimizer_names, name, "optimizer"), {}};
        const std::size_t count = settings.rule == OptimizerOp::rmsprop ? 5 : 4;
        if (values.size() != count)
            throw py::value_error("[_core] " + name + " has " + std::to_string(count) + " hyper-parameters, got " +
                                  std::to_string(values.size()));
        std::copy(values.begin(), values.end(), settings.values);
        return settings;
    }
    py::list get_state() const {
        py::list slots;
        for (const Array<T>& slot : optimizer.slots) {
            NumpyArray<T> array(slot.size());
            std::copy_n(slot.data(), slot.size(), array.mutable_data());
            slots.append(array);
        }
        return slots;
    }
    void set_state(const py::list& slots) {
        if (slots.size() != kSlots)
            throw py::value_error("[_core] optimizer state has " + std::to_string(kSlots) + " slots, got " +
                                  std::to_string(slots.size()));
        std::vector<NumpyArray<T>> arrays;
        for (std::size_t s = 0; s < kSlots; ++s)
            arrays.push_back(require_shape<T>(slots[s], "slot", {optimizer.slots[s].size()}));
        for (std::size_t s = 0; s < kSlots; ++s)
            std::copy_n(arrays[s].data(), arrays[s].size(), optimizer.slots[s].data());
    }
    Optimizer<T> optimizer;
};

template <class T>
class PyTrainer {
   public:
    PyTrainer(PyNetwork<T>& network, PyOptimizer<T>& optimizer, const LossSpec& loss, const py::object& X,
              const py::object& y, const py::object& weight, const py::object& dy, double dy_weight,
              const TrainerOptions& options)
        : network_(network),
          data_(network.net, X, y, weight),
          loss_(loss.build<T>()),
          trainer_(make(network, optimizer, dy, dy_weight, options)) {}

    NumpyArray<double> run(Index first_epoch, const py::object& lr) {
        const auto rates = require<double>(lr, "lr", py::cast<py::array>(lr).ndim() == 2 ? 2 : 1);
        const Index epochs = rates.shape(0), stride = rates.ndim() == 2 ? rates.shape(1) : 1;
        if (rates.ndim() == 2 && stride != trainer_.steps_per_epoch())
            throw py::value_error("[_core] lr needs one rate per step: expected " +
                                  std::to_string(trainer_.steps_per_epoch()) + " columns, got " +
                                  std::to_string(stride));
        const TrainingLock<T> lock(network_);
        lock.demand();
        std::vector<double> losses;
        {
            const Published published(network_);
            const Unlocked unlocked;
            losses = trainer_.run(first_epoch, epochs, rates.data(), stride, [] {
                const Locked locked;
                if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            });
        }
        NumpyArray<double> result(static_cast<Index>(losses.size()));
        std::copy(losses.begin(), losses.end(), result.mutable_data());
        return result;
    }

    double step(const py::object& X, const py::object& y, const py::object& weight, double lr) {
        const Data<T> batch(network_.net, X, y, weight);
        batch.suits(network_.net, loss_);
        const TrainingLock<T> lock(network_);
        lock.demand();
        const Published published(network_);
        const Unlocked unlocked;
        return trainer_.step(batch.view, lr);
    }

    // The same for a batch that fits as it is, without weights, users' layers and losses.
    py::object step_as_is(const py::object& X, const py::object& y, double lr) {
        const Network<T>& net = network_.net;
        if (net.has_external() || loss_.external || !fits<T>(X)) return py::none();
        const auto x = py::reinterpret_borrow<NumpyArray<T>>(X);
        if (x.ndim() != 2 || x.shape(0) < 1 || x.shape(1) != net.inputs()) return py::none();
        if (!all_finite(x.data(), x.size())) return py::none();
        const TrainingLock<T> lock(network_);
        if (!lock.held()) return py::none();
        Dataset<T> batch = {x.shape(0), x.data(), nullptr, nullptr, data_.view.target_cols, nullptr};
        const bool fit = data_.view.labels ? labels_as_they_are(y, net.outputs(), labels_, batch)
                                           : values_as_they_are(y, loss_.op != LossOp::cross_entropy, domain, batch);
        if (!fit) return py::none();
        double loss;
        {
            const Unlocked unlocked(3 * net.multiplies_per_row() * static_cast<double>(batch.rows));
            loss = trainer_.step(batch, lr);
        }
        return py::float_(loss);
    }

    std::pair<double, double> domain{1, 0};  // where step_as_is takes targets: nowhere, until Python says so

   private:
    // Shows users' layers their parameters when training ends, however it ends.
    struct Published {
        explicit Published(PyNetwork<T>& n) : network(n) {}
        ~Published() { network.net.publish(); }
        PyNetwork<T>& network;
    };
    Trainer<T> make(PyNetwork<T>& network, PyOptimizer<T>& optimizer, const py::object& dy, double dy_weight,
                    const TrainerOptions& options) {
        data_.suits(network.net, loss_);
        data_.add_slopes(network.net, dy, dy_weight);
        if (data_.view.rows < 1) throw py::value_error("[fit] no data: expected at least 1 row, got 0");
        if (options.batch_size < 1)
            throw py::value_error("[fit] batch_size is positive: expected ≥ 1, got " +
                                  std::to_string(options.batch_size));
        return Trainer<T>(network.net, optimizer.optimizer, loss_, data_.view, options);
    }
    PyNetwork<T>& network_;
    Data<T> data_;
    Loss<T> loss_;
    Trainer<T> trainer_;
    Array<std::int64_t> labels_;  // of the batch that step_as_is has in hand
};

template <class T>
void bind_network(py::module_& m, const std::string& bits) {
    using Net = PyNetwork<T>;
    // A NumPy array of this size would be faulted in by small pages: 0.13 s for 50 MB, as long as half a step there.
    py::class_<Array<T>>(m, ("Snapshot" + bits).c_str(), "The parameters of a network at one time.",
                         py::buffer_protocol())
        .def_buffer([](const Array<T>& self) { return py::buffer_info(self.data(), self.size(), true); });
    py::class_<Net> network(m, ("Network" + bits).c_str(),
                            "A chain of layers with its parameters; see chainrule.Sequential.");
    bind_calculus<T>(network);
    network.def(py::init(&make_network<T>), py::arg("layers"), py::arg("bfloat16") = false)
        .def_property_readonly("parameters",
                               [](const Net& self) {
                                   py::list rows;
                                   for (const Parameter& p : self.net.parameters())
                                       rows.append(py::make_tuple(p.layer, p.name, py::tuple(py::cast(p.shape))));
                                   return rows;
                               })
        .def(
            "get_parameter",
            [](const Net& self, Index k) {
                const Parameter& parameter = parameter_at(self.net, k);
                NumpyArray<T> array(parameter.shape);
                self.net.read(parameter, self.net.theta(), array.mutable_data());
                return array;
            },
            py::arg("k"))
        .def(
            "set_parameter",
            [](Net& self, Index k, const py::object& value) {
                const Parameter& parameter = parameter_at(self.net, k);
                const NumpyArray<T> array = require_shape<T>(value, "value", parameter.shape);
                self.net.write(parameter, array.data());
                self.net.publish();
            },
            py::arg("k"), py::arg("value"))
        .def("snapshot", [](const Net& self) { return self.net.snapshot(); })
        .def(
            "restore",
            [](Net& self, const Array<T>& snapshot) {
                if (snapshot.size() != self.net.size())
                    throw py::value_error("[restore] snapshot does not fit the network: expected " +
                                          std::to_string(self.net.size()) + " numbers, got " +
                                          std::to_string(snapshot.size()));
                self.net.restore(snapshot);
            },
            py::arg("snapshot"))
        .def("all_finite", [](const Net& self) { return self.net.all_finite(); })
        // The lock for steps that Python takes: it holds from one call to the other.
        .def("begin_training",
             [](Net& self) {
                 if (self.training.exchange(true)) refuse_second_training();
             })
        .def("end_training", [](Net& self) { self.training.store(false); })
        .def("predict", &predict<T>, py::arg("X"))
        .def("predict_as_is", &predict_as_is<T>, py::arg("X"))
        .def("trace", &trace<T>, py::arg("X"))
        .def("value_and_grad", &value_and_grad<T>, py::arg("X"), py::arg("y"), py::arg("weight"), py::arg("loss"),
             py::arg("dy") = py::none(), py::arg("dy_weight") = 0.0)
        .def("evaluate", &evaluate_loss<T>, py::arg("X"), py::arg("y"), py::arg("weight"), py::arg("loss"));
}

template <class T>
void bind_training(py::module_& m, const std::string& bits) {
    using Net = PyNetwork<T>;
    py::class_<PyOptimizer<T>>(m, ("Optimizer" + bits).c_str(),
                               "An update rule with its state for one network; see chainrule.optim.")
        .def(py::init<const Net&, const std::string&, const std::vector<double>&>(), py::arg("net"), py::arg("name"),
             py::arg("hyper"))
        .def_property(
            "step_count", [](const PyOptimizer<T>& self) { return self.optimizer.step_count; },
            [](PyOptimizer<T>& self, std::int64_t count) { self.optimizer.step_count = count; })
        .def("get_state", &PyOptimizer<T>::get_state)
        .def("set_state", &PyOptimizer<T>::set_state, py::arg("slots"));

    using Train = PyTrainer<T>;
    py::class_<Train>(m, ("Trainer" + bits).c_str(), "The epoch loop over one data set; see chainrule.Sequential.fit.")
        .def(py::init([](Net& net, PyOptimizer<T>& optimizer, const LossSpec& loss, const py::object& X,
                         const py::object& y, const py::object& weight, Index batch_size, bool shuffle,
                         std::uint64_t seed, double l1, double l2, double clip_value, double clip_norm,
                         double clip_example_norm, const py::object& dy, double dy_weight) {
                 return std::make_unique<Train>(
                     net, optimizer, loss, X, y, weight, dy, dy_weight,
                     TrainerOptions{batch_size, shuffle, seed, {l1, l2, clip_value, clip_norm}, clip_example_norm});
             }),
             py::arg("net"), py::arg("optimizer"), py::arg("loss"), py::arg("X"), py::arg("y"), py::arg("weight"),
             py::arg("batch_size"), py::arg("shuffle"), py::arg("seed"), py::arg("l1"), py::arg("l2"),
             py::arg("clip_value"), py::arg("clip_norm"), py::arg("clip_example_norm") = 0.0,
             py::arg("dy") = py::none(), py::arg("dy_weight") = 0.0, py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def("run", &Train::run, py::arg("first_epoch"), py::arg("lr"))
        .def("step", &Train::step, py::arg("X"), py::arg("y"), py::arg("weight"), py::arg("lr"))
        .def("step_as_is", &Train::step_as_is, py::arg("X"), py::arg("y"), py::arg("lr"))
        .def_readwrite("domain", &Train::domain);
}

Isa isa_by_name(const std::string& name) {
    for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::neon, Isa::baseline})
        if (name == name_of(isa)) return isa;
    throw py::value_error("[set_isa] unknown instruction set: expected one of avx512, avx2, neon, baseline, got " +
                          name);
}

void bind_machine(py::module_& m) {
    m.def("isa", [] { return std::string(name_of(active_isa())); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::neon, Isa::baseline})
            if (built_in(isa) && runs_here(isa)) names.emplace_back(name_of(isa));
        return names;
    });
    m.def(
        "set_isa",
        [](const std::string& name) {
            if (!select_isa(isa_by_name(name))) throw py::value_error("[set_isa] not available here: " + name);
        },
        py::arg("name"));
    m.def("num_threads", &thread_count);
    m.def(
        "set_num_threads",
        [](int n) {
            if (n < 1)
                throw py::value_error("[set_num_threads] threads are counted from 1: expected ≥ 1, got " +
                                      std::to_string(n));
            const Unlocked unlocked;
            set_thread_count(n);
        },
        py::arg("n"));
    m.def("ops", &ops);
}

void bind_kernels(py::module_& m) {
    m.def("op_forward", &op_forward, py::arg("name"), py::arg("x"), py::arg("param"));
    m.def(
        "op_vjp",
        [](const std::string& name, const py::object& dy, const py::object& saved, double param) {
            return op_derivative(true, name, dy, saved, param);
        },
        py::arg("name"), py::arg("dy"), py::arg("saved"), py::arg("param"));
    m.def(
        "op_jvp",
        [](const std::string& name, const py::object& dx, const py::object& saved, double param) {
            return op_derivative(false, name, dx, saved, param);
        },
        py::arg("name"), py::arg("dx"), py::arg("saved"), py::arg("param"));
    m.def(
        "op_vjp_jvp",
        [](const std::string& name, const py::object& c, const py::object& dx, const py::object& dc,
           const py::object& saved, double param) { return op_second(true, name, c, dx, dc, saved, param); },
        py::arg("name"), py::arg("c"), py::arg("dx"), py::arg("dc"), py::arg("saved"), py::arg("param"));
    m.def(
        "op_jvp_jvp",
        [](const std::string& name, const py::object& dx, const py::object& ddx, const py::object& saved,
           double param) { return op_second(false, name, dx, dx, ddx, saved, param); },
        py::arg("name"), py::arg("dx"), py::arg("ddx"), py::arg("saved"), py::arg("param"));
    m.def("loss_hvp", &loss_hvp, py::arg("name"), py::arg("f"), py::arg("y"), py::arg("t"), py::arg("weight"),
          py::arg("param"), py::arg("reduction"));
    m.def("dropout", &dropout, py::arg("x"), py::arg("p"), py::arg("seed"), py::arg("layer"), py::arg("step"));
    m.def("loss", &loss_kernel, py::arg("name"), py::arg("f"), py::arg("y"), py::arg("weight"), py::arg("param"),
          py::arg("reduction"));
    m.def("gemm", &gemm, py::arg("form"), py::arg("a"), py::arg("b"), py::arg("bias"));
    m.def(
        "random_uniform",
        [](Index n, std::uint64_t seed, std::uint64_t stream) {
            return random_numbers(n, [&](Index i) { return uniform(seed, stream, i); });
        },
        py::arg("n"), py::arg("seed"), py::arg("stream"));
    m.def(
        "random_normal",
        [](Index n, std::uint64_t seed, std::uint64_t stream) {
            return random_numbers(n, [&](Index i) { return normal(seed, stream, i); });
        },
        py::arg("n"), py::arg("seed"), py::arg("stream"));
    m.def(
        "permutation",
        [](Index n, std::uint64_t seed, std::uint64_t epoch) {
            NumpyArray<std::int64_t> order(n);
            permute(n, seed, epoch, order.mutable_data());
            return order;
        },
        py::arg("n"), py::arg("seed"), py::arg("epoch"));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "The compiled engine of chainrule. Its names are an implementation detail; use the package's.";
    m.attr("__version__") = CHAINRULE_VERSION;

    bind_machine(m);
    bind_kernels(m);
    py::class_<LossSpec>(m, "Loss",
                         "A loss by name with its parameter and reduction, or a user's function; see chainrule.losses.")
        .def(py::init(&make_loss), py::arg("name"), py::arg("param"), py::arg("reduction"), py::arg("function"));
    bind_network<float>(m, "32");
    bind_network<double>(m, "64");
    bind_training<float>(m, "32");
    bind_training<double>(m, "64");
}
