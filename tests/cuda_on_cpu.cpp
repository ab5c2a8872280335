// SPDX-License-Identifier: MIT
// Tests of CUDA on the CPU itself, and of the GPU engine's tiles on it: which thread brings and which holds what.
//
//   cuda_on_cpu_test
//
// That it finds mistakes is tested by making them, each in a process of its own that must die of it.
#define CHAINRULE_DEVICE 1
#define CHAINRULE_ISA device

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cuda.hpp"
#include "cuda/cluster.cuh"
#include "cuda/library.cuh"

namespace chainrule {
namespace cuda {
namespace {

int failed = 0;

void check(bool ok, const char* rule) {
    if (ok) return;
    std::fprintf(stderr, "failed: %s\n", rule);
    ++failed;
}

template <class... P, class... A>
void run(void (*kernel)(P...), int blocks, dim3 threads, std::size_t shared, A... arguments) {
    static const Stream stream;
    launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, shared, stream, arguments...);
    stream.wait();
}

// ---- barriers and shuffles --------------------------------------------------------------------------------------------

__global__ void reverse_through_shared(int* values) {
    CHAINRULE_SHARED(int, memory);
    const unsigned t = threadIdx.x, at = blockIdx.x * blockDim.x;
    memory[t] = values[at + t];
    __syncthreads();
    values[at + t] = memory[blockDim.x - 1 - t];
}
__global__ void sum_of_warp(int* values) {
    values += threadIdx.y * blockDim.x;
    int sum = values[threadIdx.x];
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    values[threadIdx.x] = sum;
}
__global__ void leave_a_barrier() {
    if (threadIdx.x != 0) __syncthreads();
}
__global__ void wait_at_two_barriers() {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
__global__ void read_fresh_memory(double* sum) {
    CHAINRULE_SHARED(double, memory);
    *sum = memory[threadIdx.x];
}

void barriers_and_shuffles() {
    std::vector<int> values(3 * 96);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i);
    run(reverse_through_shared, 3, 96, 96 * sizeof(int), values.data());
    for (int i = 0; i < 3 * 96; ++i)
        check(values[static_cast<std::size_t>(i)] == i / 96 * 96 + 95 - i % 96, "a barrier brings what others wrote");
    for (int i = 0; i < 64; ++i) values[static_cast<std::size_t>(i)] = i;
    run(sum_of_warp, 1, 64, 0, values.data());
    check(values[5] == 31 * 16 && values[40] == 31 * 16 + 32 * 32, "a shuffle stays within its warp");
    for (int i = 0; i < 96; ++i) values[static_cast<std::size_t>(i)] = i;
    run(sum_of_warp, 1, dim3(32, 3), 0, values.data());
    check(values[5] == 31 * 16 && values[95] == 31 * 16 + 64 * 32, "a row of 32 threads is a warp");
    double sum = 0;
    run(read_fresh_memory, 1, 1, sizeof(double), &sum);
    check(sum != sum, "fresh shared memory is NaN");
    float* memory = nullptr;
    const BesideGraphs here;
    check(cudaMalloc(reinterpret_cast<void**>(&memory), 4 * sizeof(float)) == cudaSuccess, "device memory is there");
    check(memory[3] != memory[3], "fresh device memory is NaN");
    check(cudaFree(memory) == cudaSuccess && cudaFree(&sum) != cudaSuccess, "what was not allocated is not freed");
    check(cudaMalloc(reinterpret_cast<void**>(&memory), std::size_t{1} << 50) == cudaErrorMemoryAllocation,
          "a device's memory has an end");
}

template <class F>
void dies(F f, const char* rule) {
    const pid_t child = fork();
    if (child == 0) {
        if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
        f();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    check(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, rule);
}

// ---- what nothing orders ------------------------------------------------------------------------------------------------

__global__ void shift(int* values, bool barrier) {
    CHAINRULE_SHARED(int, memory);
    memory[threadIdx.x] = values[threadIdx.x];
    if (barrier) __syncthreads();
    values[threadIdx.x] = memory[(threadIdx.x + 1) % blockDim.x];
}
__global__ void shift_within_warp(int* values, bool barrier) {
    CHAINRULE_SHARED(int, memory);
    memory[threadIdx.x] = values[threadIdx.x];
    barrier ? __syncwarp() : static_cast<void>(__shfl_xor_sync(0xffffffffu, 0, 1));
    values[threadIdx.x] = memory[threadIdx.x ^ 1];
}
__global__ void write_where_others_read(int* values) {
    CHAINRULE_SHARED(int, memory);
    if (threadIdx.x == 0) memory[0] = values[0];
    __syncthreads();
    const int first = memory[0];
    if (threadIdx.x == blockDim.x - 1) memory[0] = first + 1;
}
__global__ void add_neighbour(int* values) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    values[i] += values[i + 1];
}
__global__ void write_halves(std::uint16_t* values) { values[threadIdx.x] = 1; }
__global__ void increment(int* value) { ++*value; }

// The host's order alone, an event's, or that of a graph's branches.
void on_two_streams(int* value, bool ordered) {
    const Stream one, other;
    const Event event;
    launch(increment, 1, 1, 0, one, value);
    if (ordered) event.order(one, other);
    launch(increment, 1, 1, 0, other, value);
    other.wait();
}
void on_two_branches(int* value, bool joined) {
    const Stream one, other;
    const Event event;
    const Graph graph(one, [&] {
        event.order(one, other);
        launch(increment, 1, 1, 0, other, value);
        if (joined) event.order(other, one);
        launch(increment, 1, 1, 0, one, value);
        if (!joined) event.order(other, one);
    });
    graph.launch(one);
    graph.launch(one);
    one.wait();
}
void reused_before_it_is_over(bool waited) {
    const Stream one, other;
    const Buffer<int> value(0, 1, "a number");
    launch(increment, 1, 1, 0, one, value.data());
    if (waited) one.wait();
    clear(value.data(), 1, other);
    other.wait();
}

void released_before_it_is_over(bool waited) {
    const Stream stream;
    const Buffer<int> value(0, 1, "a number");
    launch(increment, 1, 1, 0, stream, value.data());
    if (waited) stream.wait();
}

void races() {
    if (!cuda_on_cpu::races::watching) return;
    const Buffer<int> values(0, 97, "numbers");
    int* const v = values.data();
    run(shift, 1, 64, 64 * sizeof(int), v, true);
    dies([&] { run(shift, 1, 64, 64 * sizeof(int), v, false); }, "a missing barrier is found");
    run(shift_within_warp, 1, 32, 32 * sizeof(int), v, true);
    dies([&] { run(shift_within_warp, 1, 32, 32 * sizeof(int), v, false); }, "a shuffle orders no memory");
    run(write_where_others_read, 1, 1, sizeof(int), v);
    dies([&] { run(write_where_others_read, 1, 96, sizeof(int), v); }, "a write where others read is found");
    run(add_neighbour, 1, 1, 0, v);
    dies([&] { run(add_neighbour, 1, 2, 0, v); }, "neighbours in a block are not ordered");
    dies([&] { run(add_neighbour, 2, 1, 0, v); }, "nor are blocks");
    run(write_halves, 1, 64, 0, reinterpret_cast<std::uint16_t*>(v));
    on_two_streams(v, true);
    dies([&] { on_two_streams(v, false); }, "streams are not ordered");
    on_two_branches(v, true);
    dies([&] { on_two_branches(v, false); }, "nor are the branches of a graph");
    reused_before_it_is_over(true);
    dies([] { reused_before_it_is_over(false); }, "a copy waits for what it overwrites");
    released_before_it_is_over(true);
    dies([] { released_before_it_is_over(false); }, "memory is released when nobody needs it any more");
}

// ---- tiles ------------------------------------------------------------------------------------------------------------

// The tile's parts, by way of shared memory, as an epilogue meets them.
template <class Tile>
__global__ void count_elements(int* counts) {
    CHAINRULE_SHARED(typename Tile::Real, memory);
    Tile tile;
    tile.gather(memory);
    for (int part = 0; part < Tile::parts; ++part) {
        tile.put_part(memory);
        __syncthreads();
        for (int e = static_cast<int>(threadIdx.x); e < Tile::part_rows * Tile::cols; e += Tile::threads)
            if (memory[e / Tile::cols * Tile::pitch + e % Tile::cols] == 0)
                ++counts[Tile::row_in_tile(part, e / Tile::cols) * Tile::cols + e % Tile::cols];
        __syncthreads();
    }
}
template <class Tile, bool DownK>
__global__ void count_places(int* counts) {
    using Part = Carrier<Tile, DownK, Tile::rows>;
    for (int s = 0; s < Part::count; ++s) ++counts[Part::term(s) * Tile::rows + Part::place(s)];
}

template <class Tile>
void covers(const char* rule) {
    const auto ones = [&](std::vector<int>& counts) {
        for (const int count : counts) check(count == 1, rule);
        std::fill(counts.begin(), counts.end(), 0);
    };
    std::vector<int> elements(Tile::rows * Tile::cols), places(Tile::rows * Tile::depth);
    run(count_elements<Tile>, 1, Tile::threads, tile_bytes<Tile>(), elements.data());
    ones(elements);
    run(count_places<Tile, true>, 1, Tile::threads, 0, places.data());
    ones(places);
    run(count_places<Tile, false>, 1, Tile::threads, 0, places.data());
    ones(places);
    check(tile_bytes<Tile>() <= 48 * 1024, "a tile needs no permission for its shared memory");
    check(Tile::threads * static_cast<int>(sizeof(double)) <= static_cast<int>(tile_bytes<Tile>()),
          "an epilogue's sums fit where the tile was");
}

void tiles() {
    covers<Tiles<float>::Mini>("mini tile of float32: every element once");
    covers<Tiles<double>::Mini>("mini tile of float64: every element once");
    covers<Tiles<float>::Tiny>("tiny tile of float32: every element once");
    covers<Tiles<double>::Tiny>("tiny tile of float64: every element once");
    covers<Tf32Tiny>("tiny tile of tf32: every element once");
    covers<Bfloat16Tiny>("tiny tile of bfloat16: every element once");
    covers<Tiles<float>::Small>("small tile of float32: every element once");
    covers<Tiles<float>::Large>("large tile of float32: every element once");
    covers<Tiles<double>::Small>("tile of float64: every element once");
    covers<Tf32Small>("small tile of tf32: every element once");
    covers<Tf32Large>("large tile of tf32: every element once");
    covers<Bfloat16Small>("small tile of bfloat16: every element once");
    covers<Bfloat16Large>("large tile of bfloat16: every element once");
}

// Where a thread reads an operand, puts one down, and puts two sums.
template <class Tile>
__global__ void note_words(int* words) {
    using Part = Carrier<Tile, false, Tile::rows>;
    constexpr int stride = Tile::rows + Tile::padding;
    words += 3 * threadIdx.x;
    words[0] = Tile::term(0) * stride + Tile::group();
    words[1] = Part::term(0) * stride + Part::place(0);
    words[2] = Tile::group() * Tile::pitch + 2 * Tile::turn();
}
// What a warp meets at once, or half of one by two words each, lies in different banks.
template <class Tile>
void meets_no_bank_twice(const char* rule) {
    std::vector<int> words(3 * Tile::threads);
    run(note_words<Tile>, 1, Tile::threads, 0, words.data());
    for (int warp = 0; warp < Tile::threads / 32; ++warp)
        for (int kind = 0; kind < 3; ++kind) {
            int met[2][32] = {};
            for (int lane = 0; lane < 32; ++lane)
                ++met[kind == 2 ? lane / 16 : 0][words[static_cast<std::size_t>(3 * (32 * warp + lane) + kind)] % 32];
            for (const auto& turn : met)
                for (const int times : turn) check(times < 2, rule);
        }
}
void banks() {
    meets_no_bank_twice<Tf32Tiny>("a tiny tile of tf32 meets no bank twice");
    meets_no_bank_twice<Tf32Large>("a large tile of tf32 meets no bank twice");
    meets_no_bank_twice<Bfloat16Small>("a small tile of bfloat16 meets no bank twice");
    meets_no_bank_twice<Bfloat16Large>("a large tile of bfloat16 meets no bank twice");
}

// ---- clusters -----------------------------------------------------------------------------------------------------------

enum class Mistake { none, no_barrier, written_late, no_arrival, left, wrong_rank };
// Each block of three gets what the next one's threads have written into their shared memory.
__global__ void rotate_through_cluster(int* values, Mistake mistake) {
    CHAINRULE_SHARED(int, memory);
    const int t = static_cast<int>(threadIdx.x), rank = static_cast<int>(blockIdx.x) % 3;
    int* const own = values + blockIdx.x * blockDim.x + threadIdx.x;
    if (mistake != Mistake::written_late) memory[t] = *own;
    if (mistake == Mistake::left && rank == 1 && t == 0) return;
    if (mistake != Mistake::no_barrier && mistake != Mistake::no_arrival) cluster_arrive();
    if (mistake == Mistake::written_late) memory[t] = *own;
    if (mistake != Mistake::no_barrier) cluster_wait();
    *own =
        *in_block(memory + (t + 1) % static_cast<int>(blockDim.x), mistake == Mistake::wrong_rank ? 3 : (rank + 1) % 3);
    cluster_arrive();
    cluster_wait();
}
void rotate(std::vector<int>& values, Mistake mistake) {
    static const Stream stream;
    const ClusterLaunch launch(3, 6, 40, 40 * sizeof(int), stream);
    check(launch.most(rotate_through_cluster) == 42, "clusters of three blocks lie within groups of processors");
    launch(rotate_through_cluster, values.data(), mistake);
    stream.wait();
}
void clusters() {
    std::vector<int> values(6 * 40);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i);
    const auto turn = [&](Mistake mistake) { rotate(values, mistake); };
    turn(Mistake::none);
    for (int i = 0; i < 6 * 40; ++i) {
        const int block = i / 40, from = block / 3 * 3 + (block + 1) % 3;
        check(values[static_cast<std::size_t>(i)] == from * 40 + (i + 1) % 40, "a block reads what the next one wrote");
    }
    dies([&] { turn(Mistake::no_arrival); }, "a wait without an arrival ends the process");
    dies([&] { turn(Mistake::left); }, "a cluster's barrier that a thread has left ends the process");
    dies([&] { turn(Mistake::wrong_rank); }, "a rank that is not there ends the process");
    if (cuda_on_cpu::races::watching) {
        dies([&] { turn(Mistake::no_barrier); }, "blocks of a cluster are not ordered by themselves");
        dies([&] { turn(Mistake::written_late); }, "nor by a barrier that one arrives at too early");
    }
    setenv("CHAINRULE_EMULATOR_CLUSTERS", "none", 1);
    static const Stream stream;
    const ClusterLaunch launch(3, 6, 40, 40 * sizeof(int), stream);
    check(launch.most(rotate_through_cluster) == 0, "an older GPU has no clusters");
    unsetenv("CHAINRULE_EMULATOR_CLUSTERS");
}

// Integers that tf32 and bfloat16 have leave nothing to rounding: the large tiles, which tests of networks are too small for.
template <class Tile>
void multiplies(const char* rule) {
    const int m = Tile::rows + 3, n = 2 * Tile::cols - 5, k = 2 * Tile::depth + 7;
    using T = typename Tile::Real;
    std::vector<T> a(static_cast<std::size_t>(m * k)), b(static_cast<std::size_t>(n * k)),
        c(static_cast<std::size_t>(m * n));
    for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<T>(static_cast<int>(i * 7 % 31) - 15);
    for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<T>(static_cast<int>(i * 5 % 23) - 11);
    static const Stream stream;
    multiply_by<Tile, false, false>(m, n, k, Operand<T>{a.data(), k}, Operand<T>{b.data(), k},
                                    Activate<T>{nullptr, {}, {c.data(), m, n, n}, Op::identity, T{0}, false}, stream);
    stream.wait();
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j) {
            T sum = 0;
            for (int t = 0; t < k; ++t)
                sum += a[static_cast<std::size_t>(i * k + t)] * b[static_cast<std::size_t>(j * k + t)];
            check(c[static_cast<std::size_t>(i * n + j)] == sum, rule);
        }
}

