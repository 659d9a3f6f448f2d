// SPDX-License-Identifier: Apache-2.0
//
// The algorithm: a query tile against all the keys that it sees, key tile after key tile, with the
// running softmax of FlashAttention-2 (Dao 2023, algorithm 1). Used by row_block.h.
//
// Queries lie along the vector lanes: the scores are S^T = K Q^T and the output O^T = V^T P^T. Keys
// and values are then read where they lie, as scalars that are broadcast; only the query tile is
// transposed; row maximum, exp2 and row sum are plain vertical code; and one micro-kernel,
// multiply(), serves both products.
//
// Names in the paper: row_max is m, row_sum is l, acc is O. Scores are in base 2: log2(e) is folded
// into the query.
//
// Every lane is on its own: no bit of a row's result depends on the rows beside it, on keys that
// the row does not see, or on whether a tile of such keys was skipped. What makes it true: a masked
// score is -inf, whose exp2 is exactly 0, and a tile that leaves the maximum alone rescales by
// exactly 1.
#pragma once

#include "dropout.h"
#include "elements.h"
#include "factors.h"
#include "kernel.h"
#include "multiply.h"
#include "partials.h"
#include "score_tile.h"
#include "scores.h"
#include "split.h"
#include "vec.h"

namespace fastattn {
namespace {

// Sums stay short, for accuracy. A sum over keys is over one key tile, then over a span, and then
// over all of these sums.
static_assert(kSpanKeys % kKeyTile == 0);

// The scratch memory of one query tile: matrices of `width` columns, a lane for each row.
template <class T>
struct Matrices {
    T* const query;  // (head_dim) transposed and scaled
    T* const acc;    // (value_head_dim) O^T of the span's keys
    T* const total;  // (value_head_dim) O^T of the spans before, where there are some

    Matrices(const Block& block, int64_t width, Scratch& scratch)
        : query(scratch.take<T>(block.head_dim * width)),
          acc(scratch.take<T>(block.value_head_dim * width)),
          total(scratch.take<T>(
              block.kv_len > kSpanKeys && !block.in_span ? block.value_head_dim * width : 0)) {}
};

// Rows that fill up to Columns vectors, and what is known of them after the key tiles so far.
//
// In pairs, the probabilities and values that are multiplied are bfloat16 too: values are laid out
// in pairs of keys once for all query tiles.
template <class T, bool InPairs, int Columns>
class QueryTile : ScoreTile<T, InPairs, Columns> {
    using Scores = ScoreTile<T, InPairs, Columns>;
    using Scores::block;
    using Scores::cuts;
    using Scores::head_dim;
    using Scores::key_stride;
    using Scores::lanes;
    using Scores::passes;
    using Scores::scale_scores;
    using Scores::scales_late;
    using Scores::score_scale;
    using Scores::scores;
    using Scores::shared;
    using Scores::staging;
    using Scores::tile_key;
    using Scores::tile_max;
    using Scores::width;
    using typename Scores::Element;
    using typename Scores::Operand;
    using typename Scores::V;

    const int index;         // of the query tile in the row block
    const int rows_to_come;  // behind the query tile's
    const int64_t value_head_dim;

    // In scratch memory: see Matrices.
    T* const acc;
    T* const total;

    // Of the key tile. In pairs, the stride is that of a pair's row, halved.
    const Element* tile_value;
    int64_t value_stride;

    V row_max[Columns], row_sum[Columns], total_sum[Columns], total_max[Columns];
    V rescale[Columns];
    int64_t span;  // which one acc, row_max and row_sum are about
    bool has_started = false, has_total = false;

   public:
    // Rows [first, first + count) of a row block.
    QueryTile(const Block& whole, int first, int count, const Matrices<T>& matrices,
              Shared<T>* in_turn)
        : Scores(whole, first, count, matrices.query, in_turn),
          index(first / KeptArray<T>::most_rows),
          rows_to_come(whole.row_count - first - count),
          value_head_dim(block.value_head_dim),
          acc(matrices.acc),
          total(matrices.total),
          span(passes.begin / kSpanKeys) {}

    // Query tiles are made in scratch memory and need no end.
    static void* operator new(size_t, void* where) { return where; }

