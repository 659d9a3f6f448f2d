// SPDX-License-Identifier: Apache-2.0
//
// The scores of a query tile and a key tile, S^T = K Q^T, and what they need: the transposed query,
// the keys where they lie or widened, and the passes between (scores.h). Used by online_softmax.h,
// which weighs values by them, and statistics.h, which looks at them.
#pragma once

#include "elements.h"
#include "factors.h"
#include "kernel.h"
#include "multiply.h"
#include "scores.h"
#include "vec.h"

namespace fastattn {
namespace {

// So many columns of values are staged at a time, in elements of `size` numbers: few, so that many
// threads have room; all, if they are not many more; else whole steps of the micro-kernel.
constexpr int64_t staged_columns(int64_t columns, int64_t size) {
    const int64_t all = (columns + size - 1) / size;
    return all <= 64 ? all : 48;
}
static_assert(kPageKeys % kKeyTile == 0);

// Calls visit<First, Last>(begin, end) for the keys of a tile between one cut and the next, with
// the vectors that may see them (ScorePasses::find_cuts).
template <int Columns, int Index = 0, class Visit>
[[gnu::always_inline]] inline void between_cuts(const int64_t (&cuts)[2 * Columns],
                                                const Visit& visit) {
    constexpr int first = Index < Columns ? 0 : Index - Columns + 1;
    constexpr int last = Index < Columns ? Index + 1 : Columns;
    if (cuts[Index] < cuts[Index + 1]) {
        visit.template operator()<first, last>(cuts[Index], cuts[Index + 1]);
    }
    if constexpr (Index + 2 < 2 * Columns) between_cuts<Columns, Index + 1>(cuts, visit);
}

// Whether the products are those of pairs: not for an odd head_dim, whose last would be half one.
template <class T>
bool in_pairs(const Block& block) {
    return kMultipliesPairs && sizeof(T) == 4 && block.query_dtype == Dtype::kBFloat16 &&
           block.kv_dtype == Dtype::kBFloat16 && block.head_dim % 2 == 0;
}

// The scratch memory that the query tiles of a row block use in turn. One that is alone prepares
// keys and values some at a time, where it multiplies them: that takes less memory.
template <class T>
struct Shared {
    T* scores;   // (keys, `width` lanes) S^T, then P^T; of this, pairs fill half the rows
    T* staging;  // (keys, staged_columns() or lanes) rows of a mask, or values
    T* key;      // (keys, head_dim) and
    T* value;    // (keys, value_head_dim): of a narrower type, widened; or values, in pairs
    bool some_at_a_time;  // key, then, has key_rows of kDepth, in staging, and value one row
    int64_t key_rows;
    int64_t key_tile = -1, value_tile = -1;  // the key tiles that they are of
    bool fetches = false;                    // reading keys takes longer than their use
    int64_t fetched = -1;  // the key tile at which values, and keys to come, were fetched
    Ahead ahead;           // what is needed at the end of the block, and for the next one

