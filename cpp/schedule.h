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

// A number of threads, or whom to ask for it: that takes longer than small calls can wait.
class Threads {
   public:
    Threads(int number) : number_(number) {}
    Threads(int (*ask)()) : ask_(ask) {}
    operator int() const { return ask_ == nullptr ? number_ : ask_(); }

   private:
    int number_ = 0;
    int (*ask_)() = nullptr;
};

// The team for so many items that take about so many seconds together on one thread: as many as
// have work that is worth being woken for.
int team_size(int64_t items, double seconds, const Threads& threads);

constexpr double kFlopsOfLane = 17e9;  // a second, of one thread, for each lane of its vectors

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
    int64_t keys = 1;  // that one of its rows sees, at least
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

// How many batch elements that have the same bias are in an item, of which there were so many.
int64_t batches_of_item(int64_t items, int threads);

// Decoding (decode.cpp). A task attends with some rows to a split of the keys.

// Memory, at most, where one row does not need more: with the lists less than 16 MiB.
constexpr size_t kTeamBytes = 43 << 18;     // scratch memory of all threads
constexpr size_t kCarriedBytes = 5 << 18;   // partials of what is merged so far
constexpr size_t kWaitingBytes = 13 << 18;  // partials that are not merged yet
constexpr size_t kMostMembers = 2048;       // that are worked on at a time
constexpr size_t kMostShares = 4096;        // of members in the tasks of a list

// In seconds of one thread, roughly.
struct DecodeCosts {
    double key_bytes, pair_flops, row_bytes;  // a key and its value; a query and a key; a partial

    double attend(double keys, double pairs) const;
    double merge(double rows) const;
};

// So many rows of a task, at most, and for so many threads is there memory for them.
struct TaskShape {
    int64_t rows;
    int threads;
};

// Into how many rows tasks of `rows` are cut, of which there are `items` to be done: as few as make
// the team end soonest. row_bytes: of a partial; scratch_bytes, seconds: of a task of so many rows.
TaskShape shape_tasks(int64_t rows, int64_t least_rows, int64_t items, int threads,
                      size_t row_bytes, const std::function<size_t(int64_t)>& scratch_bytes,
                      const std::function<double(int64_t)>& seconds);

// How many rows may attend together in a task, so that there is memory for all threads and heads.
int64_t rows_together(int64_t rows, int threads, int64_t heads, size_t row_bytes,
                      const std::function<size_t(int64_t)>& scratch_bytes);

// How many members that see the same keys attend to them together, so that they are read once, and
// all threads have work.
int64_t members_of_task(int64_t items, int threads);

// Whether one thread merges all partials of a wave, at its end. While a team attends, what merging
// looks at leaves the caches: a small team loses more by that than the rest waits for one thread.
bool merges_alone(int threads);

// Whether two tasks, of which the first takes longer, may run in any order.
bool are_alike(double seconds, double others);

// How many of the items make a wave, where there is no memory for more: whole rounds of the team.
int64_t items_of_wave(int64_t items, int threads);

// Short problems (short.cpp).

// How many of them are an item, of so many that take so many seconds each.
constexpr int64_t kMostProblems = 64;
int64_t problems_of_item(double seconds, int64_t problems, int threads);

// Gradients (backward.cpp has the words).

// A key block visits its row blocks from the last to the first, but so many of them first to last:
// memory is fetched ahead in that direction. It decides the bits of dK and dV.
constexpr int64_t kRowBlocksInRun = 4;

// The time on one thread for the gradients of rows and the keys that they see, roughly.
double gradient_seconds(int64_t rows, int64_t keys, int64_t columns);

// The same for a problem of few rows and few keys, and how many of them are an item.
double short_gradient_seconds(int64_t rows, int64_t keys, int64_t columns);
int64_t short_gradients_of_item(int64_t problems, int threads);

struct GradientLoad {
    int64_t key_blocks;
    double longest, total;  // seconds, of the key blocks
};
struct GradientCut {
    int64_t block_keys;
    int parts;  // of the rows that see a key block: each an item, done one after the other
    int threads;
    double longest;  // seconds, of a key block; 0 on one thread
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
