// SPDX-License-Identifier: Apache-2.0
//
// The algorithm: one block of query rows against all the keys that they see, key tile after key
// tile, with the running softmax of FlashAttention-2 (Dao 2023, algorithm 1). Called by
// attention.cpp through the table at the end; compiled once per instruction set over vec.h.
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
#include "kernel.h"

#include "elements.h"
#include "kernel_few.h"
#include "kernel_parts.h"
#include "kernel_scores.h"
#include "vec.h"

namespace fastattn {
namespace {

// Sums stay short, for accuracy: over one tile, then over this many tiles, then over such groups;
// and over pieces of a long head_dim.
constexpr int64_t kGroup = 64 * kKeyTile;  // keys
constexpr int64_t kDepth = 512;
static_assert(kPageKeys % kKeyTile == 0);

// For c in [First, Last), sum[r][c] += over k < depth: a[r * a_row + k * a_step] * b[k][c], a row
// of b being Columns vectors.
template <int First, int Last, class T, int Rows, int Columns>
[[gnu::always_inline]] inline void multiply(const T* a, int64_t a_row, int64_t a_step, const T* b,
                                            int64_t depth, Vec<T> (&sum)[Rows][Columns]) {
    constexpr int lanes = Vec<T>::lanes;
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += Columns * lanes) {
        Vec<T> column[Columns];
#pragma GCC unroll 4
        for (int c = First; c < Last; ++c) column[c] = Vec<T>::load(b + c * lanes);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const Vec<T> scalar = a[r * a_row];
#pragma GCC unroll 4
            for (int c = First; c < Last; ++c) sum[r][c] = fma(scalar, column[c], sum[r][c]);
        }
    }
}

// visit<First, Last>(begin, end): the stretches of a tile's keys between two cuts, each with the
// vectors that may see it (ScorePasses::find_cuts).
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

// step<Rows>(row) over [row, count) in steps of Rows, then of half as many, and so on.
template <int Rows, class Step>
[[gnu::always_inline]] inline void in_steps(int64_t row, int64_t count, const Step& step) {
    for (; row + Rows <= count; row += Rows) step.template operator()<Rows>(row);
    if constexpr (Rows > 1) {
        if (row < count) in_steps<Rows / 2>(row, count, step);
    }
}

// What the panels of a block use in turn.
template <class T>
struct Shared {
    T* scores;   // (kKeyTile, width of the panel) S^T, then P^T
    T* staging;  // (kKeyTile, value_head_dim or lanes) rows of a mask, or values to use instead
    T* key;      // (kKeyTile, head_dim) and
    T* value;    // (kKeyTile, value_head_dim): half precision, widened
    int64_t tile = -1;  // that key and value are those of
};

// Rows that fill up to Columns vectors, and what is known of them after the tiles so far.
template <class T, int Columns>
class Panel {
    using V = Vec<T>;
    static constexpr int lanes = V::lanes;
    static constexpr int width = Columns * lanes;  // rows, and lanes that have none

    const Block block;       // the panel's rows alone
    const int rows_to_come;  // behind them, in the block
    const int64_t head_dim, value_head_dim;
    const ScorePasses<T, Columns> passes;

    // In scratch, matrices of `width` columns unless said otherwise.
    T* const query;  // (head_dim) transposed and scaled
    T* const acc;    // (value_head_dim) O^T of the current group
    T* const total;  // (value_head_dim) O^T of the groups before
    T* const scores;
    T* const staging;
    Shared<T>* const shared;

    // Of the tile, in T.
    const T *tile_key, *tile_value;
    int64_t key_stride, value_stride;

    V row_max[Columns], row_sum[Columns], total_sum[Columns], total_max[Columns];
    V tile_max[Columns], rescale[Columns];
    int64_t cuts[2 * Columns];  // of the tile: see ScorePasses::find_cuts
    int64_t group;              // of tiles, that acc is about
    bool has_started = false, has_total = false;

    V score_scale[Columns];     // what load_query() left out of the query
    bool scale_scores = false;  // some lane's is not 1

    static int64_t total_rows(const Block& b) { return b.kv_len > kGroup ? b.value_head_dim : 0; }

