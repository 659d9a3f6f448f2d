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

// Prefill (attention.cpp): the rows of each head are cut into blocks, of whole vectors but for the
// last, and if need be their keys into spans.

constexpr size_t kForwardBytes = 15 << 20;  // of all threads; 16 MiB are promised
constexpr int64_t kMostUnits = 1 << 12, kMostSorted = 1 << 15;  // in a list
constexpr double kMergeBytesPerSecond = 8e9;                    // of partials

// What rows cost one thread, in seconds, roughly.
struct RowCosts {
    double pair;  // of a row and a key
    double key;   // which is read, and made ready, once for all rows of a block
    double row;   // which is loaded, and whose result is stored

    RowCosts(int64_t head_dim, int64_t value_head_dim, int64_t lanes, bool widens);
    double block(double rows, double keys) const { return keys * (rows * pair + key) + rows * row; }
};

// What there is to cut: of unlike heads, the largest.
struct RowsToCut {
    double heads;      // of all sequences, key heads
    int64_t rows = 0;  // of a head
    int64_t keys = 0;  // that one of its rows sees
    double pairs = 0;  // of all rows with the keys that they see
    int64_t lanes, query_tile;
    bool in_window;
};

struct RowCut {
    int64_t rows = 1;       // of a block
    bool in_spans = false;  // what several threads have of a block is merged
    int threads = 1;
    double seconds = 0;  // that this takes, roughly
};

// bytes: what a thread needs for blocks of so many rows; in spans, a partial is among it.
RowCut cut_rows(RowsToCut work, const RowCosts& costs, int threads,
                const std::function<size_t(int64_t rows, bool in_spans)>& bytes);

// How many partials may wait to be merged.
int64_t partials_at_a_time(int threads, size_t thread_bytes, size_t partial_bytes, double most);

// Of each head's blocks the last ones, which run one after the other across all heads, so that the
// shortest end last. Those before run head by head, whose keys stay near.
int64_t blocks_across_heads(int64_t blocks, int64_t heads, int threads);

}  // namespace fastattn
