// SPDX-License-Identifier: Apache-2.0
//
// Two loops that reach the machine's limits, against which the kernel is measured. Called by
// limits.cpp through the table in kernel.cpp.
#pragma once

#include "elements.h"
#include "factors.h"
#include "vec.h"

namespace fastattn {
namespace {

// The micro-kernel's multiply-adds with nothing to load or store.
template <class T, bool InPairs = false>
double run_fma(int64_t rounds) {
    using Vector = typename Factor<T, InPairs>::Vector;
    constexpr int chains = kVectorBytes == 64 ? 24 : 12;
    volatile T one = 1;
    const Vec<T> ones = T(one);
    Vector factor;
    __builtin_memcpy(&factor, &ones, sizeof factor);
    Vec<T> sum[chains];
    for (int i = 0; i < chains; ++i) sum[i] = T(i);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
        for (int i = 0; i < chains; ++i) sum[i] = fma(factor, factor, sum[i]);
    }
    for (int i = 1; i < chains; ++i) sum[0] = sum[0] + sum[i];
    one = sum[0].v[0];  // keeps the loop
    return 2.0 * Factor<T, InPairs>::size * chains * Vec<T>::lanes * double(rounds);
}

// Reads every cache line, and fetches some lines ahead, as decoding does: the hardware alone does
// not keep memory as busy.
double read_bytes(const void* data, int64_t bytes) {
    const auto* from = static_cast<const double*>(data);
    constexpr int lanes = Vec<double>::lanes, streams = 8;
    constexpr int64_t ahead = 512;
    Vec<double> sum[streams] = {};
    for (int64_t i = 0; i + streams * lanes <= bytes / 8; i += streams * lanes) {
        prefetch<0, 3>(from + i + ahead, streams * lanes);
        for (int k = 0; k < streams; ++k) sum[k] = sum[k] + Vec<double>::load(from + i + k * lanes);
    }
    for (int k = 1; k < streams; ++k) sum[0] = sum[0] + sum[k];
    return sum[0].v[0];
}

}  // namespace
}  // namespace fastattn
