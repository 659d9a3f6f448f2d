// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of the backward pass. An item of work is a key block of one head, against all
// row blocks that see it: it alone makes the gradients of its keys and values. What it adds to the
// queries' gradients it adds in its turn, key block after key block, so that the result depends on
// no schedule. Items start in that order, and each visits its row blocks from the last to the
// first. So a key block first does what later ones wait for, and what it would have to wait for
// comes last, when the key block before, which began earlier, has been there: this holds for all
// that causality and windows let a row see. Called by src/; calls the kernel's table
// (kernel/kernel.h) through parallel_for.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <ranges>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "call.h"
#include "kernel/kernel.h"
#include "parallel.h"
#include "platform.h"
#include "schedule.h"

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(20);  // before a thread that waits sleeps
constexpr Clock::duration kLongestSleep = std::chrono::milliseconds(10);
constexpr int64_t kProblemsUntilStop = 64;  // is looked at
constexpr int64_t kMostBiasParts = 16;  // of a chain of short problems: it decides bits of dbias
constexpr size_t kBiasPartsBytes = 8 << 20;  // of all chains that are worked on at a time

// The first number of begin..end - 1 for which a condition holds that holds from there on.
template <class Condition>
int64_t first_with(int64_t begin, int64_t end, const Condition& condition) {
    return *std::ranges::partition_point(std::views::iota(begin, end),
                                         [&](int64_t i) { return !condition(i); });
}

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

// Brings rows near, line by line.
class Ahead {
   public:
    void clear() {
        each_ = (lines_ + calls_ - 1) / std::max<int64_t>(calls_, 1);
        lines_ = calls_ = 0;
        count_ = now_ = 0;
        head_ = row_ = at_ = 0;
    }

    void add(const Call::Rows& rows, int64_t head, int64_t heads, int64_t first, int64_t count,
             int64_t bytes, bool written) {
        if (rows.first == nullptr) return;
        Part part{static_cast<const char*>(rows.at(head, first)),
                  rows.head_bytes,
                  heads,
                  rows.row_bytes,
                  count,
                  bytes,
                  written};
        if (part.row_bytes == bytes) {
            part.bytes *= std::exchange(part.rows, 1);
            if (part.head_bytes == part.bytes) part.bytes *= std::exchange(part.heads, 1);
        }
        lines_ += part.heads * part.rows * (part.bytes / kLine + 1);
        parts_[count_++] = part;
    }

    // As many lines as make calls like those of the problem before bring all of them.
    void fetch() {
        ++calls_;
        for (int64_t left = each_; left > 0 && now_ < count_;) {
            const Part& part = parts_[now_];
            const char* line = part.first + head_ * part.head_bytes + row_ * part.row_bytes + at_;
            const int64_t lines = std::min(left, (part.bytes - at_ + kLine - 1) / kLine);
            if (part.written) {
                for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(line + i * kLine, 1, 3);
            } else {
                for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(line + i * kLine, 0, 2);
            }
            left -= lines;
            if ((at_ += lines * kLine) < part.bytes) continue;
            at_ = 0;
            if (++row_ < part.rows) continue;
            row_ = 0;
            if (++head_ < part.heads) continue;
            head_ = 0;
            ++now_;
        }
    }

   private:
    static constexpr int64_t kLine = 64;
    struct Part {
        const char* first;
        int64_t head_bytes, heads, row_bytes, rows, bytes;
        bool written;
    };
    Part parts_[8];
    int count_ = 0, now_ = 0;
    int64_t head_ = 0, row_ = 0, at_ = 0;  // of the part now
    int64_t lines_ = 0, calls_ = 0, each_ = 0;
};

