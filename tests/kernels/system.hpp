// SPDX-License-Identifier: MIT
// What the tests ask of the operating system: memory that ends at an unmapped page, and that accesses outside of it and
// hangs end the process with a report.
#pragma once

#include <signal.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#undef near
#undef far
#else
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace chainrule {
namespace {

struct Mapping {
    unsigned char* end;  // the unmapped page begins here
    std::size_t size;    // usable bytes before it
};

#ifdef _WIN32
std::size_t page_bytes() {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

unsigned char* map_before_fence(std::size_t size, std::size_t page) {
    void* start = VirtualAlloc(nullptr, size + page, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    DWORD before;
    if (start == nullptr || !VirtualProtect(static_cast<char*>(start) + size, page, PAGE_NOACCESS, &before))
        return nullptr;
    return static_cast<unsigned char*>(start);
}

constexpr int kHang = -1;
constexpr int kFaults[] = {SIGSEGV, SIGILL, SIGFPE};
void end_hang_after(int) {}  // Windows has no alarm: who starts the tests limits their time
#else
std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

unsigned char* map_before_fence(std::size_t size, std::size_t page) {
    void* start = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + size, page, PROT_NONE) != 0) return nullptr;
    return static_cast<unsigned char*>(start);
}

constexpr int kHang = SIGALRM;
constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGALRM};
void end_hang_after(int seconds) { alarm(static_cast<unsigned>(seconds)); }
#endif

Mapping new_mapping(std::size_t size) {
    const std::size_t page = page_bytes();
    size = std::max<std::size_t>(size, std::size_t{1} << 16);
    size = (size + page - 1) / page * page;
    unsigned char* start = map_before_fence(size, page);
    if (start == nullptr) {
        std::fprintf(stderr, "no memory of %zu bytes before a page of its own\n", size);
        std::exit(2);
    }
    return {start + size, size};
}

// A new empty folder; who asks for it removes it.
std::filesystem::path new_folder(const std::string& name) {
    const auto folder = std::filesystem::temp_directory_path() / (name + std::to_string(std::random_device{}()));
    std::filesystem::create_directory(folder);
    return folder;
}

}  // namespace
}  // namespace chainrule
