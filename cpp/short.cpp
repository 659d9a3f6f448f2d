// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a call whose problems are short: few queries, and keys that one key tile
// holds. There may be a hundred thousand, so an item of work is some of them, nothing is listed,
// and what they share is found once. One that the kernel does not take (kernel/short.h) goes the
// way of longer ones, on the same thread. Called by attention.cpp; calls the kernel's table
// through parallel_for.
#include <algorithm>
#include <cmath>

#include "call.h"
#include "parallel.h"
#include "split.h"

namespace fastattn {
namespace {

constexpr double kReadBytesPerSecond = 25e9, kProblemSeconds = 60e-9;  // of one thread
// Longer ones, of which there are not so many for each thread, are better cut.
constexpr double kLongSeconds = 8e-6;
constexpr int64_t kProblemsOfThread = 4;

bool repeats(const std::vector<int64_t>& strides) {
    return std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride == 0; });
}

// Of a problem, roughly.
double seconds(const Call& call, const ShortShape& shape) {
    const AttentionArgs& args = call.args;
    const double rows = double(shape.rows), keys = double(args.kv_len);
    const double numbers = double(args.head_dim + args.value_head_dim);
    const double compute =
        2 * rows * keys * (numbers + 16) / (kFlopsOfLane * double(call.functions.lanes));
    const double read = (rows + keys) * numbers * double(size_of(args.query.dtype));
    return std::max(compute, read / kReadBytesPerSecond) + kProblemSeconds;
}

class Short {
   public:
    Short(const Call& call, const ShortShape& shape)
        : call_(call),
          args_(call.args),
          functions_(call.functions),
          shape_(shape),
          arrays_{&args_.query, &args_.key,  &args_.value, &args_.out,
                  &args_.lse,   &args_.mask, &args_.bias},
          problems_(call.batches * args_.kv_heads),
          seconds_(seconds(call, shape)),
          kernel_bytes_(kernel_bytes()) {
        // Neighbours share what is made of a mask or a bias.
        for (const Array* array : {&args_.mask, &args_.bias}) {
            heads_first_ |=
                array->data != nullptr && array->head_stride != 0 && repeats(array->batch_strides);
        }
        const double all = seconds_ * double(problems_);
        const int team = team_size(problems_, all, call.threads);
        threads_ = std::clamp(int(kForwardBytes / thread_bytes()), 1, team);
        of_item_ = problems_of_item(seconds_, problems_, threads_);
        threads_ = int(std::min<int64_t>(threads_, items()));
    }

    bool run(Interrupt interrupt) const {
        const Memory memory = allocate(bytes());
        return parallel_for(items(), threads_, interrupt,
                            [&](int64_t item, int worker, const Stop& stop) {
                                char* const mine = memory.get() + size_t(worker) * thread_bytes();
                                attend(item * of_item_, problems_in(item), mine, stop);
                                take_back(mine, thread_bytes());
                            },
                            {.item_seconds = seconds_ * double(of_item_)});
    }

    int threads() const { return threads_; }
    size_t bytes() const { return size_t(threads_) * thread_bytes(); }

    void add_phases(Schedule& schedule) const {
        schedule.scratch_bytes = std::max(schedule.scratch_bytes, bytes());
        Phase phase{threads_, {}};
        for (int64_t item = 0; item < items(); ++item) {
            phase.items.push_back({{seconds_ * double(problems_in(item))}});
        }
        schedule.phases.push_back(phase);
    }

   private:
    enum { kQuery, kKey, kValue, kOut, kLse, kMask, kBias, kArrays };
    struct Place {
        int64_t batch, head;
    };

    // A thread's scratch memory. The kernel's is cut anew by each way that a problem goes.
    struct Parts {
        ShortProblem* problems;
        void* kernel;

        Parts(const Short& of, Scratch& scratch)
            : problems(scratch.take<ShortProblem>(kMostProblems)),
              kernel(scratch.reserve(of.kernel_bytes_)) {}
    };
    struct LongWay {
        Row* rows;
        char* partials;
        void* kernel;

        LongWay(const Short& of, Scratch& scratch)
            : rows(scratch.take<Row>(of.shape_.rows)),
              partials(scratch.take<char>(of.partial_bytes())),
              kernel(scratch.reserve(of.long_way_bytes())) {}
    };

    int64_t items() const { return (problems_ + of_item_ - 1) / of_item_; }
    int64_t problems_in(int64_t item) const {
        return std::min(of_item_, problems_ - item * of_item_);
    }

    size_t partial_bytes() const {
        const size_t each = functions_.decode.partial_bytes(shape_.shared);
        return shape_.few ? size_t(shape_.rows) * each : 0;
    }
    size_t long_way_bytes() const {
        Block block = shape_.shared;
        block.row_count = shape_.rows;
        return shape_.few ? functions_.decode.scratch_bytes(block)
                          : functions_.scratch_bytes(block);
    }
    size_t kernel_bytes() const {
        Scratch scratch;
        LongWay(*this, scratch);
        return std::max(scratch.used(), functions_.shorts.scratch_bytes(shape_));
    }
    size_t thread_bytes() const {
        Scratch scratch;
        Parts(*this, scratch);
        return scratch.used();
    }

    Place place(int64_t index) const {
        if (heads_first_) return {index % call_.batches, index / call_.batches};
        return {index / args_.kv_heads, index % args_.kv_heads};
    }

