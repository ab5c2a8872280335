// SPDX-License-Identifier: MIT
// L3: the epoch loop on a device. The host draws each epoch's order while the device still works on the one before, puts the
// rates of its steps beside it, and reads one number back at the end.
#pragma once

#include <chrono>
#include <map>
#include <thread>

#include "../random.hpp"
#include "resident.cuh"
#include "step.cuh"

namespace chainrule {
namespace cuda {

// How many steps one graph has: launching a graph costs the host as much as a small step costs the device.
constexpr Index kStepsInGraph = 16;
// And how many the resident schedule takes in one launch: some 10 ms of work, so that an interrupt is heard.
constexpr int kStepsInLaunch = 1024;

// Calls poll() every 20 ms or so.
class Poller {
   public:
    explicit Poller(const std::function<void()>& poll) : poll_(poll) {}
    void operator()() {
        const auto now = Clock::now();
        if (now - last_ < std::chrono::milliseconds(20)) return;
        poll_();
        last_ = now;
    }

   private:
    using Clock = std::chrono::steady_clock;
    const std::function<void()>& poll_;
    Clock::time_point last_ = Clock::now();
};

inline std::atomic<Schedule> forced_schedule{Schedule::by_size};

template <class T>
struct Trainer<T>::Work {
    Work(Network<T>& network, Optimizer<T>& rule, const Loss<T>& the_loss, const Dataset<T>& dataset,
         const TrainerOptions& the_options)
        : net(network),
          optimizer(rule),
          options(the_options),
          rows(dataset.rows),
          step(net, the_loss, std::min(options.batch_size, rows), {dataset.dy != nullptr, options.clip_example_norm},
               true),
          order(net.device(), options.shuffle ? rows : 0, "the order of an epoch"),
          host_order(options.shuffle ? static_cast<std::size_t>(rows) : 0) {
        data.take(net, dataset, net.runtime().stream);
        source = data.source();
        source.rows = {options.shuffle ? order.data() : nullptr, &step.control.data()->first};
        net.runtime().stream.wait();
        choose();
    }

    Index batch() const { return std::min(options.batch_size, rows); }
    Index steps() const { return (rows + options.batch_size - 1) / options.batch_size; }
    bool stores_examples() const { return step.extras.sobolev || step.extras.clip_example_norm != 0; }
    bool stores() const { return options.regularization.clip_norm != 0 || stores_examples(); }
    Rule<T> rule(Index step_of_graph) const {
        const Regularization& r = options.regularization;
        Rule<T> rule = {optimizer.settings.rule,
                        net.theta(),
                        {},
                        hyper.data() + step_of_graph,
                        &step.control.data()->step,
                        static_cast<T>(r.l1),
                        static_cast<T>(r.l2),
                        static_cast<T>(r.clip_value)};
        for (int s = 0; s < kSlots; ++s) rule.slots[s] = optimizer.slots[s].data();
        return rule;
    }
    void choose();
    void open_library();
    void reserve(Index count);
    void make_room(Index count);
    Job<T> job(const Source<T>& from, Index count) const;
    void upload_job(const Source<T>& from, Index count) {
        own = job(from, count);
        upload(jobs.data(), &own, 1, net.runtime().stream);
    }
    void enqueue(const Source<T>& from, Index count, Index times);
    void enqueue_step(Source<T> from, Index count, Index number, Index times);
    void take_rates(std::int64_t count, const double* lr, Index lr_stride, Hyper<T>* to) const;
    void prepare(std::int64_t steps, const double* lr, Index lr_stride);
    const Graph* graph_of(Index count, Index times);
    void enqueue_epoch(Poller& look);
    void wait(Poller& look);
    void draw_order(Index number, cudaStream_t stream);
    void begin_epoch(Index number, const double* lr, Index lr_stride);
    double end_epoch(const Control& control);
    double epoch(Index number, const double* lr, Index lr_stride, Poller& look);

