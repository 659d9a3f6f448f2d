// SPDX-License-Identifier: Apache-2.0
//
// How a call that decodes is cut, by keys instead of queries. Read by decode.cpp and the kernel.
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

}  // namespace fastattn
