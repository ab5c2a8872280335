// SPDX-License-Identifier: MIT
// L3: the engine on NVIDIA GPUs, as the bindings see it: the classes of network.hpp, train.hpp and calculus.hpp with the same
// methods, so that one text of bindings serves both. Arrays of the caller's may lie on the host or on the network's device;
// buffers of the engine's own, laid out like theta, lie on the device. Nothing here needs CUDA's headers.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda/memory.hpp"
#include "loss.hpp"
#include "network.hpp"
#include "train.hpp"

namespace chainrule {
namespace cuda {

enum class Schedule { by_size, resident, fused, library };

std::string state();  // "" if there is a usable GPU, else what is missing
int device_count();   // 0 where there is none
std::string device_name(int device);
bool has_clusters(int device);
void synchronize(int device);
template <class T>
bool all_finite(int device, const T* at, Index size);  // an array of the caller's, there
// Of trainers made from now on; `blocks` for each network of the resident schedule, 0 by size.
void force_schedule(Schedule schedule, int blocks = 0);
// Locks it. `wait_by` says how to wait where somebody has it: the bindings give Python's lock away meanwhile, which a training in
// another thread asks for every 20 ms.
std::unique_lock<std::mutex> hold(std::mutex& mutex);
void wait_by(void (*how)(const std::function<void()>& wait));
// Where cuBLASLt may lie if the loader does not know it; to be said before the first trainer is made.
void look_for_libraries(std::vector<std::string> folders);

// A network's parameters on a device: for each linear layer W (O, I), then b (O), as in a state dict.
template <class T>
class Network {
   public:
    Network(std::vector<Layer<T>> layers, Precision precision, int device);
    ~Network();

    const std::vector<Layer<T>>& layers() const { return layers_; }
    const std::vector<Parameter>& parameters() const { return parameters_; }
    Index depth() const { return static_cast<Index>(layers_.size()); }
    Index inputs() const { return layers_.front().inputs; }
    Index outputs() const { return layers_.back().outputs; }
    bool has_external() const { return false; }
    double multiplies_per_row() const { return multiplies_; }
    Index first_cotangent() const { return first_cotangent_; }
    Precision precision() const { return precision_; }
    int device() const { return device_; }

    T* theta() const { return theta_.data(); }
    Index size() const { return theta_.size(); }
    std::uint64_t changes() const { return changes_.load(std::memory_order_acquire); }
    void count_change() { changes_.fetch_add(1, std::memory_order_release); }

    void read(const Parameter& parameter, const T* flat, T* to) const;
    void write(const Parameter& parameter, const T* from);
    using Snapshot = Buffer<T>;  // there, where a copy takes no time
    Snapshot snapshot() const;
    void restore(const Snapshot& snapshot);
    bool all_finite() const;
    void publish() {}

    void predict(Index rows, const T* x, T* f) const;
    // The output of every layer.
    void trace(Index rows, const T* x, T* const* phi) const;

    // What the engine keeps for it; one caller at a time.
    struct Runtime;
    Runtime& runtime() const { return *runtime_; }

   private:
    std::vector<Layer<T>> layers_;
    std::vector<Parameter> parameters_;
    Precision precision_;
    int device_;
    double multiplies_ = 0;
    Index first_cotangent_ = 0;
    Buffer<T> theta_;
    std::atomic<std::uint64_t> changes_{0};
    std::unique_ptr<Runtime> runtime_;
};

template <class T>
class Optimizer {
   public:
    Optimizer(const Network<T>& net, const OptimizerSettings& settings);
    const OptimizerSettings settings;
    std::int64_t step_count = 0;
    Buffer<T> slots[kSlots];  // laid out like theta; empty where the rule does not use them

    // In the layout of chainrule::Optimizer, so that a state made on one device fits on the other.
    Array<T> slot(int number) const;
    void set_slot(int number, const T* from);
    Index slot_size(int number) const;

   private:
    const Network<T>& net_;
};

// Work of one training step on up to `rows` rows.
template <class T>
class Step {
   public:
    Step(Network<T>& net, const Loss<T>& loss, Index rows, Index target_cols, const Extras& extras = {});
    ~Step();
    double sweep(const Dataset<T>& data, const std::int64_t* order, Index rows, const Noise& noise,
                 bool backward = true);
    const T* gradient();