    Network<T>& net;
    Optimizer<T>& optimizer;
    TrainerOptions options;
    Index rows;
    typename Step<T>::Work step;
    Resident<T> data;
    Source<T> source;
    Buffer<std::int64_t> order;
    std::vector<std::int64_t> host_order, next_order;
    Index upcoming = -1, next_number = -1;  // the epoch to draw an order for; the one that next_order is of
    Buffer<Hyper<T>> hyper;
    std::vector<Hyper<T>> host_hyper;
    std::map<std::pair<Index, Index>, Graph> graphs;  // by rows and steps
    Schedule schedule = Schedule::fused;
    std::unique_ptr<Library<T>> library;
    Program program;  // of the resident schedule
    Buffer<Job<T>> jobs;
    Job<T> own = {};
    Event done;
    std::int64_t enqueued = 0;  // steps of the epoch
};

// The schedule: resident, if what the network needs fits into a processor's shared memory and nobody asked for another one.
template <class T>
void Trainer<T>::Work::choose() {
    const Schedule forced = forced_schedule.load();
    const bool plain =
        !stores_examples() && net.precision() != Precision::tf32 && net.precision() != Precision::bfloat16;
    bool slots[kSlots];
    for (int s = 0; s < kSlots; ++s) slots[s] = optimizer.slots[s].size() > 0;
    program = plan_resident(net.layers(), net.first_cotangent(), batch(), slots, options.regularization.clip_norm != 0);
    const bool fits =
        plain && program.count > 0 && program.total * static_cast<Index>(sizeof(T)) <= net.runtime().shared_bytes;
    const bool large = wants_library(net.multiplies_per_row() * static_cast<double>(batch()));
    if (fits && (forced == Schedule::by_size || forced == Schedule::resident)) {
        schedule = Schedule::resident;
        jobs = Buffer<Job<T>>(net.device(), 1, "a network at work");
    } else if ((forced == Schedule::by_size ? large : forced == Schedule::library) && lt::functions()) {
        schedule = Schedule::library;
        open_library();
    }
    if (!stores()) return;
    step.gradient();  // now: a graph must not find it elsewhere
    net.runtime().stream.wait();
}

template <class T>
void Trainer<T>::Work::reserve(Index count) {
    std::vector<typename Library<T>::Linear> layers;
    for (const Layer<T>& g : net.layers())
        if (g.kind == Layer<T>::Kind::linear) layers.push_back({g.inputs, g.outputs});
    library->reserve(count, layers);
}

// A library with room for every product of a step.
template <class T>
void Trainer<T>::Work::open_library() {
    library = std::make_unique<Library<T>>(net.device(), net.precision(), net.runtime().side);
    reserve(batch());
    Arithmetic<T> how = net.runtime().how;
    how.library = library.get();
    step.tape.multiply_by(how, !stores_examples());
}

// For batches of so many rows.
template <class T>
void Trainer<T>::Work::make_room(Index count) {
    if (count <= step.capacity) return;
    graphs.clear();
    step.capacity = 0;  // also if there is no room for the library
    if (library) reserve(count);
    step.make_room(count);
}

template <class T>
Job<T> Trainer<T>::Work::job(const Source<T>& from, Index count) const {
    const Regularization& r = options.regularization;
    Job<T> job = {};
    job.theta = net.theta();
    for (int s = 0; s < kSlots; ++s) job.slots[s] = optimizer.slots[s].data();
    job.control = step.control.data();
    job.hyper = hyper.data();
    job.data = from;
    job.data.rows.first = nullptr;  // a block counts for itself
    job.rows = count;
    job.batch = batch();
    job.seed = options.seed;
    job.rule = optimizer.settings.rule;
    job.loss = step.loss.op;
    job.loss_param = static_cast<T>(step.loss.param);
    job.l1 = static_cast<T>(r.l1);
    job.l2 = static_cast<T>(r.l2);
    job.clip_value = static_cast<T>(r.clip_value);
    job.clip_norm = r.clip_norm;
    job.mean = step.loss.mean;
    return job;
}

// The blocks of as many networks, each up to `steps` steps.
template <class T>
void launch_resident(const typename Network<T>::Runtime& run, const Program& program, const Job<T>* jobs,
                     Index networks, int steps) {
    allow_shared(train_resident<T>, run.shared_bytes);
    launch(train_resident<T>, dim3(static_cast<unsigned>(networks)), kResidentThreads,
           static_cast<std::size_t>(program.total) * sizeof(T), run.stream, program, jobs, steps);
}

// One step, on the streams, of several in a graph. They all count from where the graph began, and only the last one moves that:
// so a loss that waits for no penalty is added up beside the cotangents, and the next step need not wait for it.
template <class T>
void Trainer<T>::Work::enqueue_step(Source<T> from, Index count, Index number, Index times) {
    auto& run = net.runtime();
    const typename Tape<T>::Drawing drawing = {options.seed, &step.control.data()->drawn, number};
    const Regularization& r = options.regularization;
    const Index advance = number + 1 == times ? times : 0;
    const bool early = advance == 0 && r.l1 == 0 && r.l2 == 0 && !step.extras.sobolev;
    from.rows.offset = number * count;
    step.shape(count);
    step.forward(from, count, &drawing);
    step.run_loss(from, count);
    if (early) {
        run.fork.order(run.stream, run.side);
        step.end(from, count, advance, run.side);
    }
    if (stores()) {
        step.store_gradient(from, count, &drawing);
        step.update_stored(rule(number), r.clip_norm);
    } else {
        step.update_at_once(rule(number), count, &drawing);
    }
    if (!early) step.end(from, count, advance, run.stream);
}

// Several, which need nothing of the library's from before.
template <class T>
void Trainer<T>::Work::enqueue(const Source<T>& from, Index count, Index times) {
    if (library) library->forget();
    for (Index s = 0; s < times; ++s) enqueue_step(from, count, s, times);
}

template <class T>
void Trainer<T>::Work::take_rates(std::int64_t count, const double* lr, Index lr_stride, Hyper<T>* to) const {
    for (std::int64_t s = 0; s < count; ++s)
        to[s] = prepare_step<T>(optimizer.settings, lr[lr_stride > 1 ? s : 0], optimizer.step_count + s + 1);
}

// The rates of the steps to come, and a control at its beginning. What is copied from stays as it is until the epoch is over: a wait
// for each copy takes as long as two small steps.
template <class T>
void Trainer<T>::Work::prepare(std::int64_t count, const double* lr, Index lr_stride) {
    cudaStream_t stream = net.runtime().stream;
    host_hyper.resize(static_cast<std::size_t>(count));
    take_rates(count, lr, lr_stride, host_hyper.data());
    if (hyper.size() < count) {
        graphs.clear();  // they know the old place
        hyper.grow(net.device(), count, "the rates of an epoch");
    }
    upload(hyper.data(), host_hyper.data(), count, stream);
    Control control;
    control.drawn = optimizer.step_count;
    enqueued = 0;
    step.set_control(control);
}

// So many steps as a graph; null if that was lost, for now.
template <class T>
const Graph* Trainer<T>::Work::graph_of(Index count, Index times) {
    auto found = graphs.find({count, times});
    if (found == graphs.end()) try {
            Graph graph(net.runtime().stream, [&] { enqueue(source, count, times); });
            found = graphs.emplace(std::make_pair(count, times), std::move(graph)).first;
        } catch (const GraphLost&) { return nullptr; }
    return &found->second;
}

template <class T>
void Trainer<T>::Work::enqueue_epoch(Poller& look) {
    cudaStream_t stream = net.runtime().stream;
    if (schedule == Schedule::resident) {
        upload_job(source, rows);
        while (enqueued < steps()) {
            launch_resident<T>(net.runtime(), program, jobs.data(), 1, kStepsInLaunch);
            enqueued = std::min<std::int64_t>(enqueued + kStepsInLaunch, steps());
            wait(look);
        }
        return;
    }
    const auto launch_steps = [&](Index count, Index times) {
        if (const Graph* graph = graph_of(count, times))
            graph->launch(stream);
        else
            enqueue(source, count, times);
        enqueued += times;
        look();
    };
    const Index whole = rows / options.batch_size, rest = rows % options.batch_size;
    for (Index s = 0; s < whole / kStepsInGraph; ++s) launch_steps(options.batch_size, kStepsInGraph);
    for (Index s = 0; s < whole % kStepsInGraph; ++s) launch_steps(options.batch_size, 1);
    if (rest > 0) launch_steps(rest, 1);
    wait(look);
}

// Until the device has done what it was given; meanwhile the next epoch's order is drawn.
template <class T>
void Trainer<T>::Work::wait(Poller& look) {
    done.record(net.runtime().stream);
    look();
    if (upcoming >= 0 && options.shuffle) {
        next_order.resize(static_cast<std::size_t>(rows));
        permute(rows, options.seed, static_cast<std::uint64_t>(upcoming), next_order.data());
        next_number = std::exchange(upcoming, -1);
    }
    // A short wait must not end a scheduler's turn too late, a long one must not take a processor.
    const auto patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
    while (!done.reached()) {
        look();
        if (std::chrono::steady_clock::now() < patience)
            std::this_thread::yield();
        else
            std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}

template <class T>
void Trainer<T>::Work::draw_order(Index number, cudaStream_t stream) {
    if (next_number == number)
        host_order.swap(next_order);
    else
        permute(rows, options.seed, static_cast<std::uint64_t>(number), host_order.data());
    upload(order.data(), host_order.data(), rows, stream);
}

template <class T>
void Trainer<T>::Work::begin_epoch(Index number, const double* lr, Index lr_stride) {
    if (options.shuffle) draw_order(number, net.runtime().stream);
    prepare(steps(), lr, lr_stride);
    net.count_change();
}

template <class T>
double Trainer<T>::Work::end_epoch(const Control& control) {
    optimizer.step_count += std::exchange(enqueued, 0);
    return step.loss.mean && control.weight > 0 ? control.total / control.weight : control.total;
}

template <class T>
double Trainer<T>::Work::epoch(Index number, const double* lr, Index lr_stride, Poller& look) {
    begin_epoch(number, lr, lr_stride);
    try {
        enqueue_epoch(look);
    } catch (...) {
        (void)cudaStreamSynchronize(net.runtime().stream);
        optimizer.step_count += std::exchange(enqueued, 0);
        throw;
    }
    return end_epoch(step.get_control());
}

template <class T>
Trainer<T>::Trainer(Network<T>& net, Optimizer<T>& optimizer, const Loss<T>& loss, const Dataset<T>& data,
                    const TrainerOptions& options) {
    const OnDevice here(net.device());
    const auto held = net.runtime().hold();
    work_ = std::make_unique<Work>(net, optimizer, loss, data, options);
}
template <class T>
Trainer<T>::~Trainer() = default;
template <class T>
Index Trainer<T>::steps_per_epoch() const {
    return work_->steps();
}
template <class T>
Schedule Trainer<T>::schedule() const {
    return work_->schedule;
}

template <class T>
std::vector<double> Trainer<T>::run(Index first_epoch, Index epochs, const double* lr, Index lr_stride,
                                    const std::function<void()>& poll) {
    const OnDevice here(work_->net.device());
    const auto held = work_->net.runtime().hold();
    work_->make_room(work_->batch());
    Poller look(poll);  // of the whole run: an epoch may be over in no time
    std::vector<double> losses;
    for (Index epoch = 0; epoch < epochs; ++epoch) {
        work_->upcoming = epoch + 1 < epochs ? first_epoch + epoch + 1 : -1;
        losses.push_back(work_->epoch(first_epoch + epoch, lr + epoch * lr_stride, lr_stride, look));
        if (!std::isfinite(losses.back())) break;
    }
    return losses;
}

template <class T>
double Trainer<T>::step(const Dataset<T>& batch, double lr) {
    Work& work = *work_;
    if (work.step.extras.sobolev || work.options.clip_example_norm != 0)
        throw std::invalid_argument("[step] slopes and clipped examples are for fit: expected run, got step");
    const OnDevice here(work.net.device());
    const auto held = work.net.runtime().hold();
    work.make_room(batch.rows);
    work.step.batch.take(work.net, batch, work.net.runtime().stream);
    work.prepare(1, &lr, 1);
    work.net.count_change();
    if (work.schedule == Schedule::resident && batch.rows <= work.batch()) {
        work.upload_job(work.step.batch.source(), batch.rows);
        launch_resident<T>(work.net.runtime(), work.program, work.jobs.data(), 1, 1);
    } else {
        work.enqueue(work.step.batch.source(), batch.rows, 1);
    }
    ++work.optimizer.step_count;
    return work.step.get_control().value;
}

// ---- many networks at once --------------------------------------------------------------------------------------------

template <class T>
bool same_layers(const std::vector<Layer<T>>& a, const std::vector<Layer<T>>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Layer<T>& x, const Layer<T>& y) {
        return x.kind == y.kind && x.inputs == y.inputs && x.outputs == y.outputs && x.bias == y.bias && x.op == y.op &&
               x.param == y.param;
    });
}

// Whether all of them take the same path through one launch: each a block of the resident schedule, with one program.
template <class T>
bool run_together(const std::vector<Trainer<T>*>& trainers) {
    const auto& first = trainers.front()->work();
    for (const Trainer<T>* trainer : trainers) {
        const auto& work = trainer->work();
        bool same = work.schedule == Schedule::resident && work.net.device() == first.net.device() &&
                    same_layers(work.net.layers(), first.net.layers()) && work.batch() == first.batch() &&
                    work.program.gradient == first.program.gradient;
        for (int s = 0; s < kSlots; ++s) same = same && work.program.slots[s] == first.program.slots[s];
        if (!same) return false;
    }
    return true;
}

// The epochs of networks whose epochs have as many launches; one that diverges sits out the rest. What the blocks need goes to
// the device in a copy for all of them, and comes back in one: with copies and waits of each, these take longer than the steps.
template <class T>
class Together {
   public:
    using Work = typename Trainer<T>::Work;
    explicit Together(const std::vector<Trainer<T>*>& trainers) {
        std::int64_t steps = 0;
        for (const Trainer<T>* trainer : trainers) {
            all_.push_back(&trainer->work());
            steps += all_.back()->steps();
        }
        const int device = first().net.device();
        jobs_on_device_ = Buffer<Job<T>>(device, static_cast<Index>(all_.size()), "networks at work");
        controls_on_device_ = Buffer<Control>(device, static_cast<Index>(all_.size()), "networks at work");
        rates_on_device_ = Buffer<Hyper<T>>(device, steps, "the rates of an epoch");
    }
    template <class Rates>
    void epoch(Index number, Rates rates, Index lr_stride, Poller& look, std::vector<std::vector<double>>& losses) {
        active_.clear();
        jobs_.clear();
        rates_.clear();
        std::int64_t most = 0;
        for (std::size_t k = 0; k < all_.size(); ++k) {
            if (!losses[k].empty() && !std::isfinite(losses[k].back())) continue;
            add(k, number, rates(k), lr_stride);
            most = std::max<std::int64_t>(most, all_[k]->steps());
        }
        send();
        const Index networks = static_cast<Index>(active_.size());
        for (std::int64_t done = 0; done < most; done += kStepsInLaunch) {
            launch_resident<T>(first().net.runtime(), first().program, jobs_on_device_.data(), networks,
                               kStepsInLaunch);
            for (const std::size_t k : active_)
                all_[k]->enqueued = std::min<std::int64_t>(done + kStepsInLaunch, all_[k]->steps());
            first().wait(look);
        }
        download(controls_.data(), controls_on_device_.data(), networks, stream());
        first().net.runtime().stream.wait();
        for (std::size_t n = 0; n < active_.size(); ++n)
            losses[active_[n]].push_back(all_[active_[n]]->end_epoch(controls_[n]));
    }
    // After an interruption: what has been enqueued has been done.
    void abandon() {
        (void)cudaStreamSynchronize(stream());
        for (Work* work : all_) work->optimizer.step_count += std::exchange(work->enqueued, 0);
    }

