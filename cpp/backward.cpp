// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of the backward pass. An item of work is a key block of one head, against all
// row blocks that see it: it alone makes the gradients of its keys and values. What it adds to the
// queries' gradients it adds in its turn, key block after key block, so that the result depends on
// no schedule. Items start in that order, each a row block behind the one before it, so that none
// has to wait. Called by src/; calls the kernel's table (kernel/kernel.h) through parallel_for.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <vector>

#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"
#include "platform.h"

namespace fastattn {
namespace {

constexpr size_t kBlockBytes = 1 << 20;  // of what is kept of a key block: for the caches
constexpr size_t kSumsBytes = 64 << 20;  // of the queries' gradients, unless one head has more
constexpr int64_t kItemsPerThread = 4;
constexpr double kTimesForward = 2.5;
constexpr int64_t kLeft = -1;  // a chain has left its slot

class Backward {
   public:
    explicit Backward(const GradientArgs& args)
        : call_(args.call),
          args_(args),
          functions_(call_.functions.gradients),
          block_rows_(functions_.block_rows(call_.shared_block())),
          query_sums_bytes_(functions_.query_sums_bytes(call_.shared_block())),
          sums_bytes_(room_for(query_sums_bytes_)) {
        if (args.call.q_heads == 0) return;
        find_chains();
        double seconds = 0;
        for (const Head& head : heads_) seconds += call_.seconds(head.sequence);
        seconds *= kTimesForward / double(args.call.kv_heads);
        choose_block_keys(seconds);
        threads_ = team_size(items(), seconds, call_.threads);
        // As many chains at a time as keep all threads from waiting for each other.
        size_t most = 1;
        for (const Chain& chain : chains_) {
            most_row_blocks_ = std::max(most_row_blocks_, chain.row_blocks);
            most = std::max(most, size_t(chain.row_blocks) * sums_bytes_);
        }
        slots_ = std::clamp(kSumsBytes / most, size_t(1), size_t(threads_));
        make_items();
        Block block = call_.shared_block();
        block.row_count = block_rows_;
        kernel_bytes_ = functions_.scratch_bytes(block, block_keys_);
        Scratch scratch;
        cut(scratch);
        scratch_bytes_ = scratch.used();
    }

    bool run(Interrupt interrupt) {
        if (items_.empty()) return true;
        const Memory scratch = allocate(scratch_bytes_ * size_t(threads_));
        const Memory sums = allocate(slots_ * size_t(most_row_blocks_) * sums_bytes_);
        std::vector<std::atomic<int64_t>> turns(slots_ * size_t(most_row_blocks_));
        std::vector<std::atomic<int64_t>> done(chains_.size());
        turns_ = turns.data();
        done_ = done.data();
        sums_ = sums.get();
        return parallel_for(int64_t(items_.size()), threads_, interrupt,
                            [&](int64_t index, int worker, const Stop& stop) {
                                // A forked child begins again, alone.
                                if (index == 0 && process_id() != process_) begin_again();
                                char* const memory =
                                    scratch.get() + size_t(worker) * scratch_bytes_;
                                differentiate(items_[size_t(index)], memory, stop);
                            });
    }

   private:
    struct Head {
        Sequence sequence;
        int64_t kv_head;
        int64_t first_row_block, row_blocks;  // among those of the chain
    };
    // Heads that share the gradient of a bias, and are worked on one after the other; or one head.
    struct Chain {
        std::vector<size_t> heads;
        int64_t row_blocks = 0, key_blocks = 0;
    };
    // A thread's scratch memory: the rows of a row block, and what the kernel cuts.
    struct ThreadMemory {
        Row* rows;
        GradientRow* more;
        void* kernel;
    };
    struct Item {
        size_t chain;
        int64_t key_block;
    };

    ThreadMemory cut(Scratch& scratch) const {
        return {scratch.take<Row>(block_rows_), scratch.take<GradientRow>(block_rows_),
                scratch.reserve(kernel_bytes_)};
    }

    void find_chains() {
        const AttentionArgs& call = args_.call;
        std::map<const char*, size_t> of_bias;
        for (int64_t batch = 0; batch < call_.batches; ++batch) {
            for (int64_t kv_head = 0; kv_head < call.kv_heads; ++kv_head) {
                const Sequence sequence = call_.sequence(batch);
                if (sequence.q_len == 0 || sequence.kv_len == 0) continue;
                const int64_t rows = sequence.q_len * call_.group;
                const int64_t row_blocks = (rows + block_rows_ - 1) / block_rows_;
                size_t index = chains_.size();
                if (args_.dbias.data != nullptr) {
                    const void* const bias =
                        call_.rows(args_.dbias, batch).at(kv_head * call_.group, sequence.q_start);
                    index =
                        of_bias.try_emplace(static_cast<const char*>(bias), index).first->second;
                }
                if (index == chains_.size()) chains_.emplace_back();
                Chain& chain = chains_[index];
                chain.heads.push_back(heads_.size());
                heads_.push_back({sequence, kv_head, chain.row_blocks, row_blocks});
                chain.row_blocks += row_blocks;
            }
        }
    }

