// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a call for statistics. First the queries of each head are cut into query
// tiles, and each tells what its rows know of themselves. Then, where sums over rows are asked for,
// the keys of each head are cut into spans, and each adds up what all rows give to it, in their
// order. Called by src/statistics.cpp; calls the kernel's table (kernel/kernel.h) through
// parallel_for.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"

namespace fastattn {
namespace {

// Spans are long enough that a query tile's transposition costs little, and there are enough of
// them for many threads.
constexpr int64_t kLeastSpan = 512, kMostSpans = 128;
constexpr size_t kEdgeBytes = 16 << 20;  // see Sums
constexpr double kLog2e = 1.44269504088896340736;
constexpr double kSecondsPerScore = 1e-9;      // to make a probability of it, roughly
constexpr size_t kAllScratchBytes = 32 << 20;  // of all threads together, but for one alone

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// A result or an intermediate of the arithmetic's type.
struct Numbers {
    char* data;
    int64_t size;  // of a number, in bytes

    Numbers at(int64_t i) const { return {data == nullptr ? nullptr : data + i * size, size}; }
    void set(int64_t i, double x) const {
        if (size == 8) {
            reinterpret_cast<double*>(data)[i] = x;
        } else {
            reinterpret_cast<float*>(data)[i] = float(x);
        }
    }
    void set(int64_t first, const double* from, int64_t count) const {
        if (size == 8) {
            std::copy_n(from, count, reinterpret_cast<double*>(data) + first);
        } else {
            auto* const to = reinterpret_cast<float*>(data) + first;
            for (int64_t i = 0; i < count; ++i) to[i] = float(from[i]);
        }
    }
    double get(int64_t i) const {
        return size == 8 ? reinterpret_cast<double*>(data)[i]
                         : double(reinterpret_cast<float*>(data)[i]);
    }
};

// The heads of all batch elements, and their query tiles.
class Heads {
   public:
    explicit Heads(const StatisticsArgs& args)
        : args_(args),
          call_(args.call),
          functions_(call_.functions),
          size_(args.call.query.dtype == Dtype::kFloat64 ? 8 : 4),
          rows_(std::min<int64_t>(functions_.query_tile, args.call.q_len)),
          softmax_bytes_(args.call.softmax ? 0 : count() * args.call.q_len * 2 * size_),
          softmax_(allocate(size_t(softmax_bytes_))) {
        lend(softmax_.get(), softmax_bytes_);
        Block block = call_.shared_block();
        block.row_count = int(rows_);
        kernel_bytes_ = functions_.statistics.scratch_bytes(block);
    }

    bool look(Interrupt interrupt) const {
        const int64_t tiles = parts(args_.call.q_len, rows_), items = tiles * count();
        Scratch layout;
        cut_to_look(layout);
        const size_t bytes = layout.used();
        const int threads = team(items, bytes);
        const Memory memory = allocate(bytes * size_t(threads));
        return parallel_for(items, threads, interrupt,
                            [&](int64_t item, int worker, const Stop& stop) {
                                char* const mine = memory.get() + size_t(worker) * bytes;
                                // Late rows first: under a causal mask they take the longest.
                                look_at(item / tiles, (tiles - 1 - item % tiles) * rows_, mine,
                                        stop);
                                take_back(mine, bytes);
                            },
                            {.item_seconds = call_.seconds() / double(items)});
    }

   protected:
    int64_t count() const { return call_.batches * args_.call.q_heads; }
    // The threads for so many items, each of which needs some memory.
    int team(int64_t items, size_t bytes) const {
        return int(std::clamp<int64_t>(int64_t(kAllScratchBytes / bytes), 1,
                                       team_size(items, call_.seconds(), call_.threads)));
    }
    Numbers numbers(void* data) const { return {static_cast<char*>(data), size_}; }
    Numbers softmax(int64_t row) const {
        return numbers(args_.call.softmax ? args_.call.softmax : softmax_.get()).at(2 * row);
    }

