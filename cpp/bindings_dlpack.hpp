// SPDX-License-Identifier: MIT
// L4, a part of bindings_cuda.cpp: arrays on a device, and their exchange with other libraries by DLPack.
#pragma once

#include "bindings_parts.hpp"
#include "cuda.hpp"

namespace chainrule {

// DLPack's structures, version 0, which every consumer takes. Source: github.com/dmlc/dlpack, dlpack.h
namespace dlpack {
struct Device {
    std::int32_t type, id;  // type 2: CUDA
};
struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};
struct Managed {
    Tensor tensor;
    void* context;
    void (*deleter)(Managed*);
};
constexpr std::int32_t kCuda = 2;

// What NumPy has, too: its letter and the beginning of its name, before the number of bits.
struct Kind {
    std::uint8_t code;
    char letter;
    const char* name;
    int least_bits;
};
constexpr Kind kKinds[] = {{0, 'i', "int", 8}, {1, 'u', "uint", 8}, {2, 'f', "float", 16}};
constexpr Kind kBool = {6, 'b', "bool", 8};

inline py::dtype numpy_dtype(DataType type) {
    if (type.lanes == 1 && type.code == kBool.code && type.bits == kBool.least_bits) return py::dtype(kBool.name);
    for (const Kind& kind : kKinds)
        if (type.lanes == 1 && type.code == kind.code && type.bits >= kind.least_bits && type.bits <= 64)
            return py::dtype(kind.name + std::to_string(type.bits));
    throw py::type_error(
        "[from_dlpack] dtype must be one of NumPy's real ones: expected float16 to float64, integers "
        "or bool, got DLPack's code " +
        std::to_string(type.code) + " with " + std::to_string(type.bits) + " bits (4 is bfloat16); make it float32");
}

inline DataType data_type(const py::dtype& dtype) {
    std::uint8_t code = kBool.code;
    for (const Kind& kind : kKinds)
        if (dtype.kind() == kind.letter) code = kind.code;
    return {code, static_cast<std::uint8_t>(8 * dtype.itemsize()), 1};
}
}  // namespace dlpack

// A C-contiguous array on a device: its own memory, or another library's, which `owner` keeps.
class DeviceArray {
   public:
    static DeviceArray upload(const py::array& array, int device) {
        DeviceArray made(array.dtype(), std::vector<Index>(array.shape(), array.shape() + array.ndim()), device);
        const auto flat = py::array::ensure(array, py::array::c_style);
        cuda::copy(device, made.data_, flat.data(), made.bytes());
        return made;
    }
    DeviceArray(py::dtype dtype, std::vector<Index> shape, int device)
        : dtype_(std::move(dtype)), shape_(std::move(shape)), device_(device) {
        owner_ = cuda::array_memory(device, std::max<std::size_t>(bytes(), 1));
        data_ = owner_.get();
    }
    DeviceArray(py::dtype dtype, std::vector<Index> shape, int device, void* data, std::shared_ptr<void> owner)
        : dtype_(std::move(dtype)), shape_(std::move(shape)), device_(device), data_(data), owner_(std::move(owner)) {}

    const py::dtype& dtype() const { return dtype_; }
    const std::vector<Index>& shape() const { return shape_; }
    int device() const { return device_; }
    // Who has had it by DLPack may still write it, on a stream that nobody here knows.
    void* data() const {
        if (*exported_) cuda::synchronize(device_);
        return data_;
    }
    std::size_t bytes() const {
        Index size = 1;
        for (const Index length : shape_) size *= length;
        return static_cast<std::size_t>(size * dtype_.itemsize());
    }
    // Rows [first, last), of the same memory.
    DeviceArray rows(Index first, Index last) const {
        DeviceArray part = *this;
        const std::size_t row = shape_[0] == 0 ? 0 : bytes() / static_cast<std::size_t>(shape_[0]);
        part.data_ = static_cast<unsigned char*>(data_) + static_cast<std::size_t>(first) * row;
        part.shape_[0] = last - first;
        return part;
    }
    bool all_finite() const {
        const Index size = static_cast<Index>(bytes()) / dtype_.itemsize();
        if (dtype_.kind() != 'f') return true;
        if (dtype_.itemsize() == 2) throw py::type_error("[all_finite] expected float32 or float64, got float16");
        return dtype_.itemsize() == 4 ? cuda::all_finite(device_, static_cast<const float*>(data()), size)
                                      : cuda::all_finite(device_, static_cast<const double*>(data()), size);
    }
    py::array numpy() const {
        py::array array(dtype_, shape_);
        cuda::copy(device_, array.mutable_data(), data(), bytes());
        return array;
    }
    DeviceArray copy() const {
        DeviceArray made(dtype_, shape_, device_);
        cuda::copy(device_, made.data_, data(), bytes());
        return made;
    }
    void expect_device(const std::optional<std::pair<int, int>>& wanted) const {
        if (wanted && *wanted != std::pair<int, int>(dlpack::kCuda, device_))
            throw py::buffer_error("[dlpack] an array stays on its device: expected (" + std::to_string(dlpack::kCuda) +
                                   ", " + std::to_string(device_) + "), got (" + std::to_string(wanted->first) + ", " +
                                   std::to_string(wanted->second) + "); .numpy() is the host's copy");
    }
    py::capsule to_dlpack() const;
    static DeviceArray from_dlpack(const py::object& source);

