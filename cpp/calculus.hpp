// SPDX-License-Identifier: MIT
// L3: every derivative of a whole network, in both modes and to second order. A training step needs one of them and has
// its own, shorter way (train.hpp); here subnormal numbers keep their value, and what is asked for comes out: J t, c J,
// whole Jacobians, each example's own gradient, Hessian-vector products, second derivatives in the inputs.
#pragma once

#include <memory>
#include <optional>

#include "loss.hpp"
#include "tape.hpp"
#include "tiles.hpp"

namespace chainrule {

// What is asked of a network, with all memory it takes; one caller at a time. Arrays are the caller's, plain and row-major.
template <class T>
class Derivatives {
   public:
    explicit Derivatives(const Network<T>& net) : net_(net), tape_(net), direction_(net) {}
    Direction<T>& direction() { return direction_; }
    Index bytes() const;

    // f and its tangent along dx (null: 0) and, if wanted, along `direction()`.
    void jvp(Index rows, const T* x, const T* dx, bool along_parameters, T* f, T* df);
    // f and its tangent along one input, which moves by 1.
    void sensitivity(Index rows, const T* x, Index input, T* f, T* df);
    // f and the cotangents of all φˡ below c, each null where nobody wants it; the gradient, if not null: to[k] is parameter k's,
    // plain, here and everywhere.
    void vjp(Index rows, const T* x, const T* c, T* f, T* const* dphi, T* const* to);
    // J (rows, O, I), its rows by reverse or its columns by forward mode.
    void jacobian(Index rows, const T* x, bool reverse, T* j);
    // For each parameter: its Jacobian (rows, O, shape).
    void parameter_jacobian(Index rows, const T* x, T* const* j);
    // ∂²f_o/∂x_i² (rows, O, I), or its sum over i (rows, O).
    void second(Index rows, const T* x, bool sum, T* to);

    // Of the loss over all examples: itself and its gradient, with the bits of a training step; its gradient in X; H v and
    // Jᵀ H_L J v for v = `direction()`.
    double gradient(const Dataset<T>& data, const Loss<T>& loss, T* const* to);
    void input_gradient(const Dataset<T>& data, const Loss<T>& loss, T* dx);
    void hvp(const Dataset<T>& data, const Loss<T>& loss, T* const* to);
    void gauss_newton(const Dataset<T>& data, const Loss<T>& loss, T* const* to);
    // Of each example's own loss: its gradient, for each parameter (rows, shape), and that gradient's norm.
    void example_gradients(const Dataset<T>& data, const Loss<T>& loss, T* const* to);
    void example_norms(const Dataset<T>& data, const Loss<T>& loss, T* norms);

   private:
    using Kind = typename Tape<T>::Kind;
    struct Batch {  // of a data set under a loss: rows [first, first + rows)
        const Dataset<T>& data;
        const Loss<T>& loss;
        T scale;
        Index first, rows;
    };
    int parts(Index rows) const;
    void over(Index rows, const Ranges& f);
    void by_batches(const Dataset<T>& data, const Loss<T>& loss, const Call<const Batch&>& f);
    void load_targets(const Batch& batch, Index begin, Index end);
    Targets<T> targets(const Batch& batch, Index begin) const;
    const T* weights(const Batch& batch, Index begin) const;
    void loss_gradient(const Batch& batch, Index begin, Index end);
    void loss_hvp(const Batch& batch, Index begin, Index end, Kind to);
    void difference_of_gradients(const Batch& batch, MatrixView<T> out);
    void up_and_down(const Batch& batch, const Ranges& up, const Ranges& top, const Ranges& down);
    void down_to_parameters(const Batch& batch);
    void outer_products(Kind cotangents, Kind inputs, Index lowest, Index begin, Index end, T* const* to) const;
    void example_gradients(Index begin, Index end, T* const* to) const;
    void own_gradients(Index begin, Index end, T* const* to) const;
    double square_of_gradient(Index layer, Index row) const;
    T* flat_gradient();
    void leave_gradient(Kind cotangents, Index moving, Index first, Index all, T* const* to);
    void add_gradient(Kind cotangents, Index moving, bool add);

    const Network<T>& net_;
    Tape<T> tape_;
    Direction<T> direction_;
    std::optional<Tiles<T>> tiles_;
    Index tiles_rows_ = 0;
    Array<T> gradient_, targets_, values_;
};

// The derivatives that a network keeps for its next caller, unless they take much memory; one caller at a time has them, and
// a second one makes its own.
template <class T>
class DerivativesOf {
   public:
    explicit DerivativesOf(const Network<T>& net) : net_(net) {}

    class Lease {
       public:
        explicit Lease(DerivativesOf& owner);
        ~Lease();
        Lease(const Lease&) = delete;
        Lease& operator=(const Lease&) = delete;
        Derivatives<T>* operator->() { return held_.get(); }

       private:
        DerivativesOf& owner_;
        const bool borrowed_;
        std::unique_ptr<Derivatives<T>> held_;
        std::optional<Burst> burst_;
    };

   private:
    const Network<T>& net_;
    std::atomic<bool> taken_{false};
    std::unique_ptr<Derivatives<T>> kept_;
};

extern template class Derivatives<float>;
extern template class Derivatives<double>;
extern template class DerivativesOf<float>;
extern template class DerivativesOf<double>;

}  // namespace chainrule