    // How many keys are worked on together changes no bit.
    void choose_block_keys(double seconds) {
        const int64_t tile = call_.functions.key_tile;
        Block block = call_.shared_block();
        block.row_count = block_rows_;
        const size_t fixed = functions_.scratch_bytes(block, 0);
        const size_t each = functions_.scratch_bytes(block, tile) - fixed;
        block_keys_ = tile * std::max<int64_t>(int64_t(kBlockBytes / each), 1);
        const int64_t threads = team_size(INT64_MAX, seconds, call_.threads);
        for (;; block_keys_ = block_keys_ / 2 / tile * tile) {
            count_key_blocks();
            if (block_keys_ < 2 * tile || items() >= kItemsPerThread * threads) break;
        }
    }

    void count_key_blocks() {
        for (Chain& chain : chains_) {
            chain.key_blocks = 0;
            for (const size_t head : chain.heads) {
                chain.key_blocks = std::max(chain.key_blocks, key_blocks(heads_[head]));
            }
        }
    }
    int64_t items() const {
        int64_t items = 0;
        for (const Chain& chain : chains_) items += chain.key_blocks;
        return items;
    }
    int64_t key_blocks(const Head& head) const {
        return (head.sequence.kv_len + block_keys_ - 1) / block_keys_;
    }

    // A few chains at a time; of these, key block by key block.
    void make_items() {
        items_.clear();
        for (size_t first = 0; first < chains_.size(); first += slots_) {
            const size_t last = std::min(first + slots_, chains_.size());
            int64_t most = 0;
            for (size_t i = first; i < last; ++i) most = std::max(most, chains_[i].key_blocks);
            for (int64_t key_block = 0; key_block < most; ++key_block) {
                for (size_t i = first; i < last; ++i) {
                    if (key_block < chains_[i].key_blocks) items_.push_back({i, key_block});
                }
            }
        }
    }

    void begin_again() {
        for (size_t i = 0; i < slots_ * size_t(most_row_blocks_); ++i) turns_[i] = 0;
        for (size_t i = 0; i < chains_.size(); ++i) done_[i] = 0;
        if (args_.dbias.data == nullptr) return;  // other results are overwritten
        const int64_t bytes = args_.dbias.dtype == Dtype::kFloat64 ? 8 : 4;
        for (const Head& head : heads_) {
            const Sequence& s = head.sequence;
            const Call::Rows dbias = call_.rows(args_.dbias, s.batch);
            const int64_t count = s.q_len * call_.group;
            call_.each_row(count, head.kv_head, 0, [&](int64_t, int64_t q_head, int64_t i) {
                char* const row = static_cast<char*>(dbias.at(q_head, s.q_start + i));
                for (int64_t key = 0; key < s.kv_len; ++key) {
                    std::memset(row + key * args_.dbias.col_stride * bytes, 0, size_t(bytes));
                }
            });
        }
    }

    // False: the call must stop.
    template <class Reached>
    static bool wait(const Stop& stop, const Reached& reached) {
        while (!reached()) {
            if (stop.requested(stop.context)) return false;
            yield();
        }
        return true;
    }

    void differentiate(const Item& item, char* memory, const Stop& stop) {
        const Chain& chain = chains_[item.chain];
        if (item.chain >= slots_) {
            const std::atomic<int64_t>& before = done_[item.chain - slots_];
            const auto left = [&] { return before.load(std::memory_order_acquire) == kLeft; };
            if (!wait(stop, left)) return;
        }
        for (const size_t head : chain.heads) {
            if (item.key_block < key_blocks(heads_[head]) &&
                !differentiate(heads_[head], item, memory, stop)) {
                return;
            }
        }
        // The last one leaves the slot as it was, and then lets the next chain in.
        const size_t slot = item.chain % slots_ * size_t(most_row_blocks_);
        std::atomic<int64_t>& done = done_[item.chain];
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < chain.key_blocks) return;
        for (int64_t i = 0; i < chain.row_blocks; ++i) turns_[slot + size_t(i)] = 0;
        done.store(kLeft, std::memory_order_release);
    }

