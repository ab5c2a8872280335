// SPDX-License-Identifier: MIT
// L4, a part of bindings_calculus.cpp and bindings_cuda.cpp: derivatives of whole networks; see chainrule.calculus. Each function answers None where an array does not fit as it is:
// Python then converts it, or says what is wrong with it, and asks again.
#pragma once

#include "bindings_parts.hpp"

namespace chainrule {
namespace calculus {

// A matrix that fits as it is, with this many columns; rows < 0: any number but none. Null if it does not.
template <class T>
const T* matrix(const py::object& object, Index& rows, Index cols) {
    if (!fits<T>(object)) return nullptr;
    const auto array = py::reinterpret_borrow<NumpyArray<T>>(object);
    if (array.ndim() != 2 || array.shape(1) != cols) return nullptr;
    if (rows >= 0 && array.shape(0) != rows) return nullptr;
    rows = array.shape(0);
    return array.data();
}

// New arrays for all parameters by name, each with `lead` dimensions before its own, and where their numbers begin.
template <class E>
py::dict parameter_arrays(const PyNetwork<E>& self, std::initializer_list<Index> lead,
                          std::vector<typename E::Real*>& data) {
    using T = typename E::Real;
    py::dict arrays;
    for (std::size_t k = 0; k < self.names.size(); ++k) {
        std::vector<Index> shape(lead);
        const std::vector<Index>& own = self.net.parameters()[k].shape;
        shape.insert(shape.end(), own.begin(), own.end());
        const NumpyArray<T> array = new_array<T>(shape.data(), shape.size());
        data.push_back(const_cast<T*>(array.data()));
        if (PyDict_SetItem(arrays.ptr(), self.names[k].ptr(), array.ptr()) != 0) throw py::error_already_set();
    }
    return arrays;
}

// A dict of arrays by parameter into a direction, with 0 for what is missing; whether all of it fits.
template <class E>
bool take_direction(const PyNetwork<E>& self, const py::object& given, typename E::Direction& direction) {
    using T = typename E::Real;
    if (!PyDict_CheckExact(given.ptr())) return false;
    const Py_ssize_t count = PyDict_GET_SIZE(given.ptr());
    if (count < static_cast<Py_ssize_t>(self.names.size())) direction.clear();
    Py_ssize_t found = 0;
    for (std::size_t k = 0; k < self.names.size(); ++k) {
        const py::handle item = PyDict_GetItemWithError(given.ptr(), self.names[k].ptr());
        if (!item) continue;
        const Parameter& parameter = self.net.parameters()[k];
        if (!fits<T>(item)) return false;
        const auto array = py::reinterpret_borrow<NumpyArray<T>>(item);
        if (!std::equal(array.shape(), array.shape() + array.ndim(), parameter.shape.begin(), parameter.shape.end()))
            return false;
        direction.set(parameter, array.data());
        ++found;
    }
    return found == count;
}

// The examples of a loss, their weights, and the loss itself.
template <class T>
class Examples {
   public:
    template <class Net>
    Examples(const Net& net, const py::object& X, const py::object& y, const py::object& weight, const LossSpec& spec,
             std::pair<double, double> domain)
        : loss(spec.build<T>()) {
        Index rows = -1;
        const T* x = matrix<T>(X, rows, net.inputs());
        if (x == nullptr || rows == 0 || !all_finite(x, rows * net.inputs())) return;
        data = {rows, x, nullptr, nullptr, 0, nullptr};
        fit = take_targets(net, y, domain) && take_weight(weight);
    }
    bool fit = false;
    Dataset<T> data{};
    Loss<T> loss;

