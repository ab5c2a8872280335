// SPDX-License-Identifier: MIT
// L4: with the other bindings the only file that knows Python. It takes arrays in and gives arrays out; it computes nothing
// and has no defaults. Arrays must come with the right dtype, C-contiguous: Python converts them, once, where the user can
// see it. Functions named …_as_is return None instead of converting an array, or of saying what is wrong with it.
#include <pybind11/pybind11.h>

#include <numeric>

#include "bindings_network.hpp"
#include "random.hpp"

using namespace chainrule;

namespace {

py::list ops() {
    struct Row {
        char kind[12], name[16], saves[8];
    };
    static constexpr Row table[] = {
        {"linear", "linear", "input"},
#define CHAINRULE_ELEMENTWISE(name, type, saves) {"elementwise", #name, #saves},
#define CHAINRULE_ROWWISE(name, type, saves) {"rowwise", #name, #saves},
#define CHAINRULE_LOSS(name, type) {"loss", #name, "none"},
#define CHAINRULE_OPTIMIZER(name, type) {"optimizer", #name, "none"},
#include "ops/ops.def"
        {"dropout", "dropout", "none"},
    };
    py::list rows;
    for (const Row& row : table) rows.append(py::make_tuple(row.kind, row.name, row.saves));
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

// ---- the machine --------------------------------------------------------------------------------------------------------

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
        [](Index n, std::uint64_t seed, std::uint64_t stream, Index first) {
            return random_numbers(n, [&](Index i) { return uniform(seed, stream, first + i); });
        },
        py::arg("n"), py::arg("seed"), py::arg("stream"), py::arg("first") = 0);
    m.def(
        "random_normal",
        [](Index n, std::uint64_t seed, std::uint64_t stream, Index first) {
            return random_numbers(n, [&](Index i) { return normal(seed, stream, first + i); });
        },
        py::arg("n"), py::arg("seed"), py::arg("stream"), py::arg("first") = 0);
    m.def(
        "permutation",
        [](Index n, std::uint64_t seed, std::uint64_t epoch) {
            NumpyArray<std::int64_t> order(n);
            permute(n, seed, epoch, order.mutable_data());
            return order;
        },
        py::arg("n"), py::arg("seed"), py::arg("epoch"));
}

template <class T>
void bind_cpu(py::module_& m, const std::string& bits) {
    // A NumPy array of this size would be faulted in by small pages: 0.13 s for 50 MB, as long as half a step there.
    py::class_<Array<T>>(m, ("Snapshot" + bits).c_str(), "The parameters of a network at one time.",
                         py::buffer_protocol())
        .def_buffer([](const Array<T>& self) { return py::buffer_info(self.data(), self.size(), true); });
    bind_network<Cpu<T>>(m, bits).def(py::init([](const std::vector<LayerRow>& rows, bool bfloat16) {
                                          std::vector<Layer<T>> layers = make_layers<T>(rows);
                                          for (Layer<T>& layer : layers)
                                              layer.bfloat16 = bfloat16 && layer.kind == Layer<T>::Kind::linear;
                                          return std::make_unique<PyNetwork<Cpu<T>>>(std::move(layers));
                                      }),
                                      py::arg("layers"), py::arg("bfloat16") = false);
    bind_training<Cpu<T>>(m, bits);
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
    bind_cpu<float>(m, "32");
    bind_cpu<double>(m, "64");
}
