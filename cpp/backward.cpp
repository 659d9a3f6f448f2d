// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of the backward pass. An item of work is a key block of one head, against all
// row blocks that see it: it alone makes the gradients of its keys and values. What it adds to the
// queries' gradients it adds in its turn, key block after key block, so that the result depends on
// no schedule. Items start in that order, and each visits its row blocks from the last to the
// first. So a key block first does what later ones wait for, and what it would have to wait for
// comes last, when the key block before, which began earlier, has been there: this holds for all
// that causality and windows let a row see. Called by src/; calls the kernel's table
// (kernel/kernel.h) through parallel_for. Short problems turn off to short_backward.cpp.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <ranges>
#include <span>
#include <thread>
#include <vector>

#include "gradients.h"
#include "kernel/kernel.h"
#include "parallel.h"
#include "platform.h"
#include "schedule.h"

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(20);  // before a thread that waits sleeps
constexpr Clock::duration kLongestSleep = std::chrono::milliseconds(10);

// The first number of begin..end - 1 for which a condition holds that holds from there on.
template <class Condition>
int64_t first_with(int64_t begin, int64_t end, const Condition& condition) {
    return *std::ranges::partition_point(std::views::iota(begin, end),
                                         [&](int64_t i) { return !condition(i); });
}

class Backward : Gradients {
   public:
    explicit Backward(const GradientArgs& args)
        : Gradients(args),
          query_sums_bytes_(functions_.query_sums_bytes(call_.shared_block())),
          sums_bytes_(room_for(query_sums_bytes_)) {
        // Nothing is written; there may be more heads than could be counted.
        if (args.call.q_heads == 0 || args.call.q_len == 0 || args.call.kv_len == 0) return;
        find_heads();
        find_chains();
        const auto bytes = [&](int64_t keys) { return thread_bytes(keys); };
        const auto load = [&](int64_t keys) { return load_of(keys); };
        const GradientCut cut = cut_gradients(call_.functions.key_tile, call_.threads, bytes, load);
        set_block_keys(cut.block_keys);
        parts_ = cut.parts;
        item_seconds_ = cut.longest / parts_;
        threads_ = cut.threads;
        scratch_bytes_ = thread_bytes(block_keys_);
        choose_places();
        make_items();
    }

    bool run(Interrupt interrupt) {
        if (items_.empty()) return true;
        const Memory scratch = allocate(scratch_bytes_ * scratches());
        const Memory sums = allocate(size_t(places_) * sums_bytes_);
        std::vector<std::atomic<int64_t>> turns(turn_count());
        turns_ = turns.data();
        sums_ = sums.get();
        return parallel_for(int64_t(items_.size()), threads_, interrupt,
                            [&](int64_t index, int worker, const Stop& stop) {
                                // A forked child begins again, alone.
                                if (index == 0 && process_id() != process_) begin_again();
                                const Item& item = items_[size_t(index)];
                                const size_t of = parts_ > 1 ? size_t(item.number) : size_t(worker);
                                differentiate(item, scratch.get() + of * scratch_bytes_, stop);
                            },
                            {.item_seconds = item_seconds_});
    }

    Schedule schedule() const {
        Schedule schedule;
        schedule.scratch_bytes = scratch_bytes_ * scratches() + size_t(places_) * sums_bytes_;
        if (items_.empty()) return schedule;
        Phase phase{threads_, {}};
        for (const Item& item : items_) phase.items.push_back(steps(item));
        schedule.phases.push_back(std::move(phase));
        return schedule;
    }

   private:
    // A head of keys and values that queries see, and the row blocks that see any of it.
    struct Head {
        int64_t batch, kv_head;
        const void* bias;  // whose gradient is asked for
        Interval row_blocks;
        int64_t before;  // row blocks of the heads before it in its chain
    };
    // Heads that share the gradient of a bias, and are worked on one after the other; or one head.
    struct Chain {
        size_t first_head, heads;
        int64_t row_blocks;
        int64_t key_blocks;
        int64_t rows_before, keys_before;  // row blocks and key blocks of the chains before it
    };
    struct Item {
        size_t chain;
        int64_t key_block;
        int64_t number;        // of the key block, among all
        int part;              // of the row blocks
        int64_t parts_before;  // that the key block has done then
    };
    // What an item does of a head and a key block.
    struct Visits {
        Interval row_blocks;
        bool begins, finishes;
    };
    // Those of all parts of a key block are the same.
    size_t scratches() const { return size_t(parts_ > 1 ? key_blocks_ : threads_); }
    size_t turn_count() const { return size_t(places_ + (parts_ > 1 ? key_blocks_ : 0)); }

