// SPDX-License-Identifier: MIT
// L4: the derivatives of the CPU's networks; a file of its own, compiled beside bindings.cpp.
#include "bindings_calculus.hpp"

namespace chainrule {

template void bind_calculus(py::class_<PyNetwork<Cpu<float>>>&);
template void bind_calculus(py::class_<PyNetwork<Cpu<double>>>&);

}  // namespace chainrule