    Shared(const Block& block, int64_t width, bool alone, Scratch& scratch) {
        using V = Vec<T>;
        const int64_t keys = block.kv_len < kKeyTile ? block.kv_len + block.kv_len % 2 : kKeyTile;
        const bool prepares = block.kv_dtype != kDtype<T>, pairs = in_pairs<T>(block);
        const int64_t columns = staged_columns(block.value_head_dim, pairs ? 2 : 1);
        scores = scratch.take<T>(keys * width);
        int64_t of_staging = V::padded(keys) * (columns > V::lanes ? columns : V::lanes);
        int64_t of_key = prepares && !pairs ? V::padded(keys * block.head_dim) : 0;
        int64_t of_value = prepares ? V::padded(keys * block.value_head_dim) : 0;
        if (pairs) of_value = V::padded(keys / 2 * block.value_head_dim);
        some_at_a_time = alone && prepares;
        if (some_at_a_time) {
            const int64_t depth = block.head_dim < kDepth ? block.head_dim : kDepth;
            const int64_t least = micro_rows(1) * V::padded(depth);
            if (!pairs && of_staging < least) of_staging = least;
            key_rows = of_staging / V::padded(depth);
            of_key = 0;
            of_value = pairs ? 0 : V::padded(block.value_head_dim);
        }
        staging = scratch.take<T>(of_staging);
        key = some_at_a_time ? staging : scratch.take<T>(of_key);
        value = scratch.take<T>(of_value);
    }
};

// Rows that fill up to Columns vectors, and their scores with one key tile after the other.
//
// In pairs, the query and keys that are multiplied are bfloat16, and all sums are float: a key's
// row is pairs already. The scale, which the query has no bits for, goes to the scores.
template <class T, bool InPairs, int Columns>
class ScoreTile {
   protected:
    using V = Vec<T>;
    using Operand = Factor<T, InPairs>;
    using Element = typename Operand::Element;
    static constexpr int lanes = V::lanes;
    static constexpr int width = Columns * lanes;  // rows, and lanes that have none

    const Block block;  // the query tile's rows alone
    const int64_t head_dim;
    ScorePasses<T, Columns> passes;

    // In scratch memory.
    T* const query;  // (head_dim, width) transposed and scaled
    T* const scores;
    T* const staging;
    Shared<T>* const shared;

    // Of the key tile.
    const Element* tile_key;
    int64_t key_stride;
    V tile_max[Columns];
    V rest;                     // of sums with a bias: NaN once one is not finite, else 0
    int64_t cuts[2 * Columns];  // see ScorePasses::find_cuts

    V score_scale[Columns];     // what load_query() left out of the query
    bool scale_scores = false;  // some lane's is not 1
    const bool scales_late;     // in pairs: the user of the scores multiplies them, in every tile

    static Block some_rows(Block b, int first, int count) {
        b.rows += first;
        b.row_count = count;
        return b;
    }

    // Rows [first, first + count) of a row block.
    ScoreTile(const Block& whole, int first, int count, T* transposed, Shared<T>* in_turn)
        : block(some_rows(whole, first, count)),
          head_dim(block.head_dim),
          passes(block),
          query(transposed),
          scores(in_turn->scores),
          staging(in_turn->staging),
          shared(in_turn),
          scales_late(!passes.changes_scores() && query_scale<T>(block) != 0) {}

    // Finds the keys where they lie, or prepares them, once for all query tiles.
    void find_keys(int64_t tile) {
        if constexpr (InPairs) {
            tile_key = row_of<BFloat16>(block, block.key, tile), key_stride = block.key.stride;
        } else {
            with_key<T>(block.kv_dtype, [&]<class From>(const From*) {
                const From* const key = row_of<From>(block, block.key, tile);
                if constexpr (sizeof(From) == sizeof(T)) {
                    tile_key = key, key_stride = block.key.stride;
                } else {
                    tile_key = shared->key, key_stride = head_dim;
                    if (shared->some_at_a_time || shared->key_tile == tile) return;
                    shared->key_tile = tile;
                    widen_keys(tile, keys_of(tile), 0, head_dim);
                }
            });
        }
    }

    int64_t keys_of(int64_t tile) const {
        return block.kv_len - tile < kKeyTile ? block.kv_len - tile : kKeyTile;
    }

    // Brings some rows of keys or values near.
    void fetch(const KeyRows& rows, int64_t begin, int64_t end, int64_t columns) const {
        if (begin >= end) return;
        with_key<T>(block.kv_dtype, [&]<class From>(const From*) {
            const From* row = row_of<From>(block, rows, begin);
            for (; begin < end; ++begin, row += rows.stride) fastattn::prefetch(row, columns);
        });
    }

    void widen_keys(int64_t first, int64_t rows, int64_t d, int64_t columns) {
        widen_rows(block.key, block.key_scale, first, rows, d, columns, shared->key);
    }

