// SPDX-License-Identifier: Apache-2.0
//
// The backward pass: the gradients of a row block and a key block, whose probabilities are computed
// again from the rows' lse (Dao 2023, algorithm 2). Called by backward.cpp through the table in
// kernel.cpp.
//
// As in online_softmax.h, queries lie along the vector lanes: S^T = K Q^T, dP^T = V dO^T and
// dQ^T = K^T dS^T; in dV = P^T dO and dK = dS^T Q the head_dim does. Keys and values are read where
// they lie; of the rows, both the transposed and the plain matrix are laid out for each row block.
//
// Sums over rows and keys go on from block to block. Of a problem that is one row block and one key
// tile they are complete at once, and are stored from the registers; there dQ = dS K has the
// head_dim along the lanes, too. The bits are the same both ways.
//
// Queries and gradients that are not finite: a row that holds one gets NaN as its offset, and makes
// NaN of all gradients that it adds to. The products take 0 in place of every number that is not
// finite: 0 times NaN would be NaN where a probability is 0.
#pragma once

#include "dropout.h"
#include "elements.h"
#include "factors.h"
#include "kernel.h"
#include "multiply.h"
#include "scores.h"
#include "vec.h"

namespace fastattn {
namespace {

// Whether the products are those of pairs: not for an odd size, whose last would be half one.
template <class T>
bool gradients_in_pairs(const Block& block) {
    return kMultipliesPairs && sizeof(T) == 4 && block.query_dtype == Dtype::kBFloat16 &&
           block.kv_dtype == Dtype::kBFloat16 && block.head_dim % 2 == 0 &&
           block.value_head_dim % 2 == 0;
}

// In pairs, a "word" is a pair, else a number: what a lane holds.
template <class T, bool InPairs>
class Differentiation {
    using V = Vec<T>;
    using Operand = Factor<T, InPairs>;
    using Element = typename Operand::Element;
    static constexpr int lanes = V::lanes;
    static constexpr int64_t size = Operand::size;
    static constexpr int tile_rows = kColumns * lanes;
    static constexpr int query_tiles = (InPairs ? 192 : 96) / tile_rows;  // of a row block
    static_assert(query_tiles > 0);

   public:
    static constexpr int block_rows = query_tiles * tile_rows;

   private:
    // What is known of a key tile.
    struct KeyTile {
        Span keys[query_tiles];  // that the rows of each query tile see
        bool hides;              // some pair among them
        bool looked, finite;     // whether it was asked if the keys are finite, and the answer
    };

    // Rows of sums, of padded columns. Those that are complete at once are not added to what is
    // there, but stored: sum * scale + 0, which turns -0 into 0.
    struct Sums {
        T* data;
        int64_t pitch;
        bool complete = false;
        T scale = T(1);
    };

    // One of the rows' two matrices, query or grad_out, in words.
    struct Rows {
        int64_t words, pitch;  // of a row; padded
        T* plain;              // (block_rows, pitch)
        T* transposed;         // for each query tile: (words, its rows)
        T* summed;             // (block_rows / size, padded columns) what sums over rows multiply
    };

    const GradientBlock& all;
    const Block& block;
    const int64_t head_dim, value_head_dim, key_pitch, value_pitch;
    int64_t key_count;

    // In scratch memory.
    Rows query, grad_out;
    T *wide_key, *wide_value;  // of a narrower type, widened
    Element* paired_key;       // (key_count / 2, head_dim) pairs of keys
    Sums dk, dv;               // (key_count, key_pitch or value_pitch)
    T* dq;                     // (block_rows, key_pitch), of rows that are alone
    T* dbias;                  // (key_count, rows_in_vectors()), likewise
    T *scores, *dprobs;        // (kKeyTile, tile_rows)
    T* cap_slope;              // likewise, with softcap
    Element *prob, *dscore;    // (key_count, rows_in_vectors())
    T* paired_dscore;          // (key_count / 2, rows_in_vectors()) pairs of keys
    T* staging;                // of a mask, or keys to use instead
    T *offset, *correction;    // (block_rows) P = exp2(S - offset), dS = P (dP - correction)
    T *lse_offset,
        *lse_gradient;  // (block_rows) and + exp2(S - lse_offset) lse_gradient, if adds_lse
    T* row_delta;       // (block_rows) sum(out * grad_out)
    KeyTile* tiles;
    void* kept;  // a KeptArray for each query tile, if the bias is kept

    bool adds_lse = false;
    const GradientQueue* queue = nullptr;  // of problems that are alone
    // Of a bias's gradient, to be brought near: these keys of some rows.
    mutable int dbias_row = 0, dbias_past = 0;
    Span dbias_keys = {0, 0};

   public:
    static size_t scratch_bytes(const Block& block, int64_t keys, bool alone, bool keeps_bias) {
        GradientBlock one{};
        one.block = block;
        one.end = keys;
        one.alone = alone;
        one.keeps_bias = keeps_bias;
        Scratch scratch;
        Differentiation(one, scratch);
        return scratch.used();
    }

