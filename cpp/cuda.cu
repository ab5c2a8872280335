// SPDX-License-Identifier: MIT
// L3: the engine on NVIDIA GPUs: devices, memory, networks. Built into a module of its own, _cuda, which Python loads when
// somebody first asks for a GPU. The formulas are cpp/ops', compiled for a thread (lane.hpp); cpp/cuda/ has the kernels and the
// sweeps made of them.
#define CHAINRULE_DEVICE 1
#define CHAINRULE_ISA device

#include "cuda.hpp"

#include <dlfcn.h>

#include <chrono>
#include <deque>
#include <exception>
#include <thread>

#include "cuda/calculus.cuh"
#include "cuda/predict.cuh"
#include "cuda/together.cuh"

namespace chainrule {
namespace cuda {

namespace {

std::atomic<void (*)(const std::function<void()>&)> how_to_wait{[](const std::function<void()>& wait) { wait(); }};

std::vector<std::string>& library_folders() {
    static std::vector<std::string> folders;
    return folders;
}

// The functions of one cuBLASLt; null unless all are there and it can begin on this device with this driver.
template <class Find>
std::unique_ptr<const lt::Functions> functions_of(Find find_symbol) {
    auto table = std::make_unique<lt::Functions>();
    bool all = true;
    const auto find = [&](auto& function, const char* name) {
        void* const symbol = find_symbol(name);
        std::memcpy(&function, &symbol, sizeof symbol);
        all = all && symbol;
    };
    find(table->Create, "cublasLtCreate");
    find(table->Destroy, "cublasLtDestroy");
    find(table->Matmul, "cublasLtMatmul");
    find(table->MatmulDescCreate, "cublasLtMatmulDescCreate");
    find(table->MatmulDescDestroy, "cublasLtMatmulDescDestroy");
    find(table->MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute");
    find(table->MatrixLayoutCreate, "cublasLtMatrixLayoutCreate");
    find(table->MatrixLayoutDestroy, "cublasLtMatrixLayoutDestroy");
    find(table->MatmulPreferenceCreate, "cublasLtMatmulPreferenceCreate");
    find(table->MatmulPreferenceDestroy, "cublasLtMatmulPreferenceDestroy");
    find(table->MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute");
    find(table->MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic");
    void* handle = nullptr;
    if (!all || table->Create(&handle) != 0) return nullptr;
    (void)table->Destroy(handle);
    return table;
}

// Of what somebody has loaded already, else from the first folder that has one that works. Never closed again.
std::unique_ptr<const lt::Functions> find_functions() {
#ifdef CUDA_ON_CPU
    return functions_of(cuda_on_cpu::library_symbol);
#else
    const auto in_folder = [](const std::string& folder, int how) -> std::unique_ptr<const lt::Functions> {
        for (const char* file : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"})
            if (void* const library = dlopen((folder + file).c_str(), RTLD_NOW | RTLD_LOCAL | how))
                if (auto found = functions_of([=](const char* name) { return dlsym(library, name); })) return found;
        return nullptr;
    };
    if (auto loaded = in_folder("", RTLD_NOLOAD)) return loaded;
    for (const std::string& folder : library_folders())
        if (auto found = in_folder(folder, 0)) return found;
    return nullptr;
#endif
}

}  // namespace

// ---- devices --------------------------------------------------------------------------------------------------------

std::string state() {
    int driver = 0, count = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        (void)cudaGetLastError();
        return "no NVIDIA driver: libcuda.so.1 not found";
    }
    if (driver < 12000)
        return "driver " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
               " is too old: 12.0 or newer";
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        return std::string("no GPU: ") + cudaGetErrorString(code);
    }
    return count == 0 ? "no GPU: the driver lists none" : "";
}

int device_count() {
    int count = 0;
    if (!state().empty()) return 0;
    check(cudaGetDeviceCount(&count), "counting devices");
    return count;
}

std::string device_name(int device) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "asking the device");
    return properties.name;
}

bool has_clusters(int device) { return attribute(cudaDevAttrClusterLaunch, device) != 0; }

void synchronize(int device) {
    how_to_wait.load()([=] {
        const OnDevice here(device);
        const auto wait = [] {
            const std::lock_guard<std::recursive_mutex> alone(graph_in_making());
            return cudaDeviceSynchronize();
        };
        const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        cudaError_t code = wait();
        // Another library makes a graph: it is soon over, unless it waits for Python's lock and its keeper for ours.
        while (GraphLost::is(code) && std::chrono::steady_clock::now() < patience) {
            (void)cudaGetLastError();
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            code = wait();
        }
        check(code, "a kernel");
    });
}

int device_of(const void* pointer) {
    cudaPointerAttributes attributes{};
    check(cudaPointerGetAttributes(&attributes, pointer), "asking where memory is");
    return attributes.type == cudaMemoryTypeDevice ? attributes.device : -1;
}

void wait_by(void (*how)(const std::function<void()>& wait)) { how_to_wait.store(how); }
std::unique_lock<std::mutex> hold(std::mutex& mutex) {
    std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (!lock.owns_lock()) how_to_wait.load()([&] { lock.lock(); });
    return lock;
}

void force_schedule(Schedule schedule, int blocks) {
    forced_schedule.store(schedule);
    forced_ranks.store(blocks);
}
void look_for_libraries(std::vector<std::string> folders) { library_folders() = std::move(folders); }

void copy(int device, void* to, const void* from, std::size_t bytes) {
    how_to_wait.load()([=] {
        const OnDevice here(device);
        const Stream stream;
        upload(static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), static_cast<Index>(bytes),
               stream);
        stream.wait();
    });
}

const lt::Functions* lt::functions() {
    static const std::unique_ptr<const Functions> found = find_functions();
    return found.get();
}

namespace {

// What arrays leave behind, up to so many bytes: cudaMalloc and cudaFree of a prediction take as long as a prediction may.
class Spare {
   public:
    struct Piece {
        void* memory;
        int device;
        std::size_t bytes;
    };
    void* take(int device, std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = std::find_if(pieces_.begin(), pieces_.end(), [&](const Piece& piece) {
            return piece.device == device && piece.bytes == bytes;
        });
        if (found == pieces_.end()) return nullptr;
        void* const memory = found->memory;
        total_ -= bytes;
        pieces_.erase(found);
        return memory;
    }
    void keep(const Piece& piece) {
        std::unique_lock<std::mutex> lock(mutex_);
        pieces_.push_back(piece);
        total_ += piece.bytes;
        drop_to(kMost, std::move(lock));
    }
    bool clear() {
        std::unique_lock<std::mutex> lock(mutex_);
        const bool some = !pieces_.empty();
        drop_to(0, std::move(lock));
        return some;
    }

