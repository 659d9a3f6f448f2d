// SPDX-License-Identifier: Apache-2.0
//
// The algorithm: one block of query rows against all the keys that they see, key tile after key
// tile, with the running softmax of FlashAttention-2 (Dao 2023, algorithm 1). Called by
// attention.cpp through the table at the end; compiled once per instruction set over vec.h.
//
// Queries lie along the vector lanes: the scores are S^T = K Q^T and the output O^T = V^T P^T. Keys and
// values are then read where they lie, as scalars that are broadcast; only the query tile is
// transposed; row maximum, exp2 and row sum are plain vertical code; and one micro-kernel, multiply(),
// serves both products.
//
// Names in the paper: row_max is m, row_sum is l, acc is O. Scores are in base 2: log2(e) is folded
// into the query.
//
// Every lane is on its own: no bit of a row's result depends on the rows beside it, on keys that the
// row does not see, or on whether a tile of such keys was skipped. What makes it true: a masked score
// is -inf, whose exp2 is exactly 0, and a tile that leaves the maximum alone rescales by exactly 1.
#include "kernel.h"

#include "kernel_scores.h"
#include "vec.h"

namespace fastattn {
namespace {

constexpr double kLn2 = 0.69314718055994530942;

// Sums stay short, for accuracy: over one tile, then over this many tiles, then over such groups.
constexpr int64_t kGroup = 64 * kKeyTile;  // keys

// For c in [First, Last), sum[r][c] += over k < depth: a[r * a_row + k * a_step] * b[k][c], a row of b
// being Columns vectors.
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

// visit<First, Last>(begin, end): the stretches of a tile's keys between two cuts, each with the vectors
// that may see it (ScorePasses::find_cuts).
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

template <class T, int Columns>
class BlockAttention {
    using V = Vec<T>;
    static constexpr int lanes = V::lanes;
    static constexpr int width = Columns * lanes;  // rows, and lanes that have none

    const Block& block;
    const int64_t head_dim, value_head_dim;
    const ScorePasses<T, Columns> passes;

    // In scratch, matrices of `width` columns unless said otherwise.
    T* const query;    // (head_dim) transposed and scaled
    T* const scores;   // (kKeyTile) S^T, then P^T
    T* const acc;      // (value_head_dim) O^T of the current group
    T* const total;    // (value_head_dim) O^T of the groups before
    T* const staging;  // (kKeyTile, value_head_dim or lanes) rows of a mask, or values to use instead

    V row_max[Columns], row_sum[Columns], total_sum[Columns], total_max[Columns];
    V tile_max[Columns], rescale[Columns];
    int64_t cuts[2 * Columns];  // of the tile: see ScorePasses::find_cuts
    bool has_total = false;

    static int64_t score_rows(const Block& b) { return b.kv_len < kKeyTile ? b.kv_len : kKeyTile; }
    static int64_t total_rows(const Block& b) { return b.kv_len > kGroup ? b.value_head_dim : 0; }

public:
    static int64_t scratch_elements(const Block& b) {
        const int64_t wide = b.value_head_dim > lanes ? b.value_head_dim : lanes;
        const int64_t staging_rows = (score_rows(b) + lanes - 1) / lanes * lanes;
        return (b.head_dim + score_rows(b) + b.value_head_dim + total_rows(b)) * width +
               staging_rows * wide;
    }

    explicit BlockAttention(const Block& b)
        : block(b),
          head_dim(b.head_dim),
          value_head_dim(b.value_head_dim),
          passes(b),
          query(static_cast<T*>(b.scratch)),
          scores(query + head_dim * width),
          acc(scores + score_rows(b) * width),
          total(acc + value_head_dim * width),
          staging(total + total_rows(b) * width) {}

    void run() {
        load_query();
        clear(acc);
        for (int c = 0; c < Columns; ++c) {
            row_max[c] = -kInfinity<T>;
            row_sum[c] = T(0);
        }
        int64_t group = passes.begin / kGroup;
        for (int64_t tile = passes.begin / kKeyTile * kKeyTile; tile < passes.end;
             tile += kKeyTile) {
            if (block.stop.requested(block.stop.context)) return;
            const Span keys = passes.span(tile);
            const Seen seen = passes.classify(keys);
            if (seen == Seen::kNone) continue;
            if (tile / kGroup != group) {
                close_group();
                group = tile / kGroup;
            }
            attend(keys, seen);
        }
        if (has_total) close_group();
        finish(has_total ? total : acc, has_total ? total_sum : row_sum);
    }