    size_t rows() const { return size_t(block.row_count); }
    int64_t begin() const { return passes.begin; }
    int64_t end() const { return passes.end; }

    void attend_tile(int64_t tile) {
        Span keys = passes.span(tile);
        if (keys.size() <= 0) return;
        const Seen seen = passes.classify(keys);
        if (seen == Seen::kNone) return;
        if (!has_started) start();
        if (tile / kSpanKeys != span) {
            close_span();
            span = tile / kSpanKeys;
        }
        this->find_keys(tile);
        attend(keys, seen, tile);
    }

    // Stores the result; or, where `partials` is not null, the rows' partials there.
    void finish(void* partials) {
        if (!has_started) start();
        if (has_total) close_span();
        const T* const sum = has_total ? total : acc;
        const V* const sums = has_total ? total_sum : row_sum;
        const V* const largest = has_total ? total_max : row_max;
        if (partials == nullptr) return store(sum, sums, largest);
        for (int c = 0; c < Columns; ++c) {
            store_partials(sum, sums, largest, Partials<T>(block, partials), c);
        }
    }

    // Without a mask or bias, only the outer two tiles on either side may be unlike the others: the
    // rows' intervals differ by less than a tile.
    void count(TileCounts& counts) const {
        static_assert(width + micro_rows(Columns) <= kKeyTile);
        const bool visit_all = block.rows->mask != nullptr || block.rows->bias != nullptr;
        const int64_t tiles = (block.kv_len + kKeyTile - 1) / kKeyTile;
        const int64_t first = begin() / kKeyTile, last = (end() + kKeyTile - 1) / kKeyTile;
        int64_t computed = 0;
        for (int64_t tile = first, alike; tile < last; tile += alike) {
            alike = visit_all || tile != first + 2 || tile >= last - 2 ? 1 : last - 2 - tile;
            Span keys = passes.span(tile * kKeyTile);
            const Seen seen = passes.classify(keys);
            if (seen == Seen::kNone) continue;
            computed += alike;
            if (seen == Seen::kSome) counts.edge += alike;
            counts.pairs += alike * keys.size() * block.row_count;
        }
        counts.computed += computed;
        counts.skipped += tiles - computed;
    }

   private:
    // Runs as late as it can: the query comes from memory while the query tiles before it compute.
    void start() {
        for (int i = 0; i < rows_to_come && i < width; ++i) {
            prefetch(static_cast<const T*>(block.rows[block.row_count + i].query),
                     query_items(head_dim));
        }
        this->load_query();
        if (block.kept != nullptr) passes.keep_bias(KeptArray<T>::at(block, index), staging);
        begin_span();
        has_started = true;
    }

    // How many T take as much memory as `count` elements of the query.
    int64_t query_items(int64_t count) const {
        return block.query_dtype == kDtype<T> ? count : (count + 1) / 2;
    }

    // Finds or prepares the values likewise.
    void find_values(int64_t tile) {
        if (shared->some_at_a_time) {
            value_stride = value_head_dim;
            return;
        }
        const int64_t keys = this->keys_of(tile);
        if constexpr (InPairs) {
            tile_value = reinterpret_cast<const BFloat16*>(shared->value);
            value_stride = value_head_dim;
            if (shared->value_tile == tile) return;
            shared->value_tile = tile;
            const auto* value = row_of<BFloat16>(block, block.value, tile);
            auto* to = reinterpret_cast<BFloat16*>(shared->value);
            for (int64_t j = 0; j < keys; j += 2, to += 2 * value_head_dim) {
                const BFloat16* const first = value + j * block.value.stride;
                store_pairs(first, j + 1 < keys ? first + block.value.stride : nullptr,
                            value_head_dim, to);
            }
        } else {
            with_key<T>(block.kv_dtype, [&]<class From>(const From*) {
                const From* const value = row_of<From>(this->block, this->block.value, tile);
                if constexpr (sizeof(From) == sizeof(T)) {
                    tile_value = value, value_stride = this->block.value.stride;
                } else {
                    tile_value = this->shared->value, value_stride = value_head_dim;
                    if (this->shared->value_tile == tile) return;
                    this->shared->value_tile = tile;
                    this->widen_values(tile, this->keys_of(tile), 0, value_head_dim,
                                       this->shared->value);
                }
            });
        }
    }

