// SPDX-License-Identifier: Apache-2.0
//
// The door to the products of a model's weights, beside attention.h. Called by src/linear.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "dtype.h"

namespace fastattn {

// out (rows, out_features) = x (rows, in_features) weight^T + bias. Trusted: the caller has checked
// it. Quantised rows are whole blocks.
struct LinearArgs {
    const float* x;
    const void* weight;
    const float* bias;  // null: none
    float* out;         // contiguous
    int64_t rows, in_features, out_features;
    int64_t x_stride;       // in numbers; a row is contiguous
    int64_t weight_stride;  // in bytes; a row is contiguous
    Storage storage;
};

// Computes all layers, of which each has something to do, as one piece of work. False: interrupted,
// out is unfinished; so it is where it throws std::bad_alloc.
bool linear(const std::vector<LinearArgs>& layers, Interrupt interrupt);

}  // namespace fastattn