    void count(TileCounts& counts) const {
        for (int64_t tile = 0; tile < block.kv_len; tile += kKeyTile) {
            const Span keys = passes.span(tile);
            const Seen seen = keys.size() > 0 ? passes.classify(keys) : Seen::kNone;
            counts.skipped += seen == Seen::kNone;
            counts.edge += seen == Seen::kSome;
            counts.computed += seen != Seen::kNone;
            if (seen != Seen::kNone) counts.pairs += keys.size() * block.row_count;
        }
    }

private:
    void clear(T* matrix) const {
        for (int64_t i = 0; i < value_head_dim * width; i += lanes) V(T(0)).store(matrix + i);
    }

    // query = (scale * log2(e) * Q)^T; lanes without a row are 0. With softcap, tanh comes between the
    // scale and the change of base.
    void load_query() const {
        const V scale = T(block.softcap != 0 ? block.scale / block.softcap : block.scale * kLog2e);
        for (int c = 0; c < Columns; ++c) {
            for (int64_t d = 0; d < head_dim; d += lanes) {
                const int64_t n = head_dim - d < lanes ? head_dim - d : lanes;
                V square[lanes];
                for (int i = 0; i < lanes; ++i) {
                    const int row = c * lanes + i;
                    if (row < block.row_count && n == lanes) {
                        square[i] = V::load(static_cast<const T*>(block.rows[row].query) + d);
                    } else {
                        T part[lanes] = {};
                        for (int k = 0; row < block.row_count && k < n; ++k) {
                            part[k] = static_cast<const T*>(block.rows[row].query)[d + k];
                        }
                        square[i] = V::load(part);
                    }
                }
                transpose<T>(square);
                for (int k = 0; k < n; ++k) {
                    (scale * square[k]).store(query + (d + k) * width + c * lanes);
                }
            }
        }
    }

    void attend(Span keys, Seen seen) {
        const T* value = static_cast<const T*>(block.value) + keys.begin * block.value_stride;
        int64_t value_stride = block.value_stride;
        passes.find_cuts(keys, cuts);
        compute_scores(keys);
        if (seen == Seen::kSome) {
            passes.apply(scores, keys, staging);
            find_tile_max(keys);
            if (set_nonfinite_apart(value, keys)) {
                value = staging;
                value_stride = value_head_dim;
            }
        }
        softmax(keys);
        in_steps<micro_rows(Columns)>(0, value_head_dim, [&]<int Rows>(int64_t d) {
            V sum[Rows][Columns] = {};
            between_cuts<Columns>(cuts, [&]<int First, int Last>(int64_t begin, int64_t end) {
                multiply<First, Last>(value + begin * value_stride + d, 1, value_stride,
                                      scores + begin * width, end - begin, sum);
            });
            for (int r = 0; r < Rows; ++r) {
                for (int c = 0; c < Columns; ++c) {
                    T* out = acc + (d + r) * width + c * lanes;
                    fma(V::load(out), rescale[c], sum[r][c]).store(out);
                }
            }
        });
    }

    void compute_scores(Span keys) {
        const T* key = static_cast<const T*>(block.key) + keys.begin * block.key_stride;
        V largest[Columns];
        for (int c = 0; c < Columns; ++c) largest[c] = -kInfinity<T>;
        between_cuts<Columns>(cuts, [&]<int First, int Last>(int64_t begin, int64_t end) {
            in_steps<micro_rows(Columns)>(begin, end, [&]<int Rows>(int64_t j) {
                V sum[Rows][Columns] = {};
                multiply<First, Last>(key + j * block.key_stride, block.key_stride, 1, query,
                                      head_dim, sum);
                for (int r = 0; r < Rows; ++r) {
                    for (int c = 0; c < Columns; ++c) {
                        if (c < First || c >= Last) sum[r][c] = -kInfinity<T>;
                        sum[r][c].store(scores + (j + r) * width + c * lanes);
                        largest[c] = max(sum[r][c], largest[c]);
                    }
                }
            });
        });
        for (int c = 0; c < Columns; ++c) tile_max[c] = largest[c];
    }

