// SPDX-License-Identifier: Apache-2.0
//
// Which pairs dropout keeps. The random number of a pair depends on nothing but the seed and what
// the pair is (the positions of key and query, query head and batch element), so that it is the
// same wherever and however often it is asked for. Called by online_softmax.h, decode.h and
// backward.h.
//
// The numbers are those of Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3", 2011), whose counter is (key / 4, position, head, batch): one call gives those
// of four keys. These may lie across the bounds of what is asked for: the first key of all stands
// at position Dropout::key_offset, and any number may be that. reference.py has it in NumPy.
#pragma once

#include "elements.h"
#include "kernel.h"
#include "scores.h"
#include "vec.h"

namespace fastattn {
namespace {

// Turns a counter into four random words.
template <class T>
[[gnu::always_inline]] inline void philox(Words<T> (&counter)[4], uint64_t seed) {
    const isa::Wide multiplier[2] = {0xd2511f53 - isa::Wide{}, 0xcd9e8d57 - isa::Wide{}};
#pragma GCC unroll 2
    for (int p = 0; p < Words<T>::parts; ++p) {
        isa::Wide x[4];
        for (int i = 0; i < 4; ++i) x[i] = counter[i].part[p];
        uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
#pragma GCC unroll 7
        for (int round = 0; round < 7; ++round) {
            const isa::Wide first = isa::multiply_halves(x[0], multiplier[0]);
            const isa::Wide second = isa::multiply_halves(x[2], multiplier[1]);
            x[0] = (second >> 32) ^ x[1] ^ uint64_t { key[0] };
            x[1] = second;
            x[2] = (first >> 32) ^ x[3] ^ uint64_t { key[1] };
            x[3] = first;
            key[0] += 0x9e3779b9;
            key[1] += 0xbb67ae85;
        }
        for (int i = 0; i < 4; ++i) counter[i].part[p] = x[i];
    }
}

// The pairs of one vector of rows, which lie along the lanes, with keys.
template <class T>
class KeptOfRows {
    using V = Vec<T>;
    static constexpr int lanes = V::lanes;

    Words<T> position, head, batch;
    const uint64_t seed;
    const uint32_t last_dropped;
    const int64_t key_offset;

   public:
    // For lanes behind the last row the answers mean nothing.
    KeptOfRows(const Dropout& dropout, const Row* rows, int row_count)
        : seed(dropout.seed), last_dropped(dropout.last_dropped), key_offset(dropout.key_offset) {
        uint32_t positions[lanes] = {}, heads[lanes] = {}, batches[lanes] = {};
        for (int i = 0; i < lanes && i < row_count; ++i) {
            positions[i] = uint32_t(rows[i].position + key_offset);
            heads[i] = rows[i].head;
            batches[i] = rows[i].batch;
        }
        position = Words<T>::load(positions);
        head = Words<T>::load(heads);
        batch = Words<T>::load(batches);
    }

    // visit(key, kept) for each key in turn; kept: a mask of the rows.
    template <class Visit>
    [[gnu::always_inline]] void each_key(Span keys, const Visit& visit) const {
        int64_t first = keys.begin - ((keys.begin + key_offset) & 3);
        for (; first < keys.end; first += 4) {
            const uint32_t four = uint32_t((first + key_offset) >> 2);
            Words<T> words[4] = {Words<T>::everywhere(four), position, head, batch};
            philox(words, seed);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if (first + i < keys.begin || first + i >= keys.end) continue;
                visit(first + i, above(words[i], last_dropped));
            }
        }
    }
};

// Sets the probabilities of dropped pairs to 0. probs: those of the first key with the rows, then
// `pitch` elements on those of the next; or, in pairs, of two keys, the first of which is even.
template <bool InPairs, class T>
[[gnu::always_inline]] inline void drop(T* probs, int64_t pitch, Span keys,
                                        const KeptOfRows<T>& kept) {
    kept.each_key(keys, [&](int64_t key, typename Vec<T>::Mask mask) {
        T* const at = probs + (key - keys.begin) / (InPairs ? 2 : 1) * pitch;
        if constexpr (InPairs) {
            Pairs pairs;
            __builtin_memcpy(&pairs, at, sizeof pairs);
            pairs &= Pairs(mask) | (key % 2 == 0 ? 0xffff0000 : 0x0000ffff);
            __builtin_memcpy(at, &pairs, sizeof pairs);
        } else {
            select<T>(mask, Vec<T>::load(at), Vec<T>(T(0))).store(at);
        }
    });
}

// The pairs of one row with keys, which lie along the lanes.
template <class T>
class KeptOfKeys {
    using Mask = typename Vec<T>::Mask;
    static constexpr int lanes = Vec<T>::lanes;

