// SPDX-License-Identifier: Apache-2.0
//
// What gradients look like to the kernel, beside what call.h says of a call. Used by backward.cpp
// and short_backward.cpp.
#pragma once

#include "call.h"
#include "kernel/kernel.h"
#include "scratch.h"

namespace fastattn {

// What all gradients need.
class Gradients {
   public:
    explicit Gradients(const GradientArgs& args)
        : call_(args.call),
          args_(args),
          functions_(call_.functions.gradients),
          block_rows_(functions_.block_rows(call_.shared_block())) {}

   protected:
    // A thread's scratch memory: the rows of a row block, and what the kernel cuts.
    struct ThreadMemory {
        Row* rows;
        GradientRow* more;
        void* kernel;
    };
    ThreadMemory cut(Scratch& scratch, size_t kernel_bytes) const {
        return {scratch.take<Row>(block_rows_), scratch.take<GradientRow>(block_rows_),
                scratch.reserve(kernel_bytes)};
    }
    size_t thread_bytes(int64_t keys, bool alone = false, bool keeps_bias = false) const {
        Block block = call_.shared_block();
        block.row_count = block_rows_;
        Scratch scratch;
        cut(scratch, functions_.scratch_bytes(block, keys, alone, keeps_bias));
        return scratch.used();
    }

    // A block without rows and keys, in a thread's memory.
    GradientBlock shared_block(const ThreadMemory& memory, const Stop& stop) const {
        GradientBlock block{};
        block.block = call_.shared_block();
        block.block.rows = memory.rows;
        block.block.scratch = memory.kernel;
        block.block.stop = stop;
        block.gradients = memory.more;
        block.dbias_stride = args_.dbias.col_stride;
        block.dq_dtype = args_.dq.dtype;
        block.dkv_dtype = args_.dk.dtype;
        block.accumulates = args_.accumulates;
        return block;
    }

    void set_keys(GradientBlock& block, const Sequence& s, int64_t kv_head) const {
        call_.set_keys(block.block, s, kv_head);
        block.dk = {call_.rows(args_.dk, s.batch).at(kv_head, s.kv_start), args_.dk.row_stride, 0};
        block.dv = {call_.rows(args_.dv, s.batch).at(kv_head, s.kv_start), args_.dv.row_stride, 0};
    }

    void set_rows(const ThreadMemory& to, int count, const Sequence& s, int64_t kv_head,
                  int64_t first) const {
        call_.set_rows(to.rows, count, s, kv_head, first);
        const Call::Rows grad_out = call_.rows(args_.grad_out, s.batch),
                         grad_lse = call_.rows(args_.grad_lse, s.batch),
                         dq = call_.rows(args_.dq, s.batch),
                         dbias = call_.rows(args_.dbias, s.batch),
                         delta = call_.rows(args_.delta, s.batch);
        call_.each_row(count, kv_head, first, [&](int64_t r, int64_t head, int64_t i) {
            to.more[r] = {grad_out.at(head, s.q_start + i), grad_lse.at(head, s.q_start + i),
                          dq.at(head, s.q_start + i), dbias.at(head, s.q_start + i),
                          delta.at(head, s.q_start + i)};
        });
    }

    const Call call_;
    const GradientArgs& args_;
    const GradientFunctions& functions_;
    const int block_rows_;  // at most, of a row block
};

// Whether each problem is one row block and one key tile (short_backward.cpp).
bool is_short(const GradientArgs& args);
bool differentiate_short(const GradientArgs& args, Interrupt interrupt);  // false: interrupted
Schedule schedule_short_gradients(const GradientArgs& args);

}  // namespace fastattn