    struct Work;

   private:
    std::unique_ptr<Work> work_;
};

template <class T>
double evaluate(Network<T>& net, const Loss<T>& loss, const Dataset<T>& data);

template <class T>
class Trainer {
   public:
    Trainer(Network<T>& net, Optimizer<T>& optimizer, const Loss<T>& loss, const Dataset<T>& data,
            const TrainerOptions& options);
    ~Trainer();
    Index steps_per_epoch() const;
    std::vector<double> run(Index first_epoch, Index epochs, const double* lr, Index lr_stride);
    double step(const Dataset<T>& batch, double lr);
    Schedule schedule() const;
    int blocks() const;                          // that share a batch in the resident schedule; else 0
    int graphs() const;                          // made so far
    std::pair<int, int> library_shapes() const;  // of its products: those that cuBLASLt makes, and all given to it

    struct Work;
    Work& work() const { return *work_; }

   private:
    std::unique_ptr<Work> work_;
};

// `run` of several trainers at once, lr[k * lr_network + epoch * lr_stride + step * (lr_stride > 1)]; the losses of each.
template <class T>
std::vector<std::vector<double>> run_many(const std::vector<Trainer<T>*>& trainers, Index first_epoch, Index epochs,
                                          const double* lr, Index lr_network, Index lr_stride);

// See chainrule::Direction: Ẇ, laid out like theta.
template <class T>
class Direction {
   public:
    explicit Direction(const Network<T>& net) : net_(net) {}
    void clear();
    void set(const Parameter& parameter, const T* from);
    const T* data() const { return theta_.data(); }

   private:
    void prepare();
    const Network<T>& net_;
    Buffer<T> theta_;
};

// See chainrule::Derivatives.
template <class T>
class Derivatives {
   public:
    explicit Derivatives(Network<T>& net);
    ~Derivatives();
    Direction<T>& direction() { return direction_; }

    void jvp(Index rows, const T* x, const T* dx, bool along_parameters, T* f, T* df);
    void sensitivity(Index rows, const T* x, Index input, T* f, T* df);
    void vjp(Index rows, const T* x, const T* c, T* f, T* const* dphi, T* const* to);
    void jacobian(Index rows, const T* x, bool reverse, T* j);
    void parameter_jacobian(Index rows, const T* x, T* const* j);
    void second(Index rows, const T* x, bool sum, T* to);
    double gradient(const Dataset<T>& data, const Loss<T>& loss, T* const* to);
    void input_gradient(const Dataset<T>& data, const Loss<T>& loss, T* dx);
    void hvp(const Dataset<T>& data, const Loss<T>& loss, T* const* to);
    void gauss_newton(const Dataset<T>& data, const Loss<T>& loss, T* const* to);
    void example_gradients(const Dataset<T>& data, const Loss<T>& loss, T* const* to);
    void example_norms(const Dataset<T>& data, const Loss<T>& loss, T* norms);

   private:
    Direction<T> direction_;
    struct Work;
    std::unique_ptr<Work> work_;
};

// The derivatives that a network keeps for its next caller; a second one at the same time makes its own.
template <class T>
class DerivativesOf {
   public:
    explicit DerivativesOf(Network<T>& net) : net_(net) {}
    class Lease {
       public:
        explicit Lease(DerivativesOf& owner)
            : owner_(owner), borrowed_(!owner.taken_.exchange(true, std::memory_order_acquire)) {
            if (borrowed_) held_ = std::move(owner.kept_);
            if (!held_) try {
                    held_ = std::make_unique<Derivatives<T>>(owner.net_);
                } catch (...) {
                    give_back();
                    throw;
                }
        }
        ~Lease() { give_back(); }
        Lease(const Lease&) = delete;
        Lease& operator=(const Lease&) = delete;
        Derivatives<T>* operator->() { return held_.get(); }

       private:
        void give_back() {
            if (!borrowed_) return;
            owner_.kept_ = std::move(held_);
            owner_.taken_.store(false, std::memory_order_release);
        }
        DerivativesOf& owner_;
        const bool borrowed_;
        std::unique_ptr<Derivatives<T>> held_;
    };

   private:
    Network<T>& net_;
    std::atomic<bool> taken_{false};
    std::unique_ptr<Derivatives<T>> kept_;
};

}  // namespace cuda
}  // namespace chainrule
