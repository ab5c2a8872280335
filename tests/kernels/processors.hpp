// SPDX-License-Identifier: MIT
// The processor's instruction sets; CPU quotas: what a cgroup's file says, and which of a tree of cgroups holds.
#pragma once

#include <filesystem>
#include <fstream>

#include "harness.hpp"

namespace chainrule {
namespace {

// The oracle is the compiler's runtime library: GCC's and LLVM's know, Zig's says no to everything.
void instruction_sets() {
#if defined(__x86_64__) && defined(__linux__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("fma");
    const bool avx512 = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    check(runs_here(Isa::avx512) == avx512, "AVX-512");
    check(runs_here(Isa::avx2) == (fma && __builtin_cpu_supports("avx2")), "AVX2 and FMA");
    check(multiplies_pairs() == (avx512 && __builtin_cpu_supports("avx512bf16")), "AVX512_BF16");
#endif
    check(runs_here(Isa::baseline), "the baseline runs everywhere");
}

void quota_texts() {
    context.type = "";
    const std::pair<const char*, int> rows[] = {
        {"max 100000", kNoQuota}, {"max 100000\n", kNoQuota},
        {"50000 100000", 1},                             // at least one
        {"100000 100000", 1},     {"150000 100000", 1},  // a part of a processor is none
        {"200000 100000\n", 2},   {"6400000 100000", 64},
        {"1000 500", 2},          {"-1\n 100000\n", kNoQuota},  // version 1
        {"250000\n 100000\n", 2}, {"", kNoQuota},
        {" ", kNoQuota},          {"200000", kNoQuota},
        {"garbage", kNoQuota},    {"200000 garbage", kNoQuota},
        {"0 100000", kNoQuota},   {"200000 0", kNoQuota},
        {"200000 -1", kNoQuota},  {"nan nan", kNoQuota},
        {"inf 1", kNoQuota},      {"1e300 1e-300", kNoQuota},
    };
    for (const auto& [text, want] : rows) check(quota_processors(text) == want, text);
}

// A folder with files in it, gone at the end.
class Tree {
   public:
    Tree() = default;
    Tree(const Tree&) = delete;
    Tree& operator=(const Tree&) = delete;
    ~Tree() { std::filesystem::remove_all(root_); }
    void write(const char* path, const char* text) const {
        const std::filesystem::path file = root_ / path;
        std::filesystem::create_directories(file.parent_path());
        std::ofstream(file) << text;
    }
    int processors(const char* membership) const { return cgroup_processors(membership, root_.string().c_str()); }

   private:
    const std::filesystem::path root_ = new_folder("chainrule-cgroups-");
};

void quota_paths() {
    context.type = "";
    const Tree two;  // version 2 alone
    two.write("cpu.max", "800000 100000\n");
    two.write("user.slice/cpu.max", "max 100000\n");
    two.write("user.slice/app.slice/cpu.max", "300000 100000\n");
    two.write("user.slice/app.slice/job.scope/cpu.max", "500000 100000\n");
    two.write("other/cpu.max", "100000 100000\n");
    check(two.processors("0::/user.slice/app.slice/job.scope\n") == 3, "a parent's quota, smaller than the own one");
    check(two.processors("0::/user.slice/app.slice\n") == 3, "the own quota");
    check(two.processors("0::/user.slice") == 8, "the root's quota: a container's own");
    check(two.processors("0::/\n") == 8, "a process in the root");
    check(two.processors("0::/docker/not/here\n") == 8, "a path as the host knows it: the root's is the own one");
    check(two.processors("0::/../..\n") == 8, "a path out of the mount");
    check(two.processors("1:name=systemd:/other\n0::/user.slice/app.slice\n") == 3, "lines of other hierarchies");

    const Tree one;  // version 1, version 2 beside it without the processors
    one.write("cpu/cpu.cfs_quota_us", "-1\n");
    one.write("cpu/cpu.cfs_period_us", "100000\n");
    one.write("cpu/batch/cpu.cfs_quota_us", "200000\n");
    one.write("cpu/batch/cpu.cfs_period_us", "100000\n");
    one.write("cpu/batch/job/cpu.cfs_quota_us", "-1\n");
    one.write("cpu/batch/job/cpu.cfs_period_us", "100000\n");
    one.write("unified/batch/cgroup.procs", "");
    check(one.processors("4:cpu,cpuacct:/batch/job\n0::/batch\n") == 2, "version 1: a parent's quota");
    check(one.processors("9:cpuacct,cpu:/batch\n") == 2, "the controllers in another order");
    check(one.processors("1:cpu:/\n") == kNoQuota, "version 1: none");
    check(one.processors("3:cpuset:/batch\n2:cpuacct:/batch\n0::/batch\n") == kNoQuota, "another controller's path");
    one.write("unified/batch/cpu.max", "100000 100000\n");
    check(one.processors("4:memory:/batch\n0::/batch\n") == 1, "version 2 beside version 1, with the processors");

    for (const char* text : {"", "\n", ":", "::", "0:", "0::", "0::relative", "cpu:/", "4:cpu", "no colon\n\n"})
        check(two.processors(text) == kNoQuota && one.processors(text) == kNoQuota, "text of another form");
    check(usable_processors() >= 1, "this machine has a processor");
}

}  // namespace
}  // namespace chainrule