    // The keys that a row block sees.
    Interval keys_of(const Sequence& sequence, int64_t row_block) const {
        const int64_t first = row_block * block_rows_;
        const int64_t last = std::min(first + block_rows_, sequence.q_len * call_.group) - 1;
        return {call_.interval(sequence, first / call_.group).begin,
                call_.interval(sequence, last / call_.group).end};
    }

    // Rows that come later see later keys: those that see none are the first and the last ones.
    void find_heads() {
        for (int64_t batch = 0; batch < call_.batches; ++batch) {
            const Sequence s = call_.sequence(batch);
            if (s.q_len == 0 || s.begin >= s.end) continue;
            const int64_t row_blocks = (s.q_len * call_.group + block_rows_ - 1) / block_rows_;
            const int64_t first =
                first_with(0, row_blocks, [&](int64_t i) { return keys_of(s, i).end > s.begin; });
            const int64_t past = first_with(
                first, row_blocks, [&](int64_t i) { return keys_of(s, i).begin >= s.end; });
            if (first == past) continue;
            const Call::Rows dbias = call_.rows(args_.dbias, batch);
            for (int64_t kv_head = 0; kv_head < args_.call.kv_heads; ++kv_head) {
                const void* const bias = dbias.at(kv_head * call_.group, s.q_start);
                heads_.push_back({batch, kv_head, bias, {first, past}, 0});
            }
        }
    }

    void find_chains() {
        std::ranges::stable_sort(heads_, std::less<>(), &Head::bias);
        for (size_t i = 0; i < heads_.size(); ++i) {
            Head& head = heads_[i];
            if (i == 0 || head.bias == nullptr || head.bias != heads_[i - 1].bias) {
                chains_.push_back({i, 0, 0, 0, 0, 0});
            }
            Chain& chain = chains_.back();
            head.before = chain.row_blocks;
            chain.row_blocks += head.row_blocks.end - head.row_blocks.begin;
            ++chain.heads;
        }
        std::ranges::stable_sort(chains_, std::greater<>(), &Chain::row_blocks);  // longest first
    }

    auto heads_of(const Chain& chain) const {
        return std::span(heads_).subspan(chain.first_head, chain.heads);
    }

    // How many keys are worked on together changes no bit.
    void set_block_keys(int64_t keys) {
        block_keys_ = keys;
        key_blocks_ = 0;
        int64_t rows = 0;
        for (Chain& chain : chains_) {
            int64_t most = 0;
            for (const Head& head : heads_of(chain)) {
                most = std::max(most, call_.sequence(head.batch).kv_len);
            }
            chain.key_blocks = (most + keys - 1) / keys;
            chain.rows_before = rows;
            chain.keys_before = key_blocks_;
            rows += chain.row_blocks;
            key_blocks_ += chain.key_blocks;
        }
    }

    GradientLoad load_of(int64_t keys) {
        set_block_keys(keys);
        GradientLoad load{key_blocks_, 0, 0};
        double all = 0;  // of a chain: the heads of a sequence are alike
        for (size_t i = 0; i < chains_.size(); ++i) {
            const auto batch = [&](size_t chain) {
                return heads_[chains_[chain].first_head].batch;
            };
            const bool alike = i > 0 && chains_[i].heads == 1 && chains_[i - 1].heads == 1 &&
                               batch(i) == batch(i - 1);
            if (!alike) all = 0;
            for (int64_t k = 0; !alike && k < chains_[i].key_blocks; ++k) {
                const double seconds = this->seconds({i, k, 0, 0, 0});
                load.longest = std::max(load.longest, seconds);
                all += seconds;
            }
            load.total += all;
        }
        return load;
    }

    // How many row blocks need their sums at the same time: those in a row that see a key block
    // with the last of them, since these are done in turn. Parts begin with the last ones of all.
    int64_t row_blocks_in_flight(const Chain& chain) const {
        if (chain.heads > 1 || parts_ > 1) return chain.row_blocks;
        const Head& head = heads_[chain.first_head];
        const Sequence s = call_.sequence(head.batch);
        int64_t first = head.row_blocks.begin, most = 0;
        for (int64_t i = first; i < head.row_blocks.end; ++i) {
            const int64_t begin = keys_of(s, i).begin / block_keys_;
            while ((keys_of(s, first).end - 1) / block_keys_ < begin) ++first;
            most = std::max(most, i - first + 1);
        }
        return most;
    }

    void choose_places() {
        int64_t all = 0, most = 0, in_flight = 0;
        for (const Chain& chain : chains_) {
            all += chain.row_blocks;
            most = std::max(most, chain.row_blocks);
            in_flight = std::max(in_flight, row_blocks_in_flight(chain));
            most_turns_ = std::max(most_turns_, chain.key_blocks);
        }
        places_ = gradient_places(all, most, in_flight, sums_bytes_, threads_);
    }

