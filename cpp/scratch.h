// SPDX-License-Identifier: Apache-2.0
//
// Scratch memory: it is allocated once per call and cut into parts. A layout is said once, as calls
// of Scratch::take(), which first count the bytes and then cut the memory. In a build with
// AddressSanitizer a red zone lies behind each part, and nothing may be touched that is not lent:
// an overrun from one part into the next is seen there, as one of an array is. Any other build has
// none of this. Used by all that cut: attention.cpp, decode.cpp, backward.cpp and the kernel, whose
// rules (kernel/kernel.h) hold here.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#endif

namespace fastattn {
namespace {

constexpr size_t kScratchAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kRedZone = 1024;  // bytes; keeps the alignment
#else
constexpr size_t kRedZone = 0;
#endif

// The part may be used until it is taken back.
template <class Item>
void lend(Item* part, int64_t count) {
    ASAN_UNPOISON_MEMORY_REGION(part, size_t(count) * sizeof(Item));
}

inline void take_back(void* memory, size_t bytes) { ASAN_POISON_MEMORY_REGION(memory, bytes); }

// The bytes that a part of so many takes up.
inline size_t room_for(size_t bytes) {
    return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment + kRedZone;
}

// Cuts memory into parts, one after the other. Without memory it only counts what they take up.
class Scratch {
    const uintptr_t begin_;
    size_t used_ = 0;

   public:
    explicit Scratch(void* memory = nullptr) : begin_(reinterpret_cast<uintptr_t>(memory)) {}

    size_t used() const { return used_; }

    template <class Item>
    Item* take(int64_t count) {
        Item* const part = static_cast<Item*>(reserve(size_t(count) * sizeof(Item)));
        if (begin_ != 0) lend(part, count);
        return part;
    }

    // A part for another function to cut: it is not lent.
    void* reserve(size_t bytes) {
        void* const part = reinterpret_cast<void*>(begin_ + used_);
        used_ += room_for(bytes);
        return part;
    }
};

}  // namespace
}  // namespace fastattn
