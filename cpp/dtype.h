// SPDX-License-Identifier: Apache-2.0
//
// What the door (attention.h) and the kernel both say of arrays.
#pragma once

#include <cstdint>

namespace fastattn {

enum class Dtype : uint8_t { kBool, kInt8, kFloat16, kBFloat16, kFloat32, kFloat64 };

constexpr int64_t kPageKeys = 128;  // no tile of keys crosses a multiple of it

}  // namespace fastattn
