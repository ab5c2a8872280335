// SPDX-License-Identifier: MIT
// L2: the table of kernels that each instruction set exports, and the choice between them.
#pragma once

#include "platform.hpp"

namespace chainrule {

// The ops by number, in the order of ops.def. Layers are the elementwise and row-wise ops.
enum class Op {
#define CHAINRULE_ELEMENTWISE(name, type, saves) name,
#define CHAINRULE_ROWWISE(name, type, saves) name,
#include "ops/ops.def"
    count
};
enum class LossOp {
#define CHAINRULE_LOSS(name, type) name,
#include "ops/ops.def"
    count
};
enum class OptimizerOp {
#define CHAINRULE_OPTIMIZER(name, type) name,
#include "ops/ops.def"
    count
};

enum class Saves { none, input, output };

static constexpr bool is_rowwise(Op op) {
    switch (op) {
#define CHAINRULE_ROWWISE(name, type, saves) \
    case Op::name: return true;
#include "ops/ops.def"
        default: return false;
    }
}

// Targets of a batch: class labels, or real values in padded rows.
template <class T>
struct Targets {
    const std::int64_t* labels;  // null where the targets are real
    const T* values;
    Index stride;
};

// The hyper-parameters of one step, with what depends on the step's number already worked out (see prepare_step). The
// complements 1 - β are taken in double: in float32 they would be off by 6e-6, and so would every step.
template <class T>
struct Hyper {
    T lr, weight_decay;
    T momentum, undamped, nesterov;                     // sgd; rmsprop uses momentum
    T rest1, beta2, rest2, eps, step_size, root_scale;  // adam, adamw: rest = 1 - β
    T alpha, rest_alpha, centered;                      // rmsprop
};

constexpr int kSlots = 3;  // the most state arrays that a rule keeps

// Matrices are given as pointer and row stride; see ops/op.hpp, ops/linear.hpp and optim.hpp for the meaning of each.
template <class T>
struct Products {
    void (*linear_forward)(Index rows, Index inputs, Index outputs, bool bias, const T* x, Index x_stride,
                           const T* forward, T* z, Index z_stride);
    void (*linear_forward_narrow)(Index rows, Index inputs, Index outputs, bool bias, const T* x, Index x_stride,
                                  const T* master, T* z, Index z_stride);
    void (*linear_jvp)(Index rows, Index inputs, Index outputs, bool bias, const T* dx, Index dx_stride,
                       const T* forward, T* dz, Index dz_stride, bool add);
    void (*linear_jvp_narrow)(Index rows, Index inputs, Index outputs, bool bias, const T* dx, Index dx_stride,
                              const T* master, T* dz, Index dz_stride, bool add);
    void (*linear_vjp_input)(Index rows, Index inputs, Index outputs, const T* dz, Index dz_stride, const T* backward,
                             T* dx, Index dx_stride, bool add);
    void (*linear_vjp_weight)(Index batch, Index count, Index width, const T* x, Index x_stride, const T* dz,
                              Index dz_stride, T* packed, T* tile, bool add);
    void (*linear_transpose)(Index inputs, Index outputs, Index first, Index count, Index column, const T* panel,
                             Index width, T* backward);
};
template <class T>
struct Maps {
    using Map = void (*)(Index rows, Index cols, const T* x, Index x_stride, T* y, Index y_stride, T param);
    using Derivative = void (*)(Index rows, Index cols, const T* in, Index in_stride, const T* saved,
                                Index saved_stride, T* out, Index out_stride, T param);
    using LossMap = void (*)(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y, const T* weight,
                             T scale, T* values, T* df, Index df_stride, T param);
    Map forward[static_cast<int>(Op::count)];
    Derivative vjp[static_cast<int>(Op::count)];
    Derivative jvp[static_cast<int>(Op::count)];
    LossMap loss[static_cast<int>(LossOp::count)];
    void (*optimize[static_cast<int>(OptimizerOp::count)])(Index n, T* w, const T* g, T scale, T* const* slots,
                                                           const Hyper<T>& hyper);
    void (*dropout)(Index rows, Index cols, const T* x, Index x_stride, T* y, Index y_stride, double p,
                    std::uint64_t key, std::uint64_t step, Index first_row);
    T (*penalize)(Index n, const T* w, T* g, T l1, T l2);
    void (*clip)(Index n, T* g, T limit);
    T (*sum_of_squares)(Index n, const T* g);
};
template <class T>
struct Kernels : Products<T>, Maps<T> {};

// What no training step needs: maps of second order (ops/op.hpp), and two that work on plain arrays (gemm.hpp).
template <class T>
struct SecondKernels {
    using Second = void (*)(MatrixView<const T> v, MatrixView<const T> dx, MatrixView<const T> dv,
                            MatrixView<const T> saved, MatrixView<T> out, T param);
    using LossHvp = void (*)(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                             MatrixView<const T> t, MatrixView<T> out, T param);

    Second vjp_jvp[static_cast<int>(Op::count)];  // v = c, dv = dc
    Second jvp_jvp[static_cast<int>(Op::count)];  // v = dx, dv = ddx
    LossHvp loss_hvp[static_cast<int>(LossOp::count)];
    void (*outer)(Index rows, Index cols, const T* a, const T* b, T* c, bool add);
    void (*transpose)(Index rows, Index cols, const T* a, Index a_stride, T* b, Index b_stride);
};
template <class T>
const SecondKernels<T>& second_kernels();

// The products of a linear layer on operands rounded to bfloat16; see ops/linear_bfloat16.hpp. `scratch` has kPairRoom pairs
// for each row.
constexpr Index kPairRoom = kDepth / 2 + kLine<float>;
struct Bfloat16Kernels {
    void (*forward)(Index rows, Index inputs, Index outputs, bool bias, const float* x, Index x_stride,
                    const float* master, const Pair* forward, float* z, Index z_stride, Pair* scratch);
    void (*vjp_input)(Index rows, Index inputs, Index outputs, const float* dz, Index dz_stride, const Pair* backward,
                      float* dx, Index dx_stride, Pair* scratch);
    void (*pair_rows)(Index rows, Index cols, const float* x, Index x_stride, Pair* to, Index to_stride);
    void (*vjp_weight)(Index batch, Index count, Index width, const Pair* x, Index x_stride, const float* dz,
                       Index dz_stride, Pair* packed, float* tile);
    void (*pack)(Index inputs, Index outputs, Index first, Index count, Index column, const float* panel, Index width,
                 Pair* forward, Pair* backward);
};
const Bfloat16Kernels& bfloat16_kernels();

// The table in use: the best this machine runs, or what the environment variable CHAINRULE_ISA named at start.
template <class T>
const Kernels<T>& kernels();

Isa active_isa();
bool select_isa(Isa isa);  // false where this build or this machine lacks it
bool built_in(Isa isa);

// An update rule with its hyper-parameters: sgd (momentum, dampening, nesterov, weight_decay), adam and adamw (beta1, beta2,
// eps, weight_decay), rmsprop (alpha, eps, weight_decay, momentum, centered).
struct OptimizerSettings {
    OptimizerOp rule;
    double values[5];
};
bool uses_slot(const OptimizerSettings& settings, int slot);
template <class T>
Hyper<T> prepare_step(const OptimizerSettings& settings, double lr, std::int64_t step);  // step = 1, 2, ...

}  // namespace chainrule
