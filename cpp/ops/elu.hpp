// SPDX-License-Identifier: MIT
// elu: y = x where x > 0, else α (e^x - 1), α > 0.
// derivative  1 where y > 0, else α e^x = y + α; at 0 we take α, which is continuous for α = 1
// second      0 where y >= 0, else α e^x = y + α; at the kink 0
// saves       y
// error       3 ulp; -α at -inf
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Elu {
    template <class V>
    CHAINRULE_INLINE V forward(V x, V alpha) {
        return select(x > V{}, x, alpha * expm1(select(x > V{}, V{}, x)));
    }
    template <class V>
    CHAINRULE_INLINE V derivative(V y, V alpha) {
        return select(y > V{}, splat<V>(1), y + alpha);
    }
    template <class V>
    CHAINRULE_INLINE V second(V y, V alpha) {
        return select(y < V{}, y + alpha, V{});
    }
    template <class V>
    CHAINRULE_INLINE V vjp(V dy, V y, V alpha) {
        return dy * derivative(y, alpha);
    }
    template <class V>
    CHAINRULE_INLINE V jvp(V dx, V y, V alpha) {
        return derivative(y, alpha) * dx;
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
