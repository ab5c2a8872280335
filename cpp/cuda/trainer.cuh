// SPDX-License-Identifier: MIT
// L3: the epoch loop on a device. The host draws each epoch's order and the rates of its steps, enqueues it all while the device
// still works on the epoch before, and reads one number back at the end.
#pragma once

#include <chrono>
#include <map>
#include <set>
#include <thread>

#include "../interrupt.hpp"
#include "../random.hpp"
#include "resident.cuh"
#include "step.cuh"

namespace chainrule {
namespace cuda {

// How many steps one graph has: launching a graph costs the host as much as a small step costs the device.
constexpr Index kStepsInGraph = 16;
// And how many the resident schedule takes in one launch: some 10 ms of work, so that an interrupt is heard.
constexpr int kStepsInLaunch = 1024;

// Until the device has come so far.
inline void wait(const Event& event) {
    // A short wait must not end a scheduler's turn too late, a long one must not take a processor.
    const auto patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
    while (!event.reached()) {
        Interruptible::look_up();
        if (std::chrono::steady_clock::now() < patience)
            std::this_thread::yield();
        else
            std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}

// An epoch on its way: what copies read and write of it while the host goes on. There are two, so that the device finds the next
// epoch when it has done one: to read a loss, draw an order and copy it takes as long as some steps.
constexpr Index kFlights = 2;
template <class T>
struct Flight {
    Pinned<std::int64_t> order;
    Pinned<Hyper<T>> rates;
    Pinned<Job<T>> job;
    Pinned<Control> control;  // before and after
    Event done;
};

// A program for as many networks.
template <class T>
struct ResidentLaunch {
    ResidentLaunch(const typename Network<T>::Runtime& run, const Program& the_program, Index networks)
        : program(the_program),
          kernel(program.ranks > 1 ? train_resident<T, true> : train_resident<T, false>),
          launch(program.ranks, dim3(static_cast<unsigned>(networks * program.ranks)), kResidentThreads,
                 static_cast<std::size_t>(program.total) * sizeof(T), run.stream) {
        allow_shared(kernel, run.shared_bytes);
    }
    int most() const { return launch.most(kernel); }  // of clusters at once
    // Each up to `steps` steps.
    void operator()(const Job<T>* jobs, int steps) const { launch(kernel, program, jobs, steps); }

    const Program& program;
    void (*const kernel)(Program, const Job<T>*, int);
    const ClusterLaunch launch;
};

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
          order(net.device(), options.shuffle ? rows : 0, "the order of an epoch") {
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
    Program plan(Index networks) const;
    void choose();
    void make_room(Index count);
    void make_room_for_rates(Index count) {
        if (hyper.size() >= count) return;
        graphs.clear();  // they know the old place
        hyper.grow(net.device(), count, "the rates of an epoch");
    }
    Job<T> job(const Source<T>& from, Index count, Index of_a_step) const;
    void enqueue(const Source<T>& from, Index count, Index times);
    void enqueue_step(Source<T> from, Index count, Index number, Index times);
    void take_rates(std::int64_t count, const double* lr, Index lr_stride, Hyper<T>* to) const;
    void draw_order(Flight<T>& flight, Index number, cudaStream_t stream);
    void prepare(Flight<T>& flight, std::int64_t count, const double* lr, Index lr_stride);
    void prepare_resident(Flight<T>& flight, const Job<T>& job);
    const Graph* graph_of(Index count, Index times);
    void enqueue_resident(Flight<T>& flight);
    void enqueue_steps();
    void enqueue_epoch(Flight<T>& flight, Index number, const double* lr, Index lr_stride);
    double end_epoch(const Control& control) const;

    Network<T>& net;
    Optimizer<T>& optimizer;
    TrainerOptions options;
    Index rows;
    typename Step<T>::Work step;
    Resident<T> data;
    Source<T> source;
    Buffer<std::int64_t> order;
    Buffer<Hyper<T>> hyper;
    Flight<T> flights[kFlights];
    std::map<std::pair<Index, Index>, Graph> graphs;  // by rows and steps
    std::set<Index> begun;                            // rows of steps that have been taken
    Index planned = batch();                          // rows of a step that the schedule is for, at most
    Schedule schedule = Schedule::fused;
    std::unique_ptr<Library<T>> library;
    Program program;  // of the resident schedule
    Buffer<Job<T>> jobs;
};

// In the resident schedule, beside so many networks; count 0 if it does not fit into processors' shared memory. In as many blocks as
// there are processors for, or as few as it takes, of eight rows at least.
template <class T>
Program Trainer<T>::Work::plan(Index networks) const {
    const auto& run = net.runtime();
    bool slots[kSlots];
    for (int s = 0; s < kSlots; ++s) slots[s] = optimizer.slots[s].size() > 0;
    const auto by = [&](int ranks, Index at_once) {
        const Program p = plan_resident(net.layers(), net.first_cotangent(), planned, slots,
                                        options.regularization.clip_norm != 0, ranks);
        const bool fits = p.count > 0 && p.total * static_cast<Index>(sizeof(T)) <= run.shared_bytes;
        return fits && (ranks == 1 || ResidentLaunch<T>(run, p, 1).most() >= at_once) ? p : Program{};
    };
    if (const int forced = forced_ranks.load()) return by(forced, 1);
    const int processors = run.how.processors;
    Program best;
    for (int ranks = ranks_of(planned, networks, processors); ranks > 0 && best.count == 0; ranks /= 2)
        best = by(ranks, networks);
    for (int ranks = 2; ranks <= ranks_of(planned, 1, processors) && best.count == 0; ranks *= 2) best = by(ranks, 1);
    return best;
}

// The schedule: resident, if what the network needs fits into processors' shared memory and nobody asked for another one.
template <class T>
void Trainer<T>::Work::choose() {
    const Schedule forced = forced_schedule.load();
    const bool plain =
        !stores_examples() && net.precision() != Precision::tf32 && net.precision() != Precision::bfloat16;
    program = plain ? plan(1) : Program{};
    schedule = Schedule::fused;
    step.tape.multiply_by(net.runtime().how, false);
    if (program.count > 0 && (forced == Schedule::by_size || forced == Schedule::resident)) {
        schedule = Schedule::resident;
        jobs.grow(net.device(), 1, "a network at work");
    } else if (is_for_library(net, planned)) {
        schedule = Schedule::library;
        step.tape.multiply_by(by_library(library, net, planned), !stores_examples());
    }
    if (!stores()) return;
    step.gradient();  // now: a graph must not find it elsewhere
    net.runtime().stream.wait();
}

// For steps of so many rows, the schedule that suits them, too.
template <class T>
void Trainer<T>::Work::make_room(Index count) {
    if (count <= step.capacity) return;
    graphs.clear();
    begun.clear();
    step.capacity = 0;  // also if there is no room for the library
    planned = count;
    choose();
    step.make_room(count);
}

template <class T>
Job<T> Trainer<T>::Work::job(const Source<T>& from, Index count, Index of_a_step) const {
    const Regularization& r = options.regularization;
    Job<T> job = {};
    job.theta = net.theta();
    for (int s = 0; s < kSlots; ++s) job.slots[s] = optimizer.slots[s].data();
    job.control = step.control.data();
    job.hyper = hyper.data();
    job.data = from;
    job.data.rows.first = nullptr;  // a block counts for itself
    job.rows = count;
    job.batch = of_a_step;
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

template <class T>
void Trainer<T>::Work::draw_order(Flight<T>& flight, Index number, cudaStream_t stream) {
    flight.order.grow(rows);
    permute(rows, options.seed, static_cast<std::uint64_t>(number), flight.order.data());
    upload(order.data(), flight.order.data(), rows, stream);
}

// The rates of the steps to come, and a control at its beginning.
template <class T>
void Trainer<T>::Work::prepare(Flight<T>& flight, std::int64_t count, const double* lr, Index lr_stride) {
    cudaStream_t stream = net.runtime().stream;
    flight.rates.grow(count);
    take_rates(count, lr, lr_stride, flight.rates.data());
    make_room_for_rates(count);
    upload(hyper.data(), flight.rates.data(), count, stream);
    flight.control.grow(2);
    flight.control[0] = Control{};
    flight.control[0].drawn = optimizer.step_count;
    upload(step.control.data(), flight.control.data(), 1, stream);
    net.count_change();
}

template <class T>
void Trainer<T>::Work::prepare_resident(Flight<T>& flight, const Job<T>& job) {
    flight.job.grow(1);
    flight.job[0] = job;
    upload(jobs.data(), flight.job.data(), 1, net.runtime().stream);
}

// So many steps as a graph; null if that was lost, for now. The first steps of a size go without one where they go through the
// library: some versions find no algorithm while a graph is made, and what is loaded on first use is loaded then.
template <class T>
const Graph* Trainer<T>::Work::graph_of(Index count, Index times) {
    if (schedule == Schedule::library && begun.insert(count).second) return nullptr;
    auto found = graphs.find({count, times});
    if (found == graphs.end()) try {
            Graph graph(net.runtime().stream, [&] { enqueue(source, count, times); });
            found = graphs.emplace(std::make_pair(count, times), std::move(graph)).first;
        } catch (const GraphLost&) { return nullptr; }
    return &found->second;
}

// An interrupt is heard between launches, of which an epoch mostly has one.
template <class T>
void Trainer<T>::Work::enqueue_resident(Flight<T>& flight) {
    prepare_resident(flight, job(source, rows, batch()));
    for (std::int64_t left = steps(); left > 0; left -= kStepsInLaunch) {
        ResidentLaunch<T>(net.runtime(), program, 1)(jobs.data(), kStepsInLaunch);
        optimizer.step_count += std::min<std::int64_t>(left, kStepsInLaunch);
        if (left <= kStepsInLaunch) break;
        flight.done.record(net.runtime().stream);
        wait(flight.done);
    }
}

template <class T>
void Trainer<T>::Work::enqueue_steps() {
    const auto launch_steps = [&](Index count, Index times) {
        if (const Graph* graph = graph_of(count, times))
            graph->launch(net.runtime().stream);
        else
            enqueue(source, count, times);
        optimizer.step_count += times;
        Interruptible::look_up();
    };
    const Index whole = rows / options.batch_size, rest = rows % options.batch_size;
    for (Index s = 0; s < whole / kStepsInGraph; ++s) launch_steps(options.batch_size, kStepsInGraph);
    if (whole % kStepsInGraph > 0) launch_steps(options.batch_size, whole % kStepsInGraph);
    if (rest > 0) launch_steps(rest, 1);
}

template <class T>
void Trainer<T>::Work::enqueue_epoch(Flight<T>& flight, Index number, const double* lr, Index lr_stride) {
    cudaStream_t stream = net.runtime().stream;
    if (options.shuffle) draw_order(flight, number, stream);
    prepare(flight, steps(), lr, lr_stride);
    schedule == Schedule::resident ? enqueue_resident(flight) : enqueue_steps();
    download(flight.control.data() + 1, step.control.data(), 1, stream);
    flight.done.record(stream);
    Interruptible::look_up();
}

template <class T>
double Trainer<T>::Work::end_epoch(const Control& control) const {
    return step.loss.mean && control.weight > 0 ? control.total / control.weight : control.total;
}

// enqueue(k) and end(k), of epochs 0 … count - 1 in their order, each enqueued before the one before it has ended; until end is
// false. Whatever ends it, the stream has done what it was given: a network that has diverged, one epoch more.
template <class Enqueue, class End>
void fly(cudaStream_t stream, Index count, Enqueue enqueue, End end) {
    try {
        for (Index k = 0; k <= count; ++k) {
            if (k < count) enqueue(k);
            if (k > 0 && !end(k - 1)) break;
        }
    } catch (...) {
        (void)cudaStreamSynchronize(stream);
        throw;
    }
    check(cudaStreamSynchronize(stream), "a kernel");
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
int Trainer<T>::blocks() const {
    return work_->schedule == Schedule::resident ? work_->program.ranks : 0;
}
template <class T>
int Trainer<T>::graphs() const {
    return static_cast<int>(work_->graphs.size());
}
template <class T>
std::pair<int, int> Trainer<T>::library_shapes() const {
    return work_->library ? work_->library->shapes() : std::pair<int, int>{};
}

template <class T>
std::vector<double> Trainer<T>::run(Index first_epoch, Index epochs, const double* lr, Index lr_stride) {
    const OnDevice here(work_->net.device());
    const auto held = work_->net.runtime().hold();
    Work& work = *work_;
    work.make_room(work.batch());
    std::vector<double> losses;
    const auto end = [&](Index k) {
        const Flight<T>& flight = work.flights[k % kFlights];
        wait(flight.done);
        losses.push_back(work.end_epoch(flight.control[1]));
        return std::isfinite(losses.back());
    };
    fly(
        work.net.runtime().stream, epochs,
        [&](Index k) {
            work.enqueue_epoch(work.flights[k % kFlights], first_epoch + k, lr + k * lr_stride, lr_stride);
        },
        end);
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
    work.prepare(work.flights[0], 1, &lr, 1);
    if (work.schedule == Schedule::resident) {
        work.prepare_resident(work.flights[0], work.job(work.step.batch.source(), batch.rows, batch.rows));
        ResidentLaunch<T>(work.net.runtime(), work.program, 1)(work.jobs.data(), 1);
    } else {
        work.enqueue(work.step.batch.source(), batch.rows, 1);
    }
    ++work.optimizer.step_count;
    return work.step.get_control().value;
}

}  // namespace cuda
}  // namespace chainrule
