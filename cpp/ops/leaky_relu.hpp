// SPDX-License-Identifier: MIT
// leaky_relu: y = x where x > 0, else s x, with slope s >= 0.
// derivative  1 where y > 0, else s; at the kink we take s. s >= 0 keeps the sign, so the output tells the side
// second      0, at the kink too
// saves       y
// exact to one rounding
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct LeakyRelu {
    template <class V>
    CHAINRULE_INLINE V forward(V x, V slope) {
        return select(x > V{}, x, select(slope == V{}, select(x == x, V{}, x), slope * x));
    }
    template <class V>
    CHAINRULE_INLINE V derivative(V y, V slope) {
        return select(y > V{}, splat<V>(1), select(y == y, slope, y));
    }
    template <class V>
    CHAINRULE_INLINE V second(V, V) {
        return V{};
    }
    template <class V>
    CHAINRULE_INLINE V vjp(V dy, V y, V slope) {
        return dy * derivative(y, slope);
    }
    template <class V>
    CHAINRULE_INLINE V jvp(V dx, V y, V slope) {
        return derivative(y, slope) * dx;
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
