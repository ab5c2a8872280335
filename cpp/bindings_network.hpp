// SPDX-License-Identifier: MIT
// L4, a part of bindings.cpp and bindings_cuda.cpp: networks, optimizers and trainers of either engine.
#pragma once

#include "bindings_parts.hpp"

namespace chainrule {

// ---- networks -------------------------------------------------------------------------------------------------------

[[noreturn]] inline void refuse_second_training() {
    throw std::runtime_error(
        "[fit] a network trains in one place at a time: expected an idle network, got one that is being trained");
}

// One training at a time: a second thread, or a callback, that trains the same network is told so.
template <class E>
class TrainingLock {
   public:
    explicit TrainingLock(PyNetwork<E>& network) : network_(network), held_(take(network, Trained::by_engine)) {}
    ~TrainingLock() {
        if (held_) network_.trained.store(Trained::no);
    }
    static bool take(PyNetwork<E>& network, Trained by) {
        Trained idle = Trained::no;
        return network.trained.compare_exchange_strong(idle, by);
    }
    TrainingLock(const TrainingLock&) = delete;
    TrainingLock& operator=(const TrainingLock&) = delete;
    bool held() const { return held_; }
    void demand() const {
        if (!held_) refuse_second_training();
    }

   private:
    PyNetwork<E>& network_;
    const bool held_;
};

// Nobody writes weights beside the engine: a copy that it keeps of them would be of others. Steps that Python takes do.
template <class E>
void refuse_while_training(const PyNetwork<E>& network) {
    if (network.trained.load() == Trained::by_engine)
        throw std::runtime_error(
            "[load_state_dict] weights are written between steps: expected an idle network, got one that is being "
            "trained");
}

using LayerRow = std::tuple<std::string, Index, Index, double, bool, py::object>;

template <class T>
Layer<T> make_layer(const LayerRow& row) {
    const auto& [name, inputs, outputs, param, bias, external] = row;
    using Kind = typename Layer<T>::Kind;
    if (inputs < 1 || outputs < 1)
        throw py::value_error(text("[Network] widths are positive: expected ≥ 1, got %td and %td", inputs, outputs));
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
std::vector<Layer<T>> make_layers(const std::vector<LayerRow>& rows) {
    std::vector<Layer<T>> layers;
    for (const LayerRow& row : rows) {
        layers.push_back(make_layer<T>(row));
        if (layers.size() > 1 && layers[layers.size() - 2].outputs != layers.back().inputs)
            throw py::value_error(text("[Network] layer %zu does not fit: expected %td inputs, got %td",
                                       layers.size() - 1, layers[layers.size() - 2].outputs, layers.back().inputs));
    }
    return layers;
}

template <class Net>
const Parameter& parameter_at(const Net& net, Index k) {
    if (k < 0 || k >= static_cast<Index>(net.parameters().size()))
        throw py::index_error("[_core] no such parameter: " + std::to_string(k));
    return net.parameters()[static_cast<std::size_t>(k)];
}

template <class E>
NumpyArray<typename E::Real> predict(const PyNetwork<E>& self, const py::object& X) {
    using T = typename E::Real;
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
template <class E>
py::object predict_as_is(const PyNetwork<E>& self, const py::object& X) {
    using T = typename E::Real;
    const auto& net = self.net;
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

// The output of every layer.
template <class E>
py::list trace(const PyNetwork<E>& self, const py::object& X) {
    using T = typename E::Real;
    const NumpyArray<T> x = require<T>(X, "X", 2);
    require_shape<T>(X, "X", {x.shape(0), self.net.inputs()});
    py::list outputs;
    std::vector<T*> phi;
    for (const Layer<T>& layer : self.net.layers()) {
        NumpyArray<T> array({x.shape(0), layer.outputs});
        phi.push_back(array.mutable_data());
        outputs.append(std::move(array));
    }
    self.net.trace(x.shape(0), x.data(), phi.data());
    return outputs;
}

template <class E>
py::tuple value_and_grad(PyNetwork<E>& self, const py::object& X, const py::object& y, const py::object& weight,
                         const LossSpec& spec, const py::object& dy, double dy_weight) {
    using T = typename E::Real;
    typename E::Data data(self.net, X, y, weight);
    const Loss<T> loss = spec.build<T>();
    data.suits(self.net, loss);
    data.add_slopes(self.net, dy, dy_weight);
    typename E::Step step(self.net, loss, std::max<Index>(data.view.rows, 1), data.view.target_cols,
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

template <class E>
double evaluate_loss(PyNetwork<E>& self, const py::object& X, const py::object& y, const py::object& weight,
                     const LossSpec& spec) {
    using T = typename E::Real;
    const typename E::Data data(self.net, X, y, weight);
    const Loss<T> loss = spec.build<T>();
    data.suits(self.net, loss);
    const Unlocked unlocked;
    return evaluate(self.net, loss, data.view);
}

// All of them or none.
template <class E>
void set_parameters(PyNetwork<E>& self, const py::dict& values) {
    using T = typename E::Real;
    std::vector<std::pair<const Parameter*, NumpyArray<T>>> ready;
    for (const auto& [k, value] : values) {
        const Parameter& parameter = parameter_at(self.net, py::cast<Index>(k));
        ready.emplace_back(&parameter, require_shape<T>(value, "value", parameter.shape));
    }
    refuse_while_training(self);
    for (const auto& [parameter, array] : ready) self.net.write(*parameter, array.data());
    self.net.publish();
}

template <class E>
struct PyOptimizer {
    using T = typename E::Real;
    PyOptimizer(const PyNetwork<E>& network, const std::string& name, const std::vector<double>& values)
        : optimizer(network.net, settings(name, values)) {}
    static OptimizerSettings settings(const std::string& name, const std::vector<double>& values) {
        OptimizerSettings settings = {lookup<OptimizerOp>(optimizer_names, name, "optimizer"), {}};
        const std::size_t count = settings.rule == OptimizerOp::rmsprop ? 5 : 4;
        if (values.size() != count)
            throw py::value_error(
                text("[_core] %s has %zu hyper-parameters, got %zu", name.c_str(), count, values.size()));
        std::copy(values.begin(), values.end(), settings.values);
        return settings;
    }
    py::list get_state() const {
        py::list slots;
        for (int s = 0; s < kSlots; ++s) {
            const auto& slot = optimizer.slot(s);
            NumpyArray<T> array(slot.size());
            std::copy_n(slot.data(), slot.size(), array.mutable_data());
            slots.append(array);
        }
        return slots;
    }
    void set_state(const py::list& slots) {
        if (slots.size() != kSlots)
            throw py::value_error(text("[_core] optimizer state has %d slots, got %zu", kSlots, slots.size()));
        std::vector<NumpyArray<T>> arrays;
        for (int s = 0; s < kSlots; ++s)
            arrays.push_back(require_shape<T>(slots[static_cast<std::size_t>(s)], "slot", {optimizer.slot_size(s)}));
        for (int s = 0; s < kSlots; ++s) optimizer.set_slot(s, arrays[static_cast<std::size_t>(s)].data());
    }
    typename E::Optimizer optimizer;
};

template <class E>
class PyTrainer {
   public:
    using T = typename E::Real;
    PyTrainer(PyNetwork<E>& network, PyOptimizer<E>& optimizer, const LossSpec& loss, const py::object& X,
              const py::object& y, const py::object& weight, const py::object& dy, double dy_weight,
              const TrainerOptions& options)
        : network_(network),
          data_(network.net, X, y, weight),
          loss_(loss.build<T>()),
          trainer_(make(network, optimizer, dy, dy_weight, options)) {}

    // Rates (epochs) or (epochs, steps), from dimension `first` of lr on.
    std::pair<Index, Index> rates_of(const py::array& lr, int first) const {
        const Index epochs = lr.shape(first), stride = lr.ndim() == first + 2 ? lr.shape(first + 1) : 1;
        if (lr.ndim() == first + 2 && stride != trainer_.steps_per_epoch())
            throw py::value_error(text("[_core] lr needs one rate per step: expected %td columns, got %td",
                                       trainer_.steps_per_epoch(), stride));
        return {epochs, stride};
    }

    NumpyArray<double> run(Index first_epoch, const py::object& lr) {
        const auto rates = require<double>(lr, "lr", py::cast<py::array>(lr).ndim() == 2 ? 2 : 1);
        const auto [epochs, stride] = rates_of(rates, 0);
        const TrainingLock<E> lock(network_);
        lock.demand();
        std::vector<double> losses;
        {
            const Published published(network_);
            const Unlocked unlocked;
            losses = trainer_.run(first_epoch, epochs, rates.data(), stride);
        }
        NumpyArray<double> result(static_cast<Index>(losses.size()));
        std::copy(losses.begin(), losses.end(), result.mutable_data());
        return result;
    }

    double step(const py::object& X, const py::object& y, const py::object& weight, double lr) {
        const typename E::Data batch(network_.net, X, y, weight);
        batch.suits(network_.net, loss_);
        const TrainingLock<E> lock(network_);
        lock.demand();
        const Published published(network_);
        const Unlocked unlocked;
        return trainer_.step(batch.view, lr);
    }

    // The same for a batch that fits as it is, without weights, users' layers and losses.
    py::object step_as_is(const py::object& X, const py::object& y, double lr) {
        const auto& net = network_.net;
        if (net.has_external() || loss_.external || !fits<T>(X)) return py::none();
        const auto x = py::reinterpret_borrow<NumpyArray<T>>(X);
        if (x.ndim() != 2 || x.shape(0) < 1 || x.shape(1) != net.inputs()) return py::none();
        if (!all_finite(x.data(), x.size())) return py::none();
        const TrainingLock<E> lock(network_);
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

    typename E::Trainer& trainer() { return trainer_; }
    PyNetwork<E>& network() { return network_; }
    std::pair<double, double> domain{1, 0};  // where step_as_is takes targets: nowhere, until Python says so

   private:
    // Shows users' layers their parameters when training ends, however it ends.
    struct Published {
        explicit Published(PyNetwork<E>& n) : network(n) {}
        ~Published() { network.net.publish(); }
        PyNetwork<E>& network;
    };
    typename E::Trainer make(PyNetwork<E>& network, PyOptimizer<E>& optimizer, const py::object& dy, double dy_weight,
                             const TrainerOptions& options) {
        data_.suits(network.net, loss_);
        data_.add_slopes(network.net, dy, dy_weight);
        if (data_.view.rows < 1) throw py::value_error("[fit] no data: expected at least 1 row, got 0");
        if (options.batch_size < 1)
            throw py::value_error(text("[fit] batch_size is positive: expected ≥ 1, got %td", options.batch_size));
        return typename E::Trainer(network.net, optimizer.optimizer, loss_, data_.view, options);
    }
    PyNetwork<E>& network_;
    typename E::Data data_;
    Loss<T> loss_;
    typename E::Trainer trainer_;
    Array<std::int64_t> labels_;  // of the batch that step_as_is has in hand
};

// Everything but the constructor, in which engines differ.
template <class E>
py::class_<PyNetwork<E>> bind_network(py::module_& m, const std::string& bits) {
    using T = typename E::Real;
    using Net = PyNetwork<E>;
    py::class_<Net> network(m, ("Network" + bits).c_str(),
                            "A chain of layers with its parameters; see chainrule.Sequential.");
    bind_calculus<E>(network);
    network
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
            [](Net& self, const py::int_& k, const py::object& value) {
                py::dict values;
                values[k] = value;
                set_parameters(self, values);
            },
            py::arg("k"), py::arg("value"))
        .def("set_parameters", &set_parameters<E>, py::arg("values"))
        .def("snapshot", [](const Net& self) { return self.net.snapshot(); })
        .def(
            "restore",
            [](Net& self, const typename E::Network::Snapshot& snapshot) {
                if (snapshot.size() != self.net.size())
                    throw py::value_error(
                        text("[restore] snapshot does not fit the network: expected %td numbers, got %td",
                             self.net.size(), snapshot.size()));
                refuse_while_training(self);
                self.net.restore(snapshot);
            },
            py::arg("snapshot"))
        .def("all_finite", [](const Net& self) { return self.net.all_finite(); })
        // The lock for steps that Python takes: it holds from one call to the other.
        .def("begin_training",
             [](Net& self) {
                 if (!TrainingLock<E>::take(self, Trained::by_python)) refuse_second_training();
             })
        .def("end_training", [](Net& self) { self.trained.store(Trained::no); })
        .def("predict", &predict<E>, py::arg("X"))
        .def("predict_as_is", &predict_as_is<E>, py::arg("X"))
        .def("trace", &trace<E>, py::arg("X"))
        .def("value_and_grad", &value_and_grad<E>, py::arg("X"), py::arg("y"), py::arg("weight"), py::arg("loss"),
             py::arg("dy") = py::none(), py::arg("dy_weight") = 0.0)
        .def("evaluate", &evaluate_loss<E>, py::arg("X"), py::arg("y"), py::arg("weight"), py::arg("loss"));
    return network;
}

template <class E>
py::class_<PyTrainer<E>> bind_training(py::module_& m, const std::string& bits) {
    using Net = PyNetwork<E>;
    py::class_<PyOptimizer<E>>(m, ("Optimizer" + bits).c_str(),
                               "An update rule with its state for one network; see chainrule.optim.")
        .def(py::init<const Net&, const std::string&, const std::vector<double>&>(), py::arg("net"), py::arg("name"),
             py::arg("hyper"))
        .def_property(
            "step_count", [](const PyOptimizer<E>& self) { return self.optimizer.step_count; },
            [](PyOptimizer<E>& self, std::int64_t count) { self.optimizer.step_count = count; })
        .def("get_state", &PyOptimizer<E>::get_state)
        .def("set_state", &PyOptimizer<E>::set_state, py::arg("slots"));

    using Train = PyTrainer<E>;
    py::class_<Train> trainer(m, ("Trainer" + bits).c_str(),
                              "The epoch loop over one data set; see chainrule.Sequential.fit.");
    trainer
        .def(py::init([](Net& net, PyOptimizer<E>& optimizer, const LossSpec& loss, const py::object& X,
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
    return trainer;
}

}  // namespace chainrule
