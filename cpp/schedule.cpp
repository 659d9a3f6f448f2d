// SPDX-License-Identifier: Apache-2.0
//
// See schedule.h.
#include "schedule.h"

#include <algorithm>

namespace fastattn {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr double kTeamSeconds = 0;  // small calls have a team, too: there is more to see
#else
constexpr double kTeamSeconds = 10e-6;  // what waking a team costs
#endif

}  // namespace

int team_size(int64_t items, double seconds, int threads) {
    if (items <= 1 || seconds < 2 * kTeamSeconds) return 1;
    return int(std::min<int64_t>(items, threads));
}

}  // namespace fastattn
