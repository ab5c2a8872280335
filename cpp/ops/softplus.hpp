// SPDX-License-Identifier: MIT
// softplus: y = log(1 + e^x) = max(x, 0) + log1p(e^-|x|), without the linear cut-off that others make at 20.
// derivative  σ(x)
// second      σ(x) σ(-x)
// saves       x: from the output, 1 - e^-y would lose the left tail
// error       3 ulp, in the left tail too; 0 at -inf, inf at inf
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Softplus {
    template <class V>
    CHAINRULE_INLINE V forward(V x, V) {
        return softplus(x);
    }
    template <class V>
    CHAINRULE_INLINE V derivative(V x) {
        return sigmoid(x);
    }
    template <class V>
    CHAINRULE_INLINE V second(V x, V) {
        return sigmoid(x) * sigmoid(-x);
    }
    template <class V>
    CHAINRULE_INLINE V vjp(V dy, V x, V) {
        return dy * derivative(x);
    }
    template <class V>
    CHAINRULE_INLINE V jvp(V dx, V x, V) {
        return derivative(x) * dx;
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
