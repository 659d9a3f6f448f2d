// SPDX-License-Identifier: Apache-2.0
//
// What the door (attention.h) and the kernel both say of arrays.
#pragma once

#include <cstdint>

namespace fastattn {

enum class Dtype : uint8_t { kBool, kInt8, kFloat16, kBFloat16, kFloat32, kFloat64 };

// How the weight of a linear layer is stored: as numbers, or as ggml's blocks of 32 of a row.
enum class Storage : uint8_t { kFloat32, kFloat16, kBFloat16, kQ8_0, kQ4_0, kQ4_1 };

constexpr int64_t kPageKeys = 128;  // no tile of keys crosses a multiple of it

}  // namespace fastattn
