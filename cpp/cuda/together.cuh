// SPDX-License-Identifier: MIT
// L3: many networks at once, each a block or a cluster of the resident schedule.
#pragma once

#include "trainer.cuh"

namespace chainrule {
namespace cuda {

template <class T>
bool same_layers(const std::vector<Layer<T>>& a, const std::vector<Layer<T>>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Layer<T>& x, const Layer<T>& y) {
        return x.kind == y.kind && x.inputs == y.inputs && x.outputs == y.outputs && x.bias == y.bias && x.op == y.op &&
               x.param == y.param;
    });
}

// Whether all of them take the same path through one launch: each by the resident schedule, with one program.
template <class T>
bool run_together(const std::vector<Trainer<T>*>& trainers) {
    const auto& first = trainers.front()->work();
    for (const Trainer<T>* trainer : trainers) {
        const auto& work = trainer->work();
        bool same = work.schedule == Schedule::resident && work.net.device() == first.net.device() &&
                    same_layers(work.net.layers(), first.net.layers()) && work.planned == first.planned &&
                    (work.options.regularization.clip_norm != 0) == (first.options.regularization.clip_norm != 0);
        for (int s = 0; s < kSlots; ++s)
            same = same && (work.optimizer.slots[s].size() > 0) == (first.optimizer.slots[s].size() > 0);
        if (!same) return false;
    }
    return true;
}

// The epochs of networks whose epochs have as many launches; one that diverges sits out the rest, once that is known. What the
// blocks need goes to the device in a copy for all of them, and comes back in one: with copies and waits of each, these take
// longer than the steps.
template <class T>
class Together {
   public:
    using Work = typename Trainer<T>::Work;
    explicit Together(const std::vector<Trainer<T>*>& trainers) : losses_(trainers.size()) {
        Index steps = 0;
        for (const Trainer<T>* trainer : trainers) {
            all_.push_back(&trainer->work());
            steps += all_.back()->steps();
        }
        const Index networks = static_cast<Index>(all_.size());
        program_ = first().plan(networks);
        const int device = first().net.device();
        jobs_ = Buffer<Job<T>>(device, networks, "networks at work");
        controls_ = Buffer<Control>(device, networks, "networks at work");
        rates_ = Buffer<Hyper<T>>(device, steps, "the rates of an epoch");
        for (Group& group : groups_) {
            group.flight.job.grow(networks);
            group.flight.control.grow(2 * networks);
            group.flight.rates.grow(steps);
        }
    }
    cudaStream_t stream() const { return first().net.runtime().stream; }

    // rates(n): the learning rates of network n.
    template <class Rates>
    void enqueue(Index k, Index number, Rates rates, Index lr_stride) {
        Group& group = groups_[k % kFlights];
        group.networks.clear();
        rates_used_ = 0;
        Index most = 0;
        for (std::size_t n = 0; n < all_.size(); ++n) {
            if (has_diverged(n)) continue;
            add(group, n, k, number, rates(n), lr_stride);
            most = std::max(most, all_[n]->steps());
        }
        const Index networks = static_cast<Index>(group.networks.size());
        Flight<T>& flight = group.flight;
        upload(rates_.data(), flight.rates.data(), rates_used_, stream());
        upload(controls_.data(), flight.control.data(), networks, stream());
        upload(jobs_.data(), flight.job.data(), networks, stream());
        for (Index done = 0; done < most; done += kStepsInLaunch) {
            ResidentLaunch<T>(first().net.runtime(), program_, networks)(jobs_.data(), kStepsInLaunch);
            for (const std::size_t n : group.networks)
                all_[n]->optimizer.step_count += std::clamp<Index>(all_[n]->steps() - done, 0, kStepsInLaunch);
            if (done + kStepsInLaunch >= most) break;
            flight.done.record(stream());
            wait(flight.done);
        }
        download(flight.control.data() + networks, controls_.data(), networks, stream());
        flight.done.record(stream());
        Interruptible::look_up();
    }
    void end(Index k) {
        const Group& group = groups_[k % kFlights];
        wait(group.flight.done);
        const Control* after = group.flight.control.data() + group.networks.size();
        for (const std::size_t n : group.networks) {
            const double loss = all_[n]->end_epoch(*after++);
            if (!has_diverged(n)) losses_[n].push_back(loss);
        }
    }
    const std::vector<std::vector<double>>& losses() const { return losses_; }

