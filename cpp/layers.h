// SPDX-License-Identifier: Apache-2.0
//
// The door to the layers beside products and attention, beside attention.h. Called by
// src/layers.cpp. Arrays are contiguous, and no result overlaps what it is computed of. Trusted:
// the caller has checked it.
#pragma once

#include <cstdint>

#include "attention.h"

namespace fastattn {

// Each returns false if it is interrupted; out is unfinished then.
bool gelu(const float* x, float* out, int64_t count, bool by_tanh, Interrupt interrupt);

// out = f(gate) * up; f is gelu by tanh (geglu), or gate / (1 + exp(-gate)).
bool swiglu(const float* gate, const float* up, float* out, int64_t count, Interrupt interrupt);
bool geglu(const float* gate, const float* up, float* out, int64_t count, Interrupt interrupt);

// x and out (rows, dim), weight and bias (dim).
bool layer_norm(const float* x, const float* weight, const float* bias, double eps, float* out,
                int64_t rows, int64_t dim, Interrupt interrupt);
bool rms_norm(const float* x, const float* weight, double eps, float* out, int64_t rows,
              int64_t dim, Interrupt interrupt);
bool softmax(const float* x, float* out, int64_t rows, int64_t dim, bool log, Interrupt interrupt);

// x and out (tokens, heads, head_dim), cos and sin (tokens, half); 2 * half <= head_dim.
bool rotary(const float* x, const float* cos, const float* sin, float* out, int64_t tokens,
            int64_t heads, int64_t head_dim, int64_t half, Interrupt interrupt);

}  // namespace fastattn
