// SPDX-License-Identifier: MIT
// L3: training. One step has two phases and two barriers, and no reduction of gradients:
//   1. over rows:  gather the batch, forward through all layers, the loss, all cotangents back to the input (the first wide
//                  layers of a small batch over columns instead: columns.hpp);
//   2. over tiles: each tile of a weight's gradient is summed over the batch by one thread in fixed order, and the update
//                  rule is applied while the tile is in the cache; the transposed copy of the weights is written too.
// Where the whole gradient must be seen first (clipping by norm, a caller who asks for it), phase 2 stores it and the rule
// runs in a pass of its own: the same kernels on the same tiles, hence the same bits.
#pragma once

#include <memory>

#include "loss.hpp"
#include "network.hpp"
#include "sobolev.hpp"
#include "tiles.hpp"

namespace chainrule {

// What phase 1 does beside the plain loss.
struct Extras {
    bool sobolev = false;  // the second term of sobolev.hpp, for data with dy
    double clip_example_norm =
        0;  // limit for each example's own gradient; 0: none. Not with users' layers or Sobolev's term
};

// What is done to the gradient before the update rule sees it; 0 switches a part off.
struct Regularization {
    double l1, l2, clip_value, clip_norm;
};

template <class T>
class Optimizer {
   public:
    CHAINRULE_COLD Optimizer(const Network<T>& net, const OptimizerSettings& settings);
    const OptimizerSettings settings;
    std::int64_t step_count = 0;
    Array<T> slots[kSlots];  // laid out like theta; empty where the rule does not use them
    const Array<T>& slot(int number) const { return slots[number]; }
    Index slot_size(int number) const { return slots[number].size(); }
    void set_slot(int number, const T* from) { std::copy_n(from, slot_size(number), slots[number].data()); }
};

// The work of one training step on up to `rows` rows of one network, with all memory it needs.
template <class T>
class Step {
   public:
    CHAINRULE_COLD Step(Network<T>& net, const Loss<T>& loss, Index rows, Index target_cols, const Extras& extras = {});
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
    using Scratch = typename Tiles<T>::Scratch;
    void choose_parts(double products);  // of a row with all weights
    void gather(const Dataset<T>& data, const std::int64_t* order, Index begin, Index end);
    void weigh(const Dataset<T>& data, const std::int64_t* order);
    void run_loss(Index begin, Index end);
    double total_loss() const;
    double sweep_sobolev(const Dataset<T>& data, const std::int64_t* order, Index rows, const Noise& noise);
    void clip_examples(Index begin, Index end) const;
    void differentiate(const Tile& tile, Scratch& scratch, T* gradient) const;
    double regularize(const Tile& tile, T* gradient, const Regularization& regularization) const;
    void apply(const Tile& tile, const T* gradient, T scale, Optimizer<T>& optimizer, const Hyper<T>& hyper) const;
    template <class F>
    void over_tiles(F f);
    Array<T>& stored_gradient();

    Network<T>* net_;
    Loss<T> loss_;
    Activations<T> activations_;
    Tiles<T> tiles_;
    std::unique_ptr<Sobolev<T>> sobolev_;  // null: values only
    double clip_example_norm_;
    Index target_cols_, target_stride_;
    Array<T> targets_, weights_, values_, gradient_;
    Array<std::int64_t> labels_;
    bool weighted_ = false;
    double total_weight_ = 0;
    T scale_ = 0;
    Index rows_ = 0;                           // of the batch in hand
    int parts_ = 1;                            // threads that its work is worth
    std::vector<double> penalties_, squares_;  // of each tile
};

// Mean or summed loss over a whole data set, dropout off.
template <class T>
double evaluate(Network<T>& net, const Loss<T>& loss, const Dataset<T>& data);

struct TrainerOptions {
    Index batch_size;
    bool shuffle;
    std::uint64_t seed;
    Regularization regularization;
    double clip_example_norm = 0;
};

// The epoch loop over one data set.
template <class T>
class Trainer {
   public:
    CHAINRULE_COLD Trainer(Network<T>& net, Optimizer<T>& optimizer, const Loss<T>& loss, const Dataset<T>& data,
                           const TrainerOptions& options);

    Index steps_per_epoch() const;
    // Trains the epochs first_epoch, first_epoch + 1, … with learning rates lr[epoch * lr_stride + step * (lr_stride > 1)].
    // Returns each epoch's mean loss; stops after one that is not finite. May be interrupted between steps.
    std::vector<double> run(Index first_epoch, Index epochs, const double* lr, Index lr_stride);
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