// Problems that are one row block and one key tile each. None waits for another, and there are no
// lists of them: an item is many. Those that share the gradient of a bias are a chain. Its sum is
// that of a few parts of it, into which a chain's length alone cuts it.
class ShortGradients : Gradients {
   public:
    explicit ShortGradients(const GradientArgs& args) : Gradients(args) {
        const Array& bias = args.dbias.data != nullptr ? args.dbias : args.call.bias;
        const auto add = [&](bool repeated) {
            int64_t batch_step = call_.batches;
            for (size_t axis = 0; axis < args.call.batch_shape.size(); ++axis) {
                const int64_t size = args.call.batch_shape[axis];
                batch_step /= size;
                const bool repeats = bias.data != nullptr && bias.batch_strides[axis] == 0;
                if (repeats == repeated) add_axis({size, batch_step, 0}, repeats);
            }
            const bool repeats = bias.data != nullptr && bias.head_stride == 0;
            if (repeats == repeated) add_axis({args.call.kv_heads, 0, 1}, repeats);
        };
        add(false);
        add(true);
        parts_ = std::min(members_, kMostBiasParts);
        const int64_t rows = args.call.q_len * call_.group, keys = args.call.kv_len;
        seconds_ =
            short_gradient_seconds(rows, keys, args.call.head_dim + args.call.value_head_dim) *
            double(members_) / double(parts_);
        part_bytes_ = parts_ > 1 ? size_t(rows * keys * number_bytes()) : 0;
        wave_ = chains_;
        if (parts_ > 1) {
            wave_ = std::clamp<int64_t>(int64_t(kBiasPartsBytes / (part_bytes_ * size_t(parts_))),
                                        1, chains_);
        }
        const int64_t units = wave_ * parts_;
        const int most = team_size(units, seconds_ * double(units), call_.threads);
        units_of_item_ = problems_of_item(seconds_, units, most);
        threads_ = int(std::min<int64_t>(most, items(wave_)));
        scratch_bytes_ = thread_bytes(keys, true, repeats_);
    }

    static bool takes(const GradientArgs& args) {
        const Call call(args.call);
        const int rows = call.functions.gradients.block_rows(call.shared_block());
        const bool sums_packed = call.packed() && args.dbias.data != nullptr;
        return args.call.q_len * call.group <= rows &&
               args.call.kv_len <= call.functions.key_tile && !sums_packed && call.batches > 0 &&
               args.call.kv_heads > 0 && args.call.q_len > 0 && args.call.kv_len > 0;
    }

    bool run(Interrupt interrupt) {
        const Memory scratch = allocate(scratch_bytes_ * size_t(threads_));
        const Memory sums = allocate(part_bytes_ * size_t(wave_ * parts_));
        lend(sums.get(), int64_t(part_bytes_) * wave_ * parts_);
        for (int64_t first = 0; first < chains_; first += wave_) {
            const int64_t chains = std::min(wave_, chains_ - first);
            const auto body = [&](int64_t item, int worker, const Stop& stop) {
                const int64_t unit = item * units_of_item_;
                const int64_t past = std::min(unit + units_of_item_, chains * parts_);
                differentiate(first * parts_ + unit, first * parts_ + past,
                              sums.get() + size_t(unit) * part_bytes_,
                              scratch.get() + size_t(worker) * scratch_bytes_, stop);
            };
            const double seconds = seconds_ * double(units_of_item_);
            if (!parallel_for(items(chains), threads_, interrupt, body,
                              {.item_seconds = seconds})) {
                return false;
            }
            if (parts_ == 1) continue;
            const auto merge = [&](int64_t chain, int, const Stop&) {
                merge_parts(first + chain, sums.get() + size_t(chain * parts_) * part_bytes_);
            };
            if (!parallel_for(chains, std::min(threads_, int(chains)), interrupt, merge))
                return false;
        }
        return true;
    }

    Schedule schedule() const {
        Schedule schedule;
        schedule.scratch_bytes =
            scratch_bytes_ * size_t(threads_) + part_bytes_ * size_t(wave_ * parts_);
        for (int64_t first = 0; first < chains_; first += wave_) {
            const int64_t chains = std::min(wave_, chains_ - first);
            Phase phase{threads_, {}};
            for (int64_t left = chains * parts_; left > 0; left -= units_of_item_) {
                phase.items.push_back({{seconds_ * double(std::min(left, units_of_item_))}});
            }
            schedule.phases.push_back(std::move(phase));
            if (parts_ == 1) continue;
            const double seconds = double(part_bytes_) * double(parts_) / kMergeBytesPerSecond;
            Phase merge{std::min(threads_, int(chains)), {}};
            merge.items.assign(size_t(chains), {{seconds}});
            schedule.phases.push_back(std::move(merge));
        }
        return schedule;
    }

