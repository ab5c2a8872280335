// SPDX-License-Identifier: MIT
// L4: the module _cuda, the GPU engine's. Its functions are the text of _core's; a loss is _core.Loss, so _core is
// imported first.
#include <pybind11/pybind11.h>

#include "bindings_calculus.hpp"
#include "bindings_dlpack.hpp"
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
    using Data = chainrule::Data<T, FromDevice>;
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
DeviceArray predict_array(const PyNetwork<Cuda<T>>& self, const py::object& X) {
    const Taken<T> x = FromDevice::take<T>(X, "X", 2);
    x.demand("X", {x.shape[0], self.net.inputs()});
    DeviceArray f(py::dtype::of<T>(), {x.shape[0], self.net.outputs()}, self.net.device());
    const Unlocked unlocked;
    self.net.predict(x.shape[0], x.data, static_cast<T*>(f.data()));
    return f;
}

// Losses (K, epochs), NaN after an epoch whose loss is not finite.
template <class T>
NumpyArray<double> run_many(const std::vector<PyTrainer<Cuda<T>>*>& trainers, Index first_epoch, const py::object& lr) {
    if (trainers.empty()) throw py::value_error("[fit_many] no networks: expected at least 1, got 0");
    const auto rates = require<double>(lr, "lr", py::cast<py::array>(lr).ndim() == 3 ? 3 : 2);
    const Index count = static_cast<Index>(trainers.size());
    if (rates.shape(0) != count)
        throw py::value_error("[fit_many] lr needs a row for each network: expected " + std::to_string(count) +
                              ", got " + std::to_string(rates.shape(0)));
    std::vector<std::unique_ptr<TrainingLock<Cuda<T>>>> locks;
    std::vector<cuda::Trainer<T>*> works;
    Index epochs = 0, stride = 1;
    for (PyTrainer<Cuda<T>>* trainer : trainers) {
        std::tie(epochs, stride) = trainer->rates_of(rates, 1);
        locks.push_back(std::make_unique<TrainingLock<Cuda<T>>>(trainer->network()));
        locks.back()->demand();
        works.push_back(&trainer->trainer());
    }
    std::vector<std::vector<double>> losses;
    {
        const Unlocked unlocked;
        losses = cuda::run_many(works, first_epoch, epochs, rates.data(), epochs * stride, stride);
    }
    NumpyArray<double> result({count, epochs});
    std::fill_n(result.mutable_data(), count * epochs, std::numeric_limits<double>::quiet_NaN());
    for (Index k = 0; k < count; ++k) {
        const auto& own = losses[static_cast<std::size_t>(k)];
        std::copy(own.begin(), own.end(), result.mutable_data() + k * epochs);
    }
    return result;
}

