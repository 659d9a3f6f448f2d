// SPDX-License-Identifier: Apache-2.0
//
// The one seam to threads. attention.cpp, decode.cpp, backward.cpp, linear.cpp, layers.cpp and
// limits.cpp say what the items of work are; parallel.cpp knows about OpenMP, forks and Ctrl-C.
#pragma once

#include <cstdint>
#include <functional>

#include "attention.h"
#include "kernel/kernel.h"
#include "schedule.h"

namespace fastattn {

// What team_size() (schedule.h) is asked with, once per call: get_num_threads(), or 1 within a
// parallel region.
int threads_at_hand();

// Runs body(item, worker, stop) for every item in [0, items), worker in [0, threads). A body looks
// at stop now and then and returns early when it says so. False: interrupted, some items did not
// run. The body must not throw or allocate. The caller's thread is worker 0. more: other calls
// follow soon, as those of a model's layers do, and the team stays awake for them a little longer.
using Body = std::function<void(int64_t item, int worker, const Stop& stop)>;
bool parallel_for(int64_t items, int threads, Interrupt interrupt, const Body& body,
                  bool more = false);

// Whether calls of this thread run their team on it, in the pool that OpenMP keeps for it, and not
// in a pool of their own. Right where the thread uses that pool anyway, as PyTorch's operators do:
// of two pools, one makes the other slow (libgomp then lets waiting threads sleep at once). In a
// forked child, where the pool is not, it makes no difference.
void use_pool_of_caller(bool use);

}  // namespace fastattn
