// SPDX-License-Identifier: Apache-2.0
//
// How keys are cut: those of a call that decodes, and those of long sequences. Read by
// attention.cpp, decode.cpp and the kernel, which must not be told by anything but these numbers.
#pragma once

#include <cstdint>

namespace fastattn {

// A sequence of at most so many queries is decoded: its keys are cut into splits (decode.cpp),
// unless so many heads share a key head that their rows would take much memory. The rows of any
// other are cut into blocks (attention.cpp). The contract lets callers cut longer queries anywhere,
// so kMostQueries is at most 16.
constexpr int64_t kMostQueries = 16, kMostRows = 256;

constexpr int64_t kSplitKeys = 1024;  // keys of a split; whole key tiles
constexpr int kMostTogether = 64;     // rows that attend to a split together

// The softmax of any row begins anew at each multiple of so many keys, and what it has of the keys
// before is merged with what comes, as partials are (kernel/partials.h). So no bit of a result
// tells whether one thread attended to all keys of a block of rows or several to a span each.
constexpr int64_t kSpanKeys = 4096;
static_assert(kSpanKeys % kSplitKeys == 0);

}  // namespace fastattn
