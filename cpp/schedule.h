// SPDX-License-Identifier: Apache-2.0
//
// Scheduling policy: how many threads share a call, into what it is cut, and what runs first. Pure
// arithmetic on sizes and a number of threads, so that 96 threads can be asked about without having
// them. Read by all who call parallel_for; what they cut with it, plan_attention() and its like
// tell as a Schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastattn {

// The team for so many items that take about so many seconds together on one thread: one thread
// where waking a team would cost more than it saves.
int team_size(int64_t items, double seconds, int threads);

// Part of an item. With a place, it has its turn there: it ends after the steps that have lower
// turns, and what comes after it in its item waits for that.
struct Step {
    double seconds;  // on one thread, roughly
    int64_t place = -1, turn = 0;
};

// Items in the order in which they start; each is done by one thread.
struct Phase {
    int threads;
    std::vector<std::vector<Step>> items;
};

// A call as its threads will see it; a phase begins when the one before it has ended.
struct Schedule {
    std::vector<Phase> phases;
    size_t scratch_bytes = 0;  // all threads together, at most
};

}  // namespace fastattn
