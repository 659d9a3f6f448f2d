// SPDX-License-Identifier: Apache-2.0
//
// Scheduling policy: how many threads share a call, into what it is cut, and what runs first. Pure
// arithmetic on sizes and a number of threads, so that 96 threads can be asked about without having
// them. Read by all who call parallel_for; what they cut with it, plan_attention() and its like
// tell as a Schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
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

// ---- Gradients (backward.cpp has the words) ----

// A key block visits its row blocks from the last to the first, but so many of them first to last:
// memory is fetched ahead in that direction. It decides the bits of dK and dV.
constexpr int64_t kRowBlocksInRun = 4;

// The time on one thread for the gradients of rows and the keys that they see, roughly.
double gradient_seconds(int64_t rows, int64_t keys, int64_t columns);

struct GradientLoad {
    int64_t key_blocks;
    double longest, total;  // seconds, of the key blocks
};
struct GradientCut {
    int64_t block_keys;
    int parts;  // of the rows that see a key block: each an item, done one after the other
    int threads;
};
// bytes: a thread's scratch memory for so many keys.
GradientCut cut_gradients(int64_t key_tile, int threads,
                          const std::function<size_t(int64_t keys)>& bytes,
                          const std::function<GradientLoad(int64_t block_keys)>& load);

// For how many row blocks there are sums at a time, of so many bytes each. There are `all` row
// blocks, `most` in one chain, and `in_flight` are needed at the same time in any case.
int64_t gradient_places(int64_t all, int64_t most, int64_t in_flight, size_t bytes, int threads);

struct GradientChain {
    int64_t row_blocks, key_blocks;
};
// Calls add(chain, key_block, part) in the order in which items start.
void order_gradients(const std::vector<GradientChain>& chains, int64_t places, int parts,
                     const std::function<void(size_t, int64_t, int)>& add);

}  // namespace fastattn
