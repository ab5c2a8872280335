// SPDX-License-Identifier: MIT
// L2: the formulas of cpp/ops and cpp/optim.hpp on the GPU, by number. The number is the same for all threads of a launch, so
// that a switch costs a jump, and one kernel serves all ops instead of one kernel for each.
#pragma once

#include <cuda_runtime.h>

#include "../ops/cross_entropy.hpp"
#include "../ops/dropout.hpp"
#include "../ops/elu.hpp"
#include "../ops/gaussian_nll.hpp"
#include "../ops/gelu.hpp"
#include "../ops/huber.hpp"
#include "../ops/identity.hpp"
#include "../ops/leaky_relu.hpp"
#include "../ops/least_squares.hpp"
#include "../ops/log_softmax.hpp"
#include "../ops/logistic.hpp"
#include "../ops/mae.hpp"
#include "../ops/mse.hpp"
#include "../ops/pinball.hpp"
#include "../ops/poisson.hpp"
#include "../ops/relu.hpp"
#include "../ops/sigmoid.hpp"
#include "../ops/silu.hpp"
#include "../ops/softmax.hpp"
#include "../ops/softplus.hpp"
#include "../ops/tanh.hpp"
#include "../optim.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

// A thread's numbers that lie side by side. Four float32 come from shared memory in one load, and one jump finds the formula for
// all of them, which then run in each other's waits.
template <class T, int N>
struct alignas(N % 4 == 0 ? 16 : sizeof(T)) Several {
    T at[N];
};
template <int N, class T>
static __device__ __forceinline__ Several<T, N>& several_at(T* place) {
    return *reinterpret_cast<Several<T, N>*>(place);
}
template <int N, class T>
static __device__ __forceinline__ const Several<T, N>& several_at(const T* place) {
    return *reinterpret_cast<const Several<T, N>*>(place);
}
#define CHAINRULE_EACH(c) CHAINRULE_UNROLL(16) for (int c = 0; c < N; ++c)

// ---- elementwise ----------------------------------------------------------------------------------------------------

// In place.
template <class T, int N>
static __device__ __forceinline__ void op_forward(Op op, Several<T, N>& x, T param) {
    const Vec<T> p = param;
    switch (op) {
#define CHAINRULE_ELEMENTWISE(name, type, saves) \
    case Op::name: CHAINRULE_EACH(c) x.at[c] = type::forward(Vec<T>(x.at[c]), p)[0]; return;
#include "../ops/ops.def"
        default: return;
    }
}
// Of dy, in place; jvp as well: the Jacobian is diagonal.
template <class T, int N>
static __device__ __forceinline__ void op_vjp(Op op, Several<T, N>& dy, const Several<T, N>& saved, T param) {
    const Vec<T> p = param;
    switch (op) {
#define CHAINRULE_ELEMENTWISE(name, type, saves) \
    case Op::name: CHAINRULE_EACH(c) dy.at[c] = type::vjp(Vec<T>(dy.at[c]), Vec<T>(saved.at[c]), p)[0]; return;
#include "../ops/ops.def"
        default: return;
    }
}
template <class T>
static __device__ __forceinline__ T op_forward(Op op, T x, T param) {
    Several<T, 1> one = {{x}};
    op_forward(op, one, param);
    return one.at[0];
}
template <class T>
static __device__ __forceinline__ T op_vjp(Op op, T dy, T saved, T param) {
    Several<T, 1> one = {{dy}};
    op_vjp(op, one, Several<T, 1>{{saved}}, param);
    return one.at[0];
}
// dv g' + v dx g''
template <class T>
static __device__ __forceinline__ T op_second(Op op, T v, T dx, T dv, T saved, T param) {
    const Vec<T> along = dv, s = saved, p = param, both = Vec<T>(v) * Vec<T>(dx);
    switch (op) {
#define CHAINRULE_ELEMENTWISE(name, type, saves) \
    case Op::name: return (type::jvp(along, s, p) + both * type::second(s, p))[0];
#include "../ops/ops.def"
        default: return dv;
    }
}

// ---- a row, by the threads that share it -------------------------------------------------------------------------------------------------