   private:
    py::dtype dtype_;
    std::vector<Index> shape_;
    int device_;
    void* data_ = nullptr;
    std::shared_ptr<void> owner_;
    std::shared_ptr<bool> exported_ = std::make_shared<bool>(false);  // also of the arrays that are its rows
};

inline py::capsule DeviceArray::to_dlpack() const {
    struct Exported {
        dlpack::Managed managed;
        std::vector<std::int64_t> shape;
        std::shared_ptr<void> owner;
    };
    *exported_ = true;
    auto* exported = new Exported{{}, {shape_.begin(), shape_.end()}, owner_};
    exported->managed = {{data_,
                          {dlpack::kCuda, device_},
                          static_cast<std::int32_t>(shape_.size()),
                          dlpack::data_type(dtype_),
                          exported->shape.data(),
                          nullptr,
                          0},
                         exported,
                         [](dlpack::Managed* managed) { delete static_cast<Exported*>(managed->context); }};
    // A consumer renames the capsule and calls the deleter itself.
    return py::capsule(&exported->managed, "dltensor", [](PyObject* capsule) {
        if (!PyCapsule_IsValid(capsule, "dltensor")) return;
        auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, "dltensor"));
        managed->deleter(managed);
    });
}

inline DeviceArray DeviceArray::from_dlpack(const py::object& source) {
    const auto device = py::cast<std::pair<int, int>>(source.attr("__dlpack_device__")());
    if (device.first != dlpack::kCuda)
        throw py::buffer_error("[from_dlpack] wrong kind of device: expected 2 (CUDA), got " +
                               std::to_string(device.first));
    const py::object capsule = source.attr("__dlpack__")();
    auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    const dlpack::Tensor& tensor = managed->tensor;
    const py::dtype dtype = dlpack::numpy_dtype(tensor.dtype);
    Index expected = 1;
    for (int d = tensor.ndim; d-- > 0; expected *= tensor.shape[d])
        if (tensor.strides && tensor.shape[d] > 1 && tensor.strides[d] != expected)
            throw py::buffer_error("[from_dlpack] wrong layout: expected C-contiguous, got other strides");
    cuda::synchronize(tensor.device.id);  // whatever stream the producer works on
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    const std::shared_ptr<void> owner(managed, [](void* held) {
        auto* taken = static_cast<dlpack::Managed*>(held);
        if (taken->deleter) taken->deleter(taken);
    });
    return DeviceArray(dtype, {tensor.shape, tensor.shape + tensor.ndim}, tensor.device.id,
                       static_cast<unsigned char*>(tensor.data) + tensor.byte_offset, owner);
}

// Takes NumPy arrays, and arrays on the device.
struct FromDevice {
    template <class T>
    static Taken<T> take(const py::handle& object, const char* what, int dims) {
        if (!py::isinstance<DeviceArray>(object)) return FromNumpy::take<T>(object, what, dims);
        const auto& array = py::cast<const DeviceArray&>(object);
        if (!array.dtype().equal(py::dtype::of<T>()))
            throw py::type_error(std::string("[_cuda] ") + what + " must be " +
                                 std::string(py::str(py::dtype::of<T>())) + ", got " +
                                 std::string(py::str(array.dtype())));
        if (static_cast<int>(array.shape().size()) != dims)
            throw py::value_error(std::string("[_cuda] ") + what + " must have " + std::to_string(dims) +
                                  " dimensions, got " + std::to_string(array.shape().size()));
        return {static_cast<const T*>(array.data()), array.shape(), py::reinterpret_borrow<py::object>(object)};
    }
    static bool are_labels(const py::handle& object) {
        if (!py::isinstance<DeviceArray>(object)) return FromNumpy::are_labels(object);
        return py::cast<const DeviceArray&>(object).dtype().kind() == 'i';
    }
    // They are looked at on the host.
    static NumpyArray<std::int64_t> labels(const py::handle& object, Index rows) {
        if (!py::isinstance<DeviceArray>(object)) return FromNumpy::labels(object, rows);
        return FromNumpy::labels(py::cast<const DeviceArray&>(object).numpy(), rows);
    }
};

}  // namespace chainrule
