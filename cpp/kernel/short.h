// SPDX-License-Identifier: Apache-2.0
//
// Short problems: one key tile holds all keys, so that nothing of a softmax has to be carried on,
// and what a problem costs beside its products is little. Called by short.cpp through the table in
// kernel.cpp.
//
// Queries lie along the lanes, some vectors of them at a time, until the probabilities are there;
// then the columns of the values do, so that results are stored as they come. Bits are those of
// the functions that take longer problems: of QueryTile (online_softmax.h), or of Split (decode.h),
// where the rows are few. Their sums are the same, number by number; only what lies in one vector
// differs. What is rare, they do: a problem whose result is not finite is left to them, and so no
// value that is hidden has to be looked at.
#pragma once

#include "decode.h"
#include "dropout.h"
#include "elements.h"
#include "kernel.h"
#include "multiply.h"
#include "score_tile.h"
#include "scores.h"
#include "vec.h"

namespace fastattn {
namespace {

constexpr int kShortRows = 128;
constexpr int64_t kShortKeys = 128, kShortColumns = 256;
static_assert(kShortKeys <= kKeyTile && kShortKeys <= kSplitKeys && kShortColumns <= kDepth);

// Vectors of a block of sums, at most, and its rows.
constexpr int kShortVectors = kVectorBytes == 64 ? 4 : kColumns;
constexpr int short_rows(int vectors) { return vectors > kColumns ? 6 : micro_rows(vectors); }

// step<Rows>(row) over [row, count) in steps of Rows, and what is left in fewer. The last one may
// begin amid the one before: what it does again comes to the same.
template <int Rows, class Step>
[[gnu::always_inline]] inline void in_whole_steps(int64_t row, int64_t count, const Step& step) {
    for (; row < count; row += Rows) {
        if constexpr (Rows > 1) {
            if (count < Rows || count - row <= Rows / 2) {
                return in_whole_steps<Rows / 2>(row, count, step);
            }
        }
        step.template operator()<Rows>(row + Rows <= count ? row : count - Rows);
    }
}

// use<Vectors>() for a number of them.
template <int Vectors = 1, class Use>
[[gnu::always_inline]] inline void with_vectors(int vectors, const Use& use) {
    if constexpr (Vectors < kShortVectors) {
        if (vectors > Vectors) return with_vectors<Vectors + 1>(vectors, use);
    }
    use.template operator()<Vectors>();
}

// One problem after the other.
template <class T, bool Few>
class ShortProblems {
    using V = Vec<T>;
    static constexpr int lanes = V::lanes;
    // In the order of few rows, sums of so many rows and lanes / few_rows keys are in registers.
    static constexpr int few_rows = lanes < 4 ? lanes : 4;

    // A mask or a bias as rows see it, in T: a row that all share, or (keys, all_rows). It stays
    // while problems share it.
    struct Added {
        const void* from = nullptr;
        T* tile;
        bool one_row;
    };

    // What the next problem reads and writes, which is fetched evenly meanwhile.
    class Ahead {
        static constexpr int64_t line = 64;
        const char *at = nullptr, *end = nullptr;
        bool near = false, is_written = false;

       public:
        struct Rows {
            const char* first = nullptr;
            const int64_t* places = nullptr;  // bytes from the first to each; null: by stride
            int64_t stride = 0, bytes = 0, count = 0, next = 0;
        };
        Rows parts[4];  // query, key, value, out
        int part = 4;
        int64_t lines = 0;  // at a time

        void begin(int64_t steps) {
            int64_t all = 0;
            for (const Rows& of : parts) all += of.count * ((of.bytes + line - 1) / line);
            near = all * line <= 20 << 10;
            lines = (all + steps - 1) / steps;
            part = 0;
            at = end = nullptr;
        }

        [[gnu::always_inline]] void fetch() {
            int64_t left = lines * line;
            while (left > 0 && (at < end || next_row())) {
                const char* const stop = end - at < left ? end : at + left;
                left -= stop - at;
                if (is_written) {
                    for (; at < stop; at += line) __builtin_prefetch(at, 1, 3);
                } else if (near) {
                    for (; at < stop; at += line) __builtin_prefetch(at, 0, 3);
                } else {
                    for (; at < stop; at += line) __builtin_prefetch(at, 0, 2);
                }
            }
        }

