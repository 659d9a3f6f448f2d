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

// What rows get of what their out holds, which is attention over other keys, and of the sum of the
// values over these.
template <class T>
struct Shares {
    Vec<T> before, now;
    bool begins[Vec<T>::lanes];  // no key was seen before, and out holds nothing
};

// Of `count` rows that accumulate, with the maximum and the sum of each. Makes of their lse, which
// is over the other keys, that over both; of a row that sees no key now, it stays as it is.
template <class T>
[[gnu::noinline]] Shares<T> join(const Block& block, const Row* rows, int64_t count, Vec<T> row_max,
                                 Vec<T> row_sum) {
    using V = Vec<T>;
    constexpr int lanes = V::lanes;
    double offset[lanes] = {};
    T before[lanes] = {}, now[lanes] = {};
    Shares<T> shares{};
    for (int i = 0; i < lanes && i < count; ++i) {
        const double lse = double(*static_cast<const T*>(rows[i].lse));
        const double others = lse * kLog2e, mine = double(row_max.v[i]);
        const double peak = others > mine ? others : mine;
        offset[i] = peak == -__builtin_inf() ? 0 : peak;
        before[i] = T(others - offset[i]);
        now[i] = T(mine - offset[i]);
        shares.begins[i] = lse == -__builtin_inf();
    }
    const V old_weight = exp2(V::load(before)), new_weight = exp2(V::load(now));
    const V all = fma(row_sum, new_weight, old_weight), zero = T(0);
    const auto empty = all == zero;
    shares.before = select<T>(empty, zero, old_weight / all);
    shares.now = V(T(block.dropout.scale)) * select<T>(empty, zero, new_weight / all);
    for (int i = 0; i < lanes && i < count; ++i) {
        if (row_sum.v[i] == T(0)) continue;
        *static_cast<T*>(rows[i].lse) = T(offset[i] * kLn2 + __builtin_log(double(all.v[i])));
    }
    return shares;
}

// Some columns of a row of out, which begin at `to`, after what they hold: row i of the shares;
// now: what the row gets of these keys.
template <class T, class Out>
void add_to_out(const Shares<T>& shares, int64_t i, Vec<T> now, int64_t count, Out* to) {
    const Vec<T> before = shares.begins[i] ? Vec<T>(T(0)) : load_some<T>(to, count);
    store_some(fma(before, Vec<T>(shares.before.v[i]), now), count, to);
}

// As finish_partials(), of rows that accumulate.
template <class T>
[[gnu::noinline]] void join_partials(const Block& block, const Partials<T>& partials) {
    using V = Vec<T>;
    for (int64_t first = 0; first < partials.rows; first += V::lanes) {
        const int64_t left = partials.rows - first, count = left < V::lanes ? left : V::lanes;
        T largest[V::lanes] = {}, sum[V::lanes] = {};
        for (int64_t i = 0; i < count; ++i) {
            largest[i] = partials.row_max(first + i);
            sum[i] = partials.row_sum(first + i);
        }
        const Shares<T> shares =
            join<T>(block, block.rows + first, count, V::load(largest), V::load(sum));
        with_query<T>(block.out_dtype, [&]<class Out>(const Out*) {
            for (int64_t i = 0; i < count; ++i) {
                const T* const acc = partials.acc(first + i);
                Out* const out = static_cast<Out*>(block.rows[first + i].out);
                for (int64_t d = 0; d < block.value_head_dim; d += V::lanes) {
                    const V now = fma(V::load(acc + d), V(shares.now.v[i]), V(T(0)));
                    add_to_out(shares, i, now, block.value_head_dim - d, out + d);
                }
            }
        });
    }
}

// Stores out and lse of a block's rows, whose partials are about all of their keys.
template <class T>
void finish_partials(const Block& block, void* memory) {
    using V = Vec<T>;
    const Partials<T> partials(block, memory);
    if (block.accumulates) return join_partials(block, partials);
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
        with_query<T>(block.out_dtype, [&]<class Out>(const Out*) {
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
