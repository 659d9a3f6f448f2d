// SPDX-License-Identifier: Apache-2.0
//
// What a call looks like to the kernel: its sequences, the keys that each query may see, and where
// its rows lie in memory. Used by attention.cpp, decode.cpp, short.cpp, statistics.cpp and
// gradients.h.
#pragma once

#include <memory>
#include <optional>

#include "attention.h"
#include "kernel/kernel.h"
#include "parallel.h"
#include "scratch.h"
#include "split.h"

namespace fastattn {

// One batch element, or one of the sequences that packed arrays hold. The kernel knows keys by
// their slots (Parts); where these are not their positions, each part is a sequence of its own, and
// all positions are moved by its shift.
struct Sequence {
    int64_t batch;
    int64_t q_start, q_len;    // its rows of query, out, lse, mask and bias
    int64_t kv_start, kv_len;  // its rows of key and value
    int64_t begin, end;        // the keys that length and eviction leave
    int64_t offset;            // position of its first query
    int64_t key_offset;        // what dropout adds to positions
    int64_t shift;             // what was added to positions
};

int64_t size_of(Dtype dtype);  // in bytes

struct Interval {
    int64_t begin, end;  // keys; begin <= end
};

class Call {
   public:
    explicit Call(const AttentionArgs& arguments);

    const AttentionArgs& args;
    const Functions& functions;
    const int64_t group;    // query heads that share a key and value head
    const Threads threads;  // at hand, or asked for by the caller
    int64_t batches = 1;

    bool packed() const { return args.q_starts != nullptr; }
    Sequence sequence(int64_t batch) const;  // of parts, the newest
    bool has_first_part(int64_t batch) const {
        return args.kv_parts != nullptr &&
               args.kv_parts[batch].first_begin < args.kv_parts[batch].first_end;
    }
    Sequence first_part(int64_t batch) const;
    bool decodes(int64_t q_len) const {
        return q_len <= kMostQueries && q_len * group <= kMostRows;
    }
    // Whether AttentionArgs::scores may be asked for.
    bool takes_scores() const { return args.q_len == 1 && group <= functions.decode.most_rows; }

    // Whether sequences may differ in length, or in what their queries see.
    bool unlike() const {
        return packed() || args.kv_lengths != nullptr || args.kv_begins != nullptr ||
               args.query_offset != nullptr;
    }

    // The keys that query i sees by causality, window, length and eviction.
    Interval interval(const Sequence& sequence, int64_t i) const;
    // Those that some query from `first` to `last` sees: both ends grow with the queries.
    Interval interval(const Sequence& sequence, int64_t first, int64_t last) const;

    // The keys that a window leaves to a row, at most.
    int64_t visible_at_most() const;

    // How many pairs of a query and a key there are in one head, roughly.
    double pairs(const Sequence& sequence) const;

    // The time on one thread, roughly: only to tell small calls apart.
    double seconds(const Sequence& sequence) const;
    double seconds() const;  // of all sequences

    // The rows of a batch element; at() is null where there is no array.
    struct Rows {
        char* first;
        int64_t head_bytes, row_bytes;
        void* at(int64_t head, int64_t row) const {
            return first == nullptr ? nullptr : first + head * head_bytes + row * row_bytes;
        }
    };
    Rows rows(const Array& array, int64_t batch) const;

    // Offset of a batch element.
    int64_t offset(const Array& array, int64_t batch) const;

    // Returns a block without rows, keys and values, which is enough to ask for sizes.
    Block shared_block() const;
    void set_keys(Block& block, const Sequence& sequence, int64_t kv_head) const;

    // Calls visit(r, head, i) for `count` of the pairs of a query i and a head of the group, query
    // by query, from pair `first` on; r counts from 0.
    template <class Visit>
    void each_row(int64_t count, int64_t kv_head, int64_t first, const Visit& visit) const {
        int64_t i = first / group, in_group = first % group;
        for (int64_t r = 0; r < count; ++r) {
            visit(r, kv_head * group + in_group, i);
            if (++in_group == group) in_group = 0, ++i;
        }
    }

    // Sets the rows of those pairs. All share a key and value head, and few positions.
    void set_rows(Row* rows, int count, const Sequence& sequence, int64_t kv_head,
                  int64_t first) const;

    // Sets the rows of `count` queries from `first` on, of one head; from one to the next, so many
    // rows.
    void set_rows_of_head(Row* rows, int64_t count, const Sequence& sequence, int64_t head,
                          int64_t first, int64_t step = 1) const;

   private:
    int64_t slots() const { return args.page_columns * args.page_keys; }
};

// Scratch memory, aligned for vectors. None of it is lent yet.
using Memory = std::unique_ptr<char, void (*)(void*)>;
Memory allocate(size_t bytes);  // throws std::bad_alloc

// A thread's scratch memory for a block: its rows, and what the kernel cuts.
struct BlockMemory {
    Row* rows;
    void* kernel;

    BlockMemory(int64_t row_count, size_t kernel_bytes, Scratch& scratch)
        : rows(scratch.take<Row>(row_count)), kernel(scratch.reserve(kernel_bytes)) {}
};

// What the problems of a call share, if they are short (short.cpp).
std::optional<ShortShape> short_shape(const Call& call);
// Attends to them; a problem's bits are those of the two other ways. False: interrupted.
bool attend_short(const Call& call, const ShortShape& shape, Interrupt interrupt);
// Sets how many threads and how much scratch memory that takes.
void plan_short(const Call& call, const ShortShape& shape, Plan& plan);
// Adds what attend_short() does.
void schedule_short(const Call& call, const ShortShape& shape, Schedule& schedule);

// Attends to the sequences that are decoded (decode.cpp). False: interrupted.
bool decode(const Call& call, Interrupt interrupt);
// Adds how many threads and how much scratch memory that takes.
void plan_decode(const Call& call, Plan& plan);
// Adds what decode() does.
void schedule_decode(const Call& call, Schedule& schedule);

}  // namespace fastattn