       private:
        [[gnu::noinline]] bool next_row() {
            while (part < 4 && parts[part].next == parts[part].count) ++part;
            if (part == 4) return false;
            Rows& of = parts[part];
            is_written = part == 3;
            const int64_t row = of.next++;
            at = of.first + (of.places != nullptr ? of.places[row] : row * of.stride);
            end = at + of.bytes;
            return true;
        }
    };

    const ShortShape& shape;
    const Block& block;
    const int rows, all_rows;  // in whole vectors
    const int64_t head_dim, value_head_dim, query_pitch;
    const bool copies_key, copies_value;

    // In scratch memory.
    int64_t *const query_at, *const out_at;  // (all_rows) bytes from the first row; lanes that have
                                             // no row repeat the last
    T *const low, *const high;               // (all_rows) the keys that a row sees
    T* const query;   // (head_dim, width) transposed and scaled; few: (all_rows, query_pitch)
    T* const scores;  // (keys + lanes, width) S^T, then P^T
    T* const factor;  // (width) what a sum of values is to be multiplied by
    T *const key_copy, *const value_copy;  // (keys, columns in whole vectors)
    Added mask, bias;

    // Of the problem.
    int64_t begin = 0, end = -1, offset = 0;  // what low and high are of
    Span seen = {0, 0};                       // by some row
    bool cuts = false;                        // not all rows see all of these keys
    const T *key, *value;
    int64_t key_stride, value_stride;

    // Of some vectors of rows.
    int first_row, width, rows_here;
    int64_t first, last;  // the keys that some of them see
    V check;              // NaN where a number is not finite

    Ahead ahead;

   public:
    ShortProblems(const ShortShape& all, Scratch& scratch)
        : shape(all),
          block(all.shared),
          rows(all.rows),
          all_rows(int(V::padded(rows))),
          head_dim(block.head_dim),
          value_head_dim(block.value_head_dim),
          query_pitch(V::padded(head_dim)),
          copies_key(block.kv_dtype != kDtype<T> || (Few && head_dim % lanes != 0)),
          copies_value(block.kv_dtype != kDtype<T> || value_head_dim % lanes != 0),
          query_at(scratch.take<int64_t>(all_rows)),
          out_at(scratch.take<int64_t>(all_rows)),
          low(scratch.take<T>(all_rows)),
          high(scratch.take<T>(all_rows)),
          query(scratch.take<T>(query_pitch * (Few ? all_rows : most_width()))),
          scores(scratch.take<T>((block.kv_len + lanes) * most_width())),
          factor(scratch.take<T>(most_width())),
          key_copy(scratch.take<T>(copies_key ? block.kv_len * query_pitch : 0)),
          value_copy(scratch.take<T>(copies_value ? block.kv_len * V::padded(value_head_dim) : 0)) {
        mask = added(shape.mask, shape.has_mask, scratch);
        bias = added(shape.bias, shape.has_bias, scratch);
    }

    int64_t attend(const ShortProblem* problems, int64_t count) {
        for (int i = 0; i < all_rows; ++i) {
            query_at[i] = row_at(shape.query, i);
            out_at[i] = row_at(shape.out, i);
        }
        int64_t done = 0;
        for (; done < count; ++done) {
            look_ahead(done + 1 < count ? problems + done + 1 : nullptr);
            if (!attend(problems[done])) break;
        }
        return done;
    }

   private:
    static constexpr int most_vectors = kShortVectors;
    int most_width() const {
        return all_rows < most_vectors * lanes ? all_rows : most_vectors * lanes;
    }

    void look_ahead(const ShortProblem* next) {
        ahead.part = 4;
        if (next == nullptr) return;
        const int64_t size = block.query_dtype == kDtype<T> ? sizeof(T) : sizeof(T) / 2;
        const int64_t key_size = block.kv_dtype == kDtype<T> ? sizeof(T) : sizeof(T) / 2;
        const int64_t out_size = block.out_dtype == kDtype<T> ? sizeof(T) : sizeof(T) / 2;
        const auto set = [&](int part, const void* data, const int64_t* places, int64_t stride,
                             int64_t bytes, int64_t count) {
            if (stride == bytes && (places == nullptr || shape.group == 1)) {
                bytes *= count, count = 1;
            }
            ahead.parts[part] = {static_cast<const char*>(data), places, stride, bytes, count, 0};
        };
        set(0, next->query, query_at, shape.query.query, head_dim * size, rows);
        set(1, next->key, nullptr, block.key.stride * key_size, head_dim * key_size, next->end);
        set(2, next->value, nullptr, block.value.stride * key_size, value_head_dim * key_size,
            next->end);
        set(3, next->out, out_at, shape.out.query, value_head_dim * out_size, rows);
        ahead.begin(fetching_steps());
    }

