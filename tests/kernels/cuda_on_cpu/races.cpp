// SPDX-License-Identifier: MIT
// See races.hpp beside this file.
#include "races.hpp"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

namespace cuda_on_cpu {
namespace races {

bool watching = false;
thread_local Moment now;

void Clock::advance(unsigned stream, std::uint32_t piece) {
    if (last_.size() <= stream) last_.resize(stream + 1);
    last_[stream] = std::max(last_[stream], piece);
}
void Clock::join(const Clock& other) {
    if (last_.size() < other.last_.size()) last_.resize(other.last_.size());
    for (std::size_t s = 0; s < other.last_.size(); ++s) last_[s] = std::max(last_[s], other.last_[s]);
}

namespace {

constexpr std::size_t kWord = 4, kArena = std::size_t{16} << 30;
// Of a copy longer than this, every sixteenth word stands for its neighbours.
constexpr std::size_t kLong = std::size_t{64} << 10;

struct Access {
    std::uint32_t piece = 0, cluster, block, barriers, warp_barriers, arrivals, waits;
    std::uint16_t stream, thread;
    std::uint8_t bytes, writes;  // which bytes of the word
    const void* code;

    // Whether this one, the earlier, comes before b on any GPU.
    bool before(const Access& b) const {
        if (piece != b.piece) return now.before->at(stream) >= piece;
        if (cluster == b.cluster && arrivals < b.waits) return true;
        if (block != b.block) return false;
        return thread == b.thread || barriers < b.barriers ||
               (thread / 32 == b.thread / 32 && warp_barriers < b.warp_barriers);
    }
};
// The last few accesses to a word. Where four are too few one is forgotten, and a race with it is not found.
struct Word {
    Access last[4];
};

template <class T>
T* reserve(std::size_t count) {
    void* const memory =
        ::mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    return static_cast<T*>(memory);
}
unsigned char* arena = nullptr;  // of the device; reserved when somebody wants some
Word* words = nullptr;

void write_place(const Access& access) {
    Dl_info module{};
    const bool known = access.code != nullptr && dladdr(access.code, &module) != 0;
    std::fprintf(stderr, "  %s by thread %u of block %u, piece %u of stream %u", access.writes ? "written" : "read",
                 access.thread, access.block, access.piece, access.stream);
    if (known)
        std::fprintf(stderr, ": addr2line -Cife %s 0x%zx", module.dli_fname,
                     static_cast<std::size_t>(static_cast<const char*>(access.code) -
                                              static_cast<const char*>(module.dli_fbase)) -
                         1);
    std::fprintf(stderr, "\n");
}

[[noreturn]] void die(const Access& first, const Access& second, bool shared, std::size_t byte) {
    std::fprintf(stderr, "cuda_on_cpu: nothing orders two accesses to byte %zu of %s memory\n", byte,
                 shared ? "shared" : "device");
    write_place(first);
    write_place(second);
    std::abort();
}

[[noreturn]] void die_in_use(const Access& last) {
    std::fprintf(stderr, "cuda_on_cpu: memory is released that work may still use\n");
    write_place(last);
    std::abort();
}

void meet(Word& word, const Access& mine, bool shared, std::size_t byte) {
    Access* place = nullptr;
    for (Access& other : word.last) {
        if (other.piece == 0 || (shared && (other.piece != mine.piece || other.cluster != mine.cluster))) {
            other.piece = 0;
            if (!place || place->piece != 0) place = &other;
            continue;
        }
        const bool before = other.before(mine);
        if (!before && (other.bytes & mine.bytes) && (other.writes || mine.writes)) die(other, mine, shared, byte);
        // Whoever comes after mine comes after that one, too: mine is as good as both.
        if (before && (other.bytes & ~mine.bytes) == 0 && (mine.writes || !other.writes) && !place) place = &other;
    }
    if (!place) place = &word.last[mine.thread % 4];
    *place = mine;
}

}  // namespace

void touch(const void* at, std::size_t bytes, bool writes, const void* code) {
    if (now.piece == 0 || bytes == 0) return;
    const auto* const begin = static_cast<const unsigned char*>(at);
    const bool shared = begin >= now.shared && begin < now.shared + now.shared_bytes;
    if (!shared && (begin < arena || begin >= arena + kArena)) return;  // a thread's own
    thread_local Word* const shared_words = reserve<Word>((std::size_t{2} << 20) / kWord);
    const std::size_t first = static_cast<std::size_t>(begin - (shared ? now.shared : arena)), end = first + bytes;
    Access mine = {now.piece,
                   now.cluster,
                   now.block,
                   now.barriers,
                   now.warp_barriers,
                   now.arrivals,
                   now.waits,
                   static_cast<std::uint16_t>(now.stream),
                   static_cast<std::uint16_t>(now.thread),
                   0,
                   writes,
                   code};
    const std::size_t step = bytes > kLong ? 16 : 1, last = (end - 1) / kWord;
    for (std::size_t word = first / kWord; word <= last; word = word / step * step + step) {
        const std::size_t from = std::max(first, word * kWord), to = std::min(end, word * kWord + kWord);
        mine.bytes = static_cast<std::uint8_t>(((1u << (to - from)) - 1) << from % kWord);
        meet((shared ? shared_words : words)[word], mine, shared, from);
    }
}

namespace {
std::multimap<std::size_t, unsigned char*> free_pieces;  // by size; callers hold a mutex
std::size_t used = 0;
std::size_t rounded(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }
}  // namespace

void* allocate(std::size_t bytes) {
    bytes = rounded(std::max<std::size_t>(bytes, 1));
    if (!arena) {
        words = reserve<Word>(kArena / kWord);
        arena = reserve<unsigned char>(kArena);
    }
    if (const auto found = free_pieces.find(bytes); found != free_pieces.end()) {
        unsigned char* const memory = found->second;
        free_pieces.erase(found);
        return memory;
    }
    if (used + bytes > kArena) return nullptr;
    used += bytes;
    return arena + used - bytes;
}
void release(void* memory, std::size_t bytes, const Clock& host) {
    auto* const begin = static_cast<unsigned char*>(memory);
    const std::size_t first = static_cast<std::size_t>(begin - arena) / kWord, step = bytes > kLong ? 16 : 1;
    for (std::size_t word = first; word < first + bytes / kWord; word += step)
        for (const Access& last : words[word].last)
            if (last.piece > host.at(last.stream)) die_in_use(last);
    bytes = rounded(std::max<std::size_t>(bytes, 1));
    (void)::madvise(begin, bytes, MADV_DONTNEED);
    (void)::madvise(words + static_cast<std::size_t>(begin - arena) / kWord, bytes / kWord * sizeof(Word),
                    MADV_DONTNEED);  // whole pages, both
    free_pieces.emplace(bytes, begin);
}

}  // namespace races
}  // namespace cuda_on_cpu

