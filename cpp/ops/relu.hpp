// SPDX-License-Identifier: MIT
// relu: y = max(x, 0).
// derivative  1 where y > 0, else 0; at the kink x = 0 (and -0) we take 0, as PyTorch and scikit-learn do
// second      0, at the kink too
// saves       y
// exact; written so that NaN passes: max(x, 0) in SIMD would return 0
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Relu {
    template <class V>
    CHAINRULE_INLINE V forward(V x, V) {
        return select(x < V{}, V{}, x);
    }
    template <class V>
    CHAINRULE_INLINE V derivative(V y) {
        return select(y > V{}, splat<V>(1), select(y == y, V{}, y));
    }
    template <class V>
    CHAINRULE_INLINE V second(V, V) {
        return V{};
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