    Differentiation(const GradientBlock& b, Scratch& scratch)
        : all(b),
          block(b.block),
          head_dim(block.head_dim),
          value_head_dim(block.value_head_dim),
          key_pitch(V::padded(head_dim)),
          value_pitch(V::padded(value_head_dim)),
          key_count(b.end - b.begin) {
        const int64_t even = key_count + key_count % 2;
        take_rows(query, head_dim, scratch);
        take_rows(grad_out, value_head_dim, scratch);
        const bool widened = !InPairs && block.kv_dtype != kDtype<T>;
        wide_key = scratch.take<T>(widened ? key_count * head_dim : 0);
        wide_value = scratch.take<T>(widened ? key_count * value_head_dim : 0);
        paired_key = scratch.take<Element>(InPairs ? even * head_dim : 0);
        dk = {scratch.take<T>(key_count * key_pitch), key_pitch};
        dv = {scratch.take<T>(key_count * value_pitch), value_pitch};
        dq = scratch.take<T>(all.alone ? block_rows * key_pitch : 0);
        dbias = scratch.take<T>(all.alone ? key_count * block_rows : 0);
        scores = scratch.take<T>(kKeyTile * tile_rows);
        dprobs = scratch.take<T>(kKeyTile * tile_rows);
        cap_slope = scratch.take<T>(block.softcap != 0 ? kKeyTile * tile_rows : 0);
        prob = scratch.take<Element>(key_count * block_rows);
        dscore = scratch.take<Element>(key_count * block_rows);
        paired_dscore = scratch.take<T>(InPairs ? even / 2 * block_rows : 0);
        staging = scratch.take<T>(kKeyTile * (key_pitch > lanes ? key_pitch : lanes));
        offset = scratch.take<T>(block_rows);
        correction = scratch.take<T>(block_rows);
        lse_offset = scratch.take<T>(block_rows);
        lse_gradient = scratch.take<T>(block_rows);
        row_delta = scratch.take<T>(block_rows);
        tiles = scratch.take<KeyTile>(tile_count());
        kept = all.keeps_bias ? scratch.reserve(KeptArray<T>::bytes(block) * query_tiles) : nullptr;
    }

    void begin_keys() {
        clear(dk.data, key_count * key_pitch);
        clear(dv.data, key_count * value_pitch);
        load_keys();
    }

    void differentiate() {
        differentiate_tiles();
        for (int64_t t = 0; t < tile_count(); ++t) add_key_sums(tiles[t]);
    }

    // Problems that are alone, one after the other. The gradients of their bias are added up as the
    // scores lie, (keys, rows), and go where they belong at the end.
    void differentiate_alone(const GradientQueue& problems) {
        queue = &problems;
        for (int i = 0; i < query_tiles && kept != nullptr; ++i) *kept_bias(i).head = {};
        const Sums key_sums = dk, value_sums = dv;
        bool any = false;
        for (; queue->next(queue->context); any = true) {
            key_count = all.end - all.begin;
            if (!any && all.gradients[0].dbias != nullptr) {
                clear(dbias, key_count * rows_in_vectors());
            }
            load_keys();
            differentiate_tiles();
            store_deltas();
            const bool wide = all.dkv_dtype == kDtype<T> && !all.accumulates;
            dk = complete_sums(key_sums, wide, head_dim, all.dk, T(block.scale));
            dv = complete_sums(value_sums, wide, value_head_dim, all.dv, T(block.dropout.scale));
            add_key_sums(tiles[0]);
            with_query<T>(all.dkv_dtype, [&]<class To>(const To*) {
                if (dk.data == key_sums.data) {
                    store_keys<To>(dk.data, key_pitch, head_dim, T(1), all.dk);
                }
                if (dv.data == value_sums.data) {
                    store_keys<To>(dv.data, value_pitch, value_head_dim, T(1), all.dv);
                }
            });
            find_query_sums();
        }
        if (any && all.gradients[0].dbias != nullptr) {
            add_dbias(0, block.row_count, {all.begin, all.end}, dbias, rows_in_vectors());
        }
    }

    void add_query_sums(bool first) {
        if (first) {
            clear(static_cast<T*>(all.query_sums), head_dim * block_rows);
            store_deltas();
        }
        for (int64_t t = 0; t < tile_count(); ++t) {
            int64_t stride;
            const Element* const key = keys_to_sum(t, head_dim, stride);
            each_query_tile([&]<int Columns>(int index, const Block&) {
                const Span keys = tiles[t].keys[index];
                if (keys.size() > 0) add_query_sums<Columns>(index, keys, t, key, stride);
            });
        }
    }

    void store_query_sums() const {
        with_query<T>(all.dq_dtype, [&]<class To>(const To*) {
            each_query_tile([&]<int Columns>(int index, const Block& rows) {
                store_query_sums<Columns, To>(index, rows.row_count);
            });
        });
    }

    void finish_keys() const {
        with_query<T>(all.dkv_dtype, [&]<class To>(const To*) {
            store_keys<To>(dk.data, key_pitch, head_dim, T(block.scale), all.dk);
            store_keys<To>(dv.data, value_pitch, value_head_dim, T(block.dropout.scale), all.dv);
        });
    }

   private:
    // Called evenly, so that what comes next is brought near while there is work.
    void fetch_some() const {
        if (queue != nullptr) return queue->fetch(queue->context);
        for (int i = 0; i < 2 && dbias_row < dbias_past; ++i, ++dbias_row) {
            const T* const row = static_cast<const T*>(all.gradients[dbias_row].dbias);
            prefetch<1, 3>(row + dbias_keys.begin, dbias_keys.size());
        }
    }

    KeptArray<T> kept_bias(int index) const {
        Scratch memory(static_cast<char*>(kept) + size_t(index) * KeptArray<T>::bytes(block));
        return {block, memory};
    }

    int64_t tile_count() const { return (key_count + kKeyTile - 1) / kKeyTile; }