    void make_items() {
        std::vector<GradientChain> chains;
        for (const Chain& chain : chains_) {
            chains.push_back({chain.row_blocks, chain.key_blocks});
        }
        std::vector<int64_t> parts_before(size_t(parts_ > 1 ? key_blocks_ : 0));
        order_gradients(chains, places_, parts_, [&](size_t i, int64_t key_block, int part) {
            const Chain& chain = chains_[i];
            const int64_t number = chain.keys_before + key_block;
            Item item{i, key_block, number, part, 0};
            if (parts_ > 1) {
                if (!works(item)) return;
                item.parts_before = parts_before[size_t(number)]++;
            }
            items_.push_back(item);
        });
    }

    // A part of the row blocks of a chain, the last ones of its first head first.
    Visits visits(const Chain& chain, const Head& head, const Sequence& sequence,
                  const Item& item) const {
        const int64_t begin = item.key_block * block_keys_, end = begin + block_keys_;
        const int64_t past_of_head = head.row_blocks.end;
        const int64_t first = first_with(head.row_blocks.begin, past_of_head, [&](int64_t i) {
            return keys_of(sequence, i).end > begin;
        });
        const int64_t past = first_with(
            first, past_of_head, [&](int64_t i) { return keys_of(sequence, i).begin >= end; });
        const auto bound = [&](int part) -> int64_t {
            if (part == parts_) return 0;
            const int64_t row_block = past_of_head + head.before - chain.row_blocks * part / parts_;
            if (row_block <= head.row_blocks.begin) return head.row_blocks.begin;
            return (row_block + kRowBlocksInRun - 1) / kRowBlocksInRun * kRowBlocksInRun;
        };
        const Interval part{std::max(first, bound(item.part + 1)),
                            std::min(past, bound(item.part))};
        const bool any = part.begin < part.end;
        // A key block that no row sees has gradients, too, which are zeros.
        const bool whole = first == past && bound(item.part + 1) < past_of_head &&
                           past_of_head <= bound(item.part);
        return {part, whole || (any && part.end == past), whole || (any && part.begin == first)};
    }

    // Calls visit(i) for row blocks in the order of visits, until it returns false.
    template <class Visit>
    static bool each_row_block(const Interval& row_blocks, const Visit& visit) {
        for (int64_t past = row_blocks.end; past > row_blocks.begin;) {
            const int64_t first =
                std::max((past - 1) / kRowBlocksInRun * kRowBlocksInRun, row_blocks.begin);
            for (int64_t i = first; i < past; ++i) {
                if (!visit(i)) return false;
            }
            past = first;
        }
        return true;
    }

    // Where a key block adds to the sums of a row block, and when. A place is that of several row
    // blocks, one after the other.
    struct Turn {
        int64_t place, number, next;
        bool first, last;  // of the row block
    };
    Turn turn(const Chain& chain, const Head& head, const Interval& keys, int64_t row_block,
              int64_t key_block) const {
        const int64_t row_block_of_all =
            chain.rows_before + head.before + row_block - head.row_blocks.begin;
        const int64_t round = row_block_of_all / places_ * most_turns_;
        const int64_t mine = key_block - keys.begin / block_keys_;
        const bool last = key_block == (keys.end - 1) / block_keys_;
        const int64_t number = round + mine;
        return {row_block_of_all % places_, number, last ? round + most_turns_ : number + 1,
                mine == 0, last};
    }

    std::vector<Step> steps(const Item& item) const {
        const Chain& chain = chains_[item.chain];
        const int64_t columns = args_.call.head_dim + args_.call.value_head_dim;
        std::vector<Step> steps;
        if (parts_ > 1) steps.push_back({0, places_ + item.number, 2 * item.parts_before});
        for (const Head& head : heads_of(chain)) {
            const Sequence s = call_.sequence(head.batch);
            const Visits visits = this->visits(chain, head, s, item);
            each_row_block(visits.row_blocks, [&](int64_t i) {
                const Interval keys = keys_of(s, i);
                const int64_t begin = std::max(item.key_block * block_keys_, keys.begin);
                const int64_t end = std::min((item.key_block + 1) * block_keys_, keys.end);
                const Turn turn = this->turn(chain, head, keys, i, item.key_block);
                const int64_t rows =
                    std::min<int64_t>(block_rows_, s.q_len * call_.group - i * block_rows_);
                const double seconds = gradient_seconds(rows, end - begin, columns);
                steps.push_back({seconds, turn.place, turn.number});
                return true;
            });
        }
        if (parts_ > 1) steps.push_back({0, places_ + item.number, 2 * item.parts_before + 1});
        return steps;
    }

    bool works(const Item& item) const {
        const Chain& chain = chains_[item.chain];
        return std::ranges::any_of(heads_of(chain), [&](const Head& head) {
            const Visits v = visits(chain, head, call_.sequence(head.batch), item);
            return v.begins || v.row_blocks.begin < v.row_blocks.end;
        });
    }