// Sums over rows in slices, some of them shorter than the others or empty, then added up: W's part, and the bias' by a column of ones.
template <class T>
void multiplies_rows(Precision precision, TileSize size, const char* rule) {
    const int outputs = 5, inputs = 37, k = 2 * 128 + 7;
    std::vector<T> dz(static_cast<std::size_t>(k * outputs)), x(static_cast<std::size_t>(k * inputs));
    for (std::size_t i = 0; i < dz.size(); ++i) dz[i] = static_cast<T>(static_cast<int>(i * 7 % 31) - 15);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(static_cast<int>(i * 5 % 23) - 11);
    static const Stream stream;
    for (const Index slices : {1, 2, 3, 5}) {
        std::vector<T> gradient(static_cast<std::size_t>(outputs * (inputs + 1)));
        const Buffer<T> room(0, slices * static_cast<Index>(gradient.size()), "slices");
        Operand<T> with_ones = {x.data(), inputs};
        with_ones.ones = inputs;
        multiply_rows(precision, {size, slices}, outputs, inputs + 1, k, Operand<T>{dz.data(), outputs}, with_ones,
                      StoreGradient<T>{gradient.data(), outputs, inputs, false}, room.data(), stream);
        stream.wait();
        for (int o = 0; o < outputs; ++o)
            for (int i = 0; i <= inputs; ++i) {
                T sum = 0;
                for (int t = 0; t < k; ++t)
                    sum += dz[static_cast<std::size_t>(t * outputs + o)] *
                           (i < inputs ? x[static_cast<std::size_t>(t * inputs + i)] : T{1});
                const int at = i < inputs ? o * inputs + i : outputs * inputs + o;
                check(gradient[static_cast<std::size_t>(at)] == sum, rule);
            }
    }
}
void products_of_rows() {
    for (const TileSize size : {TileSize::mini, TileSize::tiny}) {
        multiplies_rows<float>(Precision::float32, size, "sums over rows in slices are exact in float32");
        multiplies_rows<double>(Precision::float64, size, "sums over rows in slices are exact in float64");
        multiplies_rows<float>(Precision::tf32, size, "sums over rows in slices are exact in tf32");
        multiplies_rows<float>(Precision::bfloat16, size, "sums over rows in slices are exact in bfloat16");
    }
}

