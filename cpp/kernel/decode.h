// SPDX-License-Identifier: Apache-2.0
//
// Decoding: few rows against a split of the keys. It is bound by reading keys and values once, so
// the vectors lie along head_dim, a key is read whole, and all rows that share it use it while it
// is in registers. The result is partials (partials.h). Called by decode.cpp through the table in
// kernel.cpp.
//
// Names and rules are those of online_softmax.h; a row's bits depend on no other row.
#pragma once

#include "dropout.h"
#include "elements.h"
#include "factors.h"
#include "kernel.h"
#include "partials.h"
#include "scores.h"
#include "split.h"
#include "vec.h"

namespace fastattn {
namespace {

constexpr int64_t kChunk = 32;       // keys that all rows use while they are near
constexpr int kMostDecodeRows = 16;  // query tiles are faster for more
static_assert(kSplitKeys <= 32 * kChunk && kChunk % 4 == 0);

// All rows of a block against the keys of one split: all scores, then the softmax, then the values,
// so that long runs of memory are read. Neighbours whose page with some keys is the same read it
// together.
//
// In pairs (factors.h), the query is bfloat16, and keys, probabilities and values become bfloat16;
// the scale goes to the scores.
template <class T, class Element, bool InPairs>
class Split {
    using V = Vec<T>;
    using Vector = typename Factor<T, InPairs>::Vector;
    static constexpr int lanes = V::lanes;
    static constexpr int step = lanes * Factor<T, InPairs>::size;  // elements of a Vector
    static constexpr bool quantized = sizeof(Element) == 1;
    // From a row's scores to the next one's: rows do not compete for a cache line's place.
    static constexpr int64_t pitch = kSplitKeys + lanes;

    struct Chunk {
        Span keys;
        int64_t first, last;  // the rows that read them from the same memory
        Span page;            // all keys for which that is so
    };

    // What is to be fetched next: the rest of some chunk, and then those after it. Behind the keys
    // come the values, and then the keys that the thread attends to next.
    struct Ahead {
        enum { kKeys, kValues, kNextKeys, kNothing } of;
        Chunk chunk;                    // the first one that is not begun
        const Element *at, *end;        // the next line, the end of its row
        int64_t rows, stride, columns;  // rows after it
    };

    const Block& block;
    const int64_t rows, head_dim, value_head_dim, query_pitch;
    const Partials<T> partials;
    int64_t base = 0, count = 0;  // the split's first key, in whole chunks, and its keys
    Chunk chunk;                  // the current one
    const Element *key, *value;   // the first ones of the chunk
    Ahead ahead;

    // For each row, bits of the chunks whose first row it is: some row sees the chunk; some value
    // of the chunk is not finite.
    uint32_t seen[kMostTogether], set_apart[kMostTogether];

    // In scratch memory.
    T* const query;        // (rows, query_pitch) scaled, padded with zeros; or pairs
    T* const scores;       // (rows, pitch) S, then P
    T* const score_scale;  // (rows) what load_query() left out of the query
    T* const staging;      // (kChunk) of a mask, or of scales, or (kChunk, partials.pitch) values

   public:
    Split(const Block& whole, void* into, Scratch& scratch)
        : block(whole),
          rows(block.row_count),
          head_dim(block.head_dim),
          value_head_dim(block.value_head_dim),
          query_pitch(V::padded(head_dim)),
          partials(block, into),
          query(scratch.take<T>(rows * query_pitch)),
          scores(scratch.take<T>(rows * pitch)),
          score_scale(scratch.take<T>(V::padded(rows))),
          staging(scratch.take<T>(value_head_dim > 0 ? kChunk * partials.pitch : kChunk)) {}

