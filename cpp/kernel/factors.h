// SPDX-License-Identifier: Apache-2.0
//
// What the two products of attention multiply: numbers of the arithmetic, or pairs of bfloat16,
// where there is an instruction that adds the products of two pairs to a float. Called by
// online_softmax.h, decode.h and backward.h.
#pragma once

#include "elements.h"
#include "vec.h"

namespace fastattn {
namespace {

// The factors of a product, k by k: one is broadcast from memory that holds Elements, the other is
// a Vector of them.
template <class T, bool InPairs>
struct Factor {
    using Element = T;
    using Vector = Vec<T>;
    static constexpr int64_t size = 1;  // in elements
    static Vector everywhere(const T* a) { return *a; }
};
template <>
struct Factor<float, true> {
    using Element = BFloat16;
    using Vector = Pairs;
    static constexpr int64_t size = 2;
    static Vector everywhere(const BFloat16* a) {
        uint32_t pair;
        __builtin_memcpy(&pair, a, sizeof pair);
        return pair - Pairs{};
    }
};

// A Vector's worth of elements, one after the other.
template <class T, bool InPairs, class From>
typename Factor<T, InPairs>::Vector load_factor(const From* from) {
    if constexpr (!InPairs) {
        return load(from);
    } else if constexpr (kIsBFloat16<From>) {
        Pairs pairs;
        __builtin_memcpy(&pairs, from, sizeof pairs);
        return pairs;
    } else {
        return adjacent_pairs(load(from), load(from + Vec<T>::lanes));
    }
}

}  // namespace
}  // namespace fastattn
