// SPDX-License-Identifier: MIT
// L4: the module _cuda, the GPU engine's. Its functions are the text of _core's; a loss is _core.Loss and a snapshot one of
// _core's, so _core is imported first.
#include <pybind11/pybind11.h>

#include "bindings_calculus.hpp"
#include "bindings_network.hpp"
#include "cuda.hpp"

using namespace chainrule;

namespace {

template <class T>
struct Cuda {
    using Real = T;
    using Network = cuda::Network<T>;
    using Optimizer = cuda::Optimizer<T>;
    using Step = cuda::Step<T>;
    using Trainer = cuda::Trainer<T>;
    using Direction = cuda::Direction<T>;
    using DerivativesOf = cuda::DerivativesOf<T>;
};

const std::vector<std::string> schedule_names = {"", "resident", "fused", "library"};

template <class T>
cuda::Precision precision_of(const std::string& name) {
    if (std::is_same_v<T, double>) {
        if (name == "float64") return cuda::Precision::float64;
    } else {
        if (name == "float32") return cuda::Precision::float32;
        if (name == "tf32") return cuda::Precision::tf32;
        if (name == "bfloat16") return cuda::Precision::bfloat16;
    }
    throw py::value_error("[Network] unknown precision: expected " +
                          std::string(std::is_same_v<T, double> ? "float64" : "float32, tf32 or bfloat16") + ", got " +
                          name);
}

template <class T>
void bind_cuda(py::module_& m, const py::module_& core, const std::string& bits) {
    using E = Cuda<T>;
    m.attr(("Snapshot" + bits).c_str()) = core.attr(("Snapshot" + bits).c_str());
    bind_network<E>(m, bits).def(
        py::init([](const std::vector<LayerRow>& rows, const std::string& precision, int device) {
            return std::make_unique<PyNetwork<E>>(make_layers<T>(rows), precision_of<T>(precision), device);
        }),
        py::arg("layers"), py::arg("precision"), py::arg("device"));
    bind_training<E>(m, bits).def_property_readonly("schedule", [](const PyTrainer<E>& self) {
        return schedule_names[static_cast<std::size_t>(self.trainer().schedule())];
    });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The engine of chainrule on NVIDIA GPUs. Its names are an implementation detail; use the package's.";
    m.attr("__version__") = CHAINRULE_VERSION;
    const py::module_ core = py::module_::import("chainrule._core");
    m.def("state", &cuda::state);
    m.def("device_count", &cuda::device_count);
    m.def("device_name", &cuda::device_name, py::arg("device"));
    m.def(
        "synchronize",
        [](int device) {
            const Unlocked unlocked;
            cuda::synchronize(device);
        },
        py::arg("device"));
    m.def("schedules", [] { return std::vector<std::string>(schedule_names.begin() + 1, schedule_names.end()); });
    m.def(
        "force_schedule",
        [](const std::string& name) {
            cuda::force_schedule(lookup<cuda::Schedule>(schedule_names, name, "schedule"));
        },
        py::arg("name"));
    bind_cuda<float>(m, core, "32");
    bind_cuda<double>(m, core, "64");
}
