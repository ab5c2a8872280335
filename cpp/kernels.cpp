// SPDX-License-Identifier: MIT
// The only file built once per instruction set (CHAINRULE_ISA names it): every kernel in that set's namespace, and one
// table of them per real type. Nothing here may call an inline function of the standard library; see platform.hpp.
#include "kernels.hpp"

#include "ops/dropout.hpp"
#include "ops/linear.hpp"
#include "ops/linear_bfloat16.hpp"
#include "optim.hpp"

#include "ops/cross_entropy.hpp"
#include "ops/elu.hpp"
#include "ops/gaussian_nll.hpp"
#include "ops/gelu.hpp"
#include "ops/huber.hpp"
#include "ops/identity.hpp"
#include "ops/leaky_relu.hpp"
#include "ops/least_squares.hpp"
#include "ops/log_softmax.hpp"
#include "ops/logistic.hpp"
#include "ops/mae.hpp"
#include "ops/mse.hpp"
#include "ops/pinball.hpp"
#include "ops/poisson.hpp"
#include "ops/relu.hpp"
#include "ops/sigmoid.hpp"
#include "ops/silu.hpp"
#include "ops/softmax.hpp"
#include "ops/softplus.hpp"
#include "ops/tanh.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

template <class Loss, class T>
void run_loss(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y, const T* weight, T scale,
              T* values, T* df, Index df_stride, T param) {
    Loss::run(rows, cols, f, f_stride, y, weight, scale, values, df, df_stride, param);
}

template <class Loss, class T>
void run_hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale, MatrixView<const T> t,
             MatrixView<T> out, T param) {
    Loss::hvp(f, y, weight, scale, t, out, param);
}

template <class T>
constexpr Products<T> products = {
    linear_forward<T>,   linear_forward_narrow<T>, linear_jvp<T>,       linear_jvp_narrow<T>,
    linear_vjp_input<T>, linear_vjp_weight<T>,     linear_transpose<T>,
};

template <class T>
constexpr Maps<T> maps = {
    {
#define CHAINRULE_ELEMENTWISE(name, type, saves) elementwise_forward<type, T>,
#define CHAINRULE_ROWWISE(name, type, saves) rowwise_forward<type, T>,
#include "ops/ops.def"
    },
    {
#define CHAINRULE_ELEMENTWISE(name, type, saves) elementwise_vjp<type, T>,
#define CHAINRULE_ROWWISE(name, type, saves) rowwise_vjp<type, T>,
#include "ops/ops.def"
    },
    {
#define CHAINRULE_ELEMENTWISE(name, type, saves) elementwise_vjp<type, T>,
#define CHAINRULE_ROWWISE(name, type, saves) rowwise_jvp<type, T>,
#include "ops/ops.def"
    },
    {
#define CHAINRULE_LOSS(name, type) run_loss<type, T>,
#include "ops/ops.def"
    },
    {
#define CHAINRULE_OPTIMIZER(name, type) optimize<type, T>,
#include "ops/ops.def"
    },
    dropout<T>,
    penalize<T>,
    clip<T>,
    sum_of_squares<T>,
};

#if !defined(__AVX512F__)  // which takes AVX2's; see dispatch.cpp
template <class T>
constexpr SecondKernels<T> second_table = {
    {
#define CHAINRULE_ELEMENTWISE(name, type, saves) elementwise_second<type, T>,
#define CHAINRULE_ROWWISE(name, type, saves) rowwise_vjp_jvp<type, T>,
#include "ops/ops.def"
    },
    {
#define CHAINRULE_ELEMENTWISE(name, type, saves) elementwise_second<type, T>,
#define CHAINRULE_ROWWISE(name, type, saves) rowwise_jvp_jvp<type, T>,
#include "ops/ops.def"
    },
    {
#define CHAINRULE_LOSS(name, type) run_hvp<type, T>,
#include "ops/ops.def"
    },
    outer<T>,
    transpose<T>,
};

extern const SecondKernels<float> float32_second;
extern const SecondKernels<double> float64_second;
const SecondKernels<float> float32_second = second_table<float>;
const SecondKernels<double> float64_second = second_table<double>;

extern const Maps<double> float64_maps;
const Maps<double> float64_maps = maps<double>;
#endif

extern const Products<float> float32_products;
extern const Products<double> float64_products;
extern const Maps<float> float32_maps;
extern const Bfloat16Kernels bfloat16_kernels;
const Products<float> float32_products = products<float>;
const Products<double> float64_products = products<double>;
const Maps<float> float32_maps = maps<float>;
const Bfloat16Kernels bfloat16_kernels = {linear_bfloat16_forward, linear_bfloat16_vjp_input, linear_bfloat16_pair_rows,
                                          linear_bfloat16_vjp_weight, linear_bfloat16_pack};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
