// SPDX-License-Identifier: Apache-2.0
//
// See schedule.h.
#include "schedule.h"

#include <algorithm>
#include <limits>

namespace fastattn {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr double kTeamSeconds = 0;  // small calls have a team, too: there is more to see
#else
constexpr double kTeamSeconds = 10e-6;  // what waking a team costs
#endif

constexpr int64_t kItemsPerThread = 2;  // that sharing keys leaves, at least
constexpr double kWorthCutting = 0.8;   // of the time without: each cut reads the keys again

// Of one thread.
constexpr double kBytesPerSecond = 25e9, kFlopsPerSecond = 200e9;
constexpr double kTaskSeconds = 0.5e-6, kMergedRowSeconds = 50e-9;

}  // namespace

int team_size(int64_t items, double seconds, int threads) {
    if (items <= 1 || seconds < 2 * kTeamSeconds) return 1;
    return int(std::min<int64_t>(items, threads));
}

double DecodeCosts::attend(double keys, double pairs) const {
    return kTaskSeconds + keys * key_bytes / kBytesPerSecond + pairs * pair_flops / kFlopsPerSecond;
}

double DecodeCosts::merge(double rows) const {
    return rows * (kMergedRowSeconds + row_bytes / kBytesPerSecond);
}

TaskShape shape_tasks(int64_t rows, int64_t least_rows, int64_t items, int threads,
                      const std::function<size_t(int64_t)>& scratch_bytes,
                      const std::function<double(int64_t)>& seconds) {
    TaskShape best{rows, 1};
    if (threads == 1) return best;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t some = rows; some == rows || some >= least_rows; some /= 2) {
        const size_t room = kTeamBytes / scratch_bytes(some);
        const int team = int(std::clamp<size_t>(room, 1, size_t(threads)));
        const int64_t all = items * ((rows + some - 1) / some);
        const double end = double((all + team - 1) / team) * seconds(some);
        if (end < kWorthCutting * least) best = {some, team}, least = end;
        if (some == 1) break;
    }
    return best;
}

int64_t rows_together(int64_t rows, int threads, size_t row_bytes,
                      const std::function<size_t(int64_t)>& scratch_bytes) {
    while (rows > 1 && (size_t(threads) * scratch_bytes(rows) > kTeamBytes ||
                        size_t(rows) * row_bytes > kWaitingBytes)) {
        rows /= 2;
    }
    return rows;
}

int64_t members_of_task(int64_t items, int threads) {
    return std::max<int64_t>(items / (threads * kItemsPerThread), 1);
}

bool are_alike(double seconds, double others) { return others > 0.75 * seconds; }

int64_t items_of_wave(int64_t items, int threads) {
    return items > threads ? items / threads * threads : items;
}

}  // namespace fastattn