// What cuBLASLt's product leaves out where a bias' gradient is a sum of its own; around a block's columns and rows.
template <class In>
void sums_columns(const char* rule) {
    static const Stream stream;
    for (const int rows : {0, 1, 31, 32, 33, 300})
        for (const int cols : {1, 31, 32, 33, 70}) {
            const int stride = cols + 3;
            const auto number = [](int at) { return at * 7 % 31 - 15; };
            std::vector<In> from(static_cast<std::size_t>(rows * stride));
            for (int at = 0; at < rows * stride; ++at) {
                const float value = static_cast<float>(number(at));
                std::memcpy(&from[static_cast<std::size_t>(at)],
                            reinterpret_cast<const char*>(&value) + sizeof value - sizeof(In), sizeof(In));
            }
            std::vector<float> sums(static_cast<std::size_t>(cols));
            launch(sum_columns<float, In>, dim3(static_cast<unsigned>(tiles_across(cols, kColumnsOfBlock))),
                   dim3(kColumnsOfBlock, kRowsAtOnce), kColumnsOfBlock * kRowsAtOnce * sizeof(float), stream, rows,
                   cols, static_cast<const In*>(from.data()), Index{stride}, sums.data());
            stream.wait();
            for (int j = 0; j < cols; ++j) {
                int sum = 0;
                for (int i = 0; i < rows; ++i) sum += number(i * stride + j);
                check(sums[static_cast<std::size_t>(j)] == static_cast<float>(sum), rule);
            }
        }
}