    // (rows, columns): of keys or values from row `first` and column d on, whatever their type.
    [[gnu::noinline]] void widen_rows(const KeyRows& from, const KeyRows& scales, int64_t first,
                                      int64_t rows, int64_t d, int64_t columns, T* to) const {
        with_key<T>(block.kv_dtype, [&]<class From>(const From*) {
            widen(row_of<From>(block, from, first) + d, from.stride, rows, columns, to);
            if constexpr (sizeof(From) == 1) multiply_rows(scales, first, rows, columns, to);
        });
    }

    // Multiplies rows of quantized keys or values by their scales.
    void multiply_rows(const KeyRows& scales, int64_t tile, int64_t rows, int64_t columns,
                       T* matrix) const {
        const float* const scale = row_of<float>(block, scales, tile);
        for (int64_t j = 0; j < rows; ++j) {
            const T factor = T(scale[j * scales.stride]);
            for (int64_t d = 0; d < columns; ++d) matrix[j * columns + d] *= factor;
        }
    }

    // query = (scale * log2(e) * Q)^T; lanes without a row repeat the last one. With softcap, tanh
    // comes between the scale and the change of base. A row that the scale would take out of range
    // keeps it for its scores.
    void load_query() {
        const T scale = query_scale<T>(block);
        for (int c = 0; c < Columns; ++c) {
            if constexpr (InPairs) {
                load_rows<BFloat16>(c, T(scale < 0 ? -1 : 1));
                score_scale[c] = scale < 0 ? -scale : scale;
                continue;
            }
            with_query<T>(block.query_dtype, [&]<class Element>(const Element*) {
                score_scale[c] = T(1);
                if (!any<T>(load_rows<Element>(c, scale))) return;
                const auto too_large = load_rows<Element, true>(c, scale);
                score_scale[c] = select<T>(too_large, V(scale), V(T(1)));
                load_rows<Element>(c, select<T>(too_large, V(T(1)), V(scale)));
                scale_scores |= any<T>(too_large);
            });
        }
    }

    // Loads one vector of rows, times scale; returns the rows that are not finite then, or only
    // those that were.
    template <class Element, bool WereFinite = false>
    typename V::Mask load_rows(int c, V scale) const {
        const Element* rows[lanes];
        for (int i = 0; i < lanes; ++i) {
            const int row = c * lanes + i, last = block.row_count - 1;
            rows[i] = static_cast<const Element*>(block.rows[row < last ? row : last].query);
        }
        typename V::Mask too_large = {};
        V rest = T(0);  // NaN once one is not finite
        for (int64_t d = 0; d < head_dim; d += lanes) {
            const int64_t n = head_dim - d < lanes ? head_dim - d : lanes;
            V square[lanes];
            if (n == lanes) {
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) square[i] = load(rows[i] + d);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) square[i] = load_some<T>(rows[i] + d, n);
            }
            transpose<T>(square);
#pragma GCC unroll 16
            for (int k = 0; k < lanes; k += Operand::size) {
                if (k >= n) break;
                const V scaled = scale * square[k];
                T* const to = query + (d + k) / Operand::size * width + c * lanes;
                if constexpr (InPairs) {
                    const Pairs pairs = to_pairs(scaled, scale * square[k + 1]);
                    __builtin_memcpy(to, &pairs, sizeof pairs);
                } else {
                    if (WereFinite) too_large |= is_finite<T>(square[k]) & ~is_finite<T>(scaled);
                    rest = rest + (scaled - scaled);
                    scaled.store(to);
                }
            }
        }
        return WereFinite ? too_large : ~is_finite<T>(rest);
    }

    // fetches: the values of these keys are brought near meanwhile. bias: (keys, width), which is
    // added, if not null; false: some sum is not finite, and then it is not what passes give.
    bool compute_scores(Span keys, bool fetches, const T* bias = nullptr) {
        if constexpr (!InPairs && sizeof(T) == sizeof(float)) {
            if (shared->some_at_a_time) return compute_scores<true>(keys, fetches, bias);
        }
        return compute_scores<false>(keys, fetches, bias);
    }