    const Dropout& dropout;
    const Row& row;

   public:
    static constexpr int keys = 4 * lanes;  // that it says at a time

    KeptOfKeys(const Dropout& d, const Row& r) : dropout(d), row(r) {}

    // kept: of the keys first, first + 1, ...
    [[gnu::always_inline]] void find(int64_t first, Mask (&kept)[4]) const {
        const int64_t position = first + dropout.key_offset;
        if (position % 4 == 0) return find_fours(position >> 2, kept);
        find_between(position, kept);
    }

    bool keeps(int64_t key) const {
        const int64_t position = key + dropout.key_offset;
        Mask kept[4];
        find_fours(position >> 2, kept);
        const int i = int(position & 3);
        return kept[i / lanes][i % lanes] != 0;
    }

   private:
    // The same where the first position is amid four.
    [[gnu::noinline]] void find_between(int64_t position, Mask (&kept)[4]) const {
        Mask masks[2][4];  // of as many positions, and of those behind
        find_fours(position >> 2, masks[0]);
        find_fours((position >> 2) + lanes, masks[1]);
        const auto* const from = reinterpret_cast<const char*>(masks);
        __builtin_memcpy(kept, from + size_t(position & 3) * sizeof(Mask) / lanes, sizeof kept);
    }

    // kept: of the positions 4 * first, 4 * first + 1, ...
    [[gnu::always_inline]] void find_fours(int64_t first, Mask (&kept)[4]) const {
        uint32_t fours[lanes];
        for (int i = 0; i < lanes; ++i) fours[i] = uint32_t(first + i);
        Words<T> words[4] = {Words<T>::load(fours),
                             Words<T>::everywhere(uint32_t(row.position + dropout.key_offset)),
                             Words<T>::everywhere(row.head), Words<T>::everywhere(row.batch)};
        philox(words, dropout.seed);
        Mask of[4];
        for (int i = 0; i < 4; ++i) of[i] = above(words[i], dropout.last_dropped);
        // Lane i of of[n] is key 4 * i + n.
        const Mask even[2] = {zip_low<T>(of[0], of[2]), zip_high<T>(of[0], of[2])};
        const Mask odd[2] = {zip_low<T>(of[1], of[3]), zip_high<T>(of[1], of[3])};
        for (int half = 0; half < 2; ++half) {
            kept[2 * half] = zip_low<T>(even[half], odd[half]);
            kept[2 * half + 1] = zip_high<T>(even[half], odd[half]);
        }
    }
};

// The same for a row's probabilities, which lie key by key, in whole vectors.
template <class T>
void drop(T* probs, Span keys, const KeptOfKeys<T>& kept) {
    constexpr int lanes = Vec<T>::lanes;
    for (int64_t j = 0; j < keys.size(); j += KeptOfKeys<T>::keys) {
        typename Vec<T>::Mask masks[4];
        kept.find(keys.begin + j, masks);
        for (int i = 0; i < 4 && j + i * lanes < keys.size(); ++i) {
            T* const at = probs + j + i * lanes;
            select<T>(masks[i], Vec<T>::load(at), Vec<T>(T(0))).store(at);
        }
    }
}

}  // namespace
}  // namespace fastattn
