// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a call with many queries: cuts each sequence into row blocks, which share
// a key and value head, gives each thread its scratch memory, and lets the kernel attend. Called by
// src/; calls the kernel's table (kernel/kernel.h) through parallel_for. Sequences that are decoded
// go to decode.cpp.
#include "attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"

namespace fastattn {
namespace {

// Query tiles of a row block: each key tile is brought near once for all of them, so the more the
// better, while they stay in the second-level cache, leave each thread a choice of blocks, and keep
// the promise that extra memory is small. Beyond 4 only a window gains, whose blocks overlap in
// keys.
constexpr int kMostQueryTiles = 4, kMostQueryTilesInWindow = 8;
constexpr size_t kBlockBytes = 384 << 10;  // of one thread
constexpr size_t kAllBlockBytes = 8 << 20;
constexpr int64_t kBlocksPerThread = 16;
constexpr double kMostVisited = 2e7;  // tiles; plan() takes seconds to look at so many

// The row blocks of all sequences, or of those that are not decoded.
class Blocks {
   public:
    Blocks(const Call& call, bool every)
        : call_(call), args_(call.args), functions_(call.functions), every_(every) {
        if (args_.kv_heads == 0) return;
        double seconds = 0;
        const int64_t unlike = call.packed() ? call.batches : std::min<int64_t>(call.batches, 1);
        for (int64_t batch = 0; batch < unlike; ++batch) {
            const Sequence sequence = call.sequence(batch);
            if (!included(sequence)) continue;
            most_rows_ = std::max(most_rows_, rows(sequence));
            seconds += call.seconds(sequence);
        }
        if (most_rows_ == 0) return;
        if (!call.packed()) seconds *= double(call.batches);
        cut(1);
        threads_ = team_size(items(), seconds, call.threads);

        const bool in_window = call.visible_at_most() < args_.kv_len;
        across_heads_ = in_window && args_.key.head_stride < args_.key.row_stride;
        int query_tiles = in_window ? kMostQueryTilesInWindow : kMostQueryTiles;
        const size_t room = std::min(kBlockBytes, kAllBlockBytes / size_t(threads_));
        for (; query_tiles > 1; query_tiles /= 2) {
            cut(query_tiles);
            if (items() >= kBlocksPerThread * threads_ && room_for(kernel_bytes()) <= room) break;
        }
        cut(query_tiles);
        kernel_bytes_ = kernel_bytes();
        partials_bytes_ = args_.kv_parts == nullptr ? 0 : partials_bytes();
        Scratch scratch;
        BlockMemory(block_rows_, kernel_bytes_, scratch);
        for (int part = 0; part < 2; ++part) scratch.take<char>(partials_bytes_);
        scratch_bytes_ = scratch.used();
    }

    bool run(Interrupt interrupt) const {
        if (items() == 0) return true;
        const Memory memory = allocate(scratch_bytes_ * size_t(threads_));
        return parallel_for(items(), threads_, interrupt,
                            [&](int64_t item, int worker, const Stop& stop) {
                                char* const mine = memory.get() + size_t(worker) * scratch_bytes_;
                                attend(item, mine, stop);
                                take_back(mine, scratch_bytes_);
                            });
    }

    // All sequences must be of the same lengths.
    Plan plan() const {
        const TileCounts counts = items() == 0 ? TileCounts{} : count();
        Plan plan;
        plan.query_tile = functions_.query_tile;
        plan.key_tile = functions_.key_tile;
        plan.threads = threads_;
        plan.tiles = counts.skipped + counts.computed;
        plan.tiles_skipped = counts.skipped;
        plan.tiles_edge = counts.edge;
        plan.pairs_computed = counts.pairs;
        plan.scratch_bytes = scratch_bytes_ * size_t(threads_);
        return plan;
    }

