// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of the backward pass of short problems, each of one row block and one key
// tile. None waits for another, and there are no lists of them: an item is many, which follow from
// its number. Called by backward.cpp; calls the kernel's table (kernel/kernel.h) through
// parallel_for.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "gradients.h"
#include "kernel/kernel.h"
#include "parallel.h"
#include "schedule.h"

namespace fastattn {
namespace {

constexpr double kSecondsUntilStop = 1e-3;  // is looked at
constexpr int64_t kMostBiasParts = 16;  // of a chain of short problems: it decides bits of dbias
constexpr size_t kBiasPartsBytes = 8 << 20;  // of all chains that are worked on at a time

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

// Problems that share the gradient of a bias are a chain. Its sum is that of a few parts of it,
// into which a chain's length alone cuts it.
class ShortGradients : Gradients {
   public:
    explicit ShortGradients(const GradientArgs& args) : Gradients(args) {
        const Array& bias = args.dbias.data != nullptr ? args.dbias : args.call.bias;
        const bool may_repeat = bias.data != nullptr && !call_.packed();
        const auto add = [&](bool repeated) {
            int64_t batch_step = call_.batches;
            for (size_t axis = 0; axis < args.call.batch_shape.size(); ++axis) {
                const int64_t size = args.call.batch_shape[axis];
                batch_step /= size;
                const bool repeats = may_repeat && bias.batch_strides[axis] == 0;
                if (repeats == repeated) add_axis({size, batch_step, 0}, repeats);
            }
            const bool repeats = may_repeat && bias.head_stride == 0;
            if (repeats == repeated) add_axis({args.call.kv_heads, 0, 1}, repeats);
        };
        add(false);
        add(true);
        parts_ = std::min(members_, kMostBiasParts);
        const int64_t rows = args.call.q_len * call_.group, keys = args.call.kv_len;
        const double each =
            short_gradient_seconds(rows, keys, args.call.head_dim + args.call.value_head_dim);
        seconds_ = each * double(members_) / double(parts_);
        until_stop_ = std::clamp<int64_t>(int64_t(kSecondsUntilStop / each), 1, kMostProblems);
        part_bytes_ = parts_ > 1 ? size_t(rows * keys * number_bytes()) : 0;
        wave_ = chains_;
        if (parts_ > 1) {
            wave_ = std::clamp<int64_t>(int64_t(kBiasPartsBytes / (part_bytes_ * size_t(parts_))),
                                        1, chains_);
        }
        const int64_t units = wave_ * parts_;
        const int most = team_size(units, seconds_ * double(units), call_.threads);
        units_of_item_ = short_gradients_of_item(units, most);
        threads_ = int(std::min<int64_t>(most, items(wave_)));
        scratch_bytes_ = thread_bytes(keys, true, repeats_);
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
            part += part_bytes_;
        }
        take_back(memory, scratch_bytes_);
    }

    static bool next(void* context) {
        Walk& walk = *static_cast<Walk*>(context);
        const Stop& stop = walk.block.block.stop;
        do {
            if (walk.next == walk.past) return false;
            if (walk.next % walk.gradients.until_stop_ == 0 && stop.requested(stop.context)) {
                return false;
            }
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
    int64_t until_stop_ = 1;  // is looked at: problems
    size_t part_bytes_ = 0, scratch_bytes_ = 0;
    double seconds_ = 0;  // of a unit, roughly
    int threads_ = 1;
};

}  // namespace

bool is_short(const GradientArgs& args) {
    const Call call(args.call);
    const int rows = call.functions.gradients.block_rows(call.shared_block());
    const bool sums_packed = call.packed() && args.dbias.data != nullptr;
    return args.call.q_len * call.group <= rows && args.call.kv_len <= call.functions.key_tile &&
           !sums_packed && call.batches > 0 && args.call.kv_heads > 0 && args.call.q_len > 0 &&
           args.call.kv_len > 0;
}

bool differentiate_short(const GradientArgs& args, Interrupt interrupt) {
    return ShortGradients(args).run(interrupt);
}

Schedule schedule_short_gradients(const GradientArgs& args) {
    return ShortGradients(args).schedule();
}

}  // namespace fastattn