    template <bool Widens>
    bool compute_scores(Span keys, bool fetches, const T* bias) {
        const Element* const key = tile_key + keys.begin % kKeyTile * key_stride;
        rest = T(0);
        for (int64_t d = 0; d < head_dim; d += kDepth) {
            const int64_t depth = head_dim - d < kDepth ? head_dim - d : kDepth;
            V largest[Columns];
            for (int c = 0; c < Columns; ++c) largest[c] = -kInfinity<T>;
            [[maybe_unused]] int64_t first_widened = 0, widened = 0;  // what tile_key has
            between_cuts<Columns>(cuts, [&]<int First, int Last>(int64_t begin, int64_t end) {
                in_steps<micro_rows(Columns)>(begin, end, [&]<int Rows>(int64_t j) {
                    shared->ahead.fetch();
                    if (fetches && d == 0) {
                        fetch(block.value, keys.begin + j, keys.begin + j + Rows,
                              block.value_head_dim);
                    }
                    const Element* from = key + j * key_stride + d;
                    if constexpr (Widens) {
                        if (j + Rows > widened) {
                            first_widened = j;
                            widened = keys.size() - j < shared->key_rows ? keys.size()
                                                                         : j + shared->key_rows;
                            widen_keys(keys.begin + j, widened - j, d, depth);
                        }
                        from = tile_key + (j - first_widened) * depth;
                    }
                    V sum[Rows][Columns] = {};
                    multiply<First, Last, InPairs>(from, Widens ? depth : key_stride, Operand::size,
                                                   query + d / Operand::size * width, width,
                                                   depth / Operand::size, sum);
                    T* const to = scores + j * width;
#pragma GCC unroll 16
                    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
                        for (int c = 0; c < Columns; ++c) {
                            const T* const before = to + r * width + c * lanes;
                            if (d > 0) sum[r][c] = V::load(before) + sum[r][c];
                            if (InPairs && !scales_late && d + depth == head_dim) {
                                sum[r][c] = score_scale[c] * sum[r][c];
                            }
                            if (c < First || c >= Last) sum[r][c] = -kInfinity<T>;
                        }
                    }
                    if (bias != nullptr) {
                        const T* const more = bias + j * width;
#pragma GCC unroll 16
                        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
                            for (int c = First; c < Last; ++c) {
                                sum[r][c] = fma(V::load(more + r * width + c * lanes), V(T(kLog2e)),
                                                sum[r][c]);
                                rest = rest + (sum[r][c] - sum[r][c]);
                            }
                        }
                    }
#pragma GCC unroll 16
                    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
                        for (int c = 0; c < Columns; ++c) {
                            sum[r][c].store(to + r * width + c * lanes);
                            largest[c] = max(sum[r][c], largest[c]);
                        }
                    }
                });
            });
            for (int c = 0; c < Columns; ++c) tile_max[c] = largest[c];
        }
        return all_finite(rest);
    }

    void apply_score_scale(Span keys) {
        for (int64_t i = 0; i < keys.size() * width; i += width) {
            for (int c = 0; c < Columns; ++c) {
                T* const score = scores + i + c * lanes;
                (score_scale[c] * V::load(score)).store(score);
            }
        }
        find_tile_max(keys);
    }

    // True: some pair is hidden.
    bool find_tile_max(Span keys) {
        const V lowest = -kInfinity<T>;
        typename V::Mask hidden = {};
        V largest[Columns];
        for (int c = 0; c < Columns; ++c) largest[c] = lowest;
        for (int64_t i = 0; i < keys.size() * width; i += width) {
            for (int c = 0; c < Columns; ++c) {
                const V score = V::load(scores + i + c * lanes);
                hidden |= score == lowest;
                largest[c] = max(score, largest[c]);
            }
        }
        for (int c = 0; c < Columns; ++c) tile_max[c] = largest[c];
        return any<T>(hidden);
    }
};

}  // namespace
}  // namespace fastattn
