// SPDX-License-Identifier: Apache-2.0
//
// The micro-kernel of all products: a block of sums in registers, to which scalars of one matrix
// times vectors of another are added. Called by online_softmax.h and backward.h.
#pragma once

#include "factors.h"
#include "vec.h"

namespace fastattn {
namespace {

// For c in [First, Last), sum[r][c] += over k < depth: a[r * a_row + k * a_step] * b[k * b_step +
// c], c counted in vectors.
template <int First, int Last, bool InPairs, class T, int Rows, int Columns>
[[gnu::always_inline]] inline void multiply(const typename Factor<T, InPairs>::Element* a,
                                            int64_t a_row, int64_t a_step, const T* b,
                                            int64_t b_step, int64_t depth,
                                            Vec<T> (&sum)[Rows][Columns]) {
    using Vector = typename Factor<T, InPairs>::Vector;
    constexpr int lanes = Vec<T>::lanes;
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
        Vector column[Columns];
#pragma GCC unroll 4
        for (int c = First; c < Last; ++c) {
            __builtin_memcpy(&column[c], b + c * lanes, sizeof column[c]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const Vector scalar = Factor<T, InPairs>::everywhere(a + r * a_row);
#pragma GCC unroll 4
            for (int c = First; c < Last; ++c) sum[r][c] = fma(scalar, column[c], sum[r][c]);
        }
    }
}

// step<Rows>(row) over [row, count) in steps of Rows, then of the next smaller power of two, and so
// on: a few rows are as slow as a few more.
template <int Rows, class Step>
[[gnu::always_inline]] inline void in_steps(int64_t row, int64_t count, const Step& step) {
    for (; row + Rows <= count; row += Rows) step.template operator()<Rows>(row);
    if constexpr (Rows > 1) {
        constexpr int fewer = Rows > 8 ? 8 : Rows > 4 ? 4 : Rows > 2 ? 2 : 1;
        if (row < count) in_steps<fewer>(row, count, step);
    }
}

// use<Columns>() for as few vectors as the rows fill.
template <class T, int Columns = 1, class Use>
auto with_columns(int rows, const Use& use) {
    if constexpr (Columns == kColumns) {
        return use.template operator()<Columns>();
    } else {
        if (rows <= Columns * Vec<T>::lanes) return use.template operator()<Columns>();
        return with_columns<T, Columns + 1>(rows, use);
    }
}

}  // namespace
}  // namespace fastattn