   private:
    struct Group {
        Flight<T> flight;
        std::vector<std::size_t> networks;  // those that still train, by their places
    };
    Work& first() const { return *all_.front(); }
    bool has_diverged(std::size_t n) const { return !losses_[n].empty() && !std::isfinite(losses_[n].back()); }

    // The next block's network. An order or rates that the one before has, too, it takes from there.
    void add(Group& group, std::size_t n, Index k, Index number, const double* lr, Index lr_stride) {
        Work& work = *all_[n];
        const Index place = static_cast<Index>(group.networks.size());
        const Work* before = place == 0 ? nullptr : all_[group.networks.back()];
        Job<T>& job = group.flight.job[place];
        job = work.job(work.source, work.rows, work.batch());
        job.control = controls_.data() + place;
        if (work.options.shuffle) {
            const bool same = before && before->options.shuffle && before->options.seed == work.options.seed &&
                              before->rows == work.rows;
            if (same)
                job.data.rows.order = group.flight.job[place - 1].data.rows.order;
            else
                work.draw_order(work.flights[k % kFlights], number, stream());
        }
        const Index steps = work.steps();
        if (before && same_rates(*before, work) && std::equal(lr, lr + (lr_stride > 1 ? steps : 1), lr_)) {
            job.hyper = group.flight.job[place - 1].hyper;
        } else {
            job.hyper = rates_.data() + rates_used_;
            work.take_rates(steps, lr, lr_stride, group.flight.rates.data() + rates_used_);
            rates_used_ += steps;
        }
        lr_ = lr;
        group.flight.control[place] = Control{};
        group.flight.control[place].drawn = work.optimizer.step_count;
        work.net.count_change();
        group.networks.push_back(n);
    }
    static bool same_rates(const Work& a, const Work& b) {
        const OptimizerSettings &x = a.optimizer.settings, &y = b.optimizer.settings;
        return a.steps() == b.steps() && a.optimizer.step_count == b.optimizer.step_count && x.rule == y.rule &&
               std::equal(std::begin(x.values), std::end(x.values), std::begin(y.values));
    }

    std::vector<Work*> all_;
    Program program_;
    std::vector<std::vector<double>> losses_;
    Group groups_[kFlights];
    const double* lr_ = nullptr;  // the last one's
    Index rates_used_ = 0;
    Buffer<Job<T>> jobs_;
    Buffer<Control> controls_;
    Buffer<Hyper<T>> rates_;
};

template <class T>
std::vector<std::vector<double>> run_many(const std::vector<Trainer<T>*>& trainers, Index first_epoch, Index epochs,
                                          const double* lr, Index lr_network, Index lr_stride) {
    const auto rates_of = [&](std::size_t n, Index epoch) {
        return lr + static_cast<Index>(n) * lr_network + epoch * lr_stride;
    };
    if (!run_together(trainers)) {
        for (Trainer<T>* trainer : trainers) {  // before one of them has been trained
            const OnDevice here(trainer->work().net.device());
            const auto held = trainer->work().net.runtime().hold();
            trainer->work().make_room_for_rates(trainer->work().steps());
        }
        std::vector<std::vector<double>> losses;
        for (std::size_t n = 0; n < trainers.size(); ++n)
            losses.push_back(trainers[n]->run(first_epoch, epochs, rates_of(n, 0), lr_stride));
        return losses;
    }
    const OnDevice here(trainers.front()->work().net.device());
    std::vector<std::unique_lock<std::mutex>> locks;
    for (const Trainer<T>* trainer : trainers) locks.push_back(trainer->work().net.runtime().hold());
    Together<T> together(trainers);
    fly(
        together.stream(), epochs,
        [&](Index k) {
            together.enqueue(k, first_epoch + k, [&](std::size_t n) { return rates_of(n, k); }, lr_stride);
        },
        [&](Index k) {
            together.end(k);
            return true;
        });
    return together.losses();
}

}  // namespace cuda
}  // namespace chainrule
