// SPDX-License-Identifier: Apache-2.0
//
// What the probabilities of a query tile say, without their matrix. Keys pass by twice: first for
// what a row knows of itself, its softmax, entropy, largest probability and strongest keys; then,
// where they are asked for, for sums over rows, which need every row's denominator. Called by
// statistics.cpp through the table in kernel.cpp.
//
// With x = score - row_max in base 2, e = 2^x, Z = sum(e) + 2^(sink - row_max) and p = e / Z:
//   entropy = -sum(p ln p) = (sum(e) ln(Z) - ln(2) sum(e x)) / Z
// A new maximum, larger by d, makes sum(e) 2^-d * sum(e), and sum(e x) 2^-d * (sum(e x) - d
// sum(e)).
#pragma once

#include "elements.h"
#include "kernel.h"
#include "multiply.h"
#include "score_tile.h"
#include "scores.h"
#include "vec.h"

namespace fastattn {
namespace {

// With which a row's scores become probabilities: share * 2^(score - offset).
template <class T>
struct KnownSoftmax {
    T offset, share;

    explicit KnownSoftmax(const T* softmax)
        : offset(softmax[0] == -kInfinity<T> ? T(0) : softmax[0]), share(softmax[1]) {
        if (share - share == 0) return;
        offset = share;  // NaN for what the row sees, and 0 for what it does not
        share = T(1);
    }
};

template <class T>
void normalise(void* scores, int64_t count, const void* softmax) {
    using V = Vec<T>;
    const KnownSoftmax<T> known(static_cast<const T*>(softmax));
    for (T* row = static_cast<T*>(scores); count > 0; row += V::lanes, count -= V::lanes) {
        const size_t bytes = size_t(count < V::lanes ? count : V::lanes) * sizeof(T);
        T some[V::lanes] = {};
        __builtin_memcpy(some, row, bytes);
        const V score = V::load(some), weight = exp2(score - V(known.offset)) * V(known.share);
        select<T>(score == V(-kInfinity<T>), V(T(0)), weight).store(some);
        __builtin_memcpy(row, some, bytes);
    }
}

// The scratch memory of one query tile.
template <class T>
struct StatisticsMemory {
    Scratch scratch;
    Shared<T> shared;
    T* const query;

    StatisticsMemory(const Block& block, void* memory)
        : scratch(memory),
          shared(block, Vec<T>::padded(block.row_count), true, scratch),
          query(scratch.take<T>(block.head_dim * Vec<T>::padded(block.row_count))) {}
};

template <class T>
size_t statistics_scratch_bytes(const Block& block) {
    return StatisticsMemory<T>(block, nullptr).scratch.used();
}

template <class T, bool InPairs, int Columns>
class StatisticsTile : ScoreTile<T, InPairs, Columns> {
    using Scores = ScoreTile<T, InPairs, Columns>;
    using Scores::block;
    using Scores::lanes;
    using Scores::passes;
    using Scores::scores;
    using Scores::tile_max;
    using Scores::width;
    using typename Scores::V;

   public:
    StatisticsTile(const Block& whole, StatisticsMemory<T>& memory)
        : Scores(whole, 0, whole.row_count, memory.query, &memory.shared) {}

    // The rows' softmax, and what is asked of it. Late keys come first: in most models they are
    // among the strongest, and a key that is not stronger than those found costs nothing.
    void look(const StatisticsBlock& asked) {
        T row_max[width], threshold[width];
        double sum[width] = {}, moment[width] = {};
        int64_t found[width] = {};
        for (int r = 0; r < width; ++r) {
            row_max[r] = -kInfinity<T>;
            threshold[r] = r < block.row_count ? kLowest<T> : kInfinity<T>;
        }
        const bool sees = each_tile_backwards([&](Span keys, Seen) {
            if (asked.entropy) {
                add_tile<true>(keys, row_max, sum, moment);
            } else {
                add_tile<false>(keys, row_max, sum, moment);
            }
            if (asked.top > 0) find_strongest(keys, asked, threshold, found);
        });
        if (!sees) return;  // stopped
        for (int r = 0; r < block.row_count; ++r) {
            finish(asked, r, double(row_max[r]), sum[r], moment[r], found[r]);
        }
    }

