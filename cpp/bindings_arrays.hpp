// SPDX-License-Identifier: MIT
// L4, a part of bindings.cpp: the interpreter's lock, and NumPy arrays in and out.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>

#include "interrupt.hpp"
#include "network.hpp"

namespace py = pybind11;

namespace chainrule {

template <class T>
using NumpyArray = py::array_t<T, py::array::c_style>;

template <class T>
constexpr int kTypeNumber = py::detail::npy_format_descriptor<T>::value;  // NumPy's

// A message by printf's format: a call is a tenth of what a sum of strings takes, in each of their templates.
[[gnu::format(printf, 1, 2)]] inline std::string text(const char* format, ...) {
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    std::string message(static_cast<std::size_t>(std::vsnprintf(nullptr, 0, format, arguments)), ' ');
    (void)std::vsnprintf(message.data(), message.size() + 1, format, again);
    va_end(again);
    va_end(arguments);
    return message;
}
inline std::string text_of(const py::handle& object) { return py::str(object); }

// ---- the interpreter lock -------------------------------------------------------------------------------------------

// Python ends a daemon thread that asks for the lock after the interpreter has gone by unwinding its stack, which C++
// destructors must not let through: the process would abort. Such a thread waits here for the process's end instead.
[[noreturn]] inline void wait_for_exit() {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

class Locked {  // inside an Unlocked, so on a thread that Python knows; Python again
   public:
    Locked() : state_(acquire()) {}
    ~Locked() {
        if (!PyGILState_Check()) wait_for_exit();  // Python has ended this thread in code of the user's
        PyGILState_Release(state_);
    }
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;

   private:
    static PyGILState_STATE acquire() {
        if (PyGILState_GetThisThreadState() == nullptr) wait_for_exit();  // the interpreter has gone, and all it knew
        try {
            return PyGILState_Ensure();
        } catch (...) { wait_for_exit(); }
    }
    PyGILState_STATE state_;
};

// Ctrl-C, for long work without the lock.
inline void hear_signals() {
    const Locked locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

class Unlocked {  // inside, other Python threads run, and Ctrl-C is heard
   public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    // Only for more work than about 2 µs. Giving the lock away and taking it back costs 0.1 µs, and more where others want
    // it: predicting one row beside three busy Python threads took 23 µs, and 7 µs with the lock kept.
    explicit Unlocked(double multiplies) : state_(multiplies > 1e5 ? PyEval_SaveThread() : nullptr) {}
    ~Unlocked() {
        if (state_ == nullptr) return;
        try {
            PyEval_RestoreThread(state_);
        } catch (...) { wait_for_exit(); }
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

   private:
    PyThreadState* state_;
    const Interruptible interruptible_{hear_signals};
};

// A call of the user's code, in which Python may end a daemon thread: what its caller holds must not be let go without the lock.
inline py::object call(const py::handle& function, const py::tuple& arguments) {
    PyObject* answer = nullptr;
    try {
        answer = PyObject_CallObject(function.ptr(), arguments.ptr());
    } catch (...) { wait_for_exit(); }
    if (answer == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(answer);
}

// ---- array intake ---------------------------------------------------------------------------------------------------

// What an array must be to be read row by row as C has it.
constexpr int kReadable = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;

inline std::string shape_text(const py::array& array) { return py::str(array.attr("shape")); }

// `object` as an array of exactly T, C-contiguous and aligned, with `dims` dimensions.
template <class T>
NumpyArray<T> require(const py::handle& object, const char* what, int dims) {
    if (!py::isinstance<py::array>(object))
        throw py::type_error(
            text("[_core] %s must be a NumPy array, got %s", what, text_of(py::type::of(object)).c_str()));
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (!array.dtype().equal(py::dtype::of<T>()) || (array.flags() & kReadable) != kReadable)
        throw py::type_error(text("[_core] %s must be C-contiguous %s, got %s%s", what,
                                  text_of(py::dtype::of<T>()).c_str(), text_of(array.dtype()).c_str(),
                                  array.flags() & py::array::c_style ? "" : ", not C-contiguous"));
    if (array.ndim() != dims)
        throw py::value_error(
            text("[_core] %s must have %d dimensions, got shape %s", what, dims, shape_text(array).c_str()));
    return py::reinterpret_borrow<NumpyArray<T>>(array);
}

template <class T>
NumpyArray<T> require_shape(const py::handle& object, const char* what, const std::vector<Index>& shape) {
    const NumpyArray<T> array = require<T>(object, what, static_cast<int>(shape.size()));
    for (std::size_t d = 0; d < shape.size(); ++d)
        if (array.shape(static_cast<py::ssize_t>(d)) != shape[d])
            throw py::value_error(text("[_core] %s has the wrong shape: expected %s, got %s", what,
                                       text_of(py::cast(shape)).c_str(), shape_text(array).c_str()));
    return array;
}

// Calls f(T{}) with T the real type of `array`.
template <class F>
py::object with_real_type(const py::handle& array, F f) {
    if (py::isinstance<py::array_t<float>>(array)) return f(float{});
    if (py::isinstance<py::array_t<double>>(array)) return f(double{});
    throw py::type_error("[_core] expected a float32 or float64 array");
}

// ---- arrays that fit as they are ------------------------------------------------------------------------------------

// Whether `object` is a plain NumPy array of T that can be read as it is: native byte order, aligned, C-contiguous, no
// subclass. Every small step asks this, so it looks at the array's own fields and makes no Python object.
template <class T>
bool fits(const py::handle& object) {
    if (Py_TYPE(object.ptr()) != py::detail::npy_api::get().PyArray_Type_) return false;
    const auto* array = py::detail::array_proxy(object.ptr());
    const auto* type = py::detail::array_descriptor_proxy(array->descr);
    return type->type_num == kTypeNumber<T> && type->byteorder == '=' && (array->flags & kReadable) == kReadable;
}

// Whether all numbers are finite. The exponent of any other is all ones, so that one more carries into the sign. By vectors
// written out, because this file is compiled for size and X of every step comes through here; not by comparing floats, which
// GCC does one by one for float64 on a plain x86 (100 000 numbers: 0.2 ms).
template <class T>
bool all_finite(const T* values, Index size) {
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    typedef Bits Vector __attribute__((vector_size(16)));
    constexpr Index width = sizeof(Vector) / sizeof(T);
    constexpr Bits sign = Bits{1} << (8 * sizeof(T) - 1), one = Bits{1} << (std::numeric_limits<T>::digits - 1);
    const auto carried = [](auto bits) { return (bits & (sign - one)) + one; };
    Vector carries{};
    Index i = 0;
    for (; i + width <= size; i += width) {
        Vector bits;
        std::memcpy(&bits, values + i, sizeof bits);
        carries |= carried(bits);
    }
    Bits carry = 0;
    for (Index lane = 0; lane < width; ++lane) carry |= carries[lane];
    for (; i < size; ++i) {
        Bits bits;
        std::memcpy(&bits, values + i, sizeof bits);
        carry |= carried(bits);
    }
    return (carry & sign) == 0;
}

// ---- arrays out -----------------------------------------------------------------------------------------------------

// A new array. Not by py::array_t's constructor, which spends 0.2 µs on vectors of sizes and strides.
template <class T>
NumpyArray<T> new_array(const py::ssize_t* shape, std::size_t dims) {
    const auto& numpy = py::detail::npy_api::get();
    PyObject* array = numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, numpy.PyArray_DescrFromType_(kTypeNumber<T>),
                                                  static_cast<int>(dims), shape, nullptr, nullptr, 0, nullptr);
    if (array == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<NumpyArray<T>>(array);
}
template <class T>
NumpyArray<T> new_array(std::initializer_list<py::ssize_t> shape) {
    return new_array<T>(shape.begin(), shape.size());
}

// py::make_tuple is compiled anew for each list of types.
inline py::tuple tuple_of(std::initializer_list<py::object> items) {
    py::tuple tuple(items.size());
    std::size_t place = 0;
    for (const py::object& item : items) tuple[place++] = item;
    return tuple;
}

template <class T>
NumpyArray<T> copy_of(MatrixView<const T> view) {
    NumpyArray<T> array({view.rows, view.cols});
    copy_rows(view.rows, view.cols, view.data, view.stride, array.mutable_data(), view.cols);
    return array;
}

// A matrix in rows padded to cache lines, as kernels want it; the padding is zero.
template <class T>
struct Padded {
    explicit Padded(Index rows_, Index cols_)
        : rows(rows_), cols(cols_), stride(padded_stride<T>(cols_)), memory((rows_ + 1) * stride) {}
    explicit Padded(const NumpyArray<T>& array) : Padded(array.shape(0), array.shape(1)) {
        copy_rows(rows, cols, array.data(), cols, memory.data(), stride);
    }
    NumpyArray<T> numpy() const {
        NumpyArray<T> array({rows, cols});
        copy_rows(rows, cols, memory.data(), stride, array.mutable_data(), cols);
        return array;
    }
    T* data() const { return memory.data(); }
    MatrixView<const T> view() const { return {data(), rows, cols, stride}; }
    MatrixView<T> target() const { return {data(), rows, cols, stride}; }
    Index rows, cols, stride;
    Array<T> memory;
};

}  // namespace chainrule
