// SPDX-License-Identifier: MIT
// sigmoid: y = σ(x) = 1 / (1 + e^-x), the lecture's activation.
// derivative  σ'(x) = y (1 - y), from the output; relative error grows like y/(1-y) ulp as y rounds towards 1
// second      σ''(x) = y (1 - y) (1 - 2y)
// saves       y
// error       3 ulp; 0 at -inf, 1/2 at ±0, 1 at inf
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Sigmoid {
    template <class V>
    CHAINRULE_INLINE V forward(V x, V) {
        return sigmoid(x);
    }
    template <class V>
    CHAINRULE_INLINE V derivative(V y) {
        return y * (1 - y);
    }
    template <class V>
    CHAINRULE_INLINE V second(V y, V) {
        return derivative(y) * (1 - 2 * y);
    }
    template <class V>
    CHAINRULE_INLINE V vjp(V dy, V y, V) {
        return dy * derivative(y);
    }
    template <class V>
    CHAINRULE_INLINE V jvp(V dx, V y, V) {
        return derivative(y) * dx;
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