    void attend() {
        if (block.stop.requested(block.stop.context)) return;
        partials.clear();
        const Span all = keys_of_rows();
        base = all.begin / kChunk * kChunk;
        count = all.end - base;
        for (int64_t r = 0; r < rows; ++r) seen[r] = set_apart[r] = 0;
        bool sees_any = false;
        each_chunk([&] {
            if (!any_seen()) return;
            seen[chunk.first] |= bit(chunk);
            sees_any = true;
        });
        if (!sees_any) return;
        load_query();
        ahead = {Ahead::kKeys, chunk_at(base, 0), nullptr, nullptr, 0, 0, 0};
        while (!is_seen(ahead.chunk)) ahead.chunk = following(ahead.chunk);
        ahead.chunk = following(ahead.chunk);
        each_chunk([&] {
            if (!is_seen(chunk)) return hide();
            key = row_of<Element>(block, block.key, chunk.keys.begin, chunk.first);
            compute_scores();
            bool any_hidden = block.dropout.drops;
            for (int64_t r = chunk.first; r < chunk.last; ++r) any_hidden |= apply_passes(r);
            if (any_hidden && add_nonfinite()) set_apart[chunk.first] |= bit(chunk);
        });
        for (int64_t r = 0; r < rows; ++r) store_scores(r);
        for (int64_t r = 0; r < rows; ++r) softmax(r);
        if (block.dropout.drops) drop_pairs();
        if constexpr (quantized) {
            each_chunk([&] {
                if (is_seen(chunk)) multiply_scores(block.value_scale);
            });
        }
        if constexpr (InPairs) pair_probabilities();
        each_chunk([&] {
            if (!is_seen(chunk)) return;
            value = row_of<Element>(block, block.value, chunk.keys.begin, chunk.first);
            const bool apart = (set_apart[chunk.first] & bit(chunk)) != 0;
            if (apart) stage_finite();
            in_row_steps([&]<int Rows>(int64_t r) { add_values<Rows>(r, apart); });
        });
    }

   private:
    // step() for each chunk: page after page, for the rows of each in turn.
    template <class Step>
    void each_chunk(const Step& step) {
        for (chunk = chunk_at(base, 0); chunk.keys.size() > 0; chunk = following(chunk)) {
            step();
        }
    }

    // The first chunk of the keys from `begin` on and the rows from `first` on.
    Chunk chunk_at(int64_t begin, int64_t first) const {
        Span page = {begin, base + count};
        int64_t last = rows;
        const int64_t* const pages = block.rows[first].pages;
        if (pages != nullptr && page.size() > 0) {
            const int64_t column = begin / block.page_keys, end = (column + 1) * block.page_keys;
            if (end < page.end) page.end = end;
            last = first + 1;
            while (last < rows && block.rows[last].pages[column] == pages[column]) ++last;
        }
        return {some(page), first, last, page};
    }

    Chunk following(const Chunk& before) const {
        if (before.keys.end < before.page.end) {
            const Span page = {before.keys.end, before.page.end};
            return {some(page), before.first, before.last, before.page};
        }
        if (before.last < rows) return chunk_at(before.page.begin, before.last);
        return chunk_at(before.page.end, 0);
    }

    static Span some(Span keys) {
        return keys.size() < kChunk ? keys : Span{keys.begin, keys.begin + kChunk};
    }

    uint32_t bit(const Chunk& any) const { return 1u << (any.keys.begin - base) / kChunk; }

    // What no row sees is never read: there need not be a page.
    bool is_seen(const Chunk& any) const { return (seen[any.first] & bit(any)) != 0; }

    static constexpr int64_t line = 64 / sizeof(Element);  // of the caches, in elements
    // Fetches so many cache lines of what comes later. The more evenly this is asked for, the
    // busier memory is; and processors follow one instruction that goes from line to line more
    // easily than several (docs/kernel.md).
    [[gnu::always_inline]] void fetch(int64_t lines) {
        int64_t elements = lines * line;
        while (elements > 0 && (ahead.at < ahead.end || fetch_next())) {
            const Element* const stop = min(ahead.at + elements, ahead.end);
            elements -= stop - ahead.at;
            const Element* at = ahead.at;
#pragma GCC unroll 1
            for (; at < stop; at += line) __builtin_prefetch(at);
            ahead.at = at;
        }
    }
    static const Element* min(const Element* a, const Element* b) { return a < b ? a : b; }

    [[gnu::noinline]] bool fetch_next() {
        if (ahead.rows == 0) return look_ahead();
        --ahead.rows;
        ahead.at = ahead.end - ahead.columns + ahead.stride;
        ahead.end += ahead.stride;
        return true;
    }