    // How often ahead.fetch() is called for a problem, roughly.
    int64_t fetching_steps() const {
        const int64_t panels = (all_rows + most_vectors * lanes - 1) / (most_vectors * lanes);
        const int64_t keys = seen.size();
        const int vectors = int(V::padded(value_head_dim) / lanes);
        const int row_vectors = most_width() / lanes;
        const int64_t of_scores =
            Few ? (rows + few_rows - 1) / few_rows * (keys * few_rows / lanes + 1)
                : panels * (keys / short_rows(row_vectors) + 1);
        const int some = vectors < most_vectors ? vectors : most_vectors;
        const int64_t of_values = (vectors + some - 1) / some * (rows / short_rows(some) + 1);
        return of_scores + of_values;
    }

    int row_of_lane(int i) const { return i < rows ? i : rows - 1; }
    int64_t row_at(const RowSteps& steps, int i) const {
        const int r = row_of_lane(i);
        return r / shape.group * steps.query + r % shape.group * steps.head;
    }

    Added added(const RowSteps& steps, bool given, Scratch& scratch) const {
        Added array;
        array.one_row = steps.query == 0 && (steps.head == 0 || shape.group == 1);
        const int64_t keys = given ? V::padded(block.kv_len) : 0;
        array.tile = scratch.take<T>(keys * (array.one_row ? 1 : all_rows));
        return array;
    }

    // False: it is for the functions that take longer problems.
    bool attend(const ShortProblem& problem) {
        // Further away, a distance would have to be rounded as they do it.
        constexpr int64_t far = int64_t{1} << (sizeof(T) == 4 ? 22 : 51);
        if (block.alibi && (problem.offset < -far || problem.offset > far)) return false;
        find_keys(problem);
        key = in_place(problem.key, block.key.stride, copies_key, head_dim, key_copy, key_stride);
        value = in_place(problem.value, block.value.stride, copies_value, value_head_dim,
                         value_copy, value_stride);
        check = T(0);
        if (problem.bias != nullptr) {
            stage(bias, problem.bias, block.bias_dtype, block.bias_stride, shape.bias);
        }
        if (problem.mask != nullptr) {
            stage(mask, problem.mask, block.mask_dtype, block.mask_stride, shape.mask);
        }
        with_query<T>(block.query_dtype, [&]<class Element>(const Element*) {
            const auto* from = static_cast<const char*>(problem.query);
            if constexpr (Few) load_rows<Element>(from);
            for (first_row = 0; first_row < rows; first_row += width) {
                const int left = all_rows - first_row, most = vectors_at_a_time() * lanes;
                width = left < most ? left : most;
                rows_here = rows - first_row < width ? rows - first_row : width;
                const Span keys = seen_by(first_row, rows_here);
                first = keys.begin, last = keys.end;
                if constexpr (Few) {
                    compute_few_scores();
                } else {
                    transpose_rows<Element>(from);
                    with_vectors(width / lanes, [&]<int Vectors>() { compute_scores<Vectors>(); });
                }
                apply_passes(problem);
                for (int c = 0; c < width; c += lanes) softmax(problem, c);
                weigh_values(static_cast<char*>(problem.out));
            }
        });
        return all_finite(check);
    }

    // The keys that each row sees.
    void find_keys(const ShortProblem& p) {
        if (p.begin == begin && p.end == end && p.offset == offset) return;
        begin = p.begin, end = p.end, offset = p.offset;
        seen = {begin, end}, cuts = false;
        if (shape.left < 0 && shape.right < 0) return;
        const auto inside = [&](int64_t j) { return j < begin ? begin : j < end ? j : end; };
        for (int i = 0; i < all_rows; ++i) {
            const int64_t position = row_of_lane(i) / shape.group + offset;
            const int64_t from = shape.left < 0 ? begin : inside(position - shape.left);
            const int64_t to = shape.right < 0 ? end : inside(position + shape.right + 1);
            low[i] = T(from), high[i] = T(to < from ? from : to);
            cuts |= from > begin || to < end;
        }
        seen = seen_by(0, rows);
    }