    void widen_values(int64_t first, int64_t rows, int64_t d, int64_t columns, T* to) const {
        this->widen_rows(block.value, block.value_scale, first, rows, d, columns, to);
    }

    void begin_span() {
        clear(acc);
        for (int c = 0; c < Columns; ++c) {
            row_max[c] = -kInfinity<T>;
            row_sum[c] = T(0);
        }
    }

    void clear(T* matrix) const {
        for (int64_t i = 0; i < value_head_dim * width; i += lanes) V(T(0)).store(matrix + i);
    }

    void attend(Span keys, Seen seen, int64_t tile) {
        passes.find_cuts(keys, cuts);
        passes.prefetch(keys);
        shared->ahead.go_on();
        const bool fetches = shared->fetches && shared->fetched != tile;
        shared->fetched = tile;
        const T* const bias = scale_scores ? nullptr : passes.simple_bias(keys);
        bool added = bias != nullptr && this->compute_scores(keys, fetches, bias);
        if (!added) this->compute_scores(keys, fetches);
        find_values(tile);
        if (!InPairs && scale_scores) this->apply_score_scale(keys);
        const bool drops = block.dropout.drops;
        bool any_left_out = drops;
        if (seen == Seen::kSome) {
            const bool changed = passes.apply(scores, keys, staging, added);
            if (changed || !added) any_left_out |= this->find_tile_max(keys);
        }
        const bool apart = any_left_out && add_nonfinite(keys);
        if (InPairs && scales_late) {
            for (int c = 0; c < Columns; ++c) tile_max[c] = score_scale[c] * tile_max[c];
            softmax<true>(keys);
        } else {
            softmax<false>(keys);
        }
        if (drops) drop_pairs(keys);
        const bool whole = cuts[Columns - 1] == 0 && cuts[Columns] == keys.size();
        const Span next = fetches ? passes.span(tile + kKeyTile) : Span{0, 0};
        const auto add_columns = [&](int64_t first, int64_t last, const Element* value,
                                     int64_t stride) {
            in_steps<micro_rows(Columns)>(first, last, [&]<int Rows>(int64_t d) {
                if (next.size() > 0) {
                    this->fetch(block.key, next.begin + next.size() * d / value_head_dim,
                                next.begin + next.size() * (d + Rows) / value_head_dim, head_dim);
                }
                const Element* const column = value + (d - first) * Operand::size;
                if (whole) {
                    V sum[Rows][Columns] = {};
                    multiply_values<0, Columns>(column, stride, 0, keys.size(), sum);
                    add_to_acc(d, sum);
                } else {
                    add_between_cuts<Rows>(d, column, stride);
                }
            });
        };
        if (!apart && !shared->some_at_a_time) {
            return add_columns(0, value_head_dim, tile_value + (keys.begin - tile) * value_stride,
                               value_stride);
        }
        constexpr int64_t size = Operand::size;
        const int64_t staged = staged_columns(value_head_dim, size) * size;
        for (int64_t first = 0, last; first < value_head_dim; first = last) {
            last = value_head_dim - first < staged ? value_head_dim : first + staged;
            if (apart) {
                stage_finite(keys, first, last);
            } else {
                stage_columns(keys, first, last);
            }
            add_columns(first, last, reinterpret_cast<const Element*>(staging), last - first);
        }
    }

    // sum += P^T V of the keys [begin, end), counted from the first; begin is even. column: where
    // the first of `Rows` columns begins.
    template <int First, int Last, int Rows>
    [[gnu::always_inline]] void multiply_values(const Element* column, int64_t stride,
                                                int64_t begin, int64_t end,
                                                V (&sum)[Rows][Columns]) const {
        constexpr int64_t size = Operand::size;
        multiply<First, Last, InPairs>(column + begin * stride, size, stride * size,
                                       scores + begin / size * width, width,
                                       (end - begin + size - 1) / size, sum);
    }