    void find_tile_max(Span keys) {
        V largest[Columns];
        for (int c = 0; c < Columns; ++c) largest[c] = -kInfinity<T>;
        for (int64_t i = 0; i < keys.size() * width; i += width) {
            for (int c = 0; c < Columns; ++c) {
                largest[c] = max(V::load(scores + i + c * lanes), largest[c]);
            }
        }
        for (int c = 0; c < Columns; ++c) tile_max[c] = largest[c];
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

    // A probability of 0 does not keep a NaN or Inf of `value` from a row that must not see it. If the
    // tile holds any, it is copied to `staging` with those keys as zeros, and the values that are not
    // finite are added to the rows that see them, here.
    bool set_nonfinite_apart(const T* value, Span keys) {
        bool found = false;
        passes.hidden_keys(keys, [&](int64_t first, int64_t last) {
            found |= !all_finite(value + (first - keys.begin) * block.value_stride, last - first);
        });
        if (!found) return false;
        for (int64_t j = 0; j < keys.size(); ++j) {
            const T* from = value + j * block.value_stride;
            const bool finite = all_finite(from, 1);
            for (int64_t d = 0; d < value_head_dim; ++d) {
                staging[j * value_head_dim + d] = finite ? from[d] : T(0);
                if (from[d] - from[d] == 0) continue;
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
        typename V::Mask finite = V(T(0)) == V(T(0));
        bool rest_finite = true;
        for (; rows > 0; --rows, row += block.value_stride) {
            int64_t d = 0;
            for (; d + lanes <= value_head_dim; d += lanes) {
                const V x = V::load(row + d);
                finite &= x - x == V(T(0));
            }
            for (; d < value_head_dim; ++d) rest_finite &= row[d] - row[d] == 0;
        }
        typename V::Int all = -1;
        for (int i = 0; i < lanes; ++i) all &= finite[i];
        return rest_finite && all != 0;
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
            const V offset =
                select<T>(row_max[c] == V(-kInfinity<T>), V(T(0)), row_max[c]);
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

    // out = sum / row_sum, and lse = log(row_sum) + max. A sink is one more term of the denominator.
    void finish(const T* sum, const V* sums) const {
        for (int c = 0; c < Columns; ++c) {
            T sink[lanes], largest[lanes], denominator[lanes];
            for (int i = 0; i < lanes; ++i) {
                const int row = c * lanes + i;
                sink[i] = T(row < block.row_count ? block.rows[row].sink * kLog2e
                                                  : -__builtin_inf());
            }
            const V peak = max(row_max[c], V::load(sink));
            const V offset = select<T>(peak == V(-kInfinity<T>), V(T(0)), peak);
            const V shrink = exp2(row_max[c] - offset);
            const V all = fma(sums[c], shrink, exp2(V::load(sink) - offset));
            const V factor = select<T>(all == V(T(0)), V(T(0)), shrink / all);
            row_max[c].store(largest);
            sums[c].store(denominator);
            store_out(sum + c * lanes, factor, c * lanes);
            for (int i = 0; i < lanes && c * lanes + i < block.row_count; ++i) {
                const Row& row = block.rows[c * lanes + i];
                if (row.lse == nullptr) continue;
                *static_cast<T*>(row.lse) =
                    T(double(largest[i]) * kLn2 + __builtin_log(double(denominator[i])));
            }
        }
    }

    // Transposes `lanes` rows of the result into place.
    void store_out(const T* sum, V factor, int first_row) const {
        for (int64_t d = 0; d < value_head_dim; d += lanes) {
            const int64_t n = value_head_dim - d < lanes ? value_head_dim - d : lanes;
            V square[lanes];
            for (int k = 0; k < lanes; ++k) {
                // Adding 0 turns -0 into 0: which one a sum of zeros is depends on skipped tiles.
                square[k] = k < n ? fma(V::load(sum + (d + k) * width), factor, V(T(0))) : V(T(0));
            }
            transpose<T>(square);
            for (int i = 0; i < lanes && first_row + i < block.row_count; ++i) {
                T* out = static_cast<T*>(block.rows[first_row + i].out) + d;
                if (n == lanes) {
                    square[i].store(out);
                } else {
                    T part[lanes];
                    square[i].store(part);
                    for (int k = 0; k < n; ++k) out[k] = part[k];
                }
            }
        }
    }
};

// use(attention<Columns>) for as few vectors as the rows fill.
template <class T, int Columns = 1, class Use>
auto with_columns(const Block& block, const Use& use) {
    if constexpr (Columns == kColumns) {
        return use.template operator()<Columns>();
    } else {
        if (block.row_count <= Columns * Vec<T>::lanes) return use.template operator()<Columns>();
        return with_columns<T, Columns + 1>(block, use);
    }
}

template <class T>
size_t scratch_bytes(const Block& block) {
    const int64_t elements = with_columns<T>(
        block, [&]<int Columns>() { return BlockAttention<T, Columns>::scratch_elements(block); });
    return size_t(elements) * sizeof(T);
}

template <class T>
void attend(const Block& block) {
    with_columns<T>(block, [&]<int Columns>() { BlockAttention<T, Columns>(block).run(); });
}

template <class T>
void count_tiles(const Block& block, TileCounts& counts) {
    with_columns<T>(block,
                    [&]<int Columns>() { BlockAttention<T, Columns>(block).count(counts); });
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
constexpr Functions functions = {kColumns * Vec<T>::lanes, int(kKeyTile),  scratch_bytes<T>,
                                 attend<T>,                count_tiles<T>, run_fma<T>};

}  // namespace

extern const Kernel FASTATTN_KERNEL;
const Kernel FASTATTN_KERNEL = {FASTATTN_ISA_NAME, functions<float>, functions<double>, read_bytes};

}  // namespace fastattn