    void load_keys() {
        for (int64_t t = 0; t < tile_count(); ++t) tiles[t].looked = false;
        if constexpr (InPairs) {
            const BFloat16* const key = at<BFloat16>(block.key, all.begin);
            for (int64_t j = 0; j < key_count; j += 2) {
                const BFloat16* const first = key + j * block.key.stride;
                store_pairs(first, j + 1 < key_count ? first + block.key.stride : nullptr, head_dim,
                            paired_key + j * head_dim);
            }
        } else if (block.kv_dtype != kDtype<T>) {
            with_query<T>(block.kv_dtype, [&]<class From>(const From*) {
                widen(at<From>(block.key, all.begin), block.key.stride, key_count, head_dim,
                      wide_key);
                widen(at<From>(block.value, all.begin), block.value.stride, key_count,
                      value_head_dim, wide_value);
            });
        }
    }

    void differentiate_tiles() {
        load_rows();
        for (int64_t t = 0; t < tile_count(); ++t) {
            tiles[t].hides = false;
            for (Span& keys : tiles[t].keys) keys = {0, 0};
        }
        each_query_tile([&]<int Columns>(int index, const Block& rows) {
            ScorePasses<T, Columns> passes(rows);
            if (kept != nullptr) passes.keep_bias(kept_bias(index), staging);
            for (int64_t t = 0; t < tile_count(); ++t) {
                const int64_t tile = all.begin + t * kKeyTile;
                Span keys = passes.span(tile);
                if (keys.size() <= 0) continue;
                const Seen seen = passes.classify(keys);
                if (seen == Seen::kNone) continue;
                tiles[t].keys[index] = keys;
                tiles[t].hides |= seen == Seen::kSome;
                differentiate<Columns>(index, passes, keys, seen);
            }
        });
    }

    static void take_rows(Rows& rows, int64_t columns, Scratch& scratch) {
        rows.words = columns / size;
        rows.pitch = V::padded(rows.words);
        rows.plain = scratch.take<T>(block_rows * rows.pitch);
        rows.transposed = scratch.take<T>(block_rows * rows.pitch);
        rows.summed =
            InPairs ? scratch.take<T>(block_rows / size * V::padded(columns)) : rows.plain;
    }

    static void clear(T* to, int64_t count) {
        for (int64_t i = 0; i < count; i += lanes) V(T(0)).store(to + i);
    }

    // use<Columns>(index, rows) for each query tile of the row block: full ones, and a last one
    // that may be of fewer vectors.
    template <class Use>
    void each_query_tile(const Use& use) const {
        Block rows = block;
        int index = 0;
        for (int left = block.row_count; left > 0;
             left -= tile_rows, rows.rows += tile_rows, ++index) {
            rows.row_count = left < tile_rows ? left : tile_rows;
            with_columns<T>(rows.row_count,
                            [&]<int Columns>() { use.template operator()<Columns>(index, rows); });
        }
    }
    void store_deltas() const {
        for (int i = 0; i < block.row_count; ++i) {
            void* const to = all.gradients[i].delta;
            if (to != nullptr) *static_cast<T*>(to) = row_delta[i];
        }
    }
    int64_t rows_in_vectors() const { return V::padded(block.row_count); }

    // ---- Rows ----

    void load_rows() {
        adds_lse = false;
        with_query<T>(block.query_dtype, [&]<class From>(const From*) {
            if (block.out_dtype == block.query_dtype) {
                load_rows<From, From>();
            } else {
                load_rows<From, T>();
            }
        });
        if constexpr (InPairs) {
            pair_rows(query, head_dim);
            pair_rows(grad_out, value_head_dim);
        }
    }

    // Out: of out and grad_out.
    template <class From, class Out>
    void load_rows() {
        for (int i = 0; i < block.row_count; ++i) {
            const auto* const gradient = static_cast<const Out*>(all.gradients[i].grad_out);
            copy_row(static_cast<const From*>(block.rows[i].query), head_dim, query, i);
            copy_row(gradient, value_head_dim, grad_out, i);
            const auto* const out = static_cast<const Out*>(block.rows[i].out);
            const T delta = dot(out, gradient, value_head_dim);
            row_delta[i] = delta;
            set_constants(i, delta);
            fetch_some();
        }
        for (int i = block.row_count; i < rows_in_vectors(); ++i) {
            clear(query.plain + i * query.pitch, query.pitch);
            clear(grad_out.plain + i * grad_out.pitch, grad_out.pitch);
            offset[i] = lse_offset[i] = kInfinity<T>;
            correction[i] = lse_gradient[i] = T(0);
        }
        transpose_rows(query);
        transpose_rows(grad_out);
        const bool all_finite = finite(query) & finite(grad_out);
        for (int i = 0; i < block.row_count && !all_finite; ++i) {
            const auto* const from = static_cast<const From*>(block.rows[i].query);
            const auto* const gradient = static_cast<const Out*>(all.gradients[i].grad_out);
            if (finite(from, head_dim) & finite(gradient, value_head_dim)) continue;
            offset[i] = T(__builtin_nan(""));
            make_finite(query.plain + i * query.pitch, query.words);
            make_finite(grad_out.plain + i * grad_out.pitch, grad_out.words);
        }
    }

    template <class From>
    static void copy_row(const From* from, int64_t columns, const Rows& rows, int64_t i) {
        T* const to = rows.plain + i * rows.pitch;
        if constexpr (InPairs && kIsBFloat16<From>) {
            __builtin_memcpy(to, from, size_t(columns) * sizeof(From));
        } else if constexpr (InPairs) {
            auto* const words = reinterpret_cast<Element*>(to);
            for (int64_t d = 0; d < columns; d += lanes) {
                store_some(load_some<T>(from + d, columns - d), columns - d, words + d);
            }
        } else {
            widen(from, 0, 1, columns, to);
        }
        for (int64_t w = rows.words; w < rows.pitch; ++w) to[w] = T(0);
    }

