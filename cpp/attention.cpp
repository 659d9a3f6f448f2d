// SPDX-License-Identifier: Apache-2.0
//
// Who does which part: cuts a call into blocks of query rows that share a key and value head, gives
// each thread its scratch memory, and lets the kernel attend. Called by src/bindings.cpp; calls the
// kernel's table (kernel.h) through parallel_for.
#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "kernel.h"
#include "parallel.h"

namespace fastattn {
namespace {

// Panels of a block: each key tile is brought near once for all of them, so the more the better,
// while they stay in the second-level cache, leave each thread a choice of blocks, and keep the
// promise that extra memory is small. Beyond 4 only a window gains, whose blocks overlap in keys.
constexpr int kMostPanels = 4, kMostPanelsInWindow = 8;
constexpr size_t kPanelBytes = 384 << 10;  // of one thread
constexpr size_t kAllPanelBytes = 8 << 20;
constexpr int64_t kBlocksPerThread = 16;
// The few-queries form.
constexpr int64_t kMostFewQueries = 16;  // by contract: longer queries may be cut anywhere
constexpr int64_t kStretch = 512;  // keys of a part; a multiple of what the kernel takes at once
constexpr size_t kAllPartBytes = 4 << 20;  // waiting to be merged
constexpr double kMostVisited = 2e7;       // tiles, by plan(): seconds
constexpr double kFlopsPerSecond = 50e9;   // of one thread, roughly: only to tell small calls apart

int64_t size_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBool:
            return 1;
        case Dtype::kFloat16:
        case Dtype::kBFloat16:
            return 2;
        case Dtype::kFloat32:
            return 4;
        default:
            return 8;
    }
}

// The element [batch][head][row][0]; null stays null.
void* at(const Array& array, int64_t batch_offset, int64_t head, int64_t row) {
    if (array.data == nullptr) return nullptr;
    const int64_t offset = batch_offset + head * array.head_stride + row * array.row_stride;
    return static_cast<char*>(array.data) + offset * size_of(array.dtype);
}

// The rows of a group are (query, head of the group) pairs, query by query: all that share a key
// and value head, so that a block is full even if queries are few, and as narrow as can be in
// positions.
class Call {
   public:
    explicit Call(const AttentionArgs& args)
        : args_(args),
          functions_(args.query.dtype == Dtype::kFloat64 ? kernel().float64 : kernel().float32),
          group_(args.q_heads / std::max<int64_t>(args.kv_heads, 1)),
          rows_(args.q_len * group_) {
        int64_t heads = args.kv_heads;
        for (const int64_t size : args.batch_shape) {
            if (__builtin_mul_overflow(heads, size, &heads)) {
                throw std::invalid_argument("batch x kv_heads must be less than 2**63");
            }
        }
        const double pairs =
            double(heads) * double(rows_) * double(std::min(args.kv_len, visible_at_most()));
        const double flops = 2 * pairs * double(args.head_dim + args.value_head_dim + 16);
        few_ = args.q_len <= kMostFewQueries && rows_ <= functions_.few_rows;
        find_stretches();
        threads_ = team_size(heads * (few_ ? stretches_ : blocks(1)), flops / kFlopsPerSecond);

        int panels = visible_at_most() < args.kv_len ? kMostPanelsInWindow : kMostPanels;
        const size_t room = std::min(kPanelBytes, kAllPanelBytes / size_t(threads_));
        while (panels > 1 && (blocks(panels) * heads < kBlocksPerThread * threads_ ||
                              scratch_bytes(panels) > room)) {
            panels /= 2;
        }
        block_rows_ = std::min<int64_t>(rows_, panels * functions_.panel_rows);
        blocks_ = blocks(panels);
        items_ = heads * blocks_;
        rows_bytes_ = rounded(size_t(block_rows_) * sizeof(Row));
        scratch_bytes_ = rows_bytes_ + scratch_bytes(few_ ? 1 : panels);
    }

