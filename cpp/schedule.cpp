// SPDX-License-Identifier: Apache-2.0
//
// See schedule.h.
#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fastattn {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr double kTeamSeconds = 0;  // small calls have a team, too: there is more to see
#else
constexpr double kTeamSeconds = 10e-6;  // what waking a team costs
#endif

// Of gradients.
constexpr size_t kBlockBytes = 1 << 20;    // of what is kept of a key block: for the caches
constexpr size_t kSumsBytes = 64 << 20;    // of the queries' gradients, unless one chain has more
constexpr double kKeyBlocksPerThread = 3;  // as long as the longest one: threads end together
constexpr double kItemsPerThread = 4;      // the same, of parts, which cost no work
constexpr int kMostParts = 4;              // of a key block: each waits for the one before
constexpr double kGradientFlops = 50e9;    // a second, of one thread
constexpr int64_t kRowKeys = 8;            // what it costs to read a row, in keys that it sees

}  // namespace

int team_size(int64_t items, double seconds, int threads) {
    if (items <= 1 || seconds < 2 * kTeamSeconds) return 1;
    return int(std::min<int64_t>(items, threads));
}

double gradient_seconds(int64_t rows, int64_t keys, int64_t columns) {
    return double(rows) * double(keys + kRowKeys) * double(5 * columns + 80) / kGradientFlops;
}

// Fewer keys at a time cost work: rows are read more often. Parts cost memory: each key block has
// its own until it is done.
GradientCut cut_gradients(int64_t key_tile, int threads,
                          const std::function<size_t(int64_t keys)>& bytes,
                          const std::function<GradientLoad(int64_t block_keys)>& load) {
    const size_t each = bytes(key_tile) - bytes(0);
    GradientCut cut{key_tile * std::max<int64_t>(int64_t(kBlockBytes / each), 1), 1, 1};
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
    const size_t room = 2 * kBlockBytes * size_t(cut.threads);
    if (cut.threads < now.key_blocks && size_t(now.key_blocks) * bytes(cut.block_keys) <= room) {
        cut.parts =
            std::clamp(int(std::lround(now.longest * kItemsPerThread / share)), 1, kMostParts);
    }
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