    template <class From>
    static T dot(const From* a, const From* b, int64_t count) {
        V sums = T(0);
        int64_t d = 0;
        for (; d + lanes <= count; d += lanes) sums = fma(load(a + d), load(b + d), sums);
        T sum = sum_across(sums);
        for (; d < count; ++d) sum += added<T>(a[d]) * added<T>(b[d]);
        return sum;
    }

    template <class From>
    static bool finite(const From* from, int64_t count) {
        typename V::Mask bad = {};
        bool rest = true;
        int64_t d = 0;
        for (; d + lanes <= count; d += lanes) bad |= ~is_finite<T>(load(from + d));
        for (; d < count; ++d) rest &= added<T>(from[d]) - added<T>(from[d]) == 0;
        return rest && !any<T>(bad);
    }

    bool finite(const Rows& rows) const {
        const auto* const plain = reinterpret_cast<const Element*>(rows.plain);
        return finite(plain, rows_in_vectors() * rows.pitch * size);
    }

    static void make_finite(T* words, int64_t count) {
        auto* const elements = reinterpret_cast<Element*>(words);
        for (int64_t d = 0; d < count * size; ++d) {
            const T x = added<T>(elements[d]);
            if (x - x != 0) elements[d] = Element{};
        }
    }

    // The sum over keys of exp(score) and of the sink is exp(total). lse leaves the sink out, and
    // so do the probabilities by which its gradient goes to the scores.
    void set_constants(int i, T delta) {
        const double lse = double(*static_cast<const T*>(block.rows[i].lse));
        const double sink = block.rows[i].sink;
        const void* const grad_lse = all.gradients[i].grad_lse;
        const T gradient = grad_lse == nullptr ? T(0) : *static_cast<const T*>(grad_lse);
        const bool sees = lse != -__builtin_inf(), sinks = sink != -__builtin_inf();
        double total = lse;
        if (sees && sinks) {
            const double more = sink > lse ? sink : lse, less = sink > lse ? lse : sink;
            total = more + __builtin_log1p(__builtin_exp(less - more));
        }
        offset[i] = sees ? T(total * kLog2e) : kInfinity<T>;
        correction[i] = !sees ? T(0) : sinks ? delta : delta - gradient;
        lse_offset[i] = sees ? T(lse * kLog2e) : kInfinity<T>;
        lse_gradient[i] = sees && sinks ? gradient : T(0);
        adds_lse |= sinks && grad_lse != nullptr;
    }

    void transpose_rows(const Rows& rows) const {
        each_query_tile([&]<int Columns>(int index, const Block&) {
            constexpr int width = Columns * lanes;
            const T* const from = rows.plain + index * tile_rows * rows.pitch;
            T* const to = transposed<Columns>(rows, index);
            for (int c = 0; c < width; c += lanes) {
                for (int64_t w = 0; w < rows.pitch; w += lanes) {
                    V square[lanes];
#pragma GCC unroll 16
                    for (int i = 0; i < lanes; ++i) {
                        square[i] = V::load(from + (c + i) * rows.pitch + w);
                    }
                    transpose<T>(square);
#pragma GCC unroll 16
                    for (int i = 0; i < lanes; ++i) square[i].store(to + (w + i) * width + c);
                    fetch_some();
                }
            }
        });
    }
    template <int Columns>
    T* transposed(const Rows& rows, int index) const {
        return rows.transposed + index * tile_rows * rows.pitch;
    }

    // Rows two by two, in pairs.
    static void pair_rows(const Rows& rows, int64_t columns, int64_t count) {
        const int64_t pitch = V::padded(columns);
        for (int64_t i = 0; i < count; i += 2) {
            const auto* const first =
                reinterpret_cast<const BFloat16*>(rows.plain + i * rows.pitch);
            const auto* const second =
                reinterpret_cast<const BFloat16*>(rows.plain + (i + 1) * rows.pitch);
            auto* const to = rows.summed + i / 2 * pitch;
            store_pairs(first, second, columns, reinterpret_cast<BFloat16*>(to));
            for (int64_t d = columns; d < pitch; ++d) to[d] = T(0);
        }
    }
    void pair_rows(const Rows& rows, int64_t columns) const {
        pair_rows(rows, columns, rows_in_vectors());
    }

    // ---- A query tile and a key tile ----

    // There are no pages.
    template <class From>
    static const From* at(const KeyRows& rows, int64_t key) {
        return static_cast<const From*>(rows.data) + key * rows.stride;
    }

    const Element* find(const KeyRows& rows, const T* wide, int64_t columns, int64_t key,
                        int64_t& stride) const {
        if (!InPairs && block.kv_dtype != kDtype<T>) {
            stride = columns;
            return reinterpret_cast<const Element*>(wide) + (key - all.begin) * columns;
        }
        stride = rows.stride;
        return at<Element>(rows, key);
    }