    // False: there is nothing more.
    bool look_ahead() {
        while (ahead.of == Ahead::kKeys || ahead.of == Ahead::kValues) {
            const bool keys = ahead.of == Ahead::kKeys;
            const Chunk next = ahead.chunk;
            if (next.keys.size() <= 0) {
                ahead.of = keys ? Ahead::kValues : Ahead::kNextKeys;
                ahead.chunk = chunk_at(base, 0);
                continue;
            }
            ahead.chunk = following(next);
            if (!is_seen(next)) continue;
            const KeyRows& from = keys ? block.key : block.value;
            begin_rows(row_of<Element>(block, from, next.keys.begin, next.first), from.stride,
                       keys ? head_dim : value_head_dim, next.keys.size());
            return ahead.at < ahead.end;
        }
        if (ahead.of == Ahead::kNothing || block.next_keys <= 0) return false;
        ahead.of = Ahead::kNothing;
        const int64_t next = block.next_keys < kChunk ? block.next_keys : kChunk;
        begin_rows(static_cast<const Element*>(block.next_key), block.key.stride, head_dim, next);
        return ahead.at < ahead.end;
    }

    // count: at least 1.
    void begin_rows(const Element* first, int64_t stride, int64_t columns, int64_t count) {
        const bool one_run = stride == columns;
        if (one_run) columns *= count;
        ahead.at = first;
        ahead.end = first + columns;
        ahead.rows = one_run ? 0 : count - 1;
        ahead.stride = stride;
        ahead.columns = columns;
    }

    // A row's scores of the chunk.
    T* scores_of(int64_t r) const { return scores + r * pitch + chunk.keys.begin - base; }

    void hide() const {
        for (int64_t r = chunk.first; r < chunk.last; ++r) {
            for (int64_t j = 0; j < kChunk; j += lanes) {
                V(-kInfinity<T>).store(scores_of(r) + j);
            }
        }
    }

    Span keys_of_rows() const {
        Span all = {block.kv_len, 0};
        for (int64_t r = 0; r < rows; ++r) {
            const Row& row = block.rows[r];
            if (row.begin >= row.end) continue;
            if (row.begin < all.begin) all.begin = row.begin;
            if (row.end > all.end) all.end = row.end;
        }
        return all;
    }

    Span inside_of(const Row& row) const {
        const Span keys = chunk.keys;
        return {row.begin > keys.begin ? row.begin : keys.begin,
                row.end < keys.end ? row.end : keys.end};
    }

    bool any_seen() const {
        for (int64_t r = chunk.first; r < chunk.last; ++r) {
            const Row& row = block.rows[r];
            const Span inside = inside_of(row);
            if (inside.size() > 0 &&
                any_left(row.mask, block.mask_dtype, block.mask_stride, inside) &&
                any_left(row.bias, block.bias_dtype, block.bias_stride, inside)) {
                return true;
            }
        }
        return false;
    }

    static bool any_left(const void* array, Dtype dtype, int64_t stride, Span keys) {
        if (array == nullptr) return true;
        return with_element(dtype, [&](auto* element) {
            bool any_hidden = true, any_seen = false;
            look(static_cast<decltype(element)>(array) + keys.begin * stride, stride, keys.size(),
                 any_hidden, any_seen);
            return any_seen;
        });
    }

    // As QueryTile::load_query(), row by row.
    void load_query() const {
        const T scale = query_scale<T>(block);
        with_query<T>(block.query_dtype, [&]<class Q>(const Q*) {
            for (int64_t r = 0; r < rows; ++r) {
                const auto* const from = static_cast<const Q*>(block.rows[r].query);
                T* const to = query + r * query_pitch;
                score_scale[r] = T(1);
                if constexpr (InPairs) {
                    __builtin_memcpy(to, from, size_t(head_dim) * sizeof(Q));
                    continue;
                }
                typename V::Mask too_large = {};
                for (int64_t d = 0; d < query_pitch; d += lanes) {
                    const V x = load_some<T>(from + d, head_dim - d), scaled = V(scale) * x;
                    too_large |= is_finite<T>(x) & ~is_finite<T>(scaled);
                    scaled.store(to + d);
                }
                if (!any<T>(too_large)) continue;
                score_scale[r] = scale;
                for (int64_t d = 0; d < query_pitch; d += lanes) {
                    load_some<T>(from + d, head_dim - d).store(to + d);
                }
            }
        });
    }