   private:
    template <class Net>
    bool take_targets(const Net& net, const py::object& y, std::pair<double, double> domain) {
        const bool labelled = loss.external || loss.op == LossOp::cross_entropy;
        if (labelled && labels_as_they_are(y, net.outputs(), labels_, data)) return true;
        data.labels = nullptr;
        data.target_cols = loss.op == LossOp::gaussian_nll ? net.outputs() / 2 : net.outputs();
        if (loss.external) {
            const auto array = py::array::ensure(y);
            data.target_cols = array && array.ndim() == 2 ? array.shape(1) : 1;
        }
        return values_as_they_are(y, loss.op != LossOp::cross_entropy, domain, data) &&
               (loss.external || loss.op != LossOp::gaussian_nll || net.outputs() % 2 == 0);
    }
    bool take_weight(const py::object& weight) {
        if (weight.is_none()) return true;
        if (!fits<T>(weight)) return false;
        const auto array = py::reinterpret_borrow<NumpyArray<T>>(weight);
        data.weight = array.data();
        return array.ndim() == 1 && array.shape(0) == data.rows;
    }
    Array<std::int64_t> labels_;
};

// ---- functions of X -------------------------------------------------------------------------------------------------

template <class E>
py::object jvp(PyNetwork<E>& self, const py::object& X, const py::object& dX, const py::object& dparams) {
    using T = typename E::Real;
    const auto& net = self.net;
    Index rows = -1;
    const T* x = matrix<T>(X, rows, net.inputs());
    const T* dx = x == nullptr || dX.is_none() ? nullptr : matrix<T>(dX, rows, net.inputs());
    if (x == nullptr || (dx == nullptr && !dX.is_none())) return py::none();
    typename E::DerivativesOf::Lease lease(self.derivatives);
    const bool along_parameters = !dparams.is_none() && !self.names.empty();
    if (!dparams.is_none() && !take_direction(self, dparams, lease->direction())) return py::none();
    const NumpyArray<T> f = new_array<T>({rows, net.outputs()}), df = new_array<T>({rows, net.outputs()});
    T *f_data = const_cast<T*>(f.data()), *df_data = const_cast<T*>(df.data());
    {
        const Unlocked unlocked(2 * net.multiplies_per_row() * static_cast<double>(rows));
        if (dx != nullptr || along_parameters) {
            lease->jvp(rows, x, dx, along_parameters, f_data, df_data);
        } else {  // nothing moves
            net.predict(rows, x, f_data);
            std::fill_n(df_data, rows * net.outputs(), T{0});
        }
    }
    return tuple_of({f, df});
}

template <class E>
py::object sensitivity(PyNetwork<E>& self, const py::object& X, Index input) {
    using T = typename E::Real;
    const auto& net = self.net;
    Index rows = -1;
    const T* x = matrix<T>(X, rows, net.inputs());
    if (x == nullptr) return py::none();
    if (input < 0 || input >= net.inputs()) throw py::index_error("[_core] no such input: " + std::to_string(input));
    typename E::DerivativesOf::Lease lease(self.derivatives);
    const NumpyArray<T> f = new_array<T>({rows, net.outputs()}), df = new_array<T>({rows, net.outputs()});
    T *f_data = const_cast<T*>(f.data()), *df_data = const_cast<T*>(df.data());
    {
        const Unlocked unlocked(2 * net.multiplies_per_row() * static_cast<double>(rows));
        lease->sensitivity(rows, x, input, f_data, df_data);
    }
    return tuple_of({f, df});
}

template <class E>
py::object vjp(PyNetwork<E>& self, const py::object& X, const py::object& c, bool parameters) {
    using T = typename E::Real;
    const auto& net = self.net;
    Index rows = -1;
    const T *x = matrix<T>(X, rows, net.inputs()), *cotangent = matrix<T>(c, rows, net.outputs());
    if (x == nullptr || cotangent == nullptr) return py::none();
    typename E::DerivativesOf::Lease lease(self.derivatives);
    const NumpyArray<T> f = new_array<T>({rows, net.outputs()}), dx = new_array<T>({rows, net.inputs()});
    std::vector<T*> dphi(static_cast<std::size_t>(net.depth() + 1));
    dphi[0] = const_cast<T*>(dx.data());
    T* f_data = const_cast<T*>(f.data());
    std::vector<T*> gradient;
    const py::object arrays = parameters ? py::object(parameter_arrays(self, {}, gradient)) : py::none();
    {
        const Unlocked unlocked(2 * net.multiplies_per_row() * static_cast<double>(rows));
        lease->vjp(rows, x, cotangent, f_data, dphi.data(), parameters ? gradient.data() : nullptr);
    }
    return parameters ? tuple_of({f, dx, arrays}) : tuple_of({f, dx});
}

// For a trace: the cotangents of all φ, and the gradient by name.
template <class E>
py::object backward(PyNetwork<E>& self, const py::object& X, const py::object& c) {
    using T = typename E::Real;
    const auto& net = self.net;
    Index rows = -1;
    const T *x = matrix<T>(X, rows, net.inputs()), *cotangent = matrix<T>(c, rows, net.outputs());
    if (x == nullptr || cotangent == nullptr) return py::none();
    typename E::DerivativesOf::Lease lease(self.derivatives);
    py::list arrays;
    std::vector<T*> dphi;
    for (Index l = 0; l <= net.depth(); ++l) {
        const Index cols = l == 0 ? net.inputs() : net.layers()[static_cast<std::size_t>(l - 1)].outputs;
        const NumpyArray<T> array = new_array<T>({rows, cols});
        dphi.push_back(const_cast<T*>(array.data()));
        arrays.append(array);
    }
    std::vector<T*> gradient;
    const py::dict named = parameter_arrays(self, {}, gradient);
    {
        const Unlocked unlocked(3 * net.multiplies_per_row() * static_cast<double>(rows));
        lease->vjp(rows, x, cotangent, nullptr, dphi.data(), gradient.data());
    }
    return tuple_of({arrays, named});
}

template <class E>
py::object jacobian(PyNetwork<E>& self, const py::object& X, bool reverse) {
    using T = typename E::Real;
    const auto& net = self.net;
    Index rows = -1;
    const T* x = matrix<T>(X, rows, net.inputs());
    if (x == nullptr) return py::none();
    typename E::DerivativesOf::Lease lease(self.derivatives);
    const NumpyArray<T> j = new_array<T>({rows, net.outputs(), net.inputs()});
    T* data = const_cast<T*>(j.data());
    const Index seeds = reverse ? net.outputs() : net.inputs();
    const Unlocked unlocked(net.multiplies_per_row() * static_cast<double>(rows * seeds));
    lease->jacobian(rows, x, reverse, data);
    return j;
}

template <class E>
py::object parameter_jacobian(PyNetwork<E>& self, const py::object& X) {
    using T = typename E::Real;
    const auto& net = self.net;
    Index rows = -1;
    const T* x = matrix<T>(X, rows, net.inputs());
    if (x == nullptr) return py::none();
    typename E::DerivativesOf::Lease lease(self.derivatives);
    std::vector<T*> data;
    const py::dict arrays = parameter_arrays(self, {rows, net.outputs()}, data);
    const Unlocked unlocked(2 * net.multiplies_per_row() * static_cast<double>(rows * net.outputs()));
    lease->parameter_jacobian(rows, x, data.data());
    return arrays;
}

template <class E>
py::object second(PyNetwork<E>& self, const py::object& X, bool sum) {
    using T = typename E::Real;
    const auto& net = self.net;
    Index rows = -1;
    const T* x = matrix<T>(X, rows, net.inputs());
    if (x == nullptr) return py::none();
    typename E::DerivativesOf::Lease lease(self.derivatives);
    const NumpyArray<T> to =
        sum ? new_array<T>({rows, net.outputs()}) : new_array<T>({rows, net.outputs(), net.inputs()});
    T* data = const_cast<T*>(to.data());
    const Unlocked unlocked(2 * net.multiplies_per_row() * static_cast<double>(rows * net.inputs()));
    lease->second(rows, x, sum, data);
    return to;
}

// ---- functions of a loss --------------------------------------------------------------------------------------------

// f(derivatives, examples, multiplications of one forward pass), if the examples fit.
template <class E, class F>
py::object of_loss(PyNetwork<E>& self, const py::object& X, const py::object& y, const py::object& weight,
                   const LossSpec& spec, std::pair<double, double> domain, F f) {
    using T = typename E::Real;
    const Examples<T> examples(self.net, X, y, weight, spec, domain);
    if (!examples.fit) return py::none();
    typename E::DerivativesOf::Lease lease(self.derivatives);
    return f(lease, examples, self.net.multiplies_per_row() * static_cast<double>(examples.data.rows));
}

template <class E>
py::object value_and_grad_as_is(PyNetwork<E>& self, const py::object& X, const py::object& y, const LossSpec& spec,
                                std::pair<double, double> domain) {
    using T = typename E::Real;
    return of_loss(self, X, y, py::none(), spec, domain,
                   [&](auto& lease, const auto& examples, double work) -> py::object {
                       std::vector<T*> data;
                       const py::dict arrays = parameter_arrays(self, {}, data);
                       double value;
                       {
                           const Unlocked unlocked(3 * work);
                           value = lease->gradient(examples.data, examples.loss, data.data());
                       }
                       return tuple_of({py::float_(value), arrays});
                   });
}

template <class E>
py::object input_gradient(PyNetwork<E>& self, const py::object& X, const py::object& y, const py::object& weight,
                          const LossSpec& spec, std::pair<double, double> domain) {
    using T = typename E::Real;
    return of_loss(self, X, y, weight, spec, domain, [&](auto& lease, const auto& examples, double work) -> py::object {
        const NumpyArray<T> dx = new_array<T>({examples.data.rows, self.net.inputs()});
        T* data = const_cast<T*>(dx.data());
        const Unlocked unlocked(2 * work);
        lease->input_gradient(examples.data, examples.loss, data);
        return dx;
    });
}

// H v, or Jᵀ H_L J v.
template <class E>
py::object hvp(PyNetwork<E>& self, const py::object& X, const py::object& y, const py::object& weight,
               const LossSpec& spec, std::pair<double, double> domain, const py::object& v, bool gauss_newton) {
    using T = typename E::Real;
    return of_loss(self, X, y, weight, spec, domain, [&](auto& lease, const auto& examples, double work) -> py::object {
        if (!take_direction(self, v, lease->direction())) return py::none();
        if (self.names.empty()) return py::dict();
        std::vector<T*> data;
        const py::dict arrays = parameter_arrays(self, {}, data);
        const Unlocked unlocked(6 * work);
        gauss_newton ? lease->gauss_newton(examples.data, examples.loss, data.data())
                     : lease->hvp(examples.data, examples.loss, data.data());
        return arrays;
    });
}

template <class E>
py::object example_gradients(PyNetwork<E>& self, const py::object& X, const py::object& y, const LossSpec& spec,
                             std::pair<double, double> domain) {
    using T = typename E::Real;
    return of_loss(self, X, y, py::none(), spec, domain,
                   [&](auto& lease, const auto& examples, double work) -> py::object {
                       std::vector<T*> data;
                       const py::dict arrays = parameter_arrays(self, {examples.data.rows}, data);
                       const Unlocked unlocked(3 * work);
                       lease->example_gradients(examples.data, examples.loss, data.data());
                       return arrays;
                   });
}

template <class E>
py::object example_norms(PyNetwork<E>& self, const py::object& X, const py::object& y, const LossSpec& spec,
                         std::pair<double, double> domain) {
    using T = typename E::Real;
    return of_loss(self, X, y, py::none(), spec, domain,
                   [&](auto& lease, const auto& examples, double work) -> py::object {
                       const NumpyArray<T> norms = new_array<T>({examples.data.rows});
                       T* data = const_cast<T*>(norms.data());
                       const Unlocked unlocked(2 * work);
                       lease->example_norms(examples.data, examples.loss, data);
                       return norms;
                   });
}

}  // namespace calculus

template <class E>
void bind_calculus(py::class_<PyNetwork<E>>& network) {
    network.def_property_readonly("changes", [](const PyNetwork<E>& self) { return self.net.changes(); })
        .def("jvp", &calculus::jvp<E>, py::arg("X"), py::arg("dX"), py::arg("dparams"))
        .def("sensitivity", &calculus::sensitivity<E>, py::arg("X"), py::arg("input"))
        .def("vjp", &calculus::vjp<E>, py::arg("X"), py::arg("c"), py::arg("params"))
        .def("backward", &calculus::backward<E>, py::arg("X"), py::arg("c"))
        .def("jacobian", &calculus::jacobian<E>, py::arg("X"), py::arg("reverse"))
        .def("parameter_jacobian", &calculus::parameter_jacobian<E>, py::arg("X"))
        .def("second", &calculus::second<E>, py::arg("X"), py::arg("sum"))
        .def("value_and_grad_as_is", &calculus::value_and_grad_as_is<E>, py::arg("X"), py::arg("y"), py::arg("loss"),
             py::arg("domain"))
        .def("input_gradient", &calculus::input_gradient<E>, py::arg("X"), py::arg("y"), py::arg("weight"),
             py::arg("loss"), py::arg("domain"))
        .def("hvp", &calculus::hvp<E>, py::arg("X"), py::arg("y"), py::arg("weight"), py::arg("loss"),
             py::arg("domain"), py::arg("v"), py::arg("gauss_newton"))
        .def("example_gradients", &calculus::example_gradients<E>, py::arg("X"), py::arg("y"), py::arg("loss"),
             py::arg("domain"))
        .def("example_norms", &calculus::example_norms<E>, py::arg("X"), py::arg("y"), py::arg("loss"),
             py::arg("domain"));
}

}  // namespace chainrule