    template <int Rows>
    [[gnu::always_inline]] void add_to_acc(int64_t d, const V (&sum)[Rows][Columns]) const {
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < Columns; ++c) {
                T* out = acc + (d + r) * width + c * lanes;
                fma(V::load(out), rescale[c], sum[r][c]).store(out);
            }
        }
    }

    // Out of line, so that the common case keeps its sums in registers.
    template <int Rows>
    [[gnu::noinline]] void add_between_cuts(int64_t d, const Element* column,
                                            int64_t stride) const {
        V sum[Rows][Columns] = {};
        between_cuts<Columns>(cuts, [&]<int First, int Last>(int64_t begin, int64_t end) {
            multiply_values<First, Last>(column, stride, begin, end, sum);
        });
        add_to_acc(d, sum);
    }

    // scores = P^T = exp2(S^T - row_max); a NaN score makes a NaN. Scaled: by score_scale first.
    template <bool Scaled>
    void softmax(Span keys) {
        V offset[Columns], sum[Columns];
        for (int c = 0; c < Columns; ++c) {
            const V largest = max(tile_max[c], row_max[c]);
            // Nothing seen yet: -inf - 0, not -inf - -inf.
            offset[c] = select<T>(largest == V(-kInfinity<T>), V(T(0)), largest);
            rescale[c] = exp2(row_max[c] - offset[c]);
            row_max[c] = largest;
            sum[c] = T(0);
        }
        // In pairs, another key is hidden from all rows where their number is odd.
        constexpr int size = Operand::size;
        for (int c = 0; c < Columns && keys.size() % size != 0; ++c) {
            V(-kInfinity<T>).store(scores + keys.size() * width + c * lanes);
        }
        const T* row = scores;
        for (T* to = scores; row < scores + keys.size() * width; row += size * width, to += width) {
            V probs[size * Columns];
#pragma GCC unroll 8
            for (int i = 0; i < size * Columns; ++i) {
                const V x = V::load(row + i * lanes), least = offset[i % Columns];
                probs[i] = Scaled ? fma(x, score_scale[i % Columns], V(T(0)) - least) : x - least;
            }
            exp2<InPairs>(probs);
#pragma GCC unroll 4
            for (int c = 0; c < Columns; ++c) {
                if constexpr (InPairs) {
                    const V first = probs[c], second = probs[Columns + c];
                    sum[c] = sum[c] + (first + second);
                    const Pairs pairs = to_pairs(first, second);
                    __builtin_memcpy(to + c * lanes, &pairs, sizeof pairs);
                } else {
                    sum[c] = sum[c] + probs[c];
                    probs[c].store(to + c * lanes);
                }
            }
        }
        for (int c = 0; c < Columns; ++c) row_sum[c] = fma(row_sum[c], rescale[c], sum[c]);
    }

    KeptOfRows<T> kept(int c) const {
        return {block.dropout, block.rows + c * lanes, block.row_count - c * lanes};
    }

    [[gnu::noinline]] typename V::Mask kept_rows(int c, int64_t key) const {
        typename V::Mask mask = {};
        kept(c).each_key({key, key + 1}, [&](int64_t, typename V::Mask of) { mask = of; });
        return mask;
    }

    [[gnu::noinline]] void drop_pairs(Span keys) const {
        for (int c = 0; c < Columns; ++c) drop<InPairs>(scores + c * lanes, width, keys, kept(c));
    }

    // A probability of 0 times a NaN or Inf is NaN, also in a row that must not see that value, or
    // that drops it. If the key tile holds such values, they are added here to the rows that see
    // them, and stage_finite() gives the others.
    bool add_nonfinite(Span keys) {
        bool found = false;
        const auto check = [&](int64_t first, int64_t last) {
            const int64_t rows = shared->some_at_a_time ? 1 : last - first;
            for (; first < last; first += rows) {
                found |= !all_finite(value_row(first), row_stride(), rows);
            }
        };
        if (block.dropout.drops) {
            check(keys.begin, keys.end);
        } else {
            passes.hidden_keys(keys, check);
        }
        if (!found) return false;
        for (int64_t j = 0; j < keys.size(); ++j) {
            const Element* const from = value_row(keys.begin + j);
            for (int64_t d = 0; d < value_head_dim; ++d) {
                const T x = added<T>(from[d]);
                if (x - x == 0) continue;
                for (int c = 0; c < Columns; ++c) {
                    auto left_out = V::load(scores + j * width + c * lanes) == V(-kInfinity<T>);
                    if (block.dropout.drops) left_out |= ~kept_rows(c, keys.begin + j);
                    T* const sum = acc + d * width + c * lanes;
                    select<T>(left_out, V::load(sum), V::load(sum) + V(x)).store(sum);
                }
            }
        }
        return true;
    }