    bool run(Interrupt interrupt) const {
        if (items_ == 0) return true;
        if (few_) return run_few(interrupt);
        const Memory memory = scratch(threads_);
        return parallel_for(
            items_, threads_, interrupt, [&](int64_t item, int worker, const Stop& stop) {
                functions_.attend(
                    block(item, memory.get() + size_t(worker) * scratch_bytes_, stop));
            });
    }

    Plan plan() const {
        const TileCounts counts = items_ == 0 ? TileCounts{} : count();
        Plan plan;
        plan.few_queries = few_;
        plan.query_tile = functions_.panel_rows;
        plan.key_tile = functions_.key_tile;
        plan.threads = threads_;
        plan.tiles = counts.skipped + counts.computed;
        plan.tiles_skipped = counts.skipped;
        plan.tiles_edge = counts.edge;
        plan.pairs_computed = counts.pairs;
        plan.scratch_bytes = items_ == 0 ? 0 : scratch_bytes_ * size_t(threads_);
        return plan;
    }

   private:
    using Memory = std::unique_ptr<char, decltype(&std::free)>;

    // Counts one of each batch elements, heads and blocks that are alike, as often as it occurs.
    TileCounts count() const {
        const int64_t batches = items_ / blocks_ / args_.kv_heads;
        const int64_t some_batches = batches_are_alike(batches) ? 1 : batches;
        const int64_t some_heads = heads_are_alike() ? 1 : args_.kv_heads;
        // The first is the one that may be less than full.
        const int64_t some_blocks = blocks_are_alike() ? std::min<int64_t>(blocks_, 2) : blocks_;
        require_few(double(some_batches) * double(some_heads) * double(some_blocks));

        Block any = shared_block();
        any.row_count = int(block_rows_);
        const Memory memory = aligned(rows_bytes_ + rounded(functions_.scratch_bytes(any)));
        TileCounts counts{};
        for (int64_t i = 0; i < some_batches * some_heads * some_blocks; ++i) {
            const int64_t index = i % some_blocks;
            const int64_t head = i / some_blocks % some_heads;
            const int64_t batch = i / some_blocks / some_heads;
            TileCounts one{};
            functions_.count(
                block((batch * args_.kv_heads + head) * blocks_ + index, memory.get(), {}), one);
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

    void require_few(double blocks) const {
        const bool every_tile = args_.mask.data != nullptr || args_.bias.data != nullptr;
        const double tiles = blocks * double(block_rows_) / functions_.panel_rows *
                             (every_tile ? double(args_.kv_len) / functions_.key_tile : 1);
        if (tiles <= kMostVisited) return;
        throw std::invalid_argument(
            "explain looks at each tile of a mask or bias, and at one of each row of tiles in a "
            "window or below a diagonal, at most " +
            std::to_string(int64_t(kMostVisited)) + ", but there are " +
            std::to_string(int64_t(tiles)));
    }

    static size_t rounded(size_t bytes) {
        return (bytes + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
    }

    Memory scratch(int threads) const { return aligned(scratch_bytes_ * size_t(threads)); }

    static Memory aligned(size_t bytes) {
        void* const memory = std::aligned_alloc(kScratchAlignment, bytes);
        if (memory == nullptr) throw std::bad_alloc();
        return Memory(static_cast<char*>(memory), &std::free);
    }

    // Of one thread, for blocks of so many panels.
    size_t scratch_bytes(int panels) const {
        Block block = shared_block();
        block.row_count = int(std::min<int64_t>(rows_, panels * functions_.panel_rows));
        if (block.row_count == 0) return 0;
        return rounded(few_ ? functions_.part_scratch_bytes(block)
                            : functions_.scratch_bytes(block));
    }

    // Parts of all heads go to the threads; each time that no more may wait, they are merged in
    // order.
    bool run_few(Interrupt interrupt) const {
        const int64_t all = items_ * stretches_;
        Block any = shared_block();
        any.row_count = int(rows_);
        const size_t part_bytes = rounded(functions_.part_bytes(any));
        const int64_t wave = std::min<int64_t>(
            all, std::max<int64_t>(int64_t(kAllPartBytes / part_bytes), threads_));
        const Memory memory =
            aligned(scratch_bytes_ * size_t(threads_) + part_bytes * size_t(wave + 1));
        char* const carried = memory.get() + scratch_bytes_ * size_t(threads_);
        char* const parts = carried + part_bytes;
        for (int64_t first = 0; first < all; first += wave) {
            const int64_t count = std::min(wave, all - first);
            const auto attend = [&](int64_t item, int worker, const Stop& stop) {
                const int64_t stretch = (first_stretch_ + (first + item) % stretches_) * kStretch;
                functions_.attend_part(block((first + item) / stretches_,
                                             memory.get() + size_t(worker) * scratch_bytes_, stop),
                                       stretch, std::min(stretch + kStretch, args_.kv_len),
                                       parts + item * part_bytes);
            };
            const auto merge = [&](int64_t, int, const Stop& stop) {
                char* into = carried;
                for (int64_t item = 0; item < count; ++item) {
                    const int64_t head = (first + item) / stretches_;
                    const int64_t stretch = (first + item) % stretches_;
                    char* const part = parts + item * part_bytes;
                    const Block whole = block(head, memory.get(), stop);
                    if (stretch == 0) {
                        into = part;
                    } else {
                        functions_.merge_parts(whole, into, part);
                    }
                    if (stretch == stretches_ - 1) functions_.finish_part(whole, into);
                }
                if (into != carried) std::memcpy(carried, into, part_bytes);
            };
            if (threads_ == 1) {  // a small call: one trip
                const auto both = [&](int64_t, int, const Stop& stop) {
                    for (int64_t item = 0; item < count; ++item) attend(item, 0, stop);
                    merge(0, 0, stop);
                };
                if (!parallel_for(1, 1, interrupt, both)) return false;
            } else {
                if (!parallel_for(count, threads_, interrupt, attend)) return false;
                parallel_for(1, 1, {}, merge);
            }
        }
        return true;
    }

    // Those that hold a key inside the interval of some row, in whatever batch element.
    void find_stretches() {
        int64_t batches = 1, begin = args_.kv_len, end = 0;
        for (const int64_t size : args_.batch_shape) batches *= size;
        const bool alike = args_.query_offset == nullptr && args_.kv_lengths == nullptr;
        for (int64_t batch = 0; batch < (alike ? 1 : batches); ++batch) {
            for (const int64_t i : {int64_t{0}, args_.q_len - 1}) {
                Row row;
                set_interval(row, i, batch);
                begin = std::min(begin, row.begin);
                end = std::max(end, row.end);
            }
        }
        first_stretch_ = std::min(begin, end) / kStretch;
        stretches_ = std::max<int64_t>((end + kStretch - 1) / kStretch - first_stretch_, 1);
    }

    // The keys that query i sees by causality, window and length.
    void set_interval(Row& row, int64_t i, int64_t batch) const {
        const int64_t length = args_.kv_lengths ? args_.kv_lengths[batch] : args_.kv_len;
        row.position = i + (args_.query_offset ? args_.query_offset[batch] : 0);
        row.begin = args_.left == kUnlimited ? 0 : row.position - args_.left;
        row.end = args_.right == kUnlimited ? length : row.position + args_.right + 1;
        row.begin = std::clamp<int64_t>(row.begin, 0, length);
        row.end = std::clamp<int64_t>(row.end, row.begin, length);
    }

    // Of one head.
    int64_t blocks(int panels) const {
        const int64_t rows = int64_t(panels) * functions_.panel_rows;
        return (rows_ + rows - 1) / rows;
    }

    // Keys that a window leaves to a row.
    int64_t visible_at_most() const {
        if (args_.left == kUnlimited || args_.right == kUnlimited) return args_.kv_len;
        return std::min(args_.left, args_.kv_len) + std::min(args_.right, args_.kv_len) + 1;
    }

    Block shared_block() const {
        Block block{};
        block.key_stride = args_.key.row_stride;
        block.value_stride = args_.value.row_stride;
        block.head_dim = args_.head_dim;
        block.value_head_dim = args_.value_head_dim;
        block.kv_len = args_.kv_len;
        block.query_dtype = args_.query.dtype;
        block.kv_dtype = args_.key.dtype;
        block.mask_dtype = args_.mask.dtype;
        block.bias_dtype = args_.bias.dtype;
        block.mask_stride = args_.mask.col_stride;
        block.bias_stride = args_.bias.col_stride;
        block.scale = args_.scale;
        block.softcap = args_.softcap;
        block.alibi = args_.alibi_slopes != nullptr;
        return block;
    }

    int64_t offset(const Array& array, int64_t batch) const {
        int64_t offset = 0;
        for (size_t axis = array.batch_strides.size(); axis-- > 0;) {
            offset += batch % args_.batch_shape[axis] * array.batch_strides[axis];
            batch /= args_.batch_shape[axis];
        }
        return offset;
    }

    // Late blocks first: under a causal mask they are the long ones, and what ends last is short.
    // memory: scratch_bytes_, for the rows and the kernel.
    Block block(int64_t item, char* memory, const Stop& stop) const {
        const int64_t first = (blocks_ - 1 - item % blocks_) * block_rows_;
        const int64_t kv_head = item / blocks_ % args_.kv_heads;
        const int64_t batch = item / blocks_ / args_.kv_heads;
        const int64_t query = offset(args_.query, batch), out = offset(args_.out, batch),
                      lse = offset(args_.lse, batch), mask = offset(args_.mask, batch),
                      bias = offset(args_.bias, batch);
        Row* const rows = reinterpret_cast<Row*>(memory);
        Block block = shared_block();
        block.rows = rows;
        block.row_count = int(std::min<int64_t>(rows_ - first, block_rows_));
        block.key = at(args_.key, offset(args_.key, batch), kv_head, 0);
        block.value = at(args_.value, offset(args_.value, batch), kv_head, 0);
        block.scratch = memory + rows_bytes_;
        block.stop = stop;
        const int64_t first_head = kv_head * group_;
        int64_t i = first / group_, head = first_head + first % group_;
        for (int r = 0; r < block.row_count; ++r, ++head) {
            if (head == first_head + group_) {
                head = first_head;
                ++i;
            }
            Row& row = rows[r];
            row.query = at(args_.query, query, head, i);
            row.out = at(args_.out, out, head, i);
            row.lse = at(args_.lse, lse, head, i);
            row.mask = at(args_.mask, mask, head, i);
            row.bias = at(args_.bias, bias, head, i);
            set_interval(row, i, batch);
            row.slope = args_.alibi_slopes ? args_.alibi_slopes[batch * args_.q_heads + head] : 0;
            row.sink = args_.sinks ? args_.sinks[head] : -std::numeric_limits<double>::infinity();
        }
        return block;
    }

    const AttentionArgs& args_;
    const Functions& functions_;
    const int64_t group_, rows_;           // heads of a group, rows of all of them
    int64_t block_rows_, blocks_, items_;  // blocks of a head, of all heads
    bool few_;                             // the form for few queries, and
    int64_t first_stretch_, stretches_;    // its parts of a head
    size_t rows_bytes_, scratch_bytes_;    // of one thread; the rows are part of the scratch memory
    int threads_;
};

}  // namespace

bool attention(const AttentionArgs& args, Interrupt interrupt) { return Call(args).run(interrupt); }

Plan plan_attention(const AttentionArgs& args) { return Call(args).plan(); }

}  // namespace fastattn