    template <int Columns>
    void differentiate(int index, const ScorePasses<T, Columns>& passes, Span keys, Seen seen) {
        passes.prefetch(keys);
        if (all.gradients[0].dbias != nullptr && all.dbias_stride == 1) {
            dbias_row = index * tile_rows;
            const int past = dbias_row + Columns * lanes;
            dbias_past = past < block.row_count ? past : block.row_count;
            dbias_keys = keys;
        }
        int64_t stride;
        const Element* const key = find(block.key, wide_key, head_dim, keys.begin, stride);
        const bool plain = seen == Seen::kAll && !adds_lse && block.dropout.scale == 1;
        const V scale = query_scale<T>(block), one = T(1);
        int64_t value_stride;
        const Element* const value =
            find(block.value, wide_value, value_head_dim, keys.begin, value_stride);
        const auto multiply_both = [&](const auto& score, const auto& dprob) {
            multiply_keys<Columns>(key, stride, query, index, keys.size(), score, scores);
            multiply_keys<Columns>(value, value_stride, grad_out, index, keys.size(), dprob,
                                   dprobs);
        };
        if (plain) {
            const auto same = [](V x) { return x; };
            multiply_both(same, same);
            V minus[Columns], less[Columns];
            for (int c = 0; c < Columns; ++c) {
                minus[c] = V(T(0)) - V::load(offset + index * tile_rows + c * lanes);
                less[c] = V::load(correction + index * tile_rows + c * lanes);
            }
            return store_tile<Columns>(index, keys, [&](int64_t at, int c, V& p, V& ds) {
                p = exp2<InPairs>(fma(V::load(scores + at), scale, minus[c]));
                ds = p * (V::load(dprobs + at) - less[c]);
            });
        }
        const V kept_scale = T(block.dropout.scale);
        multiply_both([&](V x) { return scale * x; }, [&](V x) { return kept_scale * x; });
        if (block.softcap != 0) {
            for (int64_t i = 0; i < keys.size() * Columns * lanes; i += lanes) {
                const V x = tanh(V::load(scores + i));
                (one - x * x).store(cap_slope + i);
            }
        }
        passes.apply(scores, keys, staging);
        if (!block.dropout.drops && block.softcap == 0) {
            store_tile<Columns>(index, keys, [&](int64_t at, int c, V& p, V& ds) {
                p = find_pair(at, index * tile_rows + c * lanes, V::load(dprobs + at));
                ds = V::load(dprobs + at);
            });
            if (all.gradients[0].dbias != nullptr) add_dbias<Columns>(index, keys);
            return;
        }
        find_tile<Columns>(index, keys);
        if (all.gradients[0].dbias != nullptr) add_dbias<Columns>(index, keys);
        if (block.softcap != 0) {
            for (int64_t i = 0; i < keys.size() * Columns * lanes; i += lanes) {
                // The slope of a hidden pair may be NaN; its dS is 0.
                const V ds = V::load(dprobs + i), zero = T(0);
                select<T>(ds == zero, zero, ds * V::load(cap_slope + i)).store(dprobs + i);
            }
        }
        store_tile<Columns>(index, keys, [&](int64_t at, int, V& p, V& ds) {
            p = V::load(scores + at);
            ds = V::load(dprobs + at);
        });
    }

    template <int Columns>
    [[gnu::noinline]] void add_dbias(int index, Span keys) const {
        constexpr int width = Columns * lanes;
        const int first = index * tile_rows;
        if (!all.alone) {
            const int rows = block.row_count - first;
            return add_dbias(first, rows < width ? rows : width, keys, dprobs, width);
        }
        T* to = dbias + (keys.begin - all.begin) * rows_in_vectors() + first;
        for (int64_t j = 0; j < keys.size(); ++j, to += rows_in_vectors()) {
            for (int c = 0; c < width; c += lanes) {
                (V::load(to + c) + V::load(dprobs + j * width + c)).store(to + c);
            }
        }
    }

    // to = change(keys x rows), (count, rows of the query tile)
    template <int Columns, class Change>
    void multiply_keys(const Element* key, int64_t stride, const Rows& rows, int index,
                       int64_t count, const Change& change, T* to) const {
        constexpr int width = Columns * lanes;
        const T* const from = transposed<Columns>(rows, index);
        in_steps<micro_rows(Columns)>(0, count, [&]<int Count>(int64_t j) {
            fetch_some();
            V sum[Count][Columns] = {};
            multiply<0, Columns, InPairs>(key + j * stride, stride, size, from, width, rows.words,
                                          sum);
#pragma GCC unroll 16
            for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
                for (int c = 0; c < Columns; ++c) {
                    change(sum[r][c]).store(to + (j + r) * width + c * lanes);
                }
            }
        });
    }

    // P and dS in place of the scores and dP. Of a hidden pair both are 0, whatever is in its
    // value; of a dropped pair P is.
    template <int Columns>
    [[gnu::noinline]] void find_tile(int index, Span keys) const {
        constexpr int width = Columns * lanes;
        for (int c = 0; c < Columns; ++c) {
            const int row = index * tile_rows + c * lanes;
            if (block.dropout.drops) {
                const KeptOfRows<T> kept(block.dropout, block.rows + row, block.row_count - row);
                const V zero = T(0);
                kept.each_key(keys, [&](int64_t key, typename V::Mask keeps) {
                    const int64_t at = (key - keys.begin) * width + c * lanes;
                    const V dprob = select<T>(keeps, V::load(dprobs + at), zero);
                    select<T>(keeps, find_pair(at, row, dprob), zero).store(scores + at);
                });
            } else {
                for (int64_t j = 0; j < keys.size(); ++j) {
                    const int64_t at = j * width + c * lanes;
                    find_pair(at, row, V::load(dprobs + at)).store(scores + at);
                }
            }
        }
    }

    // Stores dS and returns P.
    [[gnu::always_inline]] V find_pair(int64_t at, int row, V dprob) const {
        const V zero = T(0), score = V::load(scores + at);
        const auto hides = score == V(-kInfinity<T>);
        const V p = exp2<InPairs>(score - V::load(offset + row));
        V ds = p * (dprob - V::load(correction + row));
        if (adds_lse) {
            const V pure = exp2<InPairs>(score - V::load(lse_offset + row));
            ds = fma(pure, V::load(lse_gradient + row), ds);
        }
        select<T>(hides, zero, ds).store(dprobs + at);
        return select<T>(hides, zero, p);
    }