    bool differentiate(const Head& head, const Item& item, char* memory, const Stop& stop) {
        const Sequence& sequence = head.sequence;
        Scratch scratch(memory);
        const auto [rows, more, kernel_memory] = cut(scratch);
        GradientBlock block{};
        block.block = call_.shared_block();
        block.block.rows = rows;
        block.block.scratch = kernel_memory;
        block.block.stop = stop;
        call_.set_keys(block.block, sequence, head.kv_head);
        block.gradients = more;
        block.begin = item.key_block * block_keys_;
        block.end = std::min(block.begin + block_keys_, sequence.kv_len);
        block.dk = {call_.rows(args_.dk, sequence.batch).at(head.kv_head, sequence.kv_start),
                    args_.dk.row_stride, 0};
        block.dv = {call_.rows(args_.dv, sequence.batch).at(head.kv_head, sequence.kv_start),
                    args_.dv.row_stride, 0};
        block.dbias_stride = args_.dbias.col_stride;
        functions_.begin_keys(block);
        const int64_t count = sequence.q_len * call_.group;
        for (int64_t row_block = 0; row_block < head.row_blocks; ++row_block) {
            if (stop.requested(stop.context)) return false;
            const int64_t first = row_block * block_rows_;
            const int64_t last = std::min(first + block_rows_, count) - 1;
            const int64_t begin = call_.interval(sequence, first / call_.group).begin;
            const int64_t end = call_.interval(sequence, last / call_.group).end;
            if (begin >= end || begin >= block.end || end <= block.begin) continue;
            block.block.row_count = int(last - first + 1);
            call_.set_rows(rows, block.block.row_count, sequence, head.kv_head, first);
            set_more(more, block.block.row_count, sequence, head.kv_head, first);
            functions_.differentiate(block);

            const size_t place = item.chain % slots_ * size_t(most_row_blocks_) +
                                 size_t(head.first_row_block + row_block);
            const int64_t first_block = begin / block_keys_, last_block = (end - 1) / block_keys_;
            std::atomic<int64_t>& turn = turns_[place];
            const int64_t mine = item.key_block - first_block;
            const auto reached = [&] { return turn.load(std::memory_order_acquire) == mine; };
            if (!wait(stop, reached)) return false;
            char* const sums = sums_ + place * sums_bytes_;
            lend(sums, int64_t(query_sums_bytes_));
            block.query_sums = sums;
            functions_.add_query_sums(block, mine == 0);
            if (item.key_block == last_block) functions_.store_query_sums(block);
            take_back(sums, sums_bytes_);
            turn.store(mine + 1, std::memory_order_release);
        }
        functions_.finish_keys(block);
        take_back(memory, scratch_bytes_);
        return true;
    }

    void set_more(GradientRow* to, int count, const Sequence& s, int64_t kv_head,
                  int64_t first) const {
        const Call::Rows grad_out = call_.rows(args_.grad_out, s.batch),
                         grad_lse = call_.rows(args_.grad_lse, s.batch),
                         dq = call_.rows(args_.dq, s.batch),
                         dbias = call_.rows(args_.dbias, s.batch),
                         delta = call_.rows(args_.delta, s.batch);
        call_.each_row(count, kv_head, first, [&](int64_t r, int64_t head, int64_t i) {
            to[r] = {grad_out.at(head, s.q_start + i), grad_lse.at(head, s.q_start + i),
                     dq.at(head, s.q_start + i), dbias.at(head, s.q_start + i),
                     delta.at(head, s.q_start + i)};
        });
    }

    const Call call_;
    const GradientArgs& args_;
    const GradientFunctions& functions_;
    const int process_ = process_id();
    const int block_rows_;                        // at most, of a row block
    const size_t query_sums_bytes_, sums_bytes_;  // of a row block; the second with its red zone
    std::vector<Head> heads_;
    std::vector<Chain> chains_;
    std::vector<Item> items_;
    int64_t block_keys_ = 0, most_row_blocks_ = 1;
    size_t slots_ = 1, kernel_bytes_ = 0, scratch_bytes_ = 0;
    int threads_ = 1;

    std::atomic<int64_t>* turns_ =
        nullptr;  // for a row block in flight: key blocks that added to it
    std::atomic<int64_t>* done_ = nullptr;  // for a chain: key blocks that are done, or kLeft
    char* sums_ = nullptr;
};

}  // namespace

bool attention_backward(const GradientArgs& args, Interrupt interrupt) {
    return Backward(args).run(interrupt);
}

}  // namespace fastattn
