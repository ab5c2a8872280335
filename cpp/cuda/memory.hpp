// SPDX-License-Identifier: MIT
// L1: memory on a device, without CUDA's headers: who only moves arrays need not know them.
#pragma once

#include <memory>
#include <new>
#include <string>
#include <utility>

#include "../platform.hpp"

namespace chainrule {
namespace cuda {

enum class Precision { float32, tf32, bfloat16, float64 };

// Device memory that is not there is Python's MemoryError.
class OutOfMemory : public std::bad_alloc {
   public:
    explicit OutOfMemory(std::string text) : text_(std::move(text)) {}
    const char* what() const noexcept override { return text_.c_str(); }

   private:
    std::string text_;
};

int device_of(const void* pointer);                                    // -1: the host's
void copy(int device, void* to, const void* from, std::size_t bytes);  // either way; waits
void* allocate(int device, std::size_t bytes, const char* what);
void release(void* memory) noexcept;
// For an array of the caller's. The last few that have gone leave theirs for others of their size.
std::shared_ptr<void> array_memory(int device, std::size_t bytes);

// Owns an array on a device; contents undefined.
template <class T>
class Buffer {
   public:
    Buffer() = default;
    Buffer(int device, Index size, const char* what)
        : data_(static_cast<T*>(allocate(device, static_cast<std::size_t>(size) * sizeof(T), what))), size_(size) {}
    Buffer(Buffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Buffer() { release(data_); }
    T* data() const { return data_; }
    Index size() const { return size_; }
    // At least so large; contents undefined.
    void grow(int device, Index size, const char* what) {
        if (size_ >= size) return;
        *this = Buffer();  // first, so that both need not fit
        *this = Buffer(device, size, what);
    }

   private:
    T* data_ = nullptr;
    Index size_ = 0;
};

}  // namespace cuda
}  // namespace chainrule