    void compute_scores() {
        const bool whole = InPairs || head_dim % lanes == 0;
        in_row_steps([&]<int Rows>(int64_t r) {
            if (whole) {
                compute_scores<Rows, true>(r);
            } else {
                compute_scores<Rows, false>(r);
            }
        });
        if constexpr (quantized) multiply_scores(block.key_scale);
    }

    // By the keys' scales; a 0 stays, whatever the scale.
    void multiply_scores(const KeyRows& scales) const {
        const int64_t keys = chunk.keys.size();
        const float* const scale = row_of<float>(block, scales, chunk.keys.begin, chunk.first);
        for (int64_t j = 0; j < keys; ++j) staging[j] = T(scale[j * scales.stride]);
        for (int64_t r = chunk.first; r < chunk.last; ++r) {
            for (int64_t j = 0; j < keys; j += lanes) {
                T* const s = scores_of(r) + j;
                const V score = V::load(s), zero = T(0);
                select<T>(score == zero, zero, score * V::load(staging + j)).store(s);
            }
        }
    }

    // In place: a row's pairs fill the first half of its memory.
    void pair_probabilities() const {
        for (int64_t r = 0; r < rows; ++r) {
            T* const s = scores + r * pitch;
            for (int64_t j = 0; j < count; j += 2 * lanes) {
                const Pairs pairs = adjacent_pairs(V::load(s + j), V::load(s + j + lanes));
                __builtin_memcpy(s + j / 2, &pairs, sizeof pairs);
            }
        }
    }

    static constexpr int most_rows = lanes < 4 ? lanes : 4;  // at a time
    static constexpr int kFetchingSteps = 4;

    // step<Rows>(r) for some rows of the chunk at a time.
    template <class Step>
    void in_row_steps(const Step& step) const {
        constexpr int most = most_rows;
        const int64_t count = chunk.last - chunk.first;
        int64_t r = 0;
        for (; r + most <= count; r += most) step.template operator()<most>(r);
        for (; most > 2 && r + 2 <= count; r += 2) step.template operator()<most / 2>(r);
        for (; r < count; ++r) step.template operator()<1>(r);
    }

    // How many lines are to be fetched at each of so many times that the chunk's rows from `row` on
    // use some of its keys or values. Many rows take longer than memory does: the first ones do it.
    int64_t lines_at_a_time(int64_t row, int64_t keys, int64_t columns, int64_t times) const {
        const int64_t steps = (chunk.last - chunk.first + most_rows - 1) / most_rows;
        if (columns == 0 || row >= kFetchingSteps * most_rows) return 0;
        times *= steps < kFetchingSteps ? steps : kFetchingSteps;
        return (keys * ((columns + line - 1) / line) + times - 1) / times;
    }

    // Rows x (lanes / Rows) sums at a time.
    template <int Rows, bool Whole>  // Whole: vectors fill head_dim
    [[gnu::noinline]] void compute_scores(int64_t row) {
        constexpr int keys = lanes / Rows;
        const int64_t count = chunk.keys.size();
        const int64_t lines = lines_at_a_time(row, keys, head_dim, 1);
        T* const to = scores_of(chunk.first + row);
        [[maybe_unused]] const V scale = query_scale<T>(block);
        const T* const queries = query + (chunk.first + row) * query_pitch;
        for (int64_t j = 0; j < count; j += keys) {
            const Element* from[keys];
#pragma GCC unroll 16
            for (int i = 0; i < keys; ++i) {
                from[i] = key + (j + i < count ? j + i : count - 1) * block.key.stride;
            }
            fetch(lines);
            V sum[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) sum[i] = T(0);
            int64_t d = 0;
            for (; d + step <= head_dim; d += step) {
                Vector rows_query[Rows];
#pragma GCC unroll 4
                for (int r = 0; r < Rows; ++r) {
                    __builtin_memcpy(&rows_query[r],
                                     queries + r * query_pitch + d / Factor<T, InPairs>::size,
                                     sizeof(Vector));
                }
#pragma GCC unroll 16
                for (int i = 0; i < keys; ++i) {
                    const Vector k = load_factor<T, InPairs>(from[i] + d);
#pragma GCC unroll 4
                    for (int r = 0; r < Rows; ++r) {
                        sum[r * keys + i] = fma(rows_query[r], k, sum[r * keys + i]);
                    }
                }
            }
            if constexpr (!Whole) {
#pragma GCC unroll 16
                for (int i = 0; i < keys; ++i) {
                    const V k = load_some<T>(from[i] + d, head_dim - d);
#pragma GCC unroll 4
                    for (int r = 0; r < Rows; ++r) {
                        const V q = V::load(queries + r * query_pitch + d);
                        sum[r * keys + i] = fma(q, k, sum[r * keys + i]);
                    }
                }
            }
            T dots[lanes];
            V products = sums_across<T>(sum);
            if constexpr (InPairs) products = scale * products;
            products.store(dots);
            for (int r = 0; r < Rows; ++r) {
                __builtin_memcpy(to + r * pitch + j, dots + r * keys, keys * sizeof(T));
            }
        }
    }