   private:
    bool included(const Sequence& sequence) const {
        return every_ || !call_.decodes(sequence.q_len);
    }
    int64_t rows(const Sequence& sequence) const { return sequence.q_len * call_.group; }
    int64_t blocks(const Sequence& sequence) const {
        return (rows(sequence) + block_rows_ - 1) / block_rows_;
    }
    int64_t items() const { return all_blocks_ * args_.kv_heads; }

    // Cuts the rows into blocks of so many query tiles.
    void cut(int query_tiles) {
        block_rows_ = std::min<int64_t>(most_rows_, int64_t(query_tiles) * functions_.query_tile);
        blocks_ = (most_rows_ + block_rows_ - 1) / block_rows_;
        all_blocks_ = blocks_ * call_.batches;
        if (!call_.packed()) return;
        first_block_.clear();
        all_blocks_ = 0;
        for (int64_t batch = 0; batch < call_.batches; ++batch) {
            const Sequence sequence = call_.sequence(batch);
            first_block_.push_back(all_blocks_);
            if (included(sequence)) all_blocks_ += blocks(sequence);
        }
    }

    size_t kernel_bytes() const {
        Block block = call_.shared_block();
        block.row_count = int(block_rows_);
        return functions_.scratch_bytes(block);
    }

    // Of batch elements, heads and blocks that are alike, it visits one and counts it for all.
    TileCounts count() const {
        const int64_t batches = call_.batches;
        const int64_t some_batches = batches_are_alike(batches) ? 1 : batches;
        const int64_t some_heads = heads_are_alike() ? 1 : args_.kv_heads;
        // The first of them is the last of the rows, which may be less than full.
        const int64_t some_blocks = blocks_are_alike() ? std::min<int64_t>(blocks_, 2) : blocks_;
        require_quick(double(some_batches) * double(some_heads) * double(some_blocks));

        const Memory memory = allocate(scratch_bytes_);
        TileCounts counts{};
        for (int64_t i = 0; i < some_batches * some_heads * some_blocks; ++i) {
            const int64_t index = i % some_blocks;
            const int64_t head = i / some_blocks % some_heads;
            const int64_t batch = i / some_blocks / some_heads;
            TileCounts one{};
            const Sequence sequence = call_.sequence(batch);
            functions_.count(block(sequence, head, blocks_ - 1 - index, memory.get(), {}), one);
            take_back(memory.get(), scratch_bytes_);
            int64_t times = batches / some_batches * (args_.kv_heads / some_heads);
            if (index > 0) times *= (blocks_ - 1) / (some_blocks - 1);
            counts.skipped += times * one.skipped;
            counts.edge += times * one.edge;
            counts.computed += times * one.computed;
            counts.pairs += times * one.pairs;
        }
        return counts;
    }

    bool batches_are_alike(int64_t batches) const {
        for (const Array* array : {&args_.mask, &args_.bias}) {
            for (const int64_t stride : array->batch_strides) {
                if (stride != 0) return false;
            }
        }
        for (const int64_t* array : {args_.query_offset, args_.kv_lengths}) {
            for (int64_t i = 1; array != nullptr && i < batches; ++i) {
                if (array[i] != array[0]) return false;
            }
        }
        return true;
    }

    bool heads_are_alike() const {
        return args_.mask.head_stride == 0 && args_.bias.head_stride == 0;
    }

    bool blocks_are_alike() const {
        return heads_are_alike() && args_.mask.row_stride == 0 && args_.bias.row_stride == 0 &&
               args_.left == kUnlimited && args_.right == kUnlimited;
    }

    void require_quick(double blocks) const {
        const bool every_tile = args_.mask.data != nullptr || args_.bias.data != nullptr;
        const double tiles = blocks * double(block_rows_) / functions_.query_tile *
                             (every_tile ? double(args_.kv_len) / functions_.key_tile : 1);
        if (tiles <= kMostVisited) return;
        throw std::invalid_argument(
            "explain looks at each tile of a mask or bias, and at one of each row of tiles in a "
            "window or below a diagonal, at most " +
            std::to_string(int64_t(kMostVisited)) + ", but there are " +
            std::to_string(int64_t(tiles)));
    }