   private:
    // An axis of the problems. Those along which the bias repeats come last.
    struct Axis {
        int64_t size, batch_step, head_step;
    };
    // What next() needs to set a block up.
    struct Walk {
        const ShortGradients& gradients;
        const ThreadMemory memory;
        GradientBlock block;
        char* part;  // of a bias's gradient; null: it goes where it belongs
        int64_t next, past;
        Ahead ahead;
    };

    void add_axis(const Axis& axis, bool repeats) {
        axes_.push_back(axis);
        (repeats && args_.dbias.data != nullptr ? members_ : chains_) *= axis.size;
        repeats_ |= repeats && axis.size > 1;
    }

    int64_t number_bytes() const { return args_.call.query.dtype == Dtype::kFloat64 ? 8 : 4; }
    int64_t items(int64_t chains) const {
        return (chains * parts_ + units_of_item_ - 1) / units_of_item_;
    }

    // A unit is a part of a chain; without a bias, it is a problem.
    void differentiate(int64_t unit, int64_t past, char* part, char* memory,
                       const Stop& stop) const {
        Scratch scratch(memory);
        const ThreadMemory cut = this->cut(scratch, 0);
        Walk walk{*this, cut, shared_block(cut, stop), nullptr, 0, 0, {}};
        walk.block.alone = true;
        walk.block.keeps_bias = repeats_;
        walk.block.end = args_.call.kv_len;
        const GradientQueue queue{
            next, [](void* context) { static_cast<Walk*>(context)->ahead.fetch(); }, &walk};
        if (args_.dbias.data == nullptr) {
            walk.next = unit, walk.past = past;
            functions_.differentiate_alone(walk.block, queue);
        }
        for (; args_.dbias.data != nullptr && unit < past; ++unit) {
            const int64_t chain = unit / parts_, i = unit % parts_;
            walk.next = chain * members_ + members_ * i / parts_;
            walk.past = chain * members_ + members_ * (i + 1) / parts_;
            if (parts_ > 1) {
                walk.part = part;
                walk.block.dbias_stride = 1;
                std::memset(part, 0, part_bytes_);
            } else {
                clear_dbias(chain);
            }
            functions_.differentiate_alone(walk.block, queue);
        }
        take_back(memory, scratch_bytes_);
    }

    static bool next(void* context) {
        Walk& walk = *static_cast<Walk*>(context);
        const Stop& stop = walk.block.block.stop;
        do {
            if (walk.next == walk.past) return false;
            if (walk.next % kProblemsUntilStop == 0 && stop.requested(stop.context)) return false;
        } while (!walk.gradients.set(walk, walk.next++));
        if (walk.next < walk.past) walk.gradients.look_ahead(walk.ahead, walk.next);
        return true;
    }

    void find(int64_t problem, int64_t& batch, int64_t& kv_head) const {
        batch = kv_head = 0;
        for (size_t i = axes_.size(); i-- > 0;) {
            const int64_t place = problem % axes_[i].size;
            problem /= axes_[i].size;
            batch += place * axes_[i].batch_step;
            kv_head += place * axes_[i].head_step;
        }
    }

    // False: the problem has no rows or no keys.
    bool set(Walk& walk, int64_t problem) const {
        int64_t batch, kv_head;
        find(problem, batch, kv_head);
        const Sequence s = call_.sequence(batch);
        if (s.q_len == 0 || s.kv_len == 0) return false;
        GradientBlock& block = walk.block;
        block.end = s.kv_len;
        block.block.row_count = int(s.q_len * call_.group);
        set_keys(block, s, kv_head);
        set_rows(walk.memory, block.block.row_count, s, kv_head, 0);
        for (int r = 0; walk.part != nullptr && r < block.block.row_count; ++r) {
            walk.memory.more[r].dbias = walk.part + r * s.kv_len * number_bytes();
        }
        return true;
    }