   private:
    static constexpr std::size_t kMost = std::size_t{64} << 20;
    // Released without the lock: that waits for graphs in making, and whoever makes one may come here for memory.
    void drop_to(std::size_t most, std::unique_lock<std::mutex> lock) {
        std::vector<Piece> gone;
        for (; total_ > most; pieces_.pop_front()) {
            total_ -= pieces_.front().bytes;
            gone.push_back(pieces_.front());
        }
        lock.unlock();
        for (const Piece& piece : gone) {
            try {
                synchronize(piece.device);  // for whoever still reads what was there: cudaFree need not wait for them
            } catch (const std::exception&) {}  // a device that is lost has no readers
            release(piece.memory);
        }
    }
    std::mutex mutex_;
    std::deque<Piece> pieces_;
    std::size_t total_ = 0;
};
Spare& spare() {
    static Spare& all = *new Spare;  // arrays may outlive whatever ends with the process
    return all;
}

}  // namespace

std::shared_ptr<void> array_memory(int device, std::size_t bytes) {
    void* memory = spare().take(device, bytes);
    if (memory)
        synchronize(device);  // for whoever still reads what was there
    else
        memory = allocate(device, bytes, "an array");
    return {memory, [=](void* gone) { spare().keep({gone, device, bytes}); }};
}

void* allocate(int device, std::size_t bytes, const char* what) {
    if (bytes == 0) return nullptr;
    const OnDevice here(device);
    void* memory = nullptr;
    cudaError_t code = cudaMalloc(&memory, bytes);
    if (code == cudaErrorMemoryAllocation && spare().clear()) {
        (void)cudaGetLastError();
        code = cudaMalloc(&memory, bytes);
    }
    if (code == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        std::size_t free = 0, total = 0;
        (void)cudaMemGetInfo(&free, &total);
        throw OutOfMemory("[cuda] out of memory: expected " + std::to_string(bytes) + " bytes for " + what + ", got " +
                          std::to_string(free) + " free of " + std::to_string(total));
    }
    check(code, "allocating memory");
    return memory;
}
void release(void* memory) noexcept {
    if (!memory) return;
    const std::lock_guard<std::recursive_mutex> alone(graph_in_making());  // it may wait for the device, and need not
    const BesideGraphs theirs;
    // Where a later allocation has failed, what was enqueued before it may still use this. Elsewhere the stream has been waited for.
    if (std::uncaught_exceptions() > 0) (void)cudaDeviceSynchronize();
    (void)cudaFree(memory);
}

// ---- networks -------------------------------------------------------------------------------------------------------

namespace {

// Each layer's part of theta begins at a multiple of 256 bytes.
template <class T>
constexpr Index kAlign = 256 / static_cast<Index>(sizeof(T));

}  // namespace

template <class T>
Network<T>::Network(std::vector<Layer<T>> layers, Precision precision, int device)
    : layers_(std::move(layers)), precision_(precision), device_(device) {
    if (layers_.empty()) throw std::invalid_argument("[Network] a network has layers: expected at least 1, got 0");
    if (const std::string missing = state(); !missing.empty()) throw std::runtime_error("[cuda] " + missing);
    Index total = 0;
    first_cotangent_ = depth();
    for (Index l = 0; l < depth(); ++l) {
        Layer<T>& g = layers_[static_cast<std::size_t>(l)];
        if (g.kind == Layer<T>::Kind::external)
            throw std::invalid_argument(
                "[Network] users' layers run on the CPU: expected built-in layers, got one in Python");
        g.offset = total;
        if (g.kind != Layer<T>::Kind::linear) continue;
        parameters_.push_back({l, "weight", {g.outputs, g.inputs}, total, g.outputs * g.inputs});
        if (g.bias) parameters_.push_back({l, "bias", {g.outputs}, total + g.outputs * g.inputs, g.outputs});
        total = round_up(total + g.outputs * g.weight_rows(), kAlign<T>);
        g.size = total - g.offset;
        multiplies_ += static_cast<double>(g.weight_rows()) * static_cast<double>(g.outputs);
        first_cotangent_ = std::min(first_cotangent_, l + 1);
    }
    const OnDevice here(device_);
    theta_ = Buffer<T>(device_, total, "parameters");
    runtime_ = std::make_unique<Runtime>(device_, precision_);
    clear(theta(), total, runtime_->stream);
    runtime_->stream.wait();
}
template <class T>
Network<T>::~Network() = default;

template <class T>
void Network<T>::read(const Parameter& parameter, const T* flat, T* to) const {
    const OnDevice here(device_);
    const auto held = runtime_->hold();
    download(to, flat + parameter.offset, parameter.size, runtime_->stream);
    runtime_->stream.wait();
}

template <class T>
void Network<T>::write(const Parameter& parameter, const T* from) {
    const OnDevice here(device_);
    const auto held = runtime_->hold();
    upload(theta() + parameter.offset, from, parameter.size, runtime_->stream);
    runtime_->stream.wait();
    count_change();
}

template <class T>
Buffer<T> Network<T>::snapshot() const {
    const OnDevice here(device_);
    const auto held = runtime_->hold();
    Buffer<T> copy(device_, size(), "a copy of the parameters");
    upload(copy.data(), theta(), size(), runtime_->stream);
    runtime_->stream.wait();
    return copy;
}

template <class T>
void Network<T>::restore(const Buffer<T>& snapshot) {
    const OnDevice here(device_);
    const auto held = runtime_->hold();
    upload(theta(), snapshot.data(), size(), runtime_->stream);
    runtime_->stream.wait();
    count_change();
}

template <class T>
bool all_finite_by(const Stream& stream, const Buffer<double>& count, const T* at, Index size) {
    sum_over(size, NotFinite<T>{at}, StoreSum{count.data() + kPieces}, count.data(), stream);
    double result = 0;
    download(&result, count.data() + kPieces, 1, stream);
    stream.wait();
    return result == 0;
}
template <class T>
bool Network<T>::all_finite() const {
    const OnDevice here(device_);
    const auto held = runtime_->hold();
    return all_finite_by(runtime_->stream, runtime_->sum, theta(), size());
}
template <class T>
bool all_finite(int device, const T* at, Index size) {
    bool finite = false;
    how_to_wait.load()([&] {
        const OnDevice here(device);
        finite = all_finite_by(Stream(), Buffer<double>(device, kPieces + 1, "a sum"), at, size);
    });
    return finite;
}

template <class T>
void Network<T>::predict(Index rows, const T* x, T* f) const {
    const OnDevice here(device_);
    const auto held = runtime_->hold();
    if constexpr (std::is_same_v<T, float>) {
        const Schedule forced = forced_schedule.load();
        const bool many = wants_resident_prediction(rows, SimtPrediction::rows, runtime_->how.processors);
        if (rows > 0 && (forced == Schedule::resident || (forced == Schedule::by_size && many)))
            if (const ResidentPrediction resident(*this); resident.fits()) return resident.run(rows, x, f);
    }
    if (!runtime_->predictor) runtime_->predictor = std::make_unique<Tape<T>>(*this, false);
    Tape<T>& tape = *runtime_->predictor;
    const bool here_already = rows > 0 && device_of(x) == device_;
    const Index piece = rows_at_once(*this, 1);
    for (Index first = 0; first < rows; first += piece) {
        const Index count = std::min(piece, rows - first);
        tape.multiply_by(arithmetic_of(*this, count), true);
        tape.shape(0, count, 1, {Tape<T>::primal});
        const T* from = x + first * inputs();
        if (!here_already) tape.load(Tape<T>::primal, 0, from, runtime_->stream);
        tape.input(here_already ? from : tape.at(Tape<T>::primal, 0).data, {}, runtime_->stream);
        tape.forward(nullptr, runtime_->stream);
        tape.store(Tape<T>::primal, depth(), f + first * outputs(), runtime_->stream);
    }
    runtime_->stream.wait();
}

template <class T>
void Network<T>::trace(Index rows, const T* x, T* const* phi) const {
    const OnDevice here(device_);
    const auto held = runtime_->hold();
    Tape<T> tape(*this, false);
    tape.keep_all(true);
    tape.shape(0, rows, 1, {Tape<T>::primal});
    tape.load(Tape<T>::primal, 0, x, runtime_->stream);
    tape.forward(nullptr, runtime_->stream);
    for (Index l = 0; l < depth(); ++l) tape.store(Tape<T>::primal, l + 1, phi[l], runtime_->stream);
    runtime_->stream.wait();
}

// ---- optimizers -----------------------------------------------------------------------------------------------------

template <class T>
Optimizer<T>::Optimizer(const Network<T>& net, const OptimizerSettings& given) : settings(given), net_(net) {
    const OnDevice here(net.device());
    const auto held = net.runtime().hold();
    for (int s = 0; s < kSlots; ++s) {
        if (!uses_slot(settings, s)) continue;
        slots[s] = Buffer<T>(net.device(), net.size(), "an optimizer's state");
        clear(slots[s].data(), net.size(), net.runtime().stream);
    }
    net.runtime().stream.wait();
}

// The CPU's network serves as the description of its own layout.
template <class T>
Array<T> Optimizer<T>::slot(int number) const {
    if (slots[number].size() == 0) return Array<T>(0);
    const chainrule::Network<T> layout(net_.layers());
    Array<T> flat(layout.size());
    for (std::size_t k = 0; k < net_.parameters().size(); ++k) {
        std::vector<T> plain(static_cast<std::size_t>(net_.parameters()[k].size));
        net_.read(net_.parameters()[k], slots[number].data(), plain.data());
        layout.pack(layout.parameters()[k], plain.data(), flat.data());
    }
    return flat;
}

template <class T>
void Optimizer<T>::set_slot(int number, const T* from) {
    if (slots[number].size() == 0) return;
    const OnDevice here(net_.device());
    const chainrule::Network<T> layout(net_.layers());
    for (std::size_t k = 0; k < net_.parameters().size(); ++k) {
        const Parameter& parameter = net_.parameters()[k];
        std::vector<T> plain(static_cast<std::size_t>(parameter.size));
        layout.read(layout.parameters()[k], from, plain.data());
        const auto held = net_.runtime().hold();
        upload(slots[number].data() + parameter.offset, plain.data(), parameter.size, net_.runtime().stream);
        net_.runtime().stream.wait();
    }
}

template <class T>
Index Optimizer<T>::slot_size(int number) const {
    return slots[number].size() == 0 ? 0 : chainrule::Network<T>(net_.layers()).size();
}

// ---- single steps ---------------------------------------------------------------------------------------------------

template <class T>
Step<T>::Step(Network<T>& net, const Loss<T>& loss, Index rows, Index, const Extras& extras) {
    const OnDevice here(net.device());
    work_ = std::make_unique<Work>(net, loss, rows, extras, false);
}
template <class T>
Step<T>::~Step() = default;

template <class T>
double Step<T>::sweep(const Dataset<T>& data, const std::int64_t*, Index rows, const Noise&, bool backward) {
    Work& w = *work_;
    const OnDevice here(w.net.device());
    const auto held = w.net.runtime().hold();
    w.batch.take(w.net, data, w.net.runtime().stream);
    w.sweep(w.batch.source(), rows, backward);
    return w.get_control().value;
}

template <class T>
const T* Step<T>::gradient() {
    const OnDevice here(work_->net.device());
    const auto held = work_->net.runtime().hold();
    return work_->gradient();
}

template <class T>
double evaluate(Network<T>& net, const Loss<T>& loss, const Dataset<T>& data) {
    const OnDevice here(net.device());
    const auto held = net.runtime().hold();
    const Index piece = std::min(data.rows, rows_at_once(net, 2));
    auto& work = kept_step(net, loss, piece);
    Resident<T> rows_there;
    rows_there.take(net, data, net.runtime().stream);
    work.set_control(Control{});
    Source<T> source = rows_there.source();
    source.rows.first = &work.control.data()->first;
    for (Index first = 0; first < data.rows; first += piece) {
        const Index rows = std::min(piece, data.rows - first);
        work.shape_by_size(rows);
        work.forward(source, rows, nullptr);
        work.run_loss(source, rows);
        work.end(source, rows, 1, net.runtime().stream);
    }
    const Control control = work.get_control();
    return loss.mean ? (control.weight > 0 ? control.total / control.weight : 0) : control.total;
}

#define CHAINRULE_INSTANTIATE(T)                                                                         \
    template class Network<T>;                                                                           \
    template class Optimizer<T>;                                                                         \
    template class Step<T>;                                                                              \
    template class Direction<T>;                                                                         \
    template class Derivatives<T>;                                                                       \
    template class Trainer<T>;                                                                           \
    template bool all_finite<T>(int, const T*, Index);                                                   \
    template double evaluate<T>(Network<T>&, const Loss<T>&, const Dataset<T>&);                         \
    template std::vector<std::vector<double>> run_many<T>(const std::vector<Trainer<T>*>&, Index, Index, \
                                                          const double*, Index, Index);
CHAINRULE_INSTANTIATE(float)
CHAINRULE_INSTANTIATE(double)

}  // namespace cuda
}  // namespace chainrule