    // dbias += dS of some rows, of (keys, pitch). Rows may share their bias, and keys may: then the
    // gradient is a sum.
    [[gnu::noinline]] void add_dbias(int first, int rows, Span keys, const T* dscores,
                                     int64_t pitch) const {
        const int64_t stride = all.dbias_stride, count = keys.size();
        for (int c = 0; c < rows; c += lanes) {
            for (int64_t j = 0; j < count; j += lanes) {
                V square[lanes];
#pragma GCC unroll 16
                for (int k = 0; k < lanes; ++k) {
                    square[k] = V::load(dscores + (j + k < count ? j + k : count - 1) * pitch + c);
                }
                transpose<T>(square);
                for (int i = 0; i < lanes && c + i < rows; ++i) {
                    T* const to = static_cast<T*>(all.gradients[first + c + i].dbias) +
                                  (keys.begin + j) * stride;
                    if (stride == 1 && j + lanes <= count) {
                        (V::load(to) + square[i]).store(to);
                        continue;
                    }
                    for (int k = 0; k < lanes && j + k < count; ++k) {
                        to[k * stride] += square[i].v[k];
                    }
                }
            }
        }
    }

    // P and dS, to where the sums find them: get(place in the tile, vector, P, dS).
    template <int Columns, class Get>
    [[gnu::always_inline]] void store_tile(int index, Span keys, const Get& get) const {
        constexpr int width = Columns * lanes;
        const int64_t pitch = rows_in_vectors();
        const int64_t first = (keys.begin - all.begin) * pitch + index * tile_rows;
        if constexpr (InPairs) {
            T* paired = paired_dscore + first / 2 + index * tile_rows / 2;
            for (int64_t j = 0; j < keys.size(); j += 2, paired += pitch) {
                V p[2][Columns], ds[2][Columns];
                const bool second = j + 1 < keys.size();
                for (int k = 0; k < 2; ++k) {
#pragma GCC unroll 4
                    for (int c = 0; c < Columns; ++c) {
                        p[k][c] = ds[k][c] = T(0);
                        if (k == 0 || second) {
                            get((j + k) * width + c * lanes, c, p[k][c], ds[k][c]);
                        }
                    }
                    if (k == 1 && !second) break;
                    store_row<Columns>(p[k], prob + first + (j + k) * pitch);
                    store_row<Columns>(ds[k], dscore + first + (j + k) * pitch);
                }
#pragma GCC unroll 4
                for (int c = 0; c < Columns; ++c) {
                    const Pairs pairs = to_pairs(ds[0][c], ds[1][c]);
                    __builtin_memcpy(paired + c * lanes, &pairs, sizeof pairs);
                }
            }
        } else {
            for (int64_t j = 0; j < keys.size(); ++j) {
#pragma GCC unroll 4
                for (int c = 0; c < Columns; ++c) {
                    V p, ds;
                    get(j * width + c * lanes, c, p, ds);
                    p.store(prob + first + j * pitch + c * lanes);
                    ds.store(dscore + first + j * pitch + c * lanes);
                }
            }
        }
    }

    // Vectors as bfloat16, one after the other.
    template <int Columns>
    static void store_row(const V (&row)[Columns], BFloat16* to) {
#pragma GCC unroll 4
        for (int c = 0; c < Columns; c += 2) {
            const Pairs pairs = adjacent_pairs(row[c], row[c + 1 < Columns ? c + 1 : c]);
            __builtin_memcpy(to + c * lanes, &pairs,
                             c + 1 < Columns ? sizeof pairs : sizeof pairs / 2);
        }
    }

    // ---- Sums over rows ----

    // dV += P^T dO and dK += dS^T Q of a key tile, for the keys that some query tile sees.
    void add_key_sums(const KeyTile& tile) const {
        Span keys = {0, 0};
        for (const Span& some : tile.keys) {
            if (some.size() <= 0) continue;
            if (keys.size() == 0) keys = some;
            if (some.begin < keys.begin) keys.begin = some.begin;
            if (some.end > keys.end) keys.end = some.end;
        }
        if (keys.size() == 0) keys = {all.begin, all.begin};
        each_query_tile([&]<int Columns>(int index, const Block&) {
            const Span seen =
                tile.keys[index].size() > 0 ? tile.keys[index] : Span{keys.end, keys.end};
            clear_unseen(index, {keys.begin, seen.begin}, Columns * lanes);
            clear_unseen(index, {seen.end, keys.end}, Columns * lanes);
        });
        multiply_rows(prob, grad_out, value_pitch, keys, dv);
        multiply_rows(dscore, query, key_pitch, keys, dk);
    }

    void clear_unseen(int index, Span keys, int width) const {
        for (int64_t j = keys.begin - all.begin; j < keys.end - all.begin; ++j) {
            const int64_t at = j * rows_in_vectors() + index * tile_rows;
            __builtin_memset(static_cast<void*>(prob + at), 0, size_t(width) * sizeof(Element));
            __builtin_memset(static_cast<void*>(dscore + at), 0, size_t(width) * sizeof(Element));
        }
    }

    // (keys, rows) x rows, of so many padded columns
    void multiply_rows(const Element* factors, const Rows& rows, int64_t columns, Span keys,
                       const Sums& sums) const {
        const int64_t first = keys.begin - all.begin, past = keys.end - all.begin;
        const int64_t pitch = rows_in_vectors();
        if (sums.complete) {
            clear_rows(sums, 0, first, columns);
            clear_rows(sums, past, key_count, columns);
        }
        multiply_into(sums, first, past - first,
                      {factors + first * pitch, pitch, size, rows.summed, columns,
                       (block.row_count + size - 1) / size, columns});
    }

    static void clear_rows(const Sums& sums, int64_t first, int64_t past, int64_t columns) {
        for (; first < past; ++first) clear(sums.data + first * sums.pitch, columns);
    }