    // Between the scores of a row and its softmax. Returns whether a pair is hidden.
    bool apply_passes(int64_t r) const {
        const Row& row = block.rows[r];
        const Span keys = chunk.keys;
        const bool changed = row.mask != nullptr || row.bias != nullptr || block.softcap != 0 ||
                             score_scale[r] != T(1);
        const bool inside = row.begin <= keys.begin && keys.end <= row.end;
        if (!changed && inside && !block.alibi && keys.size() % lanes == 0) return false;
        T* const s = scores_of(r);
        const V hidden = -kInfinity<T>;
        T first[lanes];
        for (int i = 0; i < lanes; ++i) first[i] = T(i);
        const V index = V::load(first);
        const V low = T(row.begin > keys.begin ? row.begin - keys.begin : 0);
        const V high = T(row.end < keys.end ? row.end - keys.begin : keys.size());
        const V start = T(keys.begin - row.position), slope = T(-row.slope * kLog2e);
        if (changed) {
            for (int64_t j = 0; j < keys.size(); j += lanes) {
                V score = V(score_scale[r]) * V::load(s + j);
                if (block.softcap != 0) score = V(T(block.softcap * kLog2e)) * tanh(score);
                score.store(s + j);
            }
            add_array(row.bias, block.bias_dtype, block.bias_stride, inside_of(row), s);
            add_array(row.mask, block.mask_dtype, block.mask_stride, inside_of(row), s);
        }
        typename V::Mask any_hidden = {};
        for (int64_t j = 0; j < keys.size(); j += lanes) {
            const V place = V(T(j)) + index;
            V score = V::load(s + j);
            if (block.alibi) score = bounded_sum(score, abs(start + place), slope);
            score = select<T>((place >= low) & (place < high), score, hidden);
            any_hidden |= (score == hidden) & (place < V(T(keys.size())));
            score.store(s + j);
        }
        return any<T>(any_hidden);
    }

    // seen: the keys of the chunk in the row's interval; the array need not have others.
    void add_array(const void* array, Dtype dtype, int64_t stride, Span seen, T* s) const {
        if (array == nullptr || seen.size() <= 0) return;
        const Span keys = chunk.keys;
        for (int64_t j = 0; j < kChunk; ++j) staging[j] = T(0);
        stage(array, dtype, stride, seen, staging + seen.begin - keys.begin);
        for (int64_t j = 0; j < keys.size(); j += lanes) add_to_scores(s + j, V::load(staging + j));
    }

    void store_scores(int64_t r) const {
        const Row& row = block.rows[r];
        if (row.scores == nullptr || row.begin >= row.end) return;
        __builtin_memcpy(static_cast<T*>(row.scores) + row.begin,
                         scores + r * pitch + row.begin - base,
                         size_t(row.end - row.begin) * sizeof(T));
    }