   private:
    Work& first() const { return *all_.front(); }
    cudaStream_t stream() const { return first().net.runtime().stream; }

    // The next block's network. An order or rates that the one before has, too, it takes from there.
    void add(std::size_t k, Index number, const double* lr, Index lr_stride) {
        Work& work = *all_[k];
        const Work* before = active_.empty() ? nullptr : all_[active_.back()];
        Job<T> job = work.job(work.source, work.rows);
        job.control = controls_on_device_.data() + jobs_.size();
        if (work.options.shuffle) {
            const bool same = before && before->options.shuffle && before->options.seed == work.options.seed &&
                              before->rows == work.rows;
            if (same)
                job.data.rows.order = jobs_.back().data.rows.order;
            else
                work.draw_order(number, stream());
        }
        const std::int64_t steps = work.steps();
        if (before && same_rates(*before, work) && std::equal(lr, lr + (lr_stride > 1 ? steps : 1), lr_)) {
            job.hyper = jobs_.back().hyper;
        } else {
            job.hyper = rates_on_device_.data() + rates_.size();
            rates_.resize(rates_.size() + static_cast<std::size_t>(steps));
            work.take_rates(steps, lr, lr_stride, rates_.data() + rates_.size() - steps);
        }
        lr_ = lr;
        work.enqueued = 0;
        work.net.count_change();
        active_.push_back(k);
        jobs_.push_back(job);
    }
    static bool same_rates(const Work& a, const Work& b) {
        const OptimizerSettings &x = a.optimizer.settings, &y = b.optimizer.settings;
        return a.steps() == b.steps() && a.optimizer.step_count == b.optimizer.step_count && x.rule == y.rule &&
               std::equal(std::begin(x.values), std::end(x.values), std::begin(y.values));
    }
    void send() {
        controls_.assign(active_.size(), Control{});
        for (std::size_t n = 0; n < active_.size(); ++n) controls_[n].drawn = all_[active_[n]]->optimizer.step_count;
        upload(rates_on_device_.data(), rates_.data(), static_cast<Index>(rates_.size()), stream());
        upload(controls_on_device_.data(), controls_.data(), static_cast<Index>(controls_.size()), stream());
        upload(jobs_on_device_.data(), jobs_.data(), static_cast<Index>(jobs_.size()), stream());
        first().net.runtime().stream.wait();
    }

