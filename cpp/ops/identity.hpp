// SPDX-License-Identifier: MIT
// identity: y = x.
// derivative  1
// second      0
// saves       nothing
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Identity {
    template <class V>
    CHAINRULE_INLINE V forward(V x, V) {
        return x;
    }
    template <class V>
    CHAINRULE_INLINE V second(V, V) {
        return V{};
    }
    template <class V>
    CHAINRULE_INLINE V vjp(V dy, V, V) {
        return dy;
    }
    template <class V>
    CHAINRULE_INLINE V jvp(V dx, V, V) {
        return dx;
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