    // The keys that some of these rows see.
    Span seen_by(int row, int count) const {
        if (!cuts) return seen;
        Span keys = {end, begin};
        for (int i = row; i < row + count; ++i) {
            const Span of = {int64_t(low[i]), int64_t(high[i])};
            if (of.size() == 0) continue;
            if (of.begin < keys.begin) keys.begin = of.begin;
            if (of.end > keys.end) keys.end = of.end;
        }
        return keys.size() > 0 ? keys : Span{begin, begin};
    }

    // Fewer where they see different keys.
    int vectors_at_a_time() const { return cuts ? 2 : most_vectors; }

    // Rows where they lie, or a copy of those that are seen: in T, with zeros up to whole vectors.
    const T* in_place(const void* data, int64_t stride, bool copies, int64_t columns, T* copy,
                      int64_t& copy_stride) const {
        copy_stride = copies ? V::padded(columns) : stride;
        if (!copies) return static_cast<const T*>(data);
        with_query<T>(block.kv_dtype, [&]<class From>(const From*) {
            const From* from = static_cast<const From*>(data) + seen.begin * stride;
            T* to = copy + seen.begin * copy_stride;
            for (int64_t j = seen.begin; j < seen.end; ++j, from += stride, to += copy_stride) {
                for (int64_t d = 0; d < columns; d += lanes) {
                    load_some<T>(from + d, columns - d).store(to + d);
                }
            }
        });
        return copy;
    }

    template <class Element>
    const Element* query_row(const char* from, int i) const {
        return reinterpret_cast<const Element*>(from + query_at[i]);
    }

    template <class Element>
    void load_rows(const char* from) {
        const V scale = query_scale<T>(block), zero = T(0);
        const int64_t columns = head_dim;
        V of_all = check;
        for (int i = 0; i < rows + few_rows - 1 && i < all_rows; ++i) {
            const Element* const row = query_row<Element>(from, i);
            T* const to = query + i * query_pitch;
            V bad = zero;
            for (int64_t d = 0; d < columns; d += lanes) {
                const V scaled = scale * load_some<T>(row + d, columns - d);
                bad = fma(scaled, zero, bad);
                scaled.store(to + d);
            }
            of_all = of_all + bad;
        }
        check = of_all;
    }

    template <class Element>
    void transpose_rows(const char* from) {
        const V scale = query_scale<T>(block), zero = T(0);
        const int64_t pitch = width;
        V of_all = check;
        for (int c = 0; c < pitch; c += lanes) {
            for (int64_t d = 0; d < head_dim; d += lanes) {
                V square[lanes], bad[2] = {zero, zero};
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) {
                    const Element* const row = query_row<Element>(from, first_row + c + i);
                    square[i] = load_some<T>(row + d, head_dim - d);
                }
                transpose<T>(square);
                T* const to = query + d * pitch + c;
#pragma GCC unroll 16
                for (int k = 0; k < lanes; ++k) {
                    const V scaled = scale * square[k];
                    bad[k % 2] = fma(scaled, zero, bad[k % 2]);
                    scaled.store(to + k * pitch);
                }
                of_all = of_all + (bad[0] + bad[1]);
            }
        }
        check = of_all;
    }

    template <int Vectors>
    void compute_scores() {
        in_whole_steps<short_rows(Vectors)>(0, last - first, [&]<int Keys>(int64_t step) {
            const int64_t j = first + step;
            ahead.fetch();
            V sum[Keys][Vectors] = {};
            multiply<0, Vectors, false>(key + j * key_stride, key_stride, 1, query, Vectors * lanes,
                                        head_dim, sum);
#pragma GCC unroll 16
            for (int i = 0; i < Keys; ++i) {
#pragma GCC unroll 4
                for (int c = 0; c < Vectors; ++c) {
                    sum[i][c].store(scores + ((j + i) * Vectors + c) * lanes);
                }
            }
        });
    }

