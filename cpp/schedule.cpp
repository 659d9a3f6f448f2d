// SPDX-License-Identifier: Apache-2.0
//
// See schedule.h.
#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "split.h"

namespace fastattn {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr double kTeamSeconds = 0, kThreadSeconds = 1e-9;  // there is more to see
#else
constexpr double kTeamSeconds = 4e-6;     // of a call for two
constexpr double kThreadSeconds = 10e-6;  // of each thread in a larger team
#endif

// Prefill. Each key tile is brought near once for all query tiles of a block, so the more the
// better, while they stay in the second-level cache. Beyond 4 only a window gains, whose blocks
// overlap in keys.
constexpr int64_t kMostQueryTiles = 4, kMostQueryTilesInWindow = 8;
constexpr size_t kBlockBytes = 400 << 10;   // of one thread
constexpr double kBlocksPerThread = 16;     // are enough, whatever they take
constexpr double kAlike = 0.75;             // of the largest: a head's rows see as many keys
constexpr double kUneven = 1. / 16;         // threads are never alike: of the last item, so much
constexpr double kUnlike = 1. / 4;          // and so much where items are not alike either
constexpr double kSpansTake = 1.1;          // times as long, with all that is stored and merged
constexpr size_t kPartialsBytes = 4 << 20;  // at most
constexpr int64_t kRoundsAcrossHeads = 4;   // of all threads
constexpr int64_t kItemsOfThread = 8;       // at least, whose blocks have the same bias
constexpr double kGain = 0.98;              // what is smaller must be faster, too

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
constexpr double kWorthCutting = 0.8;   // of the time without: each cut reads the keys again
constexpr double kAlikeSeconds = 0.75;  // of the longest
constexpr double kReadBytesPerSecond = 25e9, kPairFlopsPerSecond = 200e9;  // of one thread
constexpr double kTaskSeconds = 0.5e-6, kMergedRowSeconds = 50e-9;

// Of short problems.
constexpr double kShortItemSeconds = 50e-6;  // so that beginning it costs little
constexpr int64_t kShortItemsOfThread = 8;   // at least, while they are several problems

// Of gradients.
constexpr size_t kKeyBlockBytes = 1 << 20;  // of what is kept of a key block: for the caches
constexpr size_t kSumsBytes = 64 << 20;     // of the queries' gradients, unless one chain has more
constexpr double kKeyBlocksPerThread = 3;   // as long as the longest one: threads end together
constexpr double kPartItemsPerThread = 4;   // the same, of parts, which cost no work
constexpr int kMostParts = 4;               // of a key block: each waits for the one before
constexpr double kGradientFlops = 50e9;     // a second, of one thread
constexpr double kShortGradientSeconds = 0.3e-6;  // what it costs to set a short problem up
constexpr int64_t kRowKeys = 8;  // what it costs to read a row, in keys that it sees

}  // namespace

int team_size(int64_t items, double seconds, const Threads& threads) {
    if (items <= 1 || seconds < kTeamSeconds) return 1;
    const double most = std::max(seconds / kThreadSeconds, 2.);
    return int(std::min({most, double(items), double(threads)}));
}

RowCosts::RowCosts(int64_t head_dim, int64_t value_head_dim, int64_t lanes, bool widens) {
    const double numbers = double(head_dim + value_head_dim);
    pair = 2 * (numbers + 24) / (kFlopsOfLane * double(lanes));
    key = numbers * (widens ? 0.08e-9 : 0.05e-9);
    row = numbers * 1e-9;
}