    BlockMemory cut(Scratch& scratch) const { return {rows_, kernel_bytes_, scratch}; }

    // The query tile that begins with row `first` of a head.
    Block block(const Sequence& sequence, int64_t head, int64_t first, const BlockMemory& mine,
                const Stop& stop) const {
        const int64_t in_batch = head % args_.call.q_heads;
        Block block = call_.shared_block();
        block.rows = mine.rows;
        block.row_count = int(std::min(args_.call.q_len - first, rows_));
        block.scratch = mine.kernel;
        block.stop = stop;
        call_.set_keys(block, sequence, in_batch / call_.group);
        call_.set_rows_of_head(mine.rows, block.row_count, sequence, in_batch, first);
        return block;
    }

    const StatisticsArgs& args_;
    const Call call_;
    const Functions& functions_;
    const int64_t size_;  // of a number of the arithmetic
    const int64_t rows_;  // of a query tile
    size_t kernel_bytes_ = 0;

   private:
    struct LookMemory {
        BlockMemory block;
        RowStatistics* asked;
        double* first_part;  // the softmax of each row
    };

    LookMemory cut_to_look(Scratch& scratch) const {
        const BlockMemory block = cut(scratch);
        RowStatistics* const asked = scratch.take<RowStatistics>(rows_);
        return {block, asked, scratch.take<double>(2 * rows_)};
    }

    // The query tile that begins with row `first` of a head. Of parts (Parts), nothing but the
    // softmax is asked; a sink counts once, when both are known.
    void look_at(int64_t head, int64_t first, char* memory, const Stop& stop) const {
        Scratch scratch(memory);
        const LookMemory mine = cut_to_look(scratch);
        const int64_t batch = head / args_.call.q_heads;
        const int64_t index = head * args_.call.q_len + first;
        const bool parts = call_.has_first_part(batch);
        const auto look = [&](const Sequence& sequence) {
            StatisticsBlock look{};
            look.block = block(sequence, head, first, mine.block, stop);
            look.statistics = mine.asked;
            look.top = args_.top;
            look.entropy = args_.entropy != nullptr;
            for (int r = 0; r < look.block.row_count; ++r) {
                mine.asked[r] = row(index + r);
                if (parts) mine.block.rows[r].sink = -std::numeric_limits<double>::infinity();
            }
            functions_.statistics.look(look);
            return look.block.row_count;
        };
        if (!parts) {
            look(call_.sequence(batch));
            return;
        }
        const int rows = look(call_.first_part(batch));
        for (int i = 0; i < 2 * rows; ++i) mine.first_part[i] = softmax(index).get(i);
        look(call_.sequence(batch));
        const double* const sinks = args_.call.sinks;
        const double sink = sinks == nullptr ? 0 : sinks[head % args_.call.q_heads] * kLog2e;
        for (int r = 0; r < rows; ++r) {
            const Numbers newest = softmax(index + r);
            const double* const before = mine.first_part + 2 * r;
            const double largest = std::max(before[0], newest.get(0));
            double sum = 0;
            if (before[1] != 0) sum += std::exp2(before[0] - largest) / before[1];
            if (newest.get(1) != 0) sum += std::exp2(newest.get(0) - largest) / newest.get(1);
            if (sum != 0 && sinks != nullptr) sum += std::exp2(sink - largest);
            newest.set(0, largest);
            newest.set(1, sum == 0 ? 0 : 1 / sum);
        }
    }

    // What is asked of one row of all.
    RowStatistics row(int64_t index) const {
        return {softmax(index).data, numbers(args_.entropy).at(index).data,
                numbers(args_.maximum).at(index).data,
                numbers(args_.top_weights).at(index * args_.top).data,
                args_.top_keys == nullptr ? nullptr : args_.top_keys + index * args_.top};
    }

