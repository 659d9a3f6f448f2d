// SPDX-License-Identifier: Apache-2.0
//
// Partials: attention over some of the keys, and how it becomes attention over all of them. Written
// by online_softmax.h and decode.h; called by decode.cpp through the table in kernel.cpp.
#pragma once

#include "elements.h"
#include "kernel.h"
#include "scores.h"
#include "vec.h"

namespace fastattn {
namespace {

// For each row its softmax over some of the keys: the maximum, the sum, and the sum of the values
// that it weighs.
template <class T>
class Partials {
    static constexpr int64_t lanes = Vec<T>::lanes;
    T* const memory;

   public:
    const int64_t rows, pitch;  // elements of a row's values

    Partials(const Block& block, void* where)
        : memory(static_cast<T*>(where)),
          rows(block.row_count),
          pitch(Vec<T>::padded(block.value_head_dim)) {}

    static size_t bytes(const Block& block) {
        return size_t(lanes + Vec<T>::padded(block.value_head_dim)) * sizeof(T);
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

    // Adds the partials of later keys. One that saw nothing changes no bit.
    void merge(const Partials& later) const {
        for (int64_t r = 0; r < rows; ++r) {
            const T mine = row_max(r), others = later.row_max(r);
            const T largest = mine > others ? mine : others;
            const T offset = largest == -kInfinity<T> ? T(0) : largest;
            const Vec<T> my_rescale = exp2(Vec<T>(mine - offset));
            const Vec<T> their_rescale = exp2(Vec<T>(others - offset));
            T* const sum = acc(r);
            for (int64_t d = 0; d < pitch; d += lanes) {
                const Vec<T> added = their_rescale * Vec<T>::load(later.acc(r) + d);
                fma(Vec<T>::load(sum + d), my_rescale, added).store(sum + d);
            }
            row_sum(r) =
                fma(Vec<T>(row_sum(r)), my_rescale, their_rescale * Vec<T>(later.row_sum(r))).v[0];
            row_max(r) = largest;
        }
    }
};

// Stores out and lse of a block's rows, whose partials are about all of their keys.
template <class T>
void finish_partials(const Block& block, void* memory) {
    using V = Vec<T>;
    const Partials<T> partials(block, memory);
    for (int64_t r = 0; r < partials.rows; ++r) {
        const Row& row = block.rows[r];
        const T largest = partials.row_max(r), sum = partials.row_sum(r);
        const T sink = T(row.sink * kLog2e);
        const T peak = largest > sink ? largest : sink;
        const V offset = peak == -kInfinity<T> ? T(0) : peak;
        const V rescale = exp2(V(largest) - offset);
        const V all = fma(V(sum), rescale, exp2(V(sink) - offset));
        const V share = select<T>(all == V(T(0)), V(T(0)), rescale / all);
        const V factor = V(T(block.dropout.scale)) * share;
        with_query<T>(block.query_dtype, [&]<class Out>(const Out*) {
            for (int64_t d = 0; d < block.value_head_dim; d += V::lanes) {
                const V result = fma(V::load(partials.acc(r) + d), factor, V(T(0)));
                store_some(result, block.value_head_dim - d, static_cast<Out*>(row.out) + d);
            }
        });
        if (row.softmax != nullptr) {
            static_cast<T*>(row.softmax)[0] = offset.v[0];
            static_cast<T*>(row.softmax)[1] = all.v[0] == T(0) ? T(0) : T(1) / all.v[0];
        }
        if (row.lse == nullptr) continue;
        *static_cast<T*>(row.lse) = T(double(largest) * kLn2 + __builtin_log(double(sum)));
    }
}

template <class T>
void merge_partials(const Block& block, void* into, void* later) {
    Partials<T>(block, into).merge(Partials<T>(block, later));
}

}  // namespace
}  // namespace fastattn