    // `staging` takes the columns [first, last) of the keys' values.
    void stage_columns(Span keys, int64_t first, int64_t last) const {
        const int64_t columns = last - first;
        if constexpr (InPairs) {
            auto* to = reinterpret_cast<BFloat16*>(staging);
            for (int64_t j = 0; j < keys.size(); j += 2, to += 2 * columns) {
                const BFloat16* const from = value_row(keys.begin + j) + first;
                store_pairs(from, j + 1 < keys.size() ? from + row_stride() : nullptr, columns, to);
            }
        } else {
            widen_values(keys.begin, keys.size(), first, columns, staging);
        }
    }

    // Likewise, with zeros for those that are not finite.
    void stage_finite(Span keys, int64_t first, int64_t last) const {
        constexpr int64_t size = Operand::size;
        for (int64_t j = 0; j < keys.size(); ++j) {
            const Element* const from = value_row(keys.begin + j) + first;
            Element* place =
                reinterpret_cast<Element*>(staging) + j / size * (last - first) * size + j % size;
            for (int64_t d = 0; d < last - first; ++d, place += size) {
                const T x = added<T>(from[d]);
                place[0] = x - x == 0 ? from[d] : Element{};
                if (j + 1 == keys.size() && j % size + 1 < size) place[1] = Element{};
            }
        }
    }

    // A key's values, where they are not laid out in pairs.
    const Element* value_row(int64_t key) const {
        if constexpr (InPairs) {
            return row_of<Element>(block, block.value, key);
        } else {
            if (!shared->some_at_a_time) return tile_value + key % kKeyTile * value_stride;
            widen_values(key, 1, 0, value_head_dim, shared->value);
            return shared->value;
        }
    }
    int64_t row_stride() const { return InPairs ? block.value.stride : value_stride; }

    bool all_finite(const Element* row, int64_t stride, int64_t rows) const {
        typename V::Mask bad = {};
        bool rest_finite = true;
        for (; rows > 0; --rows, row += stride) {
            int64_t d = 0;
            for (; d + lanes <= value_head_dim; d += lanes) {
                bad |= ~is_finite<T>(load(row + d));
            }
            for (; d < value_head_dim; ++d) {
                const T x = added<T>(row[d]);
                rest_finite &= x - x == 0;
            }
        }
        return rest_finite && !any<T>(bad);
    }

    // Merges a span with those before, just as Partials::merge() does, and begins another.
    void close_span() {
        if (!has_total) {
            clear(total);
            for (int c = 0; c < Columns; ++c) {
                total_sum[c] = T(0);
                total_max[c] = -kInfinity<T>;
            }
        }
        for (int c = 0; c < Columns; ++c) {
            const V largest = max(total_max[c], row_max[c]);
            const V offset = select<T>(largest == V(-kInfinity<T>), V(T(0)), largest);
            const V total_rescale = exp2(total_max[c] - offset);
            const V rescale_acc = exp2(row_max[c] - offset);
            for (int64_t i = c * lanes; i < value_head_dim * width; i += width) {
                const V more = rescale_acc * V::load(acc + i);
                fma(V::load(total + i), total_rescale, more).store(total + i);
            }
            total_sum[c] = fma(total_sum[c], total_rescale, rescale_acc * row_sum[c]);
            total_max[c] = largest;
        }
        begin_span();
        has_total = true;
    }

