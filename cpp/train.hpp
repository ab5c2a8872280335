// SPDX-License-Identifier: MIT
// L3: training. One step has two phases and two barriers, and no reduction of gradients:
//   1. over rows:  gather the batch, forward through all layers, the loss, all cotangents back to the input;
//   2. over tiles: each tile of a weight's gradient is summed over the batch by one thread in fixed order, and the update
//                  rule is applied while the tile is in the cache; the transposed copy of the weights is written too.
// Where the whole gradient must be seen first (clipping by norm, a caller who asks for it), phase 2 stores it and the rule
// runs in a pass of its own: the same kernels on the same tiles, hence the same bits.
#pragma once

#include <functional>

#include "network.hpp"

namespace chainrule {

// Rows of examples in plain row-major arrays that somebody else owns.
template <class T>
struct Dataset {
    Index rows;
    const T* x;                  // (rows, inputs)
    const std::int64_t* labels;  // (rows), or null
    const T* y;                  // (rows, target_cols), or null
    Index target_cols;
    const T* weight;  // (rows), or null
};

// A loss that lives outside the engine: a user's Python callable.
template <class T>
class ExternalLoss {
   public:
    virtual ~ExternalLoss() = default;
    // Value of the batch; writes dL/df. scale * weight[i] is what a per-example loss is to be multiplied by.
    virtual double value_grad(MatrixView<const T> f, const Targets<T>& y, Index target_cols, const T* weight, T scale,
                              MatrixView<T> df) = 0;
};

template <class T>
struct Loss {
    LossOp op;
    double param;
    bool mean;  // over examples; else their sum
    std::shared_ptr<ExternalLoss<T>> external;
};

// What is done to the gradient before the update rule sees it; 0 switches a part off.
struct Regularization {
    double l1, l2, clip_value, clip_norm;
};

template <class T>
class Optimizer {
   public:
    Optimizer(const Network<T>& net, const OptimizerSettings& settings);
    const OptimizerSettings settings;
    std::int64_t step_count = 0;
    Array<T> slots[kSlots];  // laid out like theta; empty where the rule does not use them
};

// The work of one training step on up to `rows` rows of one network, with all memory it needs.
template <class T>
class Step {
   public:
    Step(Network<T>& net, const Loss<T>& loss, Index rows, Index target_cols);
    Index capacity() const { return activations_.rows(); }

    // Phase 1 on the rows order[0..rows) of the data (or 0..rows where order is null). Returns the loss. Without `backward`
    // it ends there.
    double sweep(const Dataset<T>& data, const std::int64_t* order, Index rows, const Noise& noise,
                 bool backward = true);
    double total_weight() const { return total_weight_; }  // of that batch; its rows where none is given
    // Phase 2, one of the two. `update` is step number optimizer.step_count + 1 and returns the penalty.
    double update(Optimizer<T>& optimizer, double lr, const Regularization& regularization);
    const T* gradient();  // laid out like theta

    MatrixView<T> output_cotangent() const { return activations_.dphi(net_->depth()); }  // dL/df after sweep

   private:
    // A tile of a linear layer's gradient: `count` rows from `first`, `width` columns from `column` of its master copy,
    // or all of an external layer's gradient. It begins at `place` of a buffer laid out like theta.
    struct Unit {
        enum class Kind { wide, narrow, external };
        Kind kind;
        Index layer, column, width, first, count, place;
        Index size() const { return count * width; }
    };
    void plan();
    void plan_wide(Index l, const Layer<T>& layer);
    void plan_narrow(Index l, const Layer<T>& layer);
    void gather(const Dataset<T>& data, const std::int64_t* order, Index begin, Index end);
    void weigh(const Dataset<T>& data, const std::int64_t* order);
    void run_loss(Index begin, Index end);
    double total_loss() const;
    struct Scratch {  // of one thread
        T *tile, *packed;
        Pair *x_pairs, *packed_pairs;
        const Unit* paired_for;  // whose rows x_pairs holds
    };
    void differentiate(const Unit& unit, Scratch& scratch, T* tile) const;
    void differentiate_paired(const Unit& unit, MatrixView<float> x, MatrixView<float> dz, Scratch& scratch,
                              float* tile) const;
    double regularize(const Unit& unit, T* tile, const Regularization& regularization) const;
    void apply(const Unit& unit, const T* tile, T scale, Optimizer<T>& optimizer, const Hyper<T>& hyper) const;
    template <class F>
    void over_units(F f);
    Array<T>& stored_gradient();

    Network<T>* net_;
    Loss<T> loss_;
    Activations<T> activations_;
    Index tile_inputs_, target_cols_, target_stride_;
    Array<T> targets_, weights_, values_, gradient_, tiles_;
    Array<Pair> pairs_;
    Array<std::int64_t> labels_;
    bool has_bfloat16_ = false;
    bool weighted_ = false;
    double total_weight_ = 0;
    T scale_ = 0;
    Index rows_ = 0;  // of the batch in hand
    std::vector<Unit> units_;
    double work_ = 0;                          // elements of all units
    std::vector<double> middles_;              // elements before the middle of each: where it lies decides who does it
    std::vector<double> penalties_, squares_;  // of each unit
};

// Mean or summed loss over a whole data set, dropout off.
template <class T>
double evaluate(Network<T>& net, const Loss<T>& loss, const Dataset<T>& data);

struct TrainerOptions {
    Index batch_size;
    bool shuffle;
    std::uint64_t seed;
    Regularization regularization;
};

// The epoch loop over one data set.
template <class T>
class Trainer {
   public:
    Trainer(Network<T>& net, Optimizer<T>& optimizer, const Loss<T>& loss, const Dataset<T>& data,
            const TrainerOptions& options);

    Index steps_per_epoch() const;
    // Trains the epochs first_epoch, first_epoch + 1, … with learning rates lr[epoch * lr_stride + step * (lr_stride > 1)].
    // Returns each epoch's mean loss; stops after one that is not finite. `poll` is called every 20 ms or so, between steps.
    std::vector<double> run(Index first_epoch, Index epochs, const double* lr, Index lr_stride,
                            const std::function<void()>& poll);
    // One update on a batch of the caller's.
    double step(const Dataset<T>& batch, double lr);

   private:
    Network<T>& net_;
    Optimizer<T>& optimizer_;
    Dataset<T> data_;
    TrainerOptions options_;
    Loss<T> loss_;
    Step<T> step_;
    Array<std::int64_t> order_;
    double run_batch(Index first, Index rows, double lr);
    double one_step(const Dataset<T>& data, const std::int64_t* order, Index rows, double lr);
};

extern template class Optimizer<float>;
extern template class Optimizer<double>;
extern template class Step<float>;
extern template class Step<double>;
extern template class Trainer<float>;
extern template class Trainer<double>;

}  // namespace chainrule