    double seconds(const Item& item) const {
        double seconds = 0;
        for (const Step& step : steps(item)) seconds += step.seconds;
        return seconds;
    }

    void begin_again() {
        for (size_t i = 0; i < turn_count(); ++i) turns_[i] = 0;
        if (args_.dbias.data == nullptr) return;  // other results are overwritten
        const int64_t bytes = args_.dbias.dtype == Dtype::kFloat64 ? 8 : 4;
        for (const Head& head : heads_) {
            const Sequence s = call_.sequence(head.batch);
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

    // Until it has its turn at a place. The longer a thread has waited, the longer it sleeps.
    // False: the call must stop.
    bool wait(int64_t place, int64_t number, const Stop& stop) const {
        const std::atomic<int64_t>& turn = turns_[place];
        if (turn.load(std::memory_order_acquire) == number) return true;
        const auto begin = Clock::now();
        do {
            if (stop.requested(stop.context)) return false;
            const auto waited = Clock::now() - begin;
            if (waited < kSpin) {
                pause_core();
            } else {
                std::this_thread::sleep_for(std::min(waited / 4, kLongestSleep));
            }
        } while (turn.load(std::memory_order_acquire) != number);
        return true;
    }

    void differentiate(const Item& item, char* memory, const Stop& stop) {
        const Chain& chain = chains_[item.chain];
        const int64_t place = places_ + item.number;
        if (parts_ > 1 && !wait(place, item.parts_before, stop)) return;
        for (const Head& head : heads_of(chain)) {
            if (!differentiate(chain, head, item, memory, stop)) return;
        }
        take_back(memory, scratch_bytes_);
        if (parts_ > 1) turns_[place].store(item.parts_before + 1, std::memory_order_release);
    }

    bool differentiate(const Chain& chain, const Head& head, const Item& item, char* memory,
                       const Stop& stop) {
        const Sequence sequence = call_.sequence(head.batch);
        const auto [row_blocks, begins, finishes] = visits(chain, head, sequence, item);
        Scratch scratch(memory);
        const ThreadMemory cut = this->cut(scratch, 0);
        GradientBlock block = shared_block(cut, stop);
        set_keys(block, sequence, head.kv_head);
        block.begin = item.key_block * block_keys_;
        block.end = std::min(block.begin + block_keys_, sequence.kv_len);
        if (block.begin >= block.end) return true;
        if (begins) functions_.begin_keys(block);
        const bool finished = each_row_block(row_blocks, [&](int64_t i) {
            if (stop.requested(stop.context)) return false;
            const int64_t first = i * block_rows_;
            const int64_t past = std::min(first + block_rows_, sequence.q_len * call_.group);
            block.block.row_count = int(past - first);
            set_rows(cut, block.block.row_count, sequence, head.kv_head, first);
            functions_.differentiate(block);

            const Turn turn = this->turn(chain, head, keys_of(sequence, i), i, item.key_block);
            if (!wait(turn.place, turn.number, stop)) return false;
            char* const sums = sums_ + size_t(turn.place) * sums_bytes_;
            lend(sums, int64_t(query_sums_bytes_));
            block.query_sums = sums;
            functions_.add_query_sums(block, turn.first);
            if (turn.last) functions_.store_query_sums(block);
            take_back(sums, sums_bytes_);
            turns_[turn.place].store(turn.next, std::memory_order_release);
            return true;
        });
        if (finished && finishes) functions_.finish_keys(block);
        return finished;
    }

    const int process_ = process_id();
    const size_t query_sums_bytes_, sums_bytes_;  // of a row block; the second with its red zone
    std::vector<Head> heads_;
    std::vector<Chain> chains_;
    std::vector<Item> items_;
    int64_t block_keys_ = 0, key_blocks_ = 0;
    int64_t places_ = 1;      // row blocks whose sums there is room for
    int64_t most_turns_ = 1;  // of a row block
    size_t scratch_bytes_ = 0;
    int threads_ = 1;
    double item_seconds_ = 0;  // at most, roughly
    int parts_ = 1;            // of an item, done one after the other

    // For each place the turn that is next; then, with several parts, the part that is next of each
    // key block.
    std::atomic<int64_t>* turns_ = nullptr;
    char* sums_ = nullptr;
};

}  // namespace

bool attention_backward(const GradientArgs& args, Interrupt interrupt) {
    const int before = times_begun_again();
    const bool finished =
        is_short(args) ? differentiate_short(args, interrupt) : Backward(args).run(interrupt);
    if (args.accumulates && times_begun_again() != before) throw_begun_again();
    return finished;
}

Schedule schedule_backward(const GradientArgs& args) {
    if (is_short(args)) return schedule_short_gradients(args);
    return Backward(args).schedule();
}

}  // namespace fastattn