    // out = sum / row_sum, and lse = log(row_sum) + max. A sink is one more term of the
    // denominator.
    void store(const T* sum, const V* sums, const V* maxima) const {
        if (block.accumulates) return add_to_results(sum, sums, maxima);
        for (int c = 0; c < Columns; ++c) {
            T largest[lanes], denominator[lanes];
            const V sink = block.sinks ? sinks(c) : V(-kInfinity<T>);
            const V peak = max(maxima[c], sink);
            const V offset = select<T>(peak == V(-kInfinity<T>), V(T(0)), peak);
            const V sum_rescale = exp2(maxima[c] - offset);
            const V all = fma(sums[c], sum_rescale, exp2(sink - offset));
            const V share = select<T>(all == V(T(0)), V(T(0)), sum_rescale / all);
            const V factor = V(T(block.dropout.scale)) * share;
            maxima[c].store(largest);
            sums[c].store(denominator);
            with_query<T>(block.out_dtype, [&]<class Out>(const Out*) {
                store_out<Out>(sum + c * lanes, factor, c * lanes);
            });
            for (int i = 0; i < lanes && c * lanes + i < block.row_count; ++i) {
                const Row& row = block.rows[c * lanes + i];
                if (row.softmax != nullptr) {
                    static_cast<T*>(row.softmax)[0] = offset.v[i];
                    static_cast<T*>(row.softmax)[1] = all.v[i] == T(0) ? T(0) : T(1) / all.v[i];
                }
                if (row.lse == nullptr) continue;
                *static_cast<T*>(row.lse) =
                    T(double(largest[i]) * kLn2 + __builtin_log(double(denominator[i])));
            }
        }
    }

    [[gnu::noinline]] void add_to_results(const T* sum, const V* sums, const V* maxima) const {
        for (int c = 0; c < Columns && c * lanes < block.row_count; ++c) {
            const int first = c * lanes;
            const Shares<T> shares =
                join<T>(block, block.rows + first, block.row_count - first, maxima[c], sums[c]);
            with_query<T>(block.out_dtype, [&]<class Out>(const Out*) {
                transpose_rows(
                    sum + first, first,
                    [&](int row, int64_t d, V now) {
                        Out* const out = static_cast<Out*>(block.rows[row].out);
                        add_to_out(shares, row - first, now, value_head_dim - d, out + d);
                    },
                    [&](V x) { return fma(x, shares.now, V(T(0))); });
            });
        }
    }

    V sinks(int c) const {
        T sink[lanes];
        for (int i = 0; i < lanes; ++i) {
            const int row = c * lanes + i;
            sink[i] = T(row < block.row_count ? block.rows[row].sink * kLog2e : -__builtin_inf());
        }
        return V::load(sink);
    }

    template <class Out>
    void store_out(const T* sum, V factor, int first_row) const {
        // Adding 0 turns -0 into 0: which one a sum of zeros is depends on skipped tiles.
        transpose_rows(
            sum, first_row,
            [&](int row, int64_t d, V x) {
                Out* const out = static_cast<Out*>(block.rows[row].out);
                store_some(x, value_head_dim - d, out + d);
            },
            [&](V x) { return fma(x, factor, V(T(0))); });
    }

    void store_partials(const T* sum, const V* sums, const V* maxima, const Partials<T>& partials,
                        int c) const {
        for (int i = 0; i < lanes && c * lanes + i < block.row_count; ++i) {
            partials.row_max(c * lanes + i) = maxima[c].v[i];
            partials.row_sum(c * lanes + i) = sums[c].v[i];
        }
        transpose_rows(
            sum + c * lanes, c * lanes,
            [&](int row, int64_t d, V x) { x.store(partials.acc(row) + d); },
            [](V x) { return x; });
    }

    // Calls put(row, d, x) for `lanes` rows of a matrix like acc; x holds the columns from d on.
    template <class Put, class Change>
    void transpose_rows(const T* matrix, int first_row, const Put& put,
                        const Change& change) const {
        for (int64_t d = 0; d < value_head_dim; d += lanes) {
            V square[lanes];
#pragma GCC unroll 16
            for (int k = 0; k < lanes; ++k) {
                const bool inside = k < value_head_dim - d;
                square[k] = inside ? change(V::load(matrix + (d + k) * width)) : V(T(0));
            }
            transpose<T>(square);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) {
                if (first_row + i == block.row_count) break;
                put(first_row + i, d, square[i]);
            }
        }
    }
};

}  // namespace
}  // namespace fastattn