    // Adds to the sums of a span of keys.
    void add(const SumsBlock& asked) {
        V offset[Columns], share[Columns], weight[Columns];
        for (int c = 0; c < Columns; ++c) {
            T of[3][lanes] = {};
            for (int i = 0; i < lanes; ++i) {
                const int last = block.row_count - 1, row = c * lanes + i;
                const int r = row < last ? row : last;  // lanes without a row have its scores
                const KnownSoftmax<T> softmax(static_cast<const T*>(asked.softmax) + 2 * r);
                of[0][i] = softmax.offset;
                if (row > last) continue;
                of[1][i] = softmax.share;
                of[2][i] = asked.column_sums == nullptr ? T(0) : T(asked.row_weights[r]);
            }
            offset[c] = V::load(of[0]);
            share[c] = V::load(of[1]);
            weight[c] = share[c] * V::load(of[2]);
        }
        int64_t key_block = asked.key_blocks;  // they end one after the other, the last one first
        each_tile_backwards([&](Span keys, Seen seen) {
            // Beyond the span there may be keys that no row sees.
            const int64_t first = keys.begin > asked.begin ? keys.begin : asked.begin;
            int64_t end = keys.end < asked.end ? keys.end : asked.end;
            while (end > first) {
                int64_t begin = first;
                if (asked.block_sums != nullptr) {
                    while (key_block == asked.key_blocks || asked.key_starts[key_block] >= end) {
                        --key_block;
                    }
                    if (asked.key_starts[key_block] > begin) begin = asked.key_starts[key_block];
                }
                V sum[Columns];
                const Span part = {begin, end};
                if (seen == Seen::kAll) {
                    add_part<false>(asked, keys, part, offset, weight, sum);
                } else {
                    add_part<true>(asked, keys, part, offset, weight, sum);
                }
                if (asked.block_sums != nullptr) add_to_block(asked, key_block, sum, share);
                end = begin;
            }
        });
    }

   private:
    // Calls visit(keys, seen) for the key tiles that some row sees, whose scores are there. False:
    // stopped.
    template <class Visit>
    bool each_tile_backwards(const Visit& visit) {
        bool has_started = false;
        for (int64_t tile = (passes.end - 1) / kKeyTile * kKeyTile;
             passes.begin < passes.end && tile + kKeyTile > passes.begin; tile -= kKeyTile) {
            if (block.stop.requested(block.stop.context)) return false;
            Span keys = passes.span(tile);
            if (keys.size() <= 0) continue;
            const Seen seen = passes.classify(keys);
            if (seen == Seen::kNone) continue;
            if (!has_started) this->load_query();
            has_started = true;
            this->find_keys(tile);
            passes.find_cuts(keys, this->cuts);
            passes.prefetch(keys);
            this->compute_scores(keys, false);
            if (InPairs ? this->scales_late : this->scale_scores) this->apply_score_scale(keys);
            if (seen == Seen::kSome) {
                passes.apply(scores, keys, this->staging);
                this->find_tile_max(keys);
            }
            visit(keys, seen);
        }
        return true;
    }

    template <bool HasMoment>
    void add_tile(Span keys, T* row_max, double* sums, double* moments) const {
        const V lowest = T(-1e4);  // times 0, for what is masked
        V offset[Columns], rescale[Columns], sum[Columns], moment[Columns];
        for (int c = 0; c < Columns; ++c) {
            const V before = V::load(row_max + c * lanes), largest = max(tile_max[c], before);
            // Nothing seen yet: -inf - 0, not -inf - -inf.
            offset[c] = select<T>(largest == V(-kInfinity<T>), V(T(0)), largest);
            rescale[c] = exp2(before - offset[c]);
            sum[c] = moment[c] = V(T(0));
        }
        const T* row = scores;
        for (int64_t j = 0; j < keys.size(); ++j, row += width) {
#pragma GCC unroll 4
            for (int c = 0; c < Columns; ++c) {
                const V x = V::load(row + c * lanes) - offset[c];
                const V e = exp2(x);
                sum[c] = sum[c] + e;
                if constexpr (HasMoment) moment[c] = fma(e, max(lowest, x), moment[c]);
            }
        }
        for (int c = 0; c < Columns; ++c) {
            for (int i = 0; i < lanes; ++i) {
                const int r = c * lanes + i;
                const double scale = double(rescale[c].v[i]);
                const double less = scale > 0 ? double(row_max[r]) - double(offset[c].v[i]) : 0;
                moments[r] = scale * (moments[r] + less * sums[r]) + double(moment[c].v[i]);
                sums[r] = scale * sums[r] + double(sum[c].v[i]);
            }
            max(tile_max[c], V::load(row_max + c * lanes)).store(row_max + c * lanes);
        }
    }

    // Keeps each row's strongest keys in the order of their scores; among equals, the lower key is
    // first. threshold: what a score must reach.
    void find_strongest(Span keys, const StatisticsBlock& asked, T* threshold,
                        int64_t* found) const {
        for (int c = 0; c < Columns; ++c) {
            V least = V::load(threshold + c * lanes);
            if (!any<T>(tile_max[c] >= least)) continue;
            for (int64_t j = keys.size() - 1; j >= 0; --j) {
                const T* const row = scores + j * width + c * lanes;
                const auto strong = V::load(row) >= least;
                if (!any<T>(strong)) continue;
                for (int i = 0; i < lanes; ++i) {
                    if (!strong[i]) continue;
                    const int r = c * lanes + i;
                    T* const weights = static_cast<T*>(asked.statistics[r].top_weights);
                    int64_t* const top = asked.statistics[r].top_keys;
                    int64_t at = found[r] < asked.top ? found[r]++ : asked.top - 1;
                    for (; at > 0 && weights[at - 1] <= row[i]; --at) {
                        weights[at] = weights[at - 1];
                        top[at] = top[at - 1];
                    }
                    weights[at] = row[i];
                    top[at] = keys.begin + j;
                    if (found[r] == asked.top) threshold[r] = weights[asked.top - 1];
                }
                least = V::load(threshold + c * lanes);
            }
        }
    }

