// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a linear layer: an item is some rows of the weight, and all rows of x or,
// if that is too little work for all threads, some of them. Called by src/linear.cpp; calls the
// kernel's table (kernel/kernel.h) through parallel_for.
#include "linear.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <memory>

#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"

namespace fastattn {
namespace {

constexpr int64_t kLeast = 32;              // features that scratch memory is made for
constexpr int64_t kColumns = 24;            // an item's rows of the weight: a multiple of these
constexpr int64_t kRows = 64;               // an item's rows of x, at least, if they are cut
constexpr int64_t kBlockBytes = 320 << 10;  // of weights as float, which stay near
constexpr int64_t kItemsPerThread = 4;
constexpr double kItemFlops = 2e9;  // at most, if rows can be cut: between two looks at Ctrl-C
constexpr int64_t kItemBytes = 100 << 20;  // of weights at most, of few rows: likewise
constexpr double kBytes = 1e10;            // a second, of one thread; roughly

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What each float16 is, by its bits. Leaked on purpose: a call may still run while the process
// exits. No lock, which a fork in another thread would leave behind. No number on the way is
// subnormal, which a process may have set to count as 0.
const float* halves() {
    using Table = std::array<float, 1 << 16>;
    static std::atomic<const Table*> all{nullptr};
    const Table* found = all.load(std::memory_order_acquire);
    if (found != nullptr) return found->data();
    auto fresh = std::make_unique<Table>();
    for (uint32_t bits = 0; bits < fresh->size(); ++bits) {
        const uint32_t sign = bits >> 15 << 31, exponent = bits >> 10 & 31;
        const uint32_t fraction = bits & 1023;
        const uint32_t whole = exponent == 0 ? std::bit_cast<uint32_t>(float(fraction) * 0x1p-24f)
                               : exponent == 31 ? 0x7f800000 | fraction << 13
                                                : (exponent + 112) << 23 | fraction << 13;
        (*fresh)[bits] = std::bit_cast<float>(sign | whole);
    }
    if (all.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel)) {
        found = fresh.release();
    }
    return found->data();
}

double bytes_of(const LinearArgs& args) {
    return double(args.weight_stride) * double(args.out_features);
}

double flops_of(const LinearArgs& args) {
    return 2 * double(args.rows) * double(args.in_features) * double(args.out_features);
}

// A layer cut into items. even: out_features of an item, if nothing else speaks.
class Cut {
   public:
    Cut(const LinearArgs& args, int64_t even, int64_t wanted) : args_(args) {
        const LinearFunctions& functions = kernel().linear;
        // Few rows leave no widened weights that should stay near.
        const int64_t part = std::clamp<int64_t>(args.in_features, kLeast, functions.most_features);
        const int64_t near = kBlockBytes / (part * 4);
        const int64_t row_bytes = std::max<int64_t>(std::abs(args.weight_stride), 1);
        const int64_t most = args.rows <= functions.few_rows ? kItemBytes / row_bytes : near;
        columns_ = ceil_div(std::clamp<int64_t>(even, 1, std::max<int64_t>(most, 1)), kColumns);
        columns_ *= kColumns;
        column_blocks_ = ceil_div(args.out_features, columns_);
        const double row_flops = 2 * double(args.in_features) * double(columns_);
        const double most_rows = std::min(kItemFlops / std::max(row_flops, 1.0), double(args.rows));
        const int64_t share = ceil_div(args.rows, std::max<int64_t>(wanted / column_blocks_, 1));
        const int64_t at_most = std::max<int64_t>(kRows, int64_t(most_rows));
        rows_ = ceil_div(std::clamp<int64_t>(share, kRows, at_most), 8) * 8;
    }
    int64_t items() const { return column_blocks_ * ceil_div(args_.rows, rows_); }
    LinearBlock block(int64_t item, void* scratch) const {
        const int64_t row = item / column_blocks_ * rows_;
        const int64_t column = item % column_blocks_ * columns_;
        LinearBlock one;
        one.x = args_.x + row * args_.x_stride;
        one.weight = static_cast<const char*>(args_.weight) + column * args_.weight_stride;
        one.bias = args_.bias == nullptr ? nullptr : args_.bias + column;
        one.out = args_.out + row * args_.out_features + column;
        one.rows = std::min(rows_, args_.rows - row);
        one.in_features = args_.in_features;
        one.out_features = std::min(columns_, args_.out_features - column);
        one.x_stride = args_.x_stride;
        one.out_stride = args_.out_features;
        one.weight_stride = args_.weight_stride;
        one.storage = args_.storage;
        one.halves = args_.storage < Storage::kQ8_0 ? nullptr : halves();
        one.scratch = scratch;
        return one;
    }

   private:
    const LinearArgs& args_;
    int64_t columns_, column_blocks_, rows_;
};

}  // namespace

bool linear(const std::vector<LinearArgs>& layers, Interrupt interrupt) {
    if (layers.empty()) return true;
    const LinearFunctions& functions = kernel().linear;
    double seconds = 0;
    int64_t out_features = 0;
    for (const LinearArgs& args : layers) {
        const double flops = kFlopsOfLane * double(kernel().float32.lanes);
        seconds += std::max(flops_of(args) / flops, bytes_of(args) / kBytes);
        out_features += args.out_features;
    }
    const int64_t wanted = kItemsPerThread * team_size(kMostThreads, seconds, threads_at_hand);
    std::vector<Cut> cuts;
    std::vector<int64_t> ends;
    size_t scratch_bytes = 0;
    for (const LinearArgs& args : layers) {
        const Cut& cut = cuts.emplace_back(args, ceil_div(out_features, wanted), wanted);
        ends.push_back((ends.empty() ? 0 : ends.back()) + cut.items());
        scratch_bytes = std::max(scratch_bytes, functions.scratch_bytes(cut.block(0, nullptr)));
    }
    const int64_t items = ends.back();
    const int threads = team_size(items, seconds, threads_at_hand);
    const Memory memory = allocate(scratch_bytes * size_t(threads));
    const auto multiply = [&](int64_t item, int worker, const Stop& stop) {
        if (stop.requested(stop.context)) return;
        char* const mine = memory.get() + size_t(worker) * scratch_bytes;
        const auto layer = size_t(std::upper_bound(ends.begin(), ends.end(), item) - ends.begin());
        const int64_t begin = layer == 0 ? 0 : ends[layer - 1];
        functions.multiply(cuts[layer].block(item - begin, mine));
        take_back(mine, scratch_bytes);
    };
    return parallel_for(items, threads, interrupt, multiply, {.more = true});
}

}  // namespace fastattn