    void compute_few_scores() {
        for (int r = 0; r < rows_here; r += few_rows) {
            if (r + 1 == rows_here) {
                compute_few_scores<1>(r);
            } else {
                compute_few_scores<few_rows>(r);
            }
        }
    }

    // In each lane of a sum is what Split::compute_scores() has there, of a row and a key.
    template <int Rows>
    void compute_few_scores(int r) {
        constexpr int keys = lanes / Rows;
        const int64_t past = last, columns = query_pitch, stride = key_stride, pitch = width;
        const T* const queries = query + (first_row + r) * columns;
        for (int64_t j = first; j < past; j += keys) {
            ahead.fetch();
            const T* from[keys];
#pragma GCC unroll 16
            for (int k = 0; k < keys; ++k) {
                from[k] = key + (j + k < past ? j + k : past - 1) * stride;
            }
            V sum[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) sum[i] = T(0);
            for (int64_t d = 0; d < columns; d += lanes) {
                V row[Rows];
#pragma GCC unroll 4
                for (int i = 0; i < Rows; ++i) row[i] = V::load(queries + i * columns + d);
#pragma GCC unroll 16
                for (int k = 0; k < keys; ++k) {
                    const V x = V::load(from[k] + d);
#pragma GCC unroll 4
                    for (int i = 0; i < Rows; ++i) {
                        sum[k * Rows + i] = fma(row[i], x, sum[k * Rows + i]);
                    }
                }
            }
            T dots[lanes];
            sums_across<T>(sum).store(dots);
#pragma GCC unroll 16
            for (int k = 0; k < keys; ++k) {  // the last ones may be behind the last key
                __builtin_memcpy(scores + (j + k) * pitch + r, dots + k * Rows, Rows * sizeof(T));
            }
        }
    }

    // change(score, j, c) for the scores of key j with the rows from c on.
    template <class Change>
    void change_scores(const Change& change) const {
        const int64_t past = last, pitch = width;
        T* score = scores + first * pitch;
        for (int64_t j = first; j < past; ++j) {
            for (int c = 0; c < pitch; c += lanes, score += lanes) {
                change(V::load(score), j, c).store(score);
            }
        }
    }

    // As ScorePasses::apply().
    void apply_passes(const ShortProblem& p) const {
        if (block.softcap != 0) {
            const V cap = T(block.softcap * kLog2e);
            change_scores([&](V score, int64_t, int) { return cap * tanh(score); });
        }
        if (p.bias != nullptr) add(bias);
        if (p.mask != nullptr) add(mask);
        if (block.alibi) add_alibi(p);
        if (cuts) {
            change_scores([&](V score, int64_t j, int c) {
                const V number = T(j), from = V::load(low + first_row + c);
                const auto seen = (number >= from) & (number < V::load(high + first_row + c));
                return select<T>(seen, score, V(-kInfinity<T>));
            });
        }
    }

    void add(const Added& array) const {
        const int64_t past = last, pitch = width;
        const int64_t step = array.one_row ? 1 : all_rows;
        const T* from = array.tile + first * step + (array.one_row ? 0 : first_row);
        T* score = scores + first * pitch;
        for (int64_t j = first; j < past; ++j, from += step) {
            for (int c = 0; c < pitch; c += lanes, score += lanes) {
                add_to_scores(score, array.one_row ? V(from[0]) : V::load(from + c));
            }
        }
    }

    void add_alibi(const ShortProblem& p) const {
        for (int c = 0; c < width; c += lanes) {
            T slopes[lanes], from[lanes];
            for (int i = 0; i < lanes; ++i) {
                const int r = row_of_lane(first_row + c + i);
                slopes[i] = T(-p.slopes[r % shape.group] * kLog2e);
                from[i] = T(-(r / shape.group + p.offset));
            }
            for (int64_t j = first; j < last; ++j) {
                T* const score = scores + j * width + c;
                const V distance = abs(V::load(from) + V(T(j)));
                bounded_sum(V::load(score), distance, V::load(slopes)).store(score);
            }
        }
    }