RowCut cut_rows(RowsToCut work, const RowCosts& costs, int threads,
                const std::function<size_t(int64_t rows, bool in_spans)>& bytes) {
    const int64_t rows_of_head = work.rows;
    work.rows = (work.rows + work.lanes - 1) / work.lanes * work.lanes;
    work.pairs *= double(work.rows) / double(rows_of_head);
    const int64_t tile = work.query_tile;
    const int64_t tiles = work.in_window ? kMostQueryTilesInWindow : kMostQueryTiles;
    int64_t most = std::min(tiles * tile, work.rows);
    while (most > tile && bytes(std::min(most, rows_of_head), false) > kBlockBytes) {
        most = (most - 1) / tile * tile;
    }
    RowCut best;
    best.seconds = std::numeric_limits<double>::infinity();
    for (const bool in_spans : {false, true}) {
        if (in_spans && (threads == 1 || work.keys <= kSpanKeys)) break;
        for (int64_t rows = most; rows > 0; rows -= work.lanes) {
            const size_t needed = bytes(std::min(rows, rows_of_head), in_spans);
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

int64_t partials_at_a_time(int threads, size_t thread_bytes, size_t partial_bytes, double most) {
    const size_t taken = std::min(size_t(threads) * thread_bytes, kForwardBytes);
    const double fit = double(std::min(kPartialsBytes, kForwardBytes - taken) / partial_bytes);
    if (fit > most) return int64_t(most);
    const int64_t some = std::max<int64_t>(int64_t(fit) - 1, 1);  // one is carried on
    return some > threads ? some / threads * threads : some;
}

int64_t blocks_across_heads(int64_t blocks, int64_t heads, int threads) {
    const int64_t wanted = kRoundsAcrossHeads * threads;
    return threads == 1 ? 0 : std::min(blocks, (wanted + heads - 1) / heads);
}

int64_t batches_of_item(int64_t items, int threads) {
    return std::max<int64_t>(items / (kItemsOfThread * threads), 1);
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

bool merges_alone(int threads) { return threads <= 4; }

bool are_alike(double seconds, double others) { return others > kAlikeSeconds * seconds; }

int64_t items_of_wave(int64_t items, int threads) {
    return items > threads ? items / threads * threads : items;
}

int64_t problems_of_item(double seconds, int64_t problems, int threads) {
    const int64_t share = problems / (threads * kShortItemsOfThread);
    return std::clamp<int64_t>(std::min(int64_t(kShortItemSeconds / seconds), share), 1,
                               kMostProblems);
}

double gradient_seconds(int64_t rows, int64_t keys, int64_t columns) {
    return double(rows) * double(keys + kRowKeys) * double(5 * columns + 80) / kGradientFlops;
}

double short_gradient_seconds(int64_t rows, int64_t keys, int64_t columns) {
    return gradient_seconds(rows, keys, columns) + kShortGradientSeconds;
}

// Many, since the first of them is not fetched ahead.
int64_t short_gradients_of_item(int64_t problems, int threads) {
    return std::clamp<int64_t>(problems / (threads * kShortItemsOfThread), 1, kMostProblems);
}

// Fewer keys at a time cost work: rows are read more often. Parts cost memory: each key block has
// its own until it is done.
GradientCut cut_gradients(int64_t key_tile, int threads,
                          const std::function<size_t(int64_t keys)>& bytes,
                          const std::function<GradientLoad(int64_t block_keys)>& load) {
    const size_t each = bytes(key_tile) - bytes(0);
    GradientCut cut{key_tile * std::max<int64_t>(int64_t(kKeyBlockBytes / each), 1), 1, 1, 0};
    if (threads == 1) return cut;
    GradientLoad now = load(cut.block_keys);
    cut.threads = team_size(INT64_MAX, now.total, threads);
    if (cut.threads == 1) return cut;
    const double share = now.total / cut.threads;
    while (now.longest * kKeyBlocksPerThread > share && cut.block_keys > key_tile) {
        cut.block_keys -= key_tile;
        now = load(cut.block_keys);
    }
    cut.threads = team_size(now.key_blocks, now.total, cut.threads);
    const size_t room = 2 * kKeyBlockBytes * size_t(cut.threads);
    if (cut.threads < now.key_blocks && size_t(now.key_blocks) * bytes(cut.block_keys) <= room) {
        cut.parts =
            std::clamp(int(std::lround(now.longest * kPartItemsPerThread / share)), 1, kMostParts);
    }
    cut.longest = now.longest;
    return cut;
}

// Under a window a key block needs few: twice as many for each thread, and none waits for the sums
// of rows that others have passed.
int64_t gradient_places(int64_t all, int64_t most, int64_t in_flight, size_t bytes, int threads) {
    const int64_t wanted = std::min(2 * in_flight, most) * threads;
    const int64_t room = int64_t(kSumsBytes / bytes);
    return std::min(std::max(std::min(wanted, room), in_flight), all);
}

// As many chains at a time as there are places for; of these, key block by key block. An item waits
// only for those before it: earlier key blocks, parts and chains.
void order_gradients(const std::vector<GradientChain>& chains, int64_t places, int parts,
                     const std::function<void(size_t, int64_t, int)>& add) {
    for (size_t first = 0, past; first < chains.size(); first = past) {
        int64_t row_blocks = 0;
        for (past = first; past < chains.size(); ++past) {
            row_blocks += chains[past].row_blocks;
            if (past > first && row_blocks > places) break;
        }
        for (int part = 0; part < parts; ++part) {
            std::vector<size_t> left(past - first);
            std::iota(left.begin(), left.end(), first);
            for (int64_t i = 0; !left.empty(); ++i) {
                for (const size_t chain : left) add(chain, i, part);
                std::erase_if(left,
                              [&](size_t chain) { return chains[chain].key_blocks == i + 1; });
            }
        }
    }
}

}  // namespace fastattn
