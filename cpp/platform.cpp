// SPDX-License-Identifier: MIT
#include "platform.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <string>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace chainrule {

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::neon: return "neon";
        case Isa::baseline: break;
    }
    return "baseline";
}

#if defined(__x86_64__)
namespace {

struct Processor {
    bool avx2 = false, avx512 = false, bfloat16_pairs = false;
};

// Asked of the processor itself: __builtin_cpu_supports needs the compiler's runtime library, which is not linked by every
// Clang and says no to everything in Zig's. Wide registers also need a system that saves them (XCR0).
Processor ask_processor() {
    Processor found;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return found;
    const bool fma = ecx & bit_FMA;
    unsigned saved = 0;
    asm volatile("xgetbv" : "=a"(saved), "=d"(edx) : "c"(0));
    const bool saves_avx = (saved & 0x06) == 0x06;
#ifdef __APPLE__
    const bool saves_avx512 = saves_avx;  // from a thread's first use on, which these bits do not say before
#else
    const bool saves_avx512 = (saved & 0xe6) == 0xe6;
#endif
    if (!fma || !saves_avx || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
    constexpr unsigned wide = bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW;
    found.avx2 = ebx & bit_AVX2;
    found.avx512 = saves_avx512 && (ebx & wide) == wide;
    found.bfloat16_pairs = found.avx512 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & bit_AVX512BF16);
    return found;
}

const Processor& processor() {
    static const Processor found = ask_processor();
    return found;
}

}  // namespace
#endif

bool runs_here(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx512: return processor().avx512;
        case Isa::avx2: return processor().avx2;
#elif defined(__aarch64__)
        case Isa::neon: return true;  // part of the architecture's base
#endif
        case Isa::baseline: return true;
        default: return false;
    }
}

bool multiplies_pairs() {
#if defined(__x86_64__)
    return processor().bfloat16_pairs;
#else
    return false;
#endif
}

namespace {

// A file's text; empty where it cannot be read.
std::string contents(const std::string& path) {
#ifdef __linux__
    constexpr const char* mode = "re";  // not for programs that another thread starts meanwhile
#else
    constexpr const char* mode = "r";
#endif
    std::string text;
    if (std::FILE* file = std::fopen(path.c_str(), mode)) {
        char piece[1024];
        for (std::size_t n; (n = std::fread(piece, 1, sizeof piece, file)) > 0;) text.append(piece, n);
        std::fclose(file);
    }
    return text;
}

// A cgroup's own quota. What version 2 has in one file, version 1 has in two.
int quota_of(const std::string& cgroup) {
    std::string limit = contents(cgroup + "/cpu.max");
    if (limit.empty()) limit = contents(cgroup + "/cpu.cfs_quota_us") + " " + contents(cgroup + "/cpu.cfs_period_us");
    return quota_processors(limit.c_str());
}

// The quotas of all parents hold, too. A container may see its own cgroup at the mount point and nothing under the path
// that it is told: what is not there sets no limit.
int smallest_quota(const std::string& mount, std::string cgroup) {
    int least = quota_of(mount);
    for (; !cgroup.empty(); cgroup.erase(cgroup.rfind('/'))) least = std::min(least, quota_of(mount + cgroup));
    return least;
}

}  // namespace

int quota_processors(const char* limit) {
    double quota = 0, period = 0;
    if (std::sscanf(limit, "%lf %lf", &quota, &period) != 2 || !(quota > 0 && period > 0)) return kNoQuota;
    const double processors = std::floor(quota / period);  // a part of a core is no core to spin on
    return processors < kNoQuota ? std::max(static_cast<int>(processors), 1) : kNoQuota;
}

int cgroup_processors(const char* membership, const char* mount) {
    const std::string root = mount;
    int least = kNoQuota;
    std::istringstream lines(membership);
    for (std::string line; std::getline(lines, line);) {  // number:controllers:/path, no controllers in version 2
        const std::size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos || line.compare(second, 2, ":/") != 0) continue;
        const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        const std::string cgroup = line.substr(second + 1);
        if (controllers == ",,")  // beside version 1 it may be mounted a level lower
            least = std::min({least, smallest_quota(root, cgroup), smallest_quota(root + "/unified", cgroup)});
        else if (controllers.find(",cpu,") != std::string::npos)
            least = std::min(least, smallest_quota(root + "/cpu", cgroup));
    }
    return least;
}

int usable_processors() {
    int count = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
    return std::min(std::max(count, 1), cgroup_processors(contents("/proc/self/cgroup").c_str(), "/sys/fs/cgroup"));
}

namespace {

constexpr std::align_val_t kLineAligned{kLineBytes};

std::size_t whole_units(std::size_t bytes, std::size_t unit) {
    const std::size_t size = (bytes + unit - 1) / unit * unit;
    if (size < bytes) throw std::bad_alloc();  // the sum wrapped around
    return size == 0 ? unit : size;
}

#ifdef __linux__
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

// Large arenas come straight from the system: their pages are zero already and cost nothing before they are touched, in
// the sweep that uses them. (Zeroing them first took 15 % of a two-step fit of 2048-2048-2048-2048.) Huge pages are
// asked for, because arenas are walked with large strides and small pages would miss the TLB at every row. What is left
// of an arena after its last whole huge page lies in small ones: six arenas rounded up would be 6 MB more than needed.
void* map_arena(std::size_t size) {
    const std::size_t mapped = size + kHugePage;  // room to align
    void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(start);
    char* const arena = begin + (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
    if (arena > begin) munmap(begin, static_cast<std::size_t>(arena - begin));
    munmap(arena + size, mapped - size - static_cast<std::size_t>(arena - begin));
    madvise(arena, size, MADV_HUGEPAGE);
    return arena;
}
#endif

}  // namespace

std::uint64_t float_mode() {
#if defined(__x86_64__)
    return _mm_getcsr() & ~0x3fu;  // without the flags of what has happened
#elif defined(__aarch64__)
    std::uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
#else
    return 0;
#endif
}

void set_float_mode(std::uint64_t mode) {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<unsigned>(mode) | (_mm_getcsr() & 0x3fu));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(mode));
#else
    (void)mode;
#endif
}

FlushSubnormals::FlushSubnormals(bool wanted) : before_(float_mode()) {
#if defined(__x86_64__)
    constexpr std::uint64_t flush = 0x8040;  // results, operands
#else
    constexpr std::uint64_t flush = 1u << 24;
#endif
    if (wanted) set_float_mode(before_ | flush);
}

FlushSubnormals::~FlushSubnormals() {
    if (float_mode() != before_) set_float_mode(before_);
}

void* allocate_bytes(std::size_t bytes) {
#ifdef __linux__
    if (bytes >= kHugePage) return map_arena(whole_units(bytes, page_bytes()));
#endif
    const std::size_t size = whole_units(bytes, static_cast<std::size_t>(kLineBytes));
    void* memory = ::operator new(size, kLineAligned);
    std::memset(memory, 0, size);
    return memory;
}

void free_bytes(void* memory, std::size_t bytes) {
#ifdef __linux__
    if (bytes >= kHugePage) {
        munmap(memory, whole_units(bytes, page_bytes()));
        return;
    }
#else
    (void)bytes;
#endif
    ::operator delete(memory, kLineAligned);
}

}  // namespace chainrule