    const int64_t softmax_bytes_;
    const Memory softmax_;  // of every row: see RowStatistics; unless the call knows it
};

// Sums over rows. A block of keys that reaches over the border of two spans has a sum in each: its
// edges wait, and are added up in the order of the spans.
class Sums : Heads {
   public:
    explicit Sums(const StatisticsArgs& args) : Heads(args) {
        const int64_t kv_len = args.call.kv_len;
        const int64_t most =
            std::max<int64_t>(1, int64_t(kEdgeBytes) / int64_t(2 * sizeof(double)) /
                                     std::max<int64_t>(args.query_blocks, 1));
        const int64_t spans = std::min(kMostSpans, args.blocks == nullptr ? kMostSpans : most);
        span_ = std::max(kLeastSpan,
                         parts(parts(kv_len, spans), functions_.key_tile) * functions_.key_tile);
        spans_ = parts(kv_len, span_);
        if (args.blocks == nullptr) return;
        if (touched() > kLeastSpan) {
            span_ = std::max(kLeastSpan, parts(kv_len, most));
            spans_ = parts(kv_len, span_);
        }
        // An odd number of cache lines, so that a column's elements lie in all sets of the cache.
        pitch_ = (parts(touched(), 8) | 1) * 8;
    }

    using Heads::look;

    bool add(Interrupt interrupt) const {
        const int64_t edges = args_.blocks == nullptr ? 0 : 2 * spans_ * args_.query_blocks;
        const int64_t at_once =
            edges == 0
                ? count()
                : std::clamp<int64_t>(int64_t(kEdgeBytes / sizeof(double)) / edges, 1, count());
        const size_t bytes = scratch(nullptr).used;
        const int threads = team(at_once * spans_, bytes);
        const Memory memory = allocate(bytes * size_t(threads));
        const size_t edge_bytes = size_t(at_once * edges) * sizeof(double);
        const Memory edge_memory = allocate(edge_bytes);
        lend(edge_memory.get(), int64_t(edge_bytes));
        Patience patience(interrupt);
        for (int64_t head = 0; head < count(); head += at_once) {
            if (patience.ended()) return false;
            const int64_t heads = std::min(at_once, count() - head);
            double* const edge = reinterpret_cast<double*>(edge_memory.get());
            const bool finished =
                parallel_for(heads * spans_, threads, interrupt,
                             [&](int64_t item, int worker, const Stop& stop) {
                                 char* const mine = memory.get() + size_t(worker) * bytes;
                                 add_span(head + item / spans_, item % spans_,
                                          edge + item / spans_ * edges, scratch(mine), stop);
                                 take_back(mine, bytes);
                             },
                             {.item_seconds = call_.seconds() / double(count() * spans_)});
            if (!finished) return false;
            for (int64_t i = 0; i < heads && edges > 0; ++i) join(head + i, edge + i * edges);
        }
        return true;
    }

   private:
    struct Parts {
        BlockMemory block;
        double *column_sums, *block_sums, *row_weights;
        int64_t* query_blocks;
        size_t used;
    };

    // block_sums is of the query blocks of one query tile, and of one that may go on from the
    // tile before.
    Parts scratch(char* memory) const {
        Scratch scratch(memory);
        Parts parts{cut(scratch), nullptr, nullptr, nullptr, nullptr, 0};
        parts.column_sums = scratch.take<double>(span_);
        parts.block_sums = scratch.take<double>((rows_ + 1) * pitch_);
        parts.row_weights = scratch.take<double>(rows_);
        parts.query_blocks = scratch.take<int64_t>(rows_);
        parts.used = scratch.used();
        return parts;
    }

    // How many key blocks a span touches, at most.
    int64_t touched() const {
        int64_t most = 0;
        for (int64_t i = 0; i < spans_; ++i)
            most = std::max(most, last_block(i) - first_block(i) + 1);
        return most;
    }

    int64_t span_end(int64_t span) const { return std::min((span + 1) * span_, args_.call.kv_len); }
    int64_t block_of(int64_t key) const {
        return std::upper_bound(args_.key_starts, args_.key_starts + args_.key_blocks, key) -
               args_.key_starts - 1;
    }
    int64_t first_block(int64_t span) const { return block_of(span * span_); }
    int64_t last_block(int64_t span) const { return block_of(span_end(span) - 1); }
    int64_t block_end(int64_t block) const {
        return block + 1 < args_.key_blocks ? args_.key_starts[block + 1] : args_.call.kv_len;
    }