    void finish(const StatisticsBlock& asked, int r, double largest, double sum, double moment,
                int64_t found) const {
        const RowStatistics& to = asked.statistics[r];
        const double sink = block.rows[r].sink * kLog2e;
        const bool sees = !(sum == 0);
        const double denominator = sees ? sum + power_of_two(sink - largest) : 1;
        const double share = sees ? 1 / denominator : 0;
        T* const softmax = static_cast<T*>(to.softmax);
        softmax[0] = T(largest);
        softmax[1] = T(share);
        if (to.maximum != nullptr) *static_cast<T*>(to.maximum) = T(share);
        if (to.entropy != nullptr) {
            const double log = __builtin_log(denominator);
            const double entropy = (sum * log - kLn2 * moment) * share;
            *static_cast<T*>(to.entropy) = T(entropy < 0 ? 0 : entropy);
        }
        T* const weights = static_cast<T*>(to.top_weights);
        const bool known = share - share == 0;
        for (int64_t i = 0; i < asked.top; ++i) {
            if (!known || i >= found) {
                to.top_keys[i] = -1;
                weights[i] = known ? T(0) : T(share);
            } else {
                weights[i] = T(power_of_two(double(weights[i]) - largest) * share);
            }
        }
    }

    // A sink may be far above every score.
    static double power_of_two(double x) { return exp2(Vec<double>(x < 900 ? x : 900)).v[0]; }

    // sum: each row's e over the part of the tile's keys. The keys' sums over rows go to their
    // place. Hides: a masked pair of a row that is not finite adds nothing.
    template <bool Hides>
    void add_part(const SumsBlock& asked, Span keys, Span part, const V* offset, const V* weight,
                  V (&sum)[Columns]) const {
        for (int c = 0; c < Columns; ++c) sum[c] = T(0);
        const T* row = scores + (part.begin - keys.begin) * width;
        for (int64_t j = part.begin; j < part.end; j += lanes) {
            const int64_t count = part.end - j < lanes ? part.end - j : lanes;
            V weighted[lanes];
            for (int k = 0; k < count; ++k, row += width) {
                V of_key = T(0);
#pragma GCC unroll 4
                for (int c = 0; c < Columns; ++c) {
                    const V score = V::load(row + c * lanes);
                    V e = exp2(score - offset[c]);
                    if constexpr (Hides) e = select<T>(score == V(-kInfinity<T>), V(T(0)), e);
                    sum[c] = sum[c] + e;
                    of_key = fma(e, weight[c], of_key);
                }
                weighted[k] = of_key;
            }
            if (asked.column_sums == nullptr) continue;
            for (int64_t k = count; k < lanes; ++k) weighted[k] = T(0);
            T sums[lanes];
            sums_across<T>(weighted).store(sums);
            double* const to = asked.column_sums + (j - asked.begin);
            for (int64_t k = 0; k < count; ++k) to[k] += double(sums[k]);
        }
    }

    void add_to_block(const SumsBlock& asked, int64_t key_block, const V (&sum)[Columns],
                      const V* share) const {
        T shares[width];
        for (int c = 0; c < Columns; ++c) (sum[c] * share[c]).store(shares + c * lanes);
        for (int r = 0; r < block.row_count; ++r) {
            asked.block_sums[asked.query_blocks[r] * asked.block_pitch + key_block] +=
                double(shares[r]);
        }
    }
};

// use(the query tile of all the block's rows).
template <class T, class Use>
void with_statistics_tile(const Block& block, const Use& use) {
    StatisticsMemory<T> memory(block, block.scratch);
    with_columns<T>(block.row_count, [&]<int Columns>() {
        if constexpr (kMultipliesPairs && sizeof(T) == 4) {
            if (in_pairs<T>(block)) {
                StatisticsTile<T, true, Columns> tile(block, memory);
                return use(tile);
            }
        }
        StatisticsTile<T, false, Columns> tile(block, memory);
        use(tile);
    });
}

template <class T>
constexpr StatisticsFunctions statistics_functions = {
    .scratch_bytes = statistics_scratch_bytes<T>,
    .look =
        [](const StatisticsBlock& asked) {
            with_statistics_tile<T>(asked.block, [&](auto& tile) { tile.look(asked); });
        },
    .add =
        [](const SumsBlock& asked) {
            with_statistics_tile<T>(asked.block, [&](auto& tile) { tile.add(asked); });
        },
    .normalise = normalise<T>,
};

}  // namespace
}  // namespace fastattn