    // What a problem reads and writes.
    void look_ahead(Ahead& ahead, int64_t problem) const {
        int64_t batch, kv_head;
        find(problem, batch, kv_head);
        const Sequence s = call_.sequence(batch);
        ahead.clear();
        const auto rows = [&](const Array& array, int64_t columns, bool written) {
            ahead.add(call_.rows(array, batch), kv_head * call_.group, call_.group, s.q_start,
                      s.q_len, columns * size_of(array.dtype), written);
        };
        const auto keys = [&](const Array& array, int64_t columns, bool written) {
            ahead.add(call_.rows(array, batch), kv_head, 1, s.kv_start, s.kv_len,
                      columns * size_of(array.dtype), written);
        };
        const AttentionArgs& call = args_.call;
        rows(call.query, call.head_dim, false);
        rows(args_.grad_out, call.value_head_dim, false);
        rows(call.out, call.value_head_dim, false);
        keys(call.key, call.head_dim, false);
        keys(call.value, call.value_head_dim, false);
        keys(args_.dv, call.value_head_dim, true);
        keys(args_.dk, call.head_dim, true);
        rows(args_.dq, call.head_dim, true);
    }

    // visit(r, where the gradient of the bias of row r goes), for a chain
    template <class Visit>
    void each_dbias(int64_t chain, const Visit& visit) const {
        int64_t batch, kv_head;
        find(chain * members_, batch, kv_head);
        const Call::Rows dbias = call_.rows(args_.dbias, batch);
        call_.each_row(args_.call.q_len * call_.group, kv_head, 0,
                       [&](int64_t r, int64_t head, int64_t i) { visit(r, dbias.at(head, i)); });
    }

    // Adds up what each part has, after what a first try may have left.
    void merge_parts(int64_t chain, const char* parts) const {
        if (args_.call.query.dtype == Dtype::kFloat64) {
            merge_parts(chain, reinterpret_cast<const double*>(parts));
        } else {
            merge_parts(chain, reinterpret_cast<const float*>(parts));
        }
    }
    template <class T>
    void merge_parts(int64_t chain, const T* parts) const {
        const int64_t keys = args_.call.kv_len, stride = args_.dbias.col_stride;
        clear_dbias(chain);
        for (int64_t i = 0; i < parts_; ++i, parts += part_bytes_ / sizeof(T)) {
            each_dbias(chain, [&](int64_t r, void* row) {
                T* const to = static_cast<T*>(row);
                for (int64_t j = 0; j < keys; ++j) to[j * stride] += parts[r * keys + j];
            });
        }
    }

    void clear_dbias(int64_t chain) const {
        const int64_t bytes = number_bytes();
        each_dbias(chain, [&](int64_t, void* row) {
            for (int64_t j = 0; j < args_.call.kv_len; ++j) {
                std::memset(static_cast<char*>(row) + j * args_.dbias.col_stride * bytes, 0,
                            size_t(bytes));
            }
        });
    }

    std::vector<Axis> axes_;
    bool repeats_ = false;              // the bias, from one problem to the next
    int64_t chains_ = 1, members_ = 1;  // members: problems of a chain
    int64_t parts_ = 1;                 // of a chain
    int64_t wave_ = 1;                  // chains at a time
    int64_t units_of_item_ = 1;
    size_t part_bytes_ = 0, scratch_bytes_ = 0;
    double seconds_ = 0;  // of a unit, roughly
    int threads_ = 1;
};

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
    if (ShortGradients::takes(args)) return ShortGradients(args).run(interrupt);
    return Backward(args).run(interrupt);
}

Schedule schedule_backward(const GradientArgs& args) {
    if (ShortGradients::takes(args)) return ShortGradients(args).schedule();
    return Backward(args).schedule();
}

}  // namespace fastattn
