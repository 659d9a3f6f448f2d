// SPDX-License-Identifier: Apache-2.0
//
// Scratch memory: a block that is allocated once per call and cut into parts. In a build with
// AddressSanitizer a red zone lies behind each part, and nothing may be touched that is not lent:
// an overrun from one part into the next is seen there, as one of an array is. In any other build
// there is nothing of this. Used by all that cut: attention.cpp, decode.cpp, backward.cpp and the
// kernel, whose rules (kernel.h) hold here.
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

// In elements.
template <class Item>
constexpr int64_t kGap = kRedZone / sizeof(Item);

// The part may be used until it is taken back.
template <class Item>
void lend(Item* part, int64_t count) {
    ASAN_UNPOISON_MEMORY_REGION(part, size_t(count) * sizeof(Item));
}

inline void take_back(void* memory, size_t bytes) { ASAN_POISON_MEMORY_REGION(memory, bytes); }

// What a part of so many bytes takes up.
inline size_t room_for(size_t bytes) {
    return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment + kRedZone;
}

}  // namespace
}  // namespace fastattn
