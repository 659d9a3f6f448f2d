// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a linear layer: an item is some rows of the weight, and all rows of x or,
// if that is too little work for all threads, some of them. Called by src/linear.cpp; calls the
// kernel's table (kernel/kernel.h) through parallel_for.
#include "linear.h"

#include <algorithm>

#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"

namespace fastattn {
namespace {

constexpr int64_t kColumns = 24;            // an item's rows of the weight: a multiple of these
constexpr int64_t kRows = 64;               // an item's rows of x, at least, if they are cut
constexpr int64_t kBlockBytes = 320 << 10;  // of weights as float, which stay near
constexpr int64_t kItemsPerThread = 4;
constexpr double kItemFlops = 2e9;  // at most, if rows can be cut: between two looks at Ctrl-C
constexpr double kBytes = 1e10;     // a second, of one thread; roughly

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool linear(const LinearArgs& args, Interrupt interrupt) {
    if (args.rows == 0 || args.out_features == 0) return true;
    const LinearFunctions& functions = kernel().linear;
    const double work = double(args.in_features) * double(args.out_features);
    const double bytes = double(args.weight_stride) * double(args.out_features);
    const double seconds =
        std::max(2 * work * double(args.rows) / (kFlopsOfLane * double(kernel().float32.lanes)),
                 bytes / kBytes);
    const int64_t wanted = kItemsPerThread * team_size(kMostThreads, seconds, threads_at_hand);

    // Few rows leave no widened weights that should stay near.
    const int64_t part = std::clamp<int64_t>(args.in_features, 1, functions.most_features);
    const int64_t near = kBlockBytes / (part * 4);
    const int64_t most = args.rows <= functions.few_rows ? args.out_features : near;
    const int64_t even = ceil_div(args.out_features, wanted);
    const int64_t columns =
        ceil_div(std::clamp<int64_t>(even, 1, std::max<int64_t>(most, 1)), kColumns) * kColumns;
    const int64_t column_blocks = ceil_div(args.out_features, columns);
    const double row_flops = 2 * double(args.in_features) * double(columns);
    const double most_rows = std::min(kItemFlops / std::max(row_flops, 1.0), double(args.rows));
    const int64_t share = ceil_div(args.rows, std::max<int64_t>(wanted / column_blocks, 1));
    const int64_t rows =
        ceil_div(std::clamp<int64_t>(share, kRows, std::max<int64_t>(kRows, int64_t(most_rows))),
                 8) *
        8;
    const int64_t items = column_blocks * ceil_div(args.rows, rows);
    const int threads = team_size(items, seconds, threads_at_hand);

    const auto block = [&](int64_t item, void* scratch) {
        const int64_t row = item / column_blocks * rows, column = item % column_blocks * columns;
        LinearBlock one;
        one.x = args.x + row * args.x_stride;
        one.weight = static_cast<const char*>(args.weight) + column * args.weight_stride;
        one.bias = args.bias == nullptr ? nullptr : args.bias + column;
        one.out = args.out + row * args.out_features + column;
        one.rows = std::min(rows, args.rows - row);
        one.in_features = args.in_features;
        one.out_features = std::min(columns, args.out_features - column);
        one.x_stride = args.x_stride;
        one.out_stride = args.out_features;
        one.weight_stride = args.weight_stride;
        one.storage = args.storage;
        one.scratch = scratch;
        return one;
    };
    const size_t scratch_bytes = functions.scratch_bytes(block(0, nullptr));
    const Memory memory = allocate(scratch_bytes * size_t(threads));
    const auto multiply = [&](int64_t item, int worker, const Stop& stop) {
        if (stop.requested(stop.context)) return;
        char* const mine = memory.get() + size_t(worker) * scratch_bytes;
        functions.multiply(block(item, mine));
        take_back(mine, scratch_bytes);
    };
    return parallel_for(items, threads, interrupt, multiply, {.more = true});
}

}  // namespace fastattn