    int64_t partials_bytes() const {
        return block_rows_ * int64_t(functions_.decode.partial_bytes(call_.shared_block()));
    }

    // Some rows of a head.
    struct Place {
        int64_t batch, head, index;
    };

    // Late blocks first: under a causal mask they are the long ones, and what ends last is short.
    Place place(int64_t item) const {
        const int64_t heads = args_.kv_heads;
        if (call_.packed()) {
            const int64_t index = item / heads;
            const auto next = std::upper_bound(first_block_.begin(), first_block_.end(), index) - 1;
            const int64_t batch = next - first_block_.begin();
            return {batch, item % heads, blocks(call_.sequence(batch)) - 1 - (index - *next)};
        }
        const int64_t in_batch = item % (heads * blocks_);
        const int64_t head = across_heads_ ? in_batch % heads : in_batch / blocks_;
        const int64_t index = across_heads_ ? in_batch / heads : in_batch % blocks_;
        return {item / (heads * blocks_), head, blocks_ - 1 - index};
    }

    // memory: scratch_bytes_ of it.
    void attend(int64_t item, char* memory, const Stop& stop) const {
        const Place at = place(item);
        const auto part = [&](const Sequence& sequence) {
            return block(sequence, at.head, at.index, memory, stop);
        };
        const Block newest = part(call_.sequence(at.batch));
        if (!call_.has_first_part(at.batch)) return functions_.attend(newest, nullptr);
        Scratch scratch(memory);
        BlockMemory(block_rows_, kernel_bytes_, scratch);
        char* const partials = scratch.take<char>(partials_bytes_);
        char* const later = scratch.take<char>(partials_bytes_);
        functions_.attend(part(call_.first_part(at.batch)), partials);
        functions_.attend(part(call_.sequence(at.batch)), later);
        functions_.decode.merge(newest, partials, later);
        functions_.decode.finish(newest, partials);
    }

    // memory: scratch_bytes_ of it.
    Block block(const Sequence& sequence, int64_t kv_head, int64_t index, char* memory,
                const Stop& stop) const {
        const int64_t first = index * block_rows_;
        Scratch scratch(memory);
        const BlockMemory mine(block_rows_, kernel_bytes_, scratch);
        Block block = call_.shared_block();
        block.rows = mine.rows;
        block.row_count = int(std::min(rows(sequence) - first, block_rows_));
        block.scratch = mine.kernel;
        block.stop = stop;
        call_.set_keys(block, sequence, kv_head);
        call_.set_rows(mine.rows, block.row_count, sequence, kv_head, first);
        return block;
    }

    const Call& call_;
    const AttentionArgs& args_;
    const Functions& functions_;
    const bool every_;
    int64_t most_rows_ = 0;                                 // of one head of one sequence
    int64_t block_rows_ = 1, blocks_ = 0, all_blocks_ = 0;  // blocks of such a head; of all
    std::vector<int64_t> first_block_;                      // of each packed sequence
    size_t kernel_bytes_ = 0, scratch_bytes_ = 0;           // of one thread
    int64_t partials_bytes_ = 0;                            // of one part; 0: there are no parts
    int threads_ = 1;
    // One block of all heads after the other: where the heads of a token are neighbours and few
    // keys are seen, the next block finds the same pages of memory.
    bool across_heads_ = false;
};

}  // namespace

bool attention(const AttentionArgs& args, Interrupt interrupt) {
    const Call call(args);
    if (!call.packed() && call.decodes(args.q_len)) return decode(call, interrupt);
    if (!Blocks(call, false).run(interrupt)) return false;
    return !call.packed() || decode(call, interrupt);
}

Plan plan_attention(const AttentionArgs& args) {
    const Call call(args);
    Plan plan = Blocks(call, true).plan();
    if (call.decodes(args.q_len)) plan_decode(call, plan);
    return plan;
}

}  // namespace fastattn
