// SPDX-License-Identifier: Apache-2.0
//
// The one seam to threads. attention.cpp, decode.cpp, backward.cpp, linear.cpp, layers.cpp and
// limits.cpp say what the items of work are; parallel.cpp knows about threads, forks and Ctrl-C.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

#include "attention.h"
#include "kernel/kernel.h"
#include "schedule.h"

namespace fastattn {

// For team_size() (schedule.h), once per call: get_num_threads(), or 1 within a parallel region.
int threads_at_hand();

struct Hints {
    bool more = false;        // other calls follow soon, as those of a model's layers do
    double item_seconds = 0;  // of the longest item on one thread, roughly
};

// Runs body(item, worker, stop) for every item in [0, items), worker in [0, threads). Items begin
// in their order. A body looks at stop now and then and returns early when it says so. False:
// interrupted, some items did not run. The body must not throw or allocate. The caller's thread is
// worker 0.
using Body = std::function<void(int64_t item, int worker, const Stop& stop)>;
bool parallel_for(int64_t items, int threads, Interrupt interrupt, const Body& body,
                  const Hints& hints = {});

// How often the items of a parallel_for had to begin again, all of them, in a child that a signal
// handler forked amid some of them: what they give must not depend on what they gave before.
int times_begun_again();
[[noreturn]] void throw_begun_again();  // of a call whose items cannot be done twice

// Asks about Ctrl-C between calls of parallel_for that are each too short to do so.
class Patience {
   public:
    explicit Patience(Interrupt interrupt) : interrupt_(interrupt) {}
    bool ended();  // true: interrupted

   private:
    const Interrupt interrupt_;
    std::chrono::steady_clock::time_point asked_{};  // when the first was to begin, or later
};

// While it is on, calls of this thread run alone, cut as for get_num_threads(), and the seconds of
// each item are kept, for a simulator. recorded_items(): of each parallel_for since, which are then
// forgotten.
void record_items(bool on);
std::vector<std::vector<double>> recorded_items();

// Whether calls of this thread run their team on it, in the pool that OpenMP keeps for it, as long
// as that is awake. Right where the thread uses that pool anyway, as PyTorch's operators do: its
// threads spin for a while, on the CPUs that others would need. In a forked child, where the pool
// is not, it makes no difference.
void use_pool_of_caller(bool use);

}  // namespace fastattn