    void softmax(int64_t r) const {
        T* const s = scores + r * pitch;
        V peaks = -kInfinity<T>;
        for (int64_t j = 0; j < count; j += lanes) peaks = max(V::load(s + j), peaks);
        const T largest = largest_across(peaks);
        const V offset = largest == -kInfinity<T> ? T(0) : largest;
        V sums = T(0);
        int64_t j = 0;
        for (; j < count; j += lanes) {
            const V prob = exp2<InPairs>(V::load(s + j) - offset);
            sums = sums + prob;
            prob.store(s + j);
        }
        if (InPairs && j % (2 * lanes) != 0) V(T(0)).store(s + j);
        partials.row_max(r) = largest;
        partials.row_sum(r) = sum_across(sums);
    }

    [[gnu::noinline]] void drop_pairs() const {
        for (int64_t r = 0; r < rows; ++r) {
            drop(scores + r * pitch, {base, base + count},
                 KeptOfKeys<T>(block.dropout, block.rows[r]));
        }
    }

    // A probability of 0 times a NaN or Inf is NaN, also in a row that must not see that value, or
    // that drops it. If a chunk holds such values, they are added here to the rows that see them,
    // and are left out later.
    bool add_nonfinite() const {
        const int64_t keys = chunk.keys.size();
        const Element* const values =
            row_of<Element>(block, block.value, chunk.keys.begin, chunk.first);
        bool found = false;
        for (int64_t j = 0; j < keys && !found; ++j) {
            const Element* const from = values + j * block.value.stride;
            int64_t d = 0;
            typename V::Mask bad = {};
            for (; d + lanes <= value_head_dim; d += lanes) bad |= ~is_finite<T>(load(from + d));
            for (; d < value_head_dim; ++d) found |= added<T>(from[d]) - added<T>(from[d]) != 0;
            found |= any<T>(bad);
        }
        if (!found) return false;
        for (int64_t j = 0; j < keys; ++j) {
            for (int64_t d = 0; d < value_head_dim; ++d) {
                const T x = added<T>(values[j * block.value.stride + d]);
                if (x - x == 0) continue;
                for (int64_t r = chunk.first; r < chunk.last; ++r) {
                    if (scores_of(r)[j] == -kInfinity<T>) continue;
                    if (block.dropout.drops &&
                        !KeptOfKeys<T>(block.dropout, block.rows[r]).keeps(chunk.keys.begin + j)) {
                        continue;
                    }
                    partials.acc(r)[d] += x;
                }
            }
        }
        return true;
    }

    // The values to use instead: (kChunk, partials.pitch), or (kChunk, value_head_dim) Elements.
    void stage_finite() const {
        for (int64_t j = 0; j < chunk.keys.size(); ++j) {
            for (int64_t d = 0; d < value_head_dim; ++d) {
                const Element from = value[j * block.value.stride + d];
                const T x = added<T>(from);
                const bool finite = x - x == 0;
                if constexpr (InPairs) {
                    reinterpret_cast<Element*>(staging)[j * value_head_dim + d] =
                        finite ? from : Element{};
                } else {
                    staging[j * partials.pitch + d] = finite ? x : T(0);
                }
            }
        }
    }

    // Of the chunk; staged: those of stage_finite().
    template <int Rows>
    void add_values(int64_t row, bool staged) {
        const int64_t count = chunk.keys.size();
        const T* const probs =
            scores_of(chunk.first + row) - (InPairs ? (chunk.keys.begin - base) / 2 : 0);
        if constexpr (InPairs) {
            const auto* const instead = reinterpret_cast<const Element*>(staging);
            add_pairs<Rows>(row, probs, staged ? instead : value,
                            staged ? value_head_dim : block.value.stride, count);
        } else if (staged) {
            add_numbers<Rows>(row, probs, staging, partials.pitch, count);
        } else {
            add_numbers<Rows>(row, probs, value, block.value.stride, count);
        }
    }

    template <int Rows, class From>
    void add_numbers(int64_t row, const T* probs, const From* from, int64_t stride, int64_t count) {
        constexpr int most = Rows <= 2 ? 8 : 4;
        const int64_t lines = lines_at_a_time(row, 2, value_head_dim,
                                              (value_head_dim + most * lanes - 1) / (most * lanes));
        int64_t d = 0;
        for (; d + most * lanes <= value_head_dim; d += most * lanes) {
            add_columns<Rows, most>(row, d, probs, from, stride, count, lines);
        }
        for (; d < value_head_dim; d += lanes) {
            add_columns<Rows, 1>(row, d, probs, from, stride, count, lines);
        }
    }