    void add_span(int64_t head, int64_t span, double* edges, const Parts& mine,
                  const Stop& stop) const {
        const int64_t begin = span * span_, end = span_end(span), q_len = args_.call.q_len;
        const int64_t batch = head / args_.call.q_heads;
        SumsBlock sums{};
        sums.row_weights = mine.row_weights;
        if (args_.column_sums != nullptr) {
            sums.column_sums = mine.column_sums;
            std::fill(mine.column_sums, mine.column_sums + (end - begin), 0.0);
        }
        int64_t first_block_here = 0, query_block = 0;
        if (args_.blocks != nullptr) {
            first_block_here = first_block(span);
            sums.block_sums = mine.block_sums;
            sums.query_blocks = mine.query_blocks;
            sums.key_starts = args_.key_starts + first_block_here;
            sums.key_blocks = last_block(span) - first_block_here + 1;
            sums.block_pitch = pitch_;
            std::fill_n(mine.block_sums, pitch_, 0.0);
        }
        const auto weights = call_.rows(args_.row_weights, batch);
        for (int64_t first = 0; first < q_len; first += rows_) {
            if (stop.requested(stop.context)) return;
            const int64_t count = std::min(rows_, q_len - first);
            const int64_t last_of_tile = first + count - 1;
            int64_t last_query_block = query_block;
            if (args_.blocks != nullptr) {
                int64_t at = query_block;
                for (int64_t r = 0; r < count; ++r) {
                    while (at + 1 < args_.query_blocks && args_.query_starts[at + 1] <= first + r) {
                        ++at;
                    }
                    mine.query_blocks[r] = at - query_block;
                }
                last_query_block = at;
                // The first one may have begun in the tile before.
                std::fill_n(mine.block_sums + pitch_, (at - query_block) * pitch_, 0.0);
            }
            const auto add = [&](const Sequence& part) {
                sums.begin = begin + part.shift;
                sums.end = end + part.shift;
                // Positions grow with the rows.
                if (call_.interval(part, last_of_tile).end <= sums.begin ||
                    call_.interval(part, first).begin >= sums.end) {
                    return;
                }
                sums.block = block(part, head, first, mine.block, stop);
                for (int64_t r = 0; r < count; ++r) {
                    Row& row = mine.block.rows[r];
                    row.begin = std::clamp(row.begin, sums.begin, sums.end);
                    row.end = std::clamp(row.end, row.begin, sums.end);
                    const void* const weight = weights.at(head % args_.call.q_heads, first + r);
                    mine.row_weights[r] =
                        weight == nullptr ? 1 : numbers(const_cast<void*>(weight)).get(0);
                }
                sums.softmax = softmax(head * q_len + first).data;
                functions_.statistics.add(sums);
            };
            if (call_.has_first_part(batch)) add(call_.first_part(batch));
            add(call_.sequence(batch));
            if (args_.blocks == nullptr) continue;
            // All but the last of the tile's query blocks are finished.
            const bool ends = first + count == q_len;
            const int64_t finished = last_query_block - query_block + (ends ? 1 : 0);
            for (int64_t i = 0; i < finished; ++i) {
                store(head, span, query_block + i, mine.block_sums + i * pitch_, sums.key_blocks,
                      first_block_here, edges);
            }
            if (ends) break;
            std::memmove(mine.block_sums, mine.block_sums + finished * pitch_,
                         size_t(sums.key_blocks) * sizeof(double));
            query_block = last_query_block;
        }
        if (args_.column_sums != nullptr) {
            const Numbers to = numbers(args_.column_sums).at(head * args_.call.kv_len + begin);
            to.set(0, mine.column_sums, end - begin);
        }
    }