// While one thread makes a graph, others wait for the device and release memory: neither may notice.
void graphs_beside_waits() {
    const Stream stream;
    Buffer<float> memory(0, 100, "a test");
    std::thread other;
    bool fine = true;
    try {
        const Graph graph(stream, [&] {
            other = std::thread([&] {
                try {
                    release(allocate(0, 100, "a test"));
                    synchronize(0);
                } catch (const std::exception&) { fine = false; }
            });
            std::this_thread::sleep_for(std::chrono::milliseconds(20));  // for the other one to come first
            clear(memory.data(), memory.size(), stream);
        });
        graph.launch(stream);
        stream.wait();
    } catch (const GraphLost&) { fine = false; }
    other.join();
    check(fine, "a graph is made while other threads wait for the device");
}

}  // namespace

int test() {
    barriers_and_shuffles();
    graphs_beside_waits();
    dies([] { (void)cudaFreeHost(nullptr); }, "memory that is asked for, or given back, ends another library's graph");
    dies([] { run(leave_a_barrier, 1, 64, 0); }, "a barrier that a thread has left ends the process");
    dies([] { run(wait_at_two_barriers, 1, 64, 0); }, "threads at different barriers end the process");
    races();
    clusters();
    tiles();
    banks();
    multiplies<Tiles<float>::Mini>("mini product of float32 is exact");
    multiplies<Tiles<double>::Mini>("mini product of float64 is exact");
    multiplies<Tiles<float>::Tiny>("tiny product of float32 is exact");
    multiplies<Tiles<double>::Tiny>("tiny product of float64 is exact");
    multiplies<Tf32Tiny>("tiny product of tf32 is exact");
    multiplies<Bfloat16Tiny>("tiny product of bfloat16 is exact");
    multiplies<Tiles<float>::Small>("small product of float32 is exact");
    multiplies<Tiles<float>::Large>("large product of float32 is exact");
    multiplies<Tiles<double>::Small>("product of float64 is exact");
    multiplies<Tf32Small>("small product of tf32 is exact");
    multiplies<Tf32Large>("large product of tf32 is exact");
    multiplies<Bfloat16Small>("small product of bfloat16 is exact");
    multiplies<Bfloat16Large>("large product of bfloat16 is exact");
    products_of_rows();
    sums_columns<float>("sums of columns are exact in float32");
    sums_columns<std::uint16_t>("sums of columns are exact in bfloat16");
    std::printf("%d failed\n", failed);
    return failed > 0;
}

}  // namespace cuda
}  // namespace chainrule

int main() { return chainrule::cuda::test(); }