    // A matrix of words times one of vectors, as multiply() has them.
    struct Product {
        const Element* a;
        int64_t a_row, a_step;
        const T* b;
        int64_t b_step, depth, columns;
    };

    void multiply_into(const Sums& sums, int64_t first, int64_t count, Product product) const {
        T* to = sums.data + first * sums.pitch;
        const auto step = [&]<int Columns>() {
            multiply_into<Columns>(sums, to, count, product);
            product.b += Columns * lanes;
            product.columns -= Columns * lanes;
            to += Columns * lanes;
        };
        while (product.columns > 0) {
            const int64_t left = product.columns / lanes;
            if (left >= 5 || left == 3) {
                step.template operator()<3>();
            } else if (left >= 2) {
                step.template operator()<2>();
            } else {
                step.template operator()<1>();
            }
        }
    }

    template <int Columns>
    [[gnu::noinline]] void multiply_into(const Sums& sums, T* to, int64_t count,
                                         const Product& product) const {
        constexpr int most = micro_rows(Columns) >= 8 ? 8 : micro_rows(Columns) >= 4 ? 4 : 2;
        const auto [a, a_row, a_step, b, b_step, depth, columns] = product;
        in_steps<most>(0, count, [&]<int Count>(int64_t j) {
            fetch_some();
            V sum[Count][Columns] = {};
            multiply<0, Columns, InPairs>(a + j * a_row, a_row, a_step, b, b_step, depth, sum);
            T* const at = to + j * sums.pitch;
            if (sums.complete) {
                store_complete(sum, at, sums.pitch, sums.scale);
            } else {
                add(sum, at, sums.pitch);
            }
        });
    }

    template <int Count, int Columns>
    [[gnu::always_inline]] static void add(const V (&sum)[Count][Columns], T* to, int64_t pitch) {
#pragma GCC unroll 16
        for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < Columns; ++c) {
                T* const at = to + r * pitch + c * lanes;
                (V::load(at) + sum[r][c]).store(at);
            }
        }
    }
    template <int Count, int Columns>
    [[gnu::always_inline]] static void store_complete(const V (&sum)[Count][Columns], T* to,
                                                      int64_t pitch, T scale) {
#pragma GCC unroll 16
        for (int r = 0; r < Count; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < Columns; ++c) {
                fma(sum[r][c], V(scale), V(T(0))).store(to + r * pitch + c * lanes);
            }
        }
    }

    // ---- Sums over keys ----

    // The keys of a tile from its first on, without what is not finite where some pair is hidden;
    // so many words of each can be read, those behind head_dim are zeros.
    const Element* keys_to_sum(int64_t t, int64_t words, int64_t& stride) {
        const int64_t first = t * kKeyTile;
        const int64_t count = key_count - first < kKeyTile ? key_count - first : kKeyTile;
        int64_t given;
        const Element* key = nullptr;
        if constexpr (InPairs) {
            key = paired_key + first * head_dim;
            given = size * head_dim;
        } else {
            key = find(block.key, wide_key, head_dim, all.begin + first, given);
        }
        stride = given;
        KeyTile& tile = tiles[t];
        const int64_t rows = (count + size - 1) / size, columns = head_dim * size;
        if (tile.hides && !tile.looked) {
            tile.looked = tile.finite = true;
            for (int64_t j = 0; j < rows; ++j) tile.finite &= finite(key + j * given, columns);
        }
        const bool are_finite = !tile.hides || tile.finite;
        if (are_finite && words == head_dim) return key;
        stride = words * size;
        for (int64_t j = 0; j < rows; ++j) {
            T* const to = staging + j * words;
            __builtin_memcpy(to, key + j * given, size_t(columns) * sizeof(Element));
            if (!are_finite) make_finite(to, head_dim);
            for (int64_t w = head_dim; w < words; ++w) to[w] = T(0);
        }
        return reinterpret_cast<Element*>(staging);
    }

    // dQ^T += K^T dS^T
    template <int Columns>
    [[gnu::noinline]] void add_query_sums(int index, Span keys, int64_t t, const Element* key,
                                          int64_t stride) const {
        constexpr int width = Columns * lanes;
        const int64_t first = (keys.begin - all.begin) / size;  // in words
        const int64_t pitch = rows_in_vectors();
        const T* const from = [&] {
            if constexpr (InPairs)
                return paired_dscore + first * pitch + index * tile_rows;
            else
                return dscore + first * pitch + index * tile_rows;
        }();
        const Element* const factors = key + (first - t * kKeyTile / size) * stride;
        const int64_t depth = (keys.size() + size - 1) / size;
        T* const sums = static_cast<T*>(all.query_sums) + index * tile_rows * head_dim;
        in_steps<micro_rows(Columns)>(0, head_dim, [&]<int Count>(int64_t d) {
            V sum[Count][Columns] = {};
            multiply<0, Columns, InPairs>(factors + d * size, size, stride, from, pitch, depth,
                                          sum);
            add(sum, sums + d * width, width);
        });
    }

    // dQ = dS K of rows that are alone. What lies along the lanes are the columns.
    void find_query_sums() {
        const auto row = [&](int i) { return static_cast<T*>(all.gradients[i].dq); };
        const KeyRows rows = {row(0), block.row_count > 1 ? row(1) - row(0) : 0, 0};
        bool direct = all.dq_dtype == kDtype<T> && !all.accumulates;
        for (int i = 2; i < block.row_count; ++i) direct &= row(i) - row(i - 1) == rows.stride;
        const Sums sums = complete_sums({dq, key_pitch}, direct, head_dim, rows, T(block.scale));
        int64_t stride;
        const auto* const key = reinterpret_cast<const T*>(keys_to_sum(0, key_pitch, stride));
        stride /= size;
        const int64_t pitch = rows_in_vectors();
        each_query_tile([&]<int Columns>(int index, const Block& rows) {
            const int first = index * tile_rows;
            const Span keys = tiles[0].keys[index];
            if (keys.size() <= 0) {
                return clear_rows(sums, first, first + rows.row_count, key_pitch);
            }
            const int64_t word = (keys.begin - all.begin) / size;
            const T* const from = InPairs ? paired_dscore : reinterpret_cast<T*>(dscore);
            multiply_into(
                sums, first, rows.row_count,
                {reinterpret_cast<const Element*>(from + word * pitch + first), size, pitch * size,
                 key + word * stride, stride, (keys.size() + size - 1) / size, key_pitch});
        });
        if (sums.data != dq) return;
        with_query<T>(all.dq_dtype, [&]<class To>(const To*) {
            for (int i = 0; i < block.row_count; ++i) {
                To* const to = static_cast<To*>(all.gradients[i].dq);
                for (int64_t d = 0; d < head_dim; d += lanes) {
                    store_result(V::load(dq + i * key_pitch + d), head_dim - d, to + d);
                }
            }
        });
    }

    // Where sums go that are complete at once: to the results themselves, if these are rows of
    // whole vectors of T.
    static Sums complete_sums(const Sums& scratch, bool direct, int64_t columns,
                              const KeyRows& results, T scale) {
        if (!direct || columns % lanes != 0) return {scratch.data, scratch.pitch, true, scale};
        return {static_cast<T*>(const_cast<void*>(results.data)), results.stride, true, scale};
    }

    // ---- Results: sums * scale; adding 0 turns -0 into 0 ----

    template <class To>
    [[gnu::always_inline]] void store_result(V x, int64_t count, To* to) const {
        store_some(all.accumulates ? x + load_some<T>(to, count) : x, count, to);
    }

    template <int Columns, class To>
    void store_query_sums(int index, int rows) const {
        constexpr int width = Columns * lanes;
        const T* const sums = static_cast<T*>(all.query_sums) + index * tile_rows * head_dim;
        for (int c = 0; c < width; c += lanes) {
            for (int64_t d = 0; d < head_dim; d += lanes) {
                V square[lanes];
                for (int k = 0; k < lanes; ++k) {
                    square[k] = d + k < head_dim ? V::load(sums + (d + k) * width + c) : V(T(0));
                }
                transpose<T>(square);
                for (int i = 0; i < lanes && c + i < rows; ++i) {
                    To* const to = static_cast<To*>(all.gradients[index * tile_rows + c + i].dq);
                    store_result(fma(square[i], V(T(block.scale)), V(T(0))), head_dim - d, to + d);
                }
            }
        }
    }

    template <class To>
    void store_keys(const T* sums, int64_t pitch, int64_t columns, T scale,
                    const KeyRows& into) const {
        To* to = static_cast<To*>(const_cast<void*>(into.data)) + all.begin * into.stride;
        for (int64_t j = 0; j < key_count; ++j, to += into.stride) {
            for (int64_t d = 0; d < columns; d += lanes) {
                const V sum = V::load(sums + j * pitch + d);
                store_result(fma(sum, V(scale), V(T(0))), columns - d, to + d);
            }
        }
    }
};