    static Block part(Block b, int first, int count) {
        b.rows += first;
        b.row_count = count;
        return b;
    }

   public:
    static int64_t scratch_elements(const Block& b) {
        return (b.head_dim + b.value_head_dim + total_rows(b)) * width;
    }

    // Rows [first, first + count) of a block; scratch: scratch_elements().
    Panel(const Block& whole, int first, int count, T* scratch, Shared<T>* in_turn)
        : block(part(whole, first, count)),
          rows_to_come(whole.row_count - first - count),
          head_dim(block.head_dim),
          value_head_dim(block.value_head_dim),
          passes(block),
          query(scratch),
          acc(query + head_dim * width),
          total(acc + value_head_dim * width),
          scores(in_turn->scores),
          staging(in_turn->staging),
          shared(in_turn),
          group(passes.begin / kGroup) {}

    // Panels are made in scratch memory and need no end.
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
        if (tile / kGroup != group) {
            close_group();
            group = tile / kGroup;
        }
        find_operands(tile);
        attend(keys, seen, keys.begin - tile);
    }

    // parts: null, or where those of the panel's rows go, instead of the result.
    void finish(void* parts) {
        if (!has_started) start();
        if (has_total) close_group();
        const T* const sum = has_total ? total : acc;
        const V* const sums = has_total ? total_sum : row_sum;
        if (parts == nullptr) return store(sum, sums);
        for (int c = 0; c < Columns; ++c) store_parts(sum, sums, Parts<T>(block, parts), c);
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
    // As late as can be, so that the panels before it compute while its query comes from memory.
    void start() {
        for (int i = 0; i < rows_to_come && i < width; ++i) {
            prefetch(static_cast<const T*>(block.rows[block.row_count + i].query),
                     query_items(head_dim));
        }
        load_query();
        for (int i = 0; i < block.row_count; ++i) {
            prefetch<1>(static_cast<const T*>(block.rows[i].out), query_items(value_head_dim));
        }
        clear(acc);
        for (int c = 0; c < Columns; ++c) {
            row_max[c] = -kInfinity<T>;
            row_sum[c] = T(0);
        }
        has_started = true;
    }

    // As many T as so many elements of the query fill.
    int64_t query_items(int64_t count) const {
        return block.query_dtype == kDtype<T> ? count : (count + 1) / 2;
    }

    // Keys and values are read where they lie, or else widened once for all panels.
    void find_operands(int64_t tile) {
        with_key<T>(block.kv_dtype, [&]<class Element>(const Element*) {
            const auto* key = row_of<Element>(block, block.key, tile);
            const auto* value = row_of<Element>(block, block.value, tile);
            if constexpr (sizeof(Element) == sizeof(T)) {
                tile_key = key, key_stride = block.key.stride;
                tile_value = value, value_stride = block.value.stride;
            } else {
                if (shared->tile != tile) {
                    const int64_t left = block.kv_len - tile;
                    const int64_t keys = left < kKeyTile ? left : kKeyTile;
                    widen(key, block.key.stride, keys, head_dim, shared->key);
                    widen(value, block.value.stride, keys, value_head_dim, shared->value);
                    if constexpr (sizeof(Element) == 1) {
                        multiply_rows(block.key_scale, tile, keys, head_dim, shared->key);
                        multiply_rows(block.value_scale, tile, keys, value_head_dim, shared->value);
                    }
                    shared->tile = tile;
                }
                tile_key = shared->key, key_stride = head_dim;
                tile_value = shared->value, value_stride = value_head_dim;
            }
        });
    }

    // By the scales of quantized keys or values.
    void multiply_rows(const KeyRows& scales, int64_t tile, int64_t rows, int64_t columns,
                       T* matrix) const {
        const float* const scale = row_of<float>(block, scales, tile);
        for (int64_t j = 0; j < rows; ++j) {
            const T factor = T(scale[j * scales.stride]);
            for (int64_t d = 0; d < columns; ++d) matrix[j * columns + d] *= factor;
        }
    }

    void clear(T* matrix) const {
        for (int64_t i = 0; i < value_head_dim * width; i += lanes) V(T(0)).store(matrix + i);
    }

    // query = (scale * log2(e) * Q)^T; lanes without a row are 0. With softcap, tanh comes between
    // the scale and the change of base. A row that the scale would take out of range keeps it for
    // its scores.
    void load_query() {
        const V scale = query_scale<T>(block);
        for (int c = 0; c < Columns; ++c) {
            with_query<T>(block.query_dtype, [&]<class Element>(const Element*) {
                const auto too_large = load_rows<Element>(c, scale);
                score_scale[c] = select<T>(too_large, scale, V(T(1)));
                if (!any<T>(too_large)) return;
                load_rows<Element>(c, select<T>(too_large, V(T(1)), scale));
                scale_scores = true;
            });
        }
    }

    // Loads one vector of rows, times scale; returns which of them that took out of range.
    template <class Element>
    typename V::Mask load_rows(int c, V scale) const {
        const Row* const rows = block.rows + c * lanes;
        const int rows_here = block.row_count - c * lanes;
        typename V::Mask too_large = {};
        for (int64_t d = 0; d < head_dim; d += lanes) {
            const int64_t n = head_dim - d < lanes ? head_dim - d : lanes;
            V square[lanes];
            if (n == lanes && rows_here >= lanes) {
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) {
                    square[i] = load(static_cast<const Element*>(rows[i].query) + d);
                }
            } else {
                for (int i = 0; i < lanes; ++i) {
                    T part[lanes] = {};
                    for (int k = 0; i < rows_here && k < n; ++k) {
                        part[k] = added<T>(static_cast<const Element*>(rows[i].query)[d + k]);
                    }
                    square[i] = V::load(part);
                }
            }
            transpose<T>(square);
            for (int k = 0; k < n; ++k) {
                const V scaled = scale * square[k];
                too_large |= is_finite<T>(square[k]) & ~is_finite<T>(scaled);
                scaled.store(query + (d + k) * width + c * lanes);
            }
        }
        return too_large;
    }

    // first: where the keys begin in the tile.
    void attend(Span keys, Seen seen, int64_t first) {
        const T* value = tile_value + first * value_stride;
        int64_t stride = value_stride;
        passes.find_cuts(keys, cuts);
        passes.prefetch(keys);
        compute_scores(tile_key + first * key_stride);
        if (scale_scores) apply_score_scale(keys);
        if (seen == Seen::kSome) {
            passes.apply(scores, keys, staging);
            if (find_tile_max(keys) && set_nonfinite_apart(value, keys)) {
                value = staging;
                stride = value_head_dim;
            }
        }
        softmax(keys);
        const bool whole = cuts[Columns - 1] == 0 && cuts[Columns] == keys.size();
        in_steps<micro_rows(Columns)>(0, value_head_dim, [&]<int Rows>(int64_t d) {
            if (whole) {
                V sum[Rows][Columns] = {};
                multiply<0, Columns>(value + d, 1, stride, scores, keys.size(), sum);
                add_to_acc(d, sum);
            } else {
                add_between_cuts<Rows>(d, value, stride);
            }
        });
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
    [[gnu::noinline]] void add_between_cuts(int64_t d, const T* value, int64_t stride) const {
        V sum[Rows][Columns] = {};
        between_cuts<Columns>(cuts, [&]<int First, int Last>(int64_t begin, int64_t end) {
            multiply<First, Last>(value + begin * stride + d, 1, stride, scores + begin * width,
                                  end - begin, sum);
        });
        add_to_acc(d, sum);
    }

    void compute_scores(const T* key) {
        for (int64_t d = 0; d < head_dim; d += kDepth) {
            const int64_t depth = head_dim - d < kDepth ? head_dim - d : kDepth;
            V largest[Columns];
            for (int c = 0; c < Columns; ++c) largest[c] = -kInfinity<T>;
            between_cuts<Columns>(cuts, [&]<int First, int Last>(int64_t begin, int64_t end) {
                in_steps<micro_rows(Columns)>(begin, end, [&]<int Rows>(int64_t j) {
                    V sum[Rows][Columns] = {};
                    multiply<First, Last>(key + j * key_stride + d, key_stride, 1,
                                          query + d * width, depth, sum);
#pragma GCC unroll 16
                    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
                        for (int c = 0; c < Columns; ++c) {
                            T* const score = scores + (j + r) * width + c * lanes;
                            if (d > 0) sum[r][c] = V::load(score) + sum[r][c];
                            if (c < First || c >= Last) sum[r][c] = -kInfinity<T>;
                            sum[r][c].store(score);
                            largest[c] = max(sum[r][c], largest[c]);
                        }
                    }
                });
            });
            for (int c = 0; c < Columns; ++c) tile_max[c] = largest[c];
        }
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

    // True: some score is that of a hidden pair.
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

    // scores = P^T = exp2(S^T - row_max); a NaN score makes a NaN.
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
        T* row = scores;
        for (int64_t j = 0; j < keys.size(); ++j, row += width) {
#pragma GCC unroll 4
            for (int c = 0; c < Columns; ++c) {
                const V prob = exp2(V::load(row + c * lanes) - offset[c]);
                sum[c] = sum[c] + prob;
                prob.store(row + c * lanes);
            }
        }
        for (int c = 0; c < Columns; ++c) row_sum[c] = fma(row_sum[c], rescale[c], sum[c]);
    }

    // A probability of 0 does not keep a NaN or Inf of `value` from a row that must not see it. If
    // the tile holds any, it is copied to `staging` with zeros for them, and they are added to the
    // rows that see them, here.
    bool set_nonfinite_apart(const T* value, Span keys) {
        bool found = false;
        passes.hidden_keys(keys, [&](int64_t first, int64_t last) {
            found |= !all_finite(value + (first - keys.begin) * value_stride, last - first);
        });
        if (!found) return false;
        for (int64_t j = 0; j < keys.size(); ++j) {
            const T* from = value + j * value_stride;
            for (int64_t d = 0; d < value_head_dim; ++d) {
                const bool finite = from[d] - from[d] == 0;
                staging[j * value_head_dim + d] = finite ? from[d] : T(0);
                if (finite) continue;
                for (int c = 0; c < width; c += lanes) {
                    const auto hidden = V::load(scores + j * width + c) == V(-kInfinity<T>);
                    const V sum = V::load(acc + d * width + c);
                    select<T>(hidden, sum, sum + V(from[d])).store(acc + d * width + c);
                }
            }
        }
        return true;
    }

    bool all_finite(const T* row, int64_t rows) const {
        typename V::Mask bad = {};
        bool rest_finite = true;
        for (; rows > 0; --rows, row += value_stride) {
            int64_t d = 0;
            for (; d + lanes <= value_head_dim; d += lanes) {
                bad |= ~is_finite<T>(V::load(row + d));
            }
            for (; d < value_head_dim; ++d) rest_finite &= row[d] - row[d] == 0;
        }
        return rest_finite && !any<T>(bad);
    }

    // total += acc, and a new group begins.
    void close_group() {
        if (!has_total) {
            clear(total);
            for (int c = 0; c < Columns; ++c) {
                total_sum[c] = T(0);
                total_max[c] = -kInfinity<T>;
            }
        }
        for (int c = 0; c < Columns; ++c) {
            const V offset = select<T>(row_max[c] == V(-kInfinity<T>), V(T(0)), row_max[c]);
            const V shrink = exp2(total_max[c] - offset);
            for (int64_t i = c * lanes; i < value_head_dim * width; i += width) {
                fma(V::load(total + i), shrink, V::load(acc + i)).store(total + i);
            }
            total_sum[c] = fma(total_sum[c], shrink, row_sum[c]);
            total_max[c] = row_max[c];
            row_sum[c] = T(0);
        }
        clear(acc);
        has_total = true;
    }

    // out = sum / row_sum, and lse = log(row_sum) + max. A sink is one more term of the
    // denominator.
    void store(const T* sum, const V* sums) const {
        for (int c = 0; c < Columns; ++c) {
            T sink[lanes], largest[lanes], denominator[lanes];
            for (int i = 0; i < lanes; ++i) {
                const int row = c * lanes + i;
                sink[i] =
                    T(row < block.row_count ? block.rows[row].sink * kLog2e : -__builtin_inf());
            }
            const V peak = max(row_max[c], V::load(sink));
            const V offset = select<T>(peak == V(-kInfinity<T>), V(T(0)), peak);
            const V shrink = exp2(row_max[c] - offset);
            const V all = fma(sums[c], shrink, exp2(V::load(sink) - offset));
            const V factor = select<T>(all == V(T(0)), V(T(0)), shrink / all);
            row_max[c].store(largest);
            sums[c].store(denominator);
            with_query<T>(block.query_dtype, [&]<class Element>(const Element*) {
                store_out<Element>(sum + c * lanes, factor, c * lanes);
            });
            for (int i = 0; i < lanes && c * lanes + i < block.row_count; ++i) {
                const Row& row = block.rows[c * lanes + i];
                if (row.lse == nullptr) continue;
                *static_cast<T*>(row.lse) =
                    T(double(largest[i]) * kLn2 + __builtin_log(double(denominator[i])));
            }
        }
    }

    template <class Element>
    void store_out(const T* sum, V factor, int first_row) const {
        // Adding 0 turns -0 into 0: which one a sum of zeros is depends on skipped tiles.
        transpose_rows(
            sum, first_row,
            [&](int row, int64_t d, V x) {
                Element* const out = static_cast<Element*>(block.rows[row].out);
                store_some(x, value_head_dim - d, out + d);
            },
            [&](V x) { return fma(x, factor, V(T(0))); });
    }

    void store_parts(const T* sum, const V* sums, const Parts<T>& parts, int c) const {
        for (int i = 0; i < lanes && c * lanes + i < block.row_count; ++i) {
            parts.row_max(c * lanes + i) = row_max[c].v[i];
            parts.row_sum(c * lanes + i) = sums[c].v[i];
        }
        transpose_rows(
            sum + c * lanes, c * lanes,
            [&](int row, int64_t d, V x) { x.store(parts.acc(row) + d); }, [](V x) { return x; });
    }

    // Gives put(row, d, x) `lanes` rows of a matrix like acc, where x is of columns d on.
    template <class Put, class Change>
    void transpose_rows(const T* matrix, int first_row, const Put& put,
                        const Change& change) const {
        for (int64_t d = 0; d < value_head_dim; d += lanes) {
            V square[lanes];
            for (int k = 0; k < lanes; ++k) {
                const bool inside = k < value_head_dim - d;
                square[k] = inside ? change(V::load(matrix + (d + k) * width)) : V(T(0));
            }
            transpose<T>(square);
            for (int i = 0; i < lanes && first_row + i < block.row_count; ++i) {
                put(first_row + i, d, square[i]);
            }
        }
    }
};

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