// ---- what the compiler calls ------------------------------------------------------------------------------------------

#ifndef __SANITIZE_ADDRESS__  // with it GCC knows these functions, and nobody calls them

#define CHAINRULE_WATCH(size)                                                                                     \
    void __tsan_read##size(void* at) { cuda_on_cpu::races::touch(at, size, false, __builtin_return_address(0)); } \
    void __tsan_write##size(void* at) { cuda_on_cpu::races::touch(at, size, true, __builtin_return_address(0)); } \
    void __tsan_unaligned_read##size(void* at) {                                                                  \
        cuda_on_cpu::races::touch(at, size, false, __builtin_return_address(0));                                  \
    }                                                                                                             \
    void __tsan_unaligned_write##size(void* at) {                                                                 \
        cuda_on_cpu::races::touch(at, size, true, __builtin_return_address(0));                                   \
    }

// It sends atomics to functions, too; kernels have none.
#define CHAINRULE_ATOMIC(bits, T)                                                                                     \
    T __tsan_atomic##bits##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }         \
    void __tsan_atomic##bits##_store(volatile T* at, T value, int) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##bits##_exchange(volatile T* at, T value, int) {                                                  \
        return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                      \
    }                                                                                                                 \
    T __tsan_atomic##bits##_fetch_add(volatile T* at, T value, int) {                                                 \
        return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                       \
    }

extern "C" {
CHAINRULE_ATOMIC(8, std::uint8_t)
CHAINRULE_ATOMIC(32, std::uint32_t)
CHAINRULE_ATOMIC(64, std::uint64_t)
void __tsan_init() { cuda_on_cpu::races::watching = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* at, std::size_t bytes) {
    cuda_on_cpu::races::touch(at, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, std::size_t bytes) {
    cuda_on_cpu::races::touch(at, bytes, true, __builtin_return_address(0));
}
CHAINRULE_WATCH(1)
CHAINRULE_WATCH(2)
CHAINRULE_WATCH(4)
CHAINRULE_WATCH(8)
CHAINRULE_WATCH(16)
}

#endif
