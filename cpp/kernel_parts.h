// SPDX-License-Identifier: Apache-2.0
//
// Attention over some of the keys, and how that becomes attention over all of them. Written by
// kernel.cpp and kernel_few.h, called by decode.cpp through the table at the end of kernel.cpp.
#pragma once

#include "elements.h"
#include "kernel.h"
#include "kernel_scores.h"
#include "vec.h"

namespace fastattn {
namespace {

// The softmax over some keys, row by row: its maximum, its sum, and the values that it weighs.
template <class T>
class Parts {
    static constexpr int64_t lanes = Vec<T>::lanes;
    T* const memory;

   public:
    const int64_t rows, pitch;  // elements of a row's values

    Parts(const Block& block, void* where)
        : memory(static_cast<T*>(where)),
          rows(block.row_count),
          pitch(padded(block.value_head_dim)) {}

    static int64_t padded(int64_t x) { return (x + lanes - 1) / lanes * lanes; }
    static size_t bytes(const Block& block) {
        return size_t(lanes + padded(block.value_head_dim)) * sizeof(T);
    }

    T& row_max(int64_t r) const { return memory[r * (lanes + pitch)]; }
    T& row_sum(int64_t r) const { return memory[r * (lanes + pitch) + 1]; }
    T* acc(int64_t r) const { return memory + r * (lanes + pitch) + lanes; }

    void clear() const {
        for (int64_t r = 0; r < rows; ++r) {
            row_max(r) = -kInfinity<T>;
            row_sum(r) = T(0);
            for (int64_t d = 0; d < pitch; d += lanes) Vec<T>(T(0)).store(acc(r) + d);
        }
    }

    // Adds parts about later keys. One that saw nothing changes no bit.
    void merge(const Parts& later) const {
        for (int64_t r = 0; r < rows; ++r) {
            const T mine = row_max(r), others = later.row_max(r);
            const T largest = mine > others ? mine : others;
            const T offset = largest == -kInfinity<T> ? T(0) : largest;
            const Vec<T> my_share = exp2(Vec<T>(mine - offset));
            const Vec<T> their_share = exp2(Vec<T>(others - offset));
            T* const sum = acc(r);
            for (int64_t d = 0; d < pitch; d += lanes) {
                const Vec<T> added = their_share * Vec<T>::load(later.acc(r) + d);
                fma(Vec<T>::load(sum + d), my_share, added).store(sum + d);
            }
            row_sum(r) =
                fma(Vec<T>(row_sum(r)), my_share, their_share * Vec<T>(later.row_sum(r))).v[0];
            row_max(r) = largest;
        }
    }
};

// out and lse of a block's rows from the parts about all their keys.
template <class T>
void finish_parts(const Block& block, void* memory) {
    using V = Vec<T>;
    const Parts<T> parts(block, memory);
    for (int64_t r = 0; r < parts.rows; ++r) {
        const Row& row = block.rows[r];
        const T largest = parts.row_max(r), sum = parts.row_sum(r);
        const T sink = T(row.sink * kLog2e);
        const T peak = largest > sink ? largest : sink;
        const T offset = peak == -kInfinity<T> ? T(0) : peak;
        const V shrink = exp2(V(largest - offset));
        const V all = fma(V(sum), shrink, exp2(V(sink - offset)));
        const V share = select<T>(all == V(T(0)), V(T(0)), shrink / all);
        const V factor = V(T(block.dropout.scale)) * share;
        with_query<T>(block.query_dtype, [&]<class Out>(const Out*) {
            for (int64_t d = 0; d < block.value_head_dim; d += V::lanes) {
                const V result = fma(V::load(parts.acc(r) + d), factor, V(T(0)));
                store_some(result, block.value_head_dim - d, static_cast<Out*>(row.out) + d);
            }
        });
        if (row.lse == nullptr) continue;
        *static_cast<T*>(row.lse) = T(double(largest) * kLn2 + __builtin_log(double(sum)));
    }
}

template <class T>
void merge_parts(const Block& block, void* into, void* later) {
    Parts<T>(block, into).merge(Parts<T>(block, later));
}

}  // namespace
}  // namespace fastattn