    // Of problems from `first` on.
    void attend(int64_t first, int64_t count, char* memory, const Stop& stop) const {
        Scratch scratch(memory);
        const Parts parts(*this, scratch);
        for (int64_t i = 0; i < count; ++i) set(parts.problems[i], place(first + i));
        for (int64_t done = 0; done < count; ++done) {
            done +=
                functions_.shorts.attend(shape_, parts.problems + done, count - done, parts.kernel);
            if (done == count) return;
            take_back(parts.kernel, kernel_bytes_);
            attend_the_long_way(place(first + done), parts.kernel, stop);
            take_back(parts.kernel, kernel_bytes_);
        }
    }

    void set(ShortProblem& problem, const Place& at) const {
        int64_t offsets[kArrays] = {}, rest = at.batch;
        for (size_t axis = args_.batch_shape.size(); axis-- > 0;) {
            const int64_t index = rest % args_.batch_shape[axis];
            rest /= args_.batch_shape[axis];
            for (int i = 0; i < kArrays; ++i) {
                if (arrays_[i]->data != nullptr) {
                    offsets[i] += index * arrays_[i]->batch_strides[axis];
                }
            }
        }
        const auto of = [&](int i, int64_t head) -> void* {
            const Array& array = *arrays_[i];
            if (array.data == nullptr) return nullptr;
            const int64_t place = offsets[i] + head * array.head_stride;
            return static_cast<char*>(array.data) + place * size_of(array.dtype);
        };
        const int64_t q_head = at.head * call_.group;
        const Sequence sequence = call_.sequence(at.batch);
        problem.query = of(kQuery, q_head);
        problem.key = of(kKey, at.head);
        problem.value = of(kValue, at.head);
        problem.out = of(kOut, q_head);
        problem.lse = of(kLse, q_head);
        problem.mask = of(kMask, q_head);
        problem.bias = of(kBias, q_head);
        problem.begin = sequence.begin;
        problem.end = sequence.end;
        problem.offset = sequence.offset;
        problem.key_offset = sequence.key_offset;
        problem.slopes = args_.alibi_slopes == nullptr
                             ? nullptr
                             : args_.alibi_slopes + at.batch * args_.q_heads + q_head;
        problem.sinks = args_.sinks == nullptr ? nullptr : args_.sinks + q_head;
        problem.head = uint32_t(q_head) + args_.head_offset;
        problem.batch = uint32_t(at.batch) + args_.batch_offset;
    }

    void attend_the_long_way(const Place& at, void* memory, const Stop& stop) const {
        const Sequence sequence = call_.sequence(at.batch);
        Scratch scratch(memory);
        const LongWay mine(*this, scratch);
        Block block = shape_.shared;
        block.rows = mine.rows;
        block.row_count = shape_.rows;
        block.scratch = mine.kernel;
        block.stop = stop;
        call_.set_keys(block, sequence, at.head);
        call_.set_rows(mine.rows, block.row_count, sequence, at.head, 0);
        if (!shape_.few) return functions_.attend(block, nullptr);
        functions_.decode.attend(block, mine.partials);
        functions_.decode.finish(block, mine.partials);
    }

    const Call& call_;
    const AttentionArgs& args_;
    const Functions& functions_;
    const ShortShape& shape_;
    const Array* const arrays_[kArrays];
    const int64_t problems_;
    const double seconds_;
    const size_t kernel_bytes_;
    bool heads_first_ = false;  // all batch elements of a head come one after the other
    int threads_ = 1;
    int64_t of_item_ = 1;
};

}  // namespace

std::optional<ShortShape> short_shape(const Call& call) {
    const AttentionArgs& args = call.args;
    const int64_t most = kMostRows;
    const bool has_problems =
        call.batches > 0 && args.kv_heads > 0 && args.q_heads > 0 && args.q_len > 0;
    if (!has_problems || args.kv_len == 0 || args.head_dim == 0 || args.value_head_dim == 0 ||
        args.q_len > most || args.q_len * call.group > most || call.packed() ||
        args.pages != nullptr || args.kv_parts != nullptr || args.softmax != nullptr ||
        args.scores != nullptr || args.key.dtype == Dtype::kInt8) {
        return {};
    }
    // A problem may be given up, and attended to again, after some of its results were stored.
    if (args.accumulates) return {};
    const auto steps = [](const Array& array) {
        const int64_t size = size_of(array.dtype);
        return RowSteps{array.row_stride * size, array.head_stride * size};
    };
    ShortShape shape{};
    shape.shared = call.shared_block();
    shape.rows = int(args.q_len * call.group);
    shape.group = int(call.group);
    shape.few = call.decodes(args.q_len) && shape.rows <= call.functions.decode.most_rows;
    shape.left = args.left;
    shape.right = args.right;
    shape.query = steps(args.query);
    shape.out = steps(args.out);
    shape.lse = steps(args.lse);
    shape.mask = steps(args.mask);
    shape.bias = steps(args.bias);
    shape.has_mask = args.mask.data != nullptr;
    shape.has_bias = args.bias.data != nullptr;
    if (!call.functions.shorts.takes(shape)) return {};
    if (seconds(call, shape) > kLongSeconds &&
        call.batches * args.kv_heads < kProblemsOfThread * call.threads) {
        return {};
    }
    return shape;
}

bool attend_short(const Call& call, const ShortShape& shape, Interrupt interrupt) {
    return Short(call, shape).run(interrupt);
}

void plan_short(const Call& call, const ShortShape& shape, Plan& plan) {
    const Short problems(call, shape);
    plan.threads = problems.threads();
    plan.scratch_bytes = problems.bytes();
}

void schedule_short(const Call& call, const ShortShape& shape, Schedule& schedule) {
    Short(call, shape).add_phases(schedule);
}

}  // namespace fastattn