template <class T>
static __device__ __forceinline__ void row_forward(Op op, Index n, const T* x, T* y) {
    switch (op) {
#define CHAINRULE_ROWWISE(name, type, saves) \
    case Op::name: return type::forward(n, x, y);
#include "../ops/ops.def"
        default: return;
    }
}
template <class T>
static __device__ __forceinline__ void row_vjp(Op op, Index n, const T* dy, const T* saved, T* dx) {
    switch (op) {
#define CHAINRULE_ROWWISE(name, type, saves) \
    case Op::name: return type::vjp(n, dy, saved, dx);
#include "../ops/ops.def"
        default: return;
    }
}
template <class T>
static __device__ __forceinline__ void row_jvp(Op op, Index n, const T* dx, const T* saved, T* dy) {
    switch (op) {
#define CHAINRULE_ROWWISE(name, type, saves) \
    case Op::name: return type::jvp(n, dx, saved, dy);
#include "../ops/ops.def"
        default: return;
    }
}
template <class T>
static __device__ __forceinline__ void row_vjp_jvp(Op op, Index n, const T* v, const T* dx, const T* dv, const T* saved,
                                                   T* out) {
    switch (op) {
#define CHAINRULE_ROWWISE(name, type, saves) \
    case Op::name: return type::vjp_jvp(n, v, dx, dv, saved, out);
#include "../ops/ops.def"
        default: return;
    }
}
template <class T>
static __device__ __forceinline__ void row_jvp_jvp(Op op, Index n, const T* dx, const T* ddx, const T* saved, T* out) {
    switch (op) {
#define CHAINRULE_ROWWISE(name, type, saves) \
    case Op::name: return type::jvp_jvp(n, dx, ddx, saved, out);
#include "../ops/ops.def"
        default: return;
    }
}

// A row of weight 0 does not count, whatever its loss is: as leave_out of loss.hpp.
template <class T>
static __device__ __forceinline__ bool is_left_out(Index n, const T* weight, T* gradient) {
    if (!weight || *weight != 0) return false;
    for (Index j = first_column(); j < n; j += column_step<T>()) gradient[j] = 0;
    return true;
}

// The loss of one row, and ∂L/∂f; weight may be null.
template <class T>
static __device__ __forceinline__ T row_loss(LossOp op, Index n, const T* f, const Targets<T>& y, const T* weight,
                                             T scale, T* df, T param) {
    T value = 0;
    if (is_left_out(n, weight, df)) return value;
    switch (op) {
#define CHAINRULE_LOSS(name, type) \
    case LossOp::name: type::run(1, n, f, n, y, weight, scale, &value, df, n, param); break;
#include "../ops/ops.def"
        default: break;
    }
    return value;
}
// out = weight * scale * H t
template <class T>
static __device__ __forceinline__ void row_loss_hvp(LossOp op, Index n, const T* f, const Targets<T>& y,
                                                    const T* weight, T scale, const T* t, T* out, T param) {
    if (is_left_out(n, weight, out)) return;
    switch (op) {
#define CHAINRULE_LOSS(name, type)                                                                           \
    case LossOp::name:                                                                                       \
        return type::hvp(MatrixView<const T>{f, 1, n, n}, y, weight, scale, MatrixView<const T>{t, 1, n, n}, \
                         MatrixView<T>{out, 1, n, n}, param);
#include "../ops/ops.def"
        default: return;
    }
}

// ---- update rules ---------------------------------------------------------------------------------------------------

// Of weights and their slots, in place.
template <class T, int N>
static __device__ __forceinline__ void rule_update(OptimizerOp rule, Several<T, N>& w, const Several<T, N>& g,
                                                   Several<T, N> (&slots)[kSlots], const Hyper<T>& hyper) {
    static_assert(kSlots == 3, "each slot has its place here");
    switch (rule) {
#define CHAINRULE_OPTIMIZER(name, type)                                                   \
    case OptimizerOp::name:                                                               \
        CHAINRULE_EACH(c) {                                                               \
            const State<T> state = {{&slots[0].at[c], &slots[1].at[c], &slots[2].at[c]}}; \
            w.at[c] = type::update(0, Vec<T>(w.at[c]), Vec<T>(g.at[c]), state, hyper)[0]; \
        }                                                                                 \
        return;
#include "../ops/ops.def"
        default: return;
    }
}
#undef CHAINRULE_EACH

}  // namespace CHAINRULE_ISA

namespace cuda {
using namespace CHAINRULE_ISA;
}
}  // namespace chainrule