    // The values of two keys at a time, whose elements are paired in registers.
    template <int Rows>
    void add_pairs(int64_t row, const T* probs, const Element* from, int64_t stride,
                   int64_t count) {
        constexpr int most = Rows <= 2 ? 4 : 2;  // of a vector for the low halves, one for the high
        const int64_t lines = lines_at_a_time(row, 2, value_head_dim,
                                              (value_head_dim + most * step - 1) / (most * step));
        int64_t d = 0;
        for (; d + most * step <= value_head_dim; d += most * step) {
            add_paired_columns<Rows, most>(row, d, probs, from, stride, count, lines);
        }
        for (; d < value_head_dim; d += step) {
            add_paired_columns<Rows, 1>(row, d, probs, from, stride, count, lines);
        }
    }

    template <int Rows, int Columns>
    [[gnu::always_inline]] void add_paired_columns(int64_t row, int64_t d, const T* probs,
                                                   const Element* from, int64_t stride,
                                                   int64_t count, int64_t lines) {
        V sum[Rows][2 * Columns] = {};
        for (int64_t j = 0; j < count; j += 2) {
            fetch(lines);
            // Of an odd count, the last probability is 0, and any value will do.
            const Element* const first = from + j * stride + d;
            const Element* const second = j + 1 < count ? first + stride : first;
            Pairs column[2 * Columns];
#pragma GCC unroll 4
            for (int c = 0; c < Columns; ++c) {
                pair_rows(load_factor<T, true>(first + c * step),
                          load_factor<T, true>(second + c * step), column[2 * c],
                          column[2 * c + 1]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
                uint32_t pair;
                __builtin_memcpy(&pair, probs + r * pitch + j / 2, sizeof pair);
                const Pairs prob = pair - Pairs{};
#pragma GCC unroll 8
                for (int c = 0; c < 2 * Columns; ++c) sum[r][c] = fma(prob, column[c], sum[r][c]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < Columns; ++c) {
                in_order(sum[r][2 * c], sum[r][2 * c + 1]);
                for (int half = 0; half < 2; ++half) {
                    T* const out =
                        partials.acc(chunk.first + row + r) + d + c * step + half * lanes;
                    (V::load(out) + sum[r][2 * c + half]).store(out);
                }
            }
        }
    }

    template <int Rows, int Columns, class From>
    [[gnu::always_inline]] void add_columns(int64_t row, int64_t d, const T* probs,
                                            const From* from, int64_t stride, int64_t count,
                                            int64_t lines) {
        const bool whole = d + Columns * lanes <= value_head_dim;
        V sum[Rows][Columns] = {};
        for (int64_t j = 0; j < count; ++j) {
            if (j % 2 == 0) fetch(lines);
            V column[Columns];
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) {
                const From* const at = from + j * stride + d + c * lanes;
                column[c] = whole ? load(at) : load_some<T>(at, value_head_dim - d);
            }
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
                const V prob = probs[r * pitch + j];
#pragma GCC unroll 8
                for (int c = 0; c < Columns; ++c) sum[r][c] = fma(prob, column[c], sum[r][c]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) {
                T* const out = partials.acc(chunk.first + row + r) + d + c * lanes;
                (V::load(out) + sum[r][c]).store(out);
            }
        }
    }
};

template <class T>
void decode(const Block& block, void* partials) {
    Scratch scratch(block.scratch);
    with_key<T>(block.kv_dtype, [&]<class Element>(const Element*) {
        constexpr bool narrow = sizeof(Element) == 1 || kIsBFloat16<Element>;
        if constexpr (kMultipliesPairs && narrow) {
            constexpr int64_t step = 2 * Vec<T>::lanes;
            if (block.query_dtype == Dtype::kBFloat16 && block.head_dim % step == 0 &&
                block.value_head_dim % step == 0) {
                return Split<T, Element, true>(block, partials, scratch).attend();
            }
        }
        Split<T, Element, false>(block, partials, scratch).attend();
    });
}

template <class T>
size_t decode_scratch_bytes(const Block& block) {
    Scratch scratch;
    Split<T, T, false>(block, nullptr, scratch);
    return scratch.used();
}

}  // namespace
}  // namespace fastattn
