// SPDX-License-Identifier: Apache-2.0
//
// What a call looks like to the kernel: its sequences, the keys that each query may see, and where
// its rows lie in memory. Used by attention.cpp, decode.cpp and backward.cpp.
#pragma once

#include <memory>

#include "attention.h"
#include "kernel.h"
#include "parallel.h"
#include "scratch.h"

namespace fastattn {

// Queries beyond are cut into blocks (attention.cpp); up to that many, the keys are (decode.cpp),
// unless so many heads share a key head that their rows would take much memory. By contract no more
// than 16: longer queries may be cut anywhere.
constexpr int64_t kFewQueries = 16, kMostFewRows = 256;

// One batch element, or one of the sequences that packed arrays hold.
struct Sequence {
    int64_t batch;
    int64_t q_start, q_len;    // its rows of query, out, lse, mask and bias
    int64_t kv_start, kv_len;  // its rows of key and value
    int64_t begin, end;        // the keys that length and eviction leave
    int64_t offset;            // position of its first query
};

struct Interval {
    int64_t begin, end;  // keys; begin <= end
};

class Call {
   public:
    explicit Call(const AttentionArgs& arguments);

    const AttentionArgs& args;
    const Functions& functions;
    const int64_t group;  // query heads that share a key and value head
    int64_t batches = 1;

    bool packed() const { return args.q_starts != nullptr; }
    Sequence sequence(int64_t batch) const;
    bool few(int64_t q_len) const { return q_len <= kFewQueries && q_len * group <= kMostFewRows; }

    // The keys that query i sees by causality, window, length and eviction.
    Interval interval(const Sequence& sequence, int64_t i) const;

    // Keys that a window leaves to a row.
    int64_t visible_at_most() const;

    // On one thread, roughly: only to tell small calls apart.
    double seconds(const Sequence& sequence) const;

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

    // Without rows, keys and values: enough to ask for sizes.
    Block shared_block() const;
    void set_keys(Block& block, const Sequence& sequence, int64_t kv_head) const;

    // visit(r, head, i) for `count` of the (query, head of the group) pairs, query by query, from
    // pair `first` on: r from 0 on, the query head, and the query.
    template <class Visit>
    void each_row(int64_t count, int64_t kv_head, int64_t first, const Visit& visit) const {
        int64_t i = first / group, in_group = first % group;
        for (int64_t r = 0; r < count; ++r) {
            visit(r, kv_head * group + in_group, i);
            if (++in_group == group) in_group = 0, ++i;
        }
    }

    // Those pairs: all that share a key and value head, as narrow as can be in positions.
    void set_rows(Row* rows, int count, const Sequence& sequence, int64_t kv_head,
                  int64_t first) const;
};

// Scratch memory, aligned for vectors. None of it is lent yet.
using Memory = std::unique_ptr<char, void (*)(void*)>;
Memory allocate(size_t bytes);  // throws std::bad_alloc

// The sequences of few queries (decode.cpp). False: interrupted.
bool attend_few(const Call& call, Interrupt interrupt);
// Its threads and scratch memory.
void plan_few(const Call& call, Plan& plan);

}  // namespace fastattn