    // Stores the sums of a query block for a span, or keeps them among the edges.
    void store(int64_t head, int64_t span, int64_t query_block, const double* sums, int64_t count,
               int64_t first_key_block, double* edges) const {
        const Numbers to =
            numbers(args_.blocks)
                .at((head * args_.query_blocks + query_block) * args_.key_blocks + first_key_block);
        double* const edge = edges + (span * args_.query_blocks + query_block) * 2;
        int64_t begin = 0, end = count;
        if (args_.key_starts[first_key_block] < span * span_) edge[0] = sums[begin++];
        if (begin < end && block_end(first_key_block + end - 1) > span_end(span)) {
            edge[1] = sums[--end];
        }
        to.set(begin, sums + begin, end - begin);
    }

    void join(int64_t head, const double* edges) const {
        const Numbers to = numbers(args_.blocks);
        for (int64_t span = 0; span + 1 < spans_; ++span) {
            const int64_t block = last_block(span);
            const bool begins = args_.key_starts[block] >= span * span_;
            if (!begins || block_end(block) <= span_end(span)) continue;
            for (int64_t q = 0; q < args_.query_blocks; ++q) {
                double sum = edges[(span * args_.query_blocks + q) * 2 + 1];
                for (int64_t s = span + 1; s < spans_ && s * span_ < block_end(block); ++s) {
                    sum += edges[(s * args_.query_blocks + q) * 2];
                }
                to.set((head * args_.query_blocks + q) * args_.key_blocks + block, sum);
            }
        }
    }

    int64_t span_ = 0, spans_ = 0;  // keys of a span, and how many spans there are
    int64_t pitch_ = 0;             // of a thread's sums: of as many key blocks as a span touches
};

}  // namespace

bool attention_statistics(const StatisticsArgs& args, Interrupt interrupt) {
    if (args.call.q_len == 0 || args.call.kv_len == 0) return true;
    const Sums sums(args);
    if (!sums.look(interrupt)) return false;
    return (args.column_sums == nullptr && args.blocks == nullptr) || sums.add(interrupt);
}

bool attention_column_sums(AttentionArgs args, void* column_sums, Interrupt interrupt) {
    const Call call(args);
    const bool wide = args.query.dtype == Dtype::kFloat64;
    const int64_t heads = call.batches * args.q_heads, rows = heads * args.q_len;
    const int64_t size = wide ? 8 : 4, sums = heads * args.kv_len;
    const Memory softmax = allocate(size_t(rows * 2 * size));
    lend(softmax.get(), rows * 2 * size);
    if (!call.takes_scores()) {
        // Scores of another order of sums would not match a softmax: query tiles' own is taken.
        const bool in_tiles =
            !call.decodes(args.q_len) || args.q_len * call.group > call.functions.decode.most_rows;
        if (in_tiles) args.softmax = softmax.get();
        if (!attention(args, interrupt)) return false;
        if (rows == 0 || args.kv_len == 0) return true;
        StatisticsArgs statistics;
        statistics.call = args;
        statistics.call.value = statistics.call.value_scale = {};
        statistics.call.value_head_dim = 0;
        statistics.column_sums = column_sums;
        const Sums all(statistics);
        return (in_tiles || all.look(interrupt)) && all.add(interrupt);
    }
    args.softmax = softmax.get();
    constexpr double unseen = -std::numeric_limits<double>::infinity();
    if (wide) {
        std::fill_n(static_cast<double*>(column_sums), sums, unseen);
    } else {
        std::fill_n(static_cast<float*>(column_sums), sums, float(unseen));
    }
    args.scores = column_sums;
    if (!attention(args, interrupt)) return false;
    const int threads = team_size(heads, double(sums) * kSecondsPerScore, call.threads);
    return parallel_for(heads, threads, interrupt, [&](int64_t head, int, const Stop&) {
        call.functions.statistics.normalise(
            static_cast<char*>(column_sums) + head * args.kv_len * size, args.kv_len,
            softmax.get() + head * 2 * size);
    });
}

}  // namespace fastattn