// use(Differentiation's type, as a null pointer)
template <class T, class Use>
auto with_differentiation(const Block& block, const Use& use) {
    if constexpr (kMultipliesPairs && sizeof(T) == 4) {
        if (gradients_in_pairs<T>(block)) {
            return use(static_cast<Differentiation<T, true>*>(nullptr));
        }
    }
    return use(static_cast<Differentiation<T, false>*>(nullptr));
}

template <class T, class Step>
void differentiation(const GradientBlock& block, const Step& step) {
    with_differentiation<T>(block.block, [&]<class Kind>(Kind*) {
        Scratch scratch(block.block.scratch);
        Kind of_block(block, scratch);
        step(of_block);
    });
}

template <class T>
int gradient_block_rows(const Block& block) {
    return with_differentiation<T>(block, []<class Kind>(Kind*) { return Kind::block_rows; });
}

template <class T>
size_t gradient_scratch_bytes(const Block& block, int64_t keys, bool alone, bool keeps_bias) {
    return with_differentiation<T>(block, [&]<class Kind>(Kind*) {
        return Kind::scratch_bytes(block, keys, alone, keeps_bias);
    });
}

template <class T>
size_t query_sums_bytes(const Block& block) {
    return size_t(block.head_dim * gradient_block_rows<T>(block)) * sizeof(T);
}

template <class T>
constexpr GradientFunctions gradients = {
    gradient_block_rows<T>,
    gradient_scratch_bytes<T>,
    query_sums_bytes<T>,
    [](const GradientBlock& b) { differentiation<T>(b, [](auto& d) { d.begin_keys(); }); },
    [](const GradientBlock& b) { differentiation<T>(b, [](auto& d) { d.differentiate(); }); },
    [](const GradientBlock& b, bool first) {
        differentiation<T>(b, [&](auto& d) { d.add_query_sums(first); });
    },
    [](const GradientBlock& b) { differentiation<T>(b, [](auto& d) { d.store_query_sums(); }); },
    [](const GradientBlock& b) { differentiation<T>(b, [](auto& d) { d.finish_keys(); }); },
    [](const GradientBlock& b, const GradientQueue& queue) {
        differentiation<T>(b, [&](auto& d) { d.differentiate_alone(queue); });
    },
};

}  // namespace
}  // namespace fastattn
