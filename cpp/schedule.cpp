// SPDX-License-Identifier: Apache-2.0
//
// See schedule.h.
#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "split.h"

namespace fastattn {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr double kTeamSeconds = 0;  // small calls have a team, too: there is more to see
#else
constexpr double kTeamSeconds = 10e-6;  // what waking a team costs
#endif

// Prefill. Each key tile is brought near once for all query tiles of a block, so the more the
// better, while they stay in the second-level cache. Beyond 4 only a window gains, whose blocks
// overlap in keys.
constexpr int64_t kMostQueryTiles = 4, kMostQueryTilesInWindow = 8;
constexpr size_t kBlockBytes = 384 << 10;  // of one thread
constexpr double kBlocksPerThread = 16;    // are enough, whatever they take
constexpr double kAlike = 0.75;            // of the largest: a head's rows see as many keys
constexpr double kUneven = 1. / 16;        // threads are never alike: of the last item, so much
constexpr double kUnlike = 1. / 4;         // and so much where items are not alike either
constexpr double kSpansTake = 1.1;         // times as long, with all that is stored and merged
constexpr double kGain = 0.98;             // what is smaller must be faster, too

// The time until all threads are done with some items that take `each` and then `more` that take
// `less`: these go to threads that have none of the last of those.
double time_of(double items, double each, double more, double less, double threads) {
    const double busy = std::fmod(items, threads), rounds = std::floor(items / threads);
    if (busy == 0) return rounds * each + std::ceil(more / threads) * less;
    const double beside = less > 0 ? (threads - busy) * std::floor(each / less) : more;
    return (rounds + 1) * each + std::ceil(std::max(more - beside, 0.) / threads) * less;
}

// rows: whole vectors, of a block and of a head.
double time_of(const RowsToCut& work, const RowCosts& costs, int64_t rows, bool in_spans,
               int threads) {
    const double of_head = double(work.rows), of_block = double(rows);
    const double keys = double(work.keys);
    const double span = double(in_spans ? std::min(kSpanKeys, work.keys) : work.keys);
    const double blocks = std::ceil(of_head / of_block), spans = std::ceil(keys / span);
    const double each = costs.block(of_block, span);
    const double all =
        work.pairs * (costs.pair + costs.key / of_block) + work.heads * of_head * costs.row * spans;
    const double uneven = threads == 1 ? 0 : each * kUneven;
    const double split = in_spans ? kSpansTake : 1;
    if (work.pairs < kAlike * work.heads * of_head * keys) {
        return split * (std::max(each, all / threads) + each * kUnlike);
    }
    const double full = work.heads * std::floor(of_head / of_block) * std::floor(keys / span);
    const double more = work.heads * blocks * spans - full;
    const double less = more > 0 ? std::max(all - full * each, 0.) / more : 0;
    return split * (time_of(full, each, more, less, threads) + uneven);
}

// Decoding.
constexpr int64_t kItemsLeft = 2;       // for each thread, at least, where keys are shared
constexpr double kWorthCutting = 0.9;   // of the time without: each cut reads the keys again
constexpr double kAlikeSeconds = 0.75;  // of the longest
constexpr double kReadBytesPerSecond = 25e9, kPairFlopsPerSecond = 200e9;  // of one thread
constexpr double kTaskSeconds = 0.5e-6, kMergedRowSeconds = 50e-9;

}  // namespace

int team_size(int64_t items, double seconds, int threads) {
    if (items <= 1 || seconds < 2 * kTeamSeconds) return 1;
    return int(std::min<int64_t>(items, threads));
}

RowCosts::RowCosts(int64_t head_dim, int64_t value_head_dim, int64_t lanes, bool widens) {
    const double numbers = double(head_dim + value_head_dim);
    pair = 2 * (numbers + 24) / (17e9 * double(lanes));
    key = numbers * (widens ? 0.08e-9 : 0.05e-9);
    row = numbers * 1e-9;
}

RowCut cut_rows(RowsToCut work, const RowCosts& costs, int threads,
                const std::function<size_t(int64_t rows, bool in_spans)>& bytes) {
    const int64_t rows_of_head = work.rows;
    work.rows = (work.rows + work.lanes - 1) / work.lanes * work.lanes;
    work.pairs *= double(work.rows) / double(rows_of_head);
    const int64_t tiles = work.in_window ? kMostQueryTilesInWindow : kMostQueryTiles;
    RowCut best;
    best.seconds = std::numeric_limits<double>::infinity();
    for (const bool in_spans : {false, true}) {
        if (in_spans && (threads == 1 || work.keys <= kSpanKeys)) break;
        for (int64_t rows = std::min(tiles * work.query_tile, work.rows); rows > 0;
             rows -= work.lanes) {
            const size_t needed = bytes(std::min(rows, rows_of_head), in_spans);
            if (needed > kBlockBytes && rows > work.query_tile) continue;
            const int team = int(std::clamp<size_t>(kForwardBytes / needed, 1, size_t(threads)));
            const double seconds = time_of(work, costs, rows, in_spans, team);
            if (seconds < kGain * best.seconds) {
                best = {std::min(rows, rows_of_head), in_spans, team, seconds};
            }
            const double longest = costs.block(double(rows), double(work.keys));
            if (team == threads && longest * kBlocksPerThread <= seconds) return best;
            if (threads == 1) return best;
        }
    }
    return best;
}

double DecodeCosts::attend(double keys, double pairs) const {
    return kTaskSeconds + keys * key_bytes / kReadBytesPerSecond +
           pairs * pair_flops / kPairFlopsPerSecond;
}

double DecodeCosts::merge(double rows) const {
    return rows * (kMergedRowSeconds + row_bytes / kMergeBytesPerSecond);
}

TaskShape shape_tasks(int64_t rows, int64_t least_rows, int64_t items, int threads,
                      size_t row_bytes, const std::function<size_t(int64_t)>& scratch_bytes,
                      const std::function<double(int64_t)>& seconds) {
    TaskShape best{rows, 1};
    if (threads == 1) return best;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t some = rows; some == rows || some >= least_rows; some /= 2) {
        const size_t room =
            std::min(kTeamBytes / scratch_bytes(some), kWaitingBytes / (size_t(some) * row_bytes));
        const int team = int(std::clamp<size_t>(room, 1, size_t(threads)));
        const int64_t all = items * ((rows + some - 1) / some);
        const double end = double((all + team - 1) / team) * seconds(some);
        if (end < kWorthCutting * least) best = {some, team}, least = end;
        if (some == 1) break;
    }
    return best;
}

int64_t rows_together(int64_t rows, int threads, int64_t heads, size_t row_bytes,
                      const std::function<size_t(int64_t)>& scratch_bytes) {
    const size_t partials = row_bytes * size_t(std::max<int64_t>(threads, heads));
    while (rows > 1 && (size_t(threads) * scratch_bytes(rows) > kTeamBytes ||
                        size_t(rows) * partials > kWaitingBytes)) {
        rows /= 2;
    }
    return rows;
}

int64_t members_of_task(int64_t items, int threads) {
    return std::max<int64_t>(items / (threads * kItemsLeft), 1);
}

bool are_alike(double seconds, double others) { return others > kAlikeSeconds * seconds; }

int64_t items_of_wave(int64_t items, int threads) {
    return items > threads ? items / threads * threads : items;
}

}  // namespace fastattn