    // All keys, so that a tile fits problems of other lengths too.
    void stage(Added& array, const void* data, Dtype dtype, int64_t stride,
               const RowSteps& steps) const {
        if (array.from == data) return;
        array.from = data;
        const Span all = {0, block.kv_len};
        if (array.one_row) return fastattn::stage<T>(data, dtype, stride, all, array.tile);
        const bool as_it_is = stride == 1 && dtype == kDtype<T>;
        for (int r = 0; r < rows; r += lanes) {
            for (int64_t j = 0; j < all.end; j += lanes) {
                const Span keys = {j, j + lanes < all.end ? j + lanes : all.end};
                V square[lanes];
                for (int i = 0; i < lanes; ++i) {
                    const void* const row = static_cast<const char*>(data) + row_at(steps, r + i);
                    if (as_it_is) {
                        square[i] = load_some<T>(static_cast<const T*>(row) + j, keys.size());
                    } else {
                        T some[lanes] = {};
                        fastattn::stage<T>(row, dtype, stride, keys, some);
                        square[i] = V::load(some);
                    }
                }
                transpose<T>(square);
                for (int k = 0; k < lanes; ++k)
                    square[k].store(array.tile + (j + k) * all_rows + r);
            }
        }
    }

    // Of one vector of rows. Sets their factors and stores their lse.
    void softmax(const ShortProblem& p, int c) const {
        T* const column = scores + c;
        const int64_t from = first, past = last, pitch = width;
        V largest = -kInfinity<T>;
        for (int64_t j = from; j < past; ++j) largest = max(V::load(column + j * pitch), largest);
        const V offset = select<T>(largest == V(-kInfinity<T>), V(T(0)), largest);
        const V sum = sum_probabilities(column, offset);
        if (block.dropout.drops) drop_pairs(p, c);
        V sink = -kInfinity<T>;
        if (p.sinks != nullptr) {
            T sinks[lanes];
            for (int i = 0; i < lanes; ++i) {
                sinks[i] = T(p.sinks[row_of_lane(first_row + c + i) % shape.group] * kLog2e);
            }
            sink = V::load(sinks);
        }
        const V peak = max(largest, sink);
        const V zero = select<T>(peak == V(-kInfinity<T>), V(T(0)), peak);
        const V rescale = exp2(largest - zero);
        const V all = fma(sum, rescale, exp2(sink - zero));
        const V share = select<T>(all == V(T(0)), V(T(0)), rescale / all);
        (V(T(block.dropout.scale)) * share).store(factor + c);
        if (p.lse == nullptr) return;
        for (int i = 0; i < lanes && c + i < rows_here; ++i) {
            char* const lse = static_cast<char*>(p.lse) + row_at(shape.lse, first_row + c + i);
            *reinterpret_cast<T*>(lse) =
                T(double(largest.v[i]) * kLn2 + __builtin_log(double(sum.v[i])));
        }
    }

    // P = exp2(S - offset). With few rows, the keys of a chunk are summed as if they lay along the
    // lanes.
    V sum_probabilities(T* column, V offset) const {
        const int64_t from = first, past = last, pitch = width;
        const auto prob = [&](int64_t j) {
            const V p = exp2(V::load(column + j * pitch) - offset);
            p.store(column + j * pitch);
            return p;
        };
        V sum[Few ? lanes : 1];
        for (V& s : sum) s = T(0);
        if constexpr (Few) {
            for (int64_t j = from; j < past; ++j) sum[j % lanes] = sum[j % lanes] + prob(j);
#pragma GCC unroll 4
            for (int half = lanes / 2; half > 0; half /= 2) {
                for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
            }
        } else {
            for (int64_t j = from; j < past; ++j) sum[0] = sum[0] + prob(j);
        }
        return sum[0];
    }

    [[gnu::noinline]] void drop_pairs(const ShortProblem& p, int c) const {
        Row of[lanes];
        for (int i = 0; i < lanes; ++i) {
            const int r = row_of_lane(first_row + c + i);
            of[i].position = r / shape.group + p.offset;
            of[i].head = p.head + uint32_t(r % shape.group);
            of[i].batch = p.batch;
        }
        Dropout dropout = block.dropout;
        dropout.key_offset = p.key_offset;
        drop<false>(scores + first * width + c, width, Span{first, last},
                    KeptOfRows<T>(dropout, of, lanes));
    }