// A block's full panels, and the last one, which may be narrower.
template <class T>
struct Cut {
    static constexpr int panel_rows = kColumns * Vec<T>::lanes;
    using Full = Panel<T, kColumns>;

    int full, last_rows;
    int64_t score_elements, staging_elements, key_elements, value_elements;

    explicit Cut(const Block& block)
        : full((block.row_count - 1) / panel_rows), last_rows(block.row_count - full * panel_rows) {
        constexpr int lanes = Vec<T>::lanes;
        const int64_t keys = block.kv_len < kKeyTile ? block.kv_len : kKeyTile;
        const int64_t wide = block.value_head_dim > lanes ? block.value_head_dim : lanes;
        score_elements = keys * (full > 0 ? panel_rows : rounded(last_rows, lanes));
        staging_elements = rounded(keys, lanes) * wide;
        const bool widened = block.kv_dtype != kDtype<T>;
        key_elements = widened ? rounded(keys * block.head_dim, lanes) : 0;
        value_elements = widened ? rounded(keys * block.value_head_dim, lanes) : 0;
    }

    static int64_t rounded(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
};

template <class T>
size_t scratch_bytes(const Block& block) {
    const Cut<T> cut(block);
    const int64_t last = with_columns<T>(
        cut.last_rows, [&]<int Columns>() { return Panel<T, Columns>::scratch_elements(block); });
    const int64_t elements = cut.full * Cut<T>::Full::scratch_elements(block) + last +
                             cut.score_elements + cut.staging_elements + cut.key_elements +
                             cut.value_elements;
    return size_t(elements) * sizeof(T) + cut.full * sizeof(typename Cut<T>::Full);
}

// use(full panels, last panel)
template <class T, class Use>
void with_panels(const Block& block, const Use& use) {
    using Full = typename Cut<T>::Full;
    const Cut<T> cut(block);
    Full* const panels = static_cast<Full*>(block.scratch);
    T* scratch = reinterpret_cast<T*>(panels + cut.full);
    Shared<T> shared;
    shared.scores = scratch;
    shared.staging = shared.scores + cut.score_elements;
    shared.key = shared.staging + cut.staging_elements;
    shared.value = shared.key + cut.key_elements;
    scratch = shared.value + cut.value_elements;
    for (int i = 0; i < cut.full; ++i, scratch += Full::scratch_elements(block)) {
        new (panels + i) Full(block, i * Cut<T>::panel_rows, Cut<T>::panel_rows, scratch, &shared);
    }
    with_columns<T>(cut.last_rows, [&]<int Columns>() {
        Panel<T, Columns> last(block, cut.full * Cut<T>::panel_rows, cut.last_rows, scratch,
                               &shared);
        use([&](const auto& visit) {
            for (int i = 0; i < cut.full; ++i) visit(panels[i]);
            visit(last);
        });
    });
}

template <class T>
void attend(const Block& block, void* parts) {
    with_panels<T>(block, [&](const auto& each_panel) {
        int64_t begin = block.kv_len, end = 0;
        each_panel([&](auto& panel) {
            if (panel.begin() < begin) begin = panel.begin();
            if (panel.end() > end) end = panel.end();
        });
        for (int64_t tile = begin / kKeyTile * kKeyTile; tile < end; tile += kKeyTile) {
            if (block.stop.requested(block.stop.context)) return;
            each_panel([&](auto& panel) { panel.attend_tile(tile); });
        }
        char* here = static_cast<char*>(parts);
        each_panel([&](auto& panel) {
            panel.finish(here);
            if (parts != nullptr) here += panel.rows() * Parts<T>::bytes(block);
        });
    });
}

template <class T>
void count_tiles(const Block& block, TileCounts& counts) {
    with_panels<T>(block, [&](const auto& each_panel) {
        each_panel([&](const auto& panel) { panel.count(counts); });
    });
}

// The limit: the micro-kernel's multiply-adds with nothing to load or store.
template <class T>
double run_fma(int64_t rounds) {
    constexpr int chains = kVectorBytes == 64 ? 24 : 12;
    volatile T one = 1;
    const Vec<T> factor = T(one), term = T(one - 1);
    Vec<T> sum[chains];
    for (int i = 0; i < chains; ++i) sum[i] = T(i);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
        for (int i = 0; i < chains; ++i) sum[i] = fma(sum[i], factor, term);
    }
    for (int i = 1; i < chains; ++i) sum[0] = sum[0] + sum[i];
    one = sum[0].v[0];  // keeps the loop
    return 2.0 * chains * Vec<T>::lanes * double(rounds);
}

double read_bytes(const void* data, int64_t bytes) {
    const auto* from = static_cast<const double*>(data);
    constexpr int lanes = Vec<double>::lanes;
    Vec<double> sum[4] = {};
    for (int64_t i = 0; i + 4 * lanes <= bytes / 8; i += 4 * lanes) {
        for (int k = 0; k < 4; ++k) sum[k] = sum[k] + Vec<double>::load(from + i + k * lanes);
    }
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])).v[0];
}

template <class T>
constexpr Functions functions = {Cut<T>::panel_rows, int(kKeyTile),        scratch_bytes<T>,
                                 attend<T>,          count_tiles<T>,       Parts<T>::bytes,
                                 kFewRows,           few_scratch_bytes<T>, attend_few<T>,
                                 merge_parts<T>,     finish_parts<T>,      run_fma<T>};

}  // namespace

extern const Kernel FASTATTN_KERNEL;
const Kernel FASTATTN_KERNEL = {FASTATTN_ISA_NAME, functions<float>, functions<double>, read_bytes};

}  // namespace fastattn