void bind_arrays(py::module_& m) {
    py::class_<DeviceArray>(m, "Array", "A C-contiguous array on a device: float32, float64 or int64.")
        .def_property_readonly("shape", [](const DeviceArray& self) { return py::tuple(py::cast(self.shape())); })
        .def_property_readonly("dtype", &DeviceArray::dtype)
        .def_property_readonly("device", &DeviceArray::device)
        .def("__len__", [](const DeviceArray& self) { return self.shape().at(0); })
        .def(
            "__getitem__",
            [](const DeviceArray& self, const py::slice& part) {
                py::ssize_t first = 0, last = 0, step = 0, length = 0;
                if (!part.compute(self.shape().at(0), &first, &last, &step, &length)) throw py::error_already_set();
                if (step != 1) throw py::index_error("[_cuda] an array's rows: expected neighbours, got a step");
                return self.rows(first, first + length);
            },
            py::arg("rows"))
        .def("all_finite", &DeviceArray::all_finite)
        .def("numpy", &DeviceArray::numpy)
        .def(
            "__array__",
            [](const DeviceArray& self, const py::object& dtype, const py::object&) -> py::object {
                const py::array array = self.numpy();
                return dtype.is_none() ? py::object(array) : py::object(array.attr("astype")(dtype));
            },
            py::arg("dtype") = py::none(), py::arg("copy") = py::none())
        // Nothing of ours works on an array any more when somebody has it: `stream` need not wait.
        .def(
            "__dlpack__",
            [](const DeviceArray& self, const py::object&, const py::object&,
               const std::optional<std::pair<int, int>>& device, std::optional<bool> copy) {
                self.expect_device(device);
                return (copy.value_or(false) ? self.copy() : self).to_dlpack();
            },
            py::arg("stream") = py::none(), py::kw_only(), py::arg("max_version") = py::none(),
            py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
        .def("__dlpack_device__", [](const DeviceArray& self) { return py::make_tuple(dlpack::kCuda, self.device()); });
    m.def("upload", &DeviceArray::upload, py::arg("array"), py::arg("device"));
    m.def("from_dlpack", &DeviceArray::from_dlpack, py::arg("source"));
}

// Where NVIDIA's wheels, of CUDA 13 and 12, and its installer put their libraries.
std::vector<std::string> library_folders() {
    std::vector<std::string> folders;  // in the order in which PyTorch looks, whose libraries must be of one version
    const py::object spec = py::module_::import("importlib.util").attr("find_spec")("nvidia");
    if (!spec.is_none() && !spec.attr("submodule_search_locations").is_none())
        for (const py::handle& place : spec.attr("submodule_search_locations"))
            for (const char* part : {"/cu13/lib/", "/cublas/lib/"})
                folders.push_back(py::cast<std::string>(place) + part);
    folders.push_back("");  // the loader's
    folders.push_back("/usr/local/cuda/lib64/");
    return folders;
}

template <class T>
void bind_cuda(py::module_& m, const std::string& bits) {
    using E = Cuda<T>;
    py::class_<cuda::Buffer<T>>(m, ("Snapshot" + bits).c_str(), "The parameters of a network at one time.");
    bind_network<E>(m, bits)
        .def(py::init([](const std::vector<LayerRow>& rows, const std::string& precision, int device) {
                 return std::make_unique<PyNetwork<E>>(make_layers<T>(rows), precision_of<T>(precision), device);
             }),
             py::arg("layers"), py::arg("precision"), py::arg("device"))
        .def("predict_array", &predict_array<T>, py::arg("X"));
    m.def("run_many", &run_many<T>, py::arg("trainers"), py::arg("first_epoch"), py::arg("lr"));
    bind_training<E>(m, bits)
        .def_property_readonly(
            "schedule",
            [](PyTrainer<E>& self) { return schedule_names[static_cast<std::size_t>(self.trainer().schedule())]; })
        .def_property_readonly("blocks", [](PyTrainer<E>& self) { return self.trainer().blocks(); })
        .def_property_readonly("graphs", [](PyTrainer<E>& self) { return self.trainer().graphs(); })
        .def_property_readonly("library_shapes", [](PyTrainer<E>& self) { return self.trainer().library_shapes(); });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The engine of chainrule on NVIDIA GPUs. Its names are an implementation detail; use the package's.";
    m.attr("__version__") = CHAINRULE_VERSION;
    py::module_::import("chainrule._core");
    cuda::look_for_libraries(library_folders());
    cuda::wait_by([](const std::function<void()>& wait) {
        if (!PyGILState_Check()) return wait();
        const Unlocked unlocked;
        wait();
    });
    m.def("state", &cuda::state);
    m.def("device_count", &cuda::device_count);
    m.def("device_name", &cuda::device_name, py::arg("device"));
    m.def("has_clusters", &cuda::has_clusters, py::arg("device"));
    m.def("synchronize", &cuda::synchronize, py::arg("device"));
    m.def("schedules", [] { return std::vector<std::string>(schedule_names.begin() + 1, schedule_names.end()); });
    m.def(
        "force_schedule",
        [](const std::string& name, int blocks) {
            cuda::force_schedule(lookup<cuda::Schedule>(schedule_names, name, "schedule"), std::max(blocks, 0));
        },
        py::arg("name"), py::arg("blocks") = 0);
    bind_arrays(m);
    bind_cuda<float>(m, "32");
    bind_cuda<double>(m, "64");
}