    void weigh_values(char* out) {
        with_query<T>(block.out_dtype, [&]<class Out>(const Out*) { weigh_values<Out>(out); });
    }

    template <class Out>
    void weigh_values(char* out) {
        constexpr int64_t most = most_vectors * lanes;
        for (int64_t d = 0; d < value_head_dim; d += most) {
            const int64_t left = value_head_dim - d;
            with_vectors(int((left + lanes - 1) / lanes), [&]<int Vectors>() {
                in_whole_steps<short_rows(Vectors)>(0, rows_here, [&]<int Rows>(int64_t r) {
                    ahead.fetch();
                    V sum[Rows][Vectors] = {};
                    const Span keys = seen_by(first_row + int(r), Rows);
                    if (!Few || keys.end <= kChunk) {
                        multiply_values(r, keys, d, sum);
                    } else {
                        V all[Rows][Vectors];
                        add_chunks(r, keys, d, all);
#pragma GCC unroll 16
                        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
                            for (int c = 0; c < Vectors; ++c) sum[i][c] = all[i][c];
                        }
                    }
                    V bad[Vectors] = {};
#pragma GCC unroll 16
                    for (int i = 0; i < Rows; ++i) {
                        const V times = factor[r + i], zero = T(0);
                        auto* const to =
                            reinterpret_cast<Out*>(out + out_at[first_row + r + i]) + d;
#pragma GCC unroll 4
                        for (int c = 0; c < Vectors; ++c) {
                            const V x = fma(sum[i][c], times, zero);
                            bad[c] = fma(x, zero, bad[c]);
                            store_some(x, left - c * lanes, to + c * lanes);
                        }
                    }
                    for (int c = 0; c < Vectors; ++c) check = check + bad[c];
                });
            });
        }
    }

    template <int Rows, int Vectors>
    [[gnu::always_inline]] void multiply_values(int64_t r, Span keys, int64_t d,
                                                V (&sum)[Rows][Vectors]) const {
        multiply<0, Vectors, false>(scores + keys.begin * width + r, 1, width,
                                    value + keys.begin * value_stride + d, value_stride,
                                    keys.size(), sum);
    }

    // As Split adds them up.
    template <int Rows, int Vectors>
    [[gnu::noinline]] void add_chunks(int64_t r, Span keys, int64_t d,
                                      V (&sum)[Rows][Vectors]) const {
        for (auto& row : sum) {
            for (V& x : row) x = T(0);
        }
        for (int64_t from = keys.begin, to; from < keys.end; from = to) {
            to = (from / kChunk + 1) * kChunk;
            if (to > keys.end) to = keys.end;
            V of_chunk[Rows][Vectors] = {};
            multiply_values(r, {from, to}, d, of_chunk);
            for (int i = 0; i < Rows; ++i) {
                for (int c = 0; c < Vectors; ++c) sum[i][c] = sum[i][c] + of_chunk[i][c];
            }
        }
    }
};

// use(problems) for one or the other order of sums.
template <class T, class Use>
auto with_short_problems(const ShortShape& shape, void* memory, const Use& use) {
    Scratch scratch(memory);
    if (shape.few) {
        ShortProblems<T, true> problems(shape, scratch);
        return use(problems, scratch);
    }
    ShortProblems<T, false> problems(shape, scratch);
    return use(problems, scratch);
}

template <class T>
constexpr ShortFunctions short_functions = {
    .takes =
        [](const ShortShape& shape) {
            const Block& block = shape.shared;
            const bool pairs = kMultipliesPairs && block.query_dtype == Dtype::kBFloat16;
            return shape.rows <= kShortRows && block.kv_len <= kShortKeys &&
                   block.head_dim <= kShortColumns && block.value_head_dim <= kShortColumns &&
                   !pairs;
        },
    .scratch_bytes =
        [](const ShortShape& shape) {
            return with_short_problems<T>(
                shape, nullptr, [](auto&, const Scratch& scratch) { return scratch.used(); });
        },
    .attend =
        [](const ShortShape& shape, const ShortProblem* problems, int64_t count, void* memory) {
            return with_short_problems<T>(shape, memory, [&](auto& some, const Scratch&) {
                return some.attend(problems, count);
            });
        },
};

}  // namespace
}  // namespace fastattn