    std::vector<Work*> all_;
    std::vector<std::size_t> active_;  // those that still train, by their places
    std::vector<Job<T>> jobs_;
    std::vector<Control> controls_;
    std::vector<Hyper<T>> rates_;
    const double* lr_ = nullptr;  // the last one's
    Buffer<Job<T>> jobs_on_device_;
    Buffer<Control> controls_on_device_;
    Buffer<Hyper<T>> rates_on_device_;
};

template <class T>
std::vector<std::vector<double>> run_many(const std::vector<Trainer<T>*>& trainers, Index first_epoch, Index epochs,
                                          const double* lr, Index lr_network, Index lr_stride,
                                          const std::function<void()>& poll) {
    std::vector<std::vector<double>> losses(trainers.size());
    const auto rates_of = [&](std::size_t k, Index epoch) {
        return lr + static_cast<Index>(k) * lr_network + epoch * lr_stride;
    };
    if (!run_together(trainers)) {
        for (std::size_t k = 0; k < trainers.size(); ++k)
            losses[k] = trainers[k]->run(first_epoch, epochs, rates_of(k, 0), lr_stride, poll);
        return losses;
    }
    const OnDevice here(trainers.front()->work().net.device());
    std::vector<std::unique_lock<std::mutex>> locks;
    for (const Trainer<T>* trainer : trainers) locks.push_back(trainer->work().net.runtime().hold());
    Together<T> together(trainers);
    Poller look(poll);
    try {
        for (Index epoch = 0; epoch < epochs; ++epoch)
            together.epoch(
                first_epoch + epoch, [&](std::size_t k) { return rates_of(k, epoch); }, lr_stride, look, losses);
    } catch (...) {
        together.abandon();
        throw;
    }
    return losses;
}

}  // namespace cuda
}  // namespace chainrule
