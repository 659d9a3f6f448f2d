// SPDX-License-Identifier: Apache-2.0
//
// Who does which part of a call with few queries, as in decoding: here the keys are cut, into
// stretches of fixed length, so that one head keeps every core busy. What a stretch gives is a part
// for each row, and a row's parts are merged in order. Sequences that hold some of the same keys in
// a stretch, be it a broadcast array or the same pages, are attended together: these keys are read
// once. Called by attention.cpp; calls the kernel's table (kernel.h) through parallel_for.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "call.h"
#include "kernel.h"
#include "parallel.h"

namespace fastattn {
namespace {

constexpr int64_t kItemsPerThread = 2;     // that sharing leaves, so that all threads have work
constexpr size_t kCarriedBytes = 2 << 20;  // of what is merged so far
constexpr size_t kWaitingBytes = 4 << 20;  // of parts to be merged
constexpr int64_t kMostPieces = 1 << 16;   // in a list

struct Member {
    Sequence sequence;
    int64_t begin, end;                   // the keys that some of its rows see
    int64_t first_stretch, last_stretch;  // that hold them; one at least
    bool one_stretch() const { return first_stretch == last_stretch; }
};

// Members that share a stretch.
struct Piece {
    int64_t stretch;
    int first, count;  // in Pieces::order
};

// As many sequences as are worked on at a time.
struct Slice {
    std::vector<Member> members;
    std::vector<size_t> carried_at;  // where a member's rows begin, among all of a head
    size_t rows = 0;
    int64_t first_stretch = INT64_MAX, last_stretch = 0, stretches = 0;  // in all
    double seconds = 0;
    int team = 1;
};

// The pieces that each head has in some stretches.
struct Pieces {
    std::vector<int> order;          // of members
    std::vector<size_t> waiting_at;  // where the rows of each begin, among all of a head
    std::vector<Piece> list;
    size_t rows = 0;
    int64_t most_few_rows = 0, most_lane_rows = 0;  // of a piece, by what it runs in
};

class Few {
   public:
    explicit Few(const Call& call)
        : call_(call),
          functions_(call.functions),
          part_bytes_(functions_.part_bytes(call.shared_block())),
          head_bytes_(part_bytes_ * size_t(call.args.kv_heads)) {}

    // All sequences that have few queries, from batch element `next` on, that fit a slice.
    Slice take(int64_t& next) const {
        Slice slice;
        for (; next < call_.batches; ++next) {
            Member member{call_.sequence(next), 0, 0, 0, 0};
            if (member.sequence.q_len == 0 || !call_.few(member.sequence.q_len)) continue;
            const size_t bytes = (slice.rows + rows(member)) * head_bytes_;
            if (slice.rows > 0 && bytes > kCarriedBytes) break;
            find_stretches(member);
            slice.carried_at.push_back(slice.rows);
            slice.rows += rows(member);
            slice.first_stretch = std::min(slice.first_stretch, member.first_stretch);
            slice.last_stretch = std::max(slice.last_stretch, member.last_stretch);
            slice.stretches += member.last_stretch - member.first_stretch + 1;
            slice.seconds += call_.seconds(member.sequence);
            slice.members.push_back(member);
        }
        slice.team = team_size(slice.stretches * call_.args.kv_heads, slice.seconds);
        return slice;
    }

    // Those of the stretches from `next` on, as many as fit a list.
    Pieces pieces(const Slice& slice, int64_t& next) const {
        Pieces pieces;
        for (; next <= slice.last_stretch; ++next) {
            if (int64_t(pieces.order.size() + slice.members.size()) > kMostPieces &&
                !pieces.order.empty()) {
                break;
            }
            add_pieces(slice, next, pieces);
        }
        for (const Piece& piece : pieces.list) {
            const Member& member = slice.members[size_t(pieces.order[size_t(piece.first)])];
            int64_t& most = along_lanes(member) ? pieces.most_lane_rows : pieces.most_few_rows;
            most = std::max(most, piece.count * int64_t(rows(member)));
        }
        return pieces;
    }

    // For the rows of a piece and for the kernel, of one thread.
    size_t scratch_bytes(const Pieces& pieces) const {
        Block block = call_.shared_block();
        size_t most = 0;
        if (pieces.most_few_rows > 0) {
            block.row_count = int(pieces.most_few_rows);
            most = rows_bytes(block.row_count) + room_for(functions_.few_scratch_bytes(block));
        }
        if (pieces.most_lane_rows > 0) {
            block.row_count = int(pieces.most_lane_rows);
            const size_t bytes = room_for(functions_.scratch_bytes(block));
            most = std::max(most, rows_bytes(block.row_count) + bytes);
        }
        return most;
    }

    size_t carried_bytes(const Slice& slice) const {
        return slice.rows * head_bytes_ + slice.members.size() * heads() * kRedZone;
    }
    size_t waiting_bytes(const Pieces& pieces) const {
        const size_t all = pieces.rows * head_bytes_ + pieces.list.size() * heads() * kRedZone;
        return std::min(kWaitingBytes, all) + kRedZone +
               size_t(std::max(pieces.most_few_rows, pieces.most_lane_rows)) * part_bytes_;
    }

    bool run(const Slice& slice, Interrupt interrupt) const {
        const Memory carried = allocate(carried_bytes(slice));
        for (int64_t next = slice.first_stretch; next <= slice.last_stretch;) {
            if (!run(slice, pieces(slice, next), carried.get(), interrupt)) return false;
        }
        return true;
    }

   private:
    // In waves: no more parts may wait to be merged than there is memory for.
    bool run(const Slice& slice, const Pieces& pieces, char* carried, Interrupt interrupt) const {
        const int64_t count = int64_t(pieces.list.size()), all = count * call_.args.kv_heads;
        const int team = slice.team;
        const size_t scratch = scratch_bytes(pieces);
        const auto waiting = [&](int64_t item) {
            const int place = pieces.list[size_t(item % count)].first;
            const size_t head = size_t(item / count);
            return (head * pieces.rows + pieces.waiting_at[size_t(place)]) * part_bytes_ +
                   size_t(item) * kRedZone;
        };
        const size_t waiting_size = waiting_bytes(pieces);
        const Memory memory = allocate(scratch * size_t(team) + waiting_size);
        char* const parts = memory.get() + scratch * size_t(team);

        for (int64_t first = 0, last = 0; first < all; first = last) {
            const size_t before = waiting(first);
            while (last < all && waiting(last) - before < kWaitingBytes) ++last;
            const auto attend = [&](int64_t index, int worker, const Stop& stop) {
                const int64_t item = first + index;
                char* const mine = memory.get() + size_t(worker) * scratch;
                attend_piece(slice, pieces, item, mine, parts + (waiting(item) - before), stop);
                take_back(mine, scratch);
            };
            const auto merge = [&](int64_t, int, const Stop&) {
                for (int64_t item = first; item < last; ++item) {
                    merge_piece(slice, pieces, item, parts + (waiting(item) - before), carried,
                                memory.get());
                }
                take_back(memory.get(), scratch);
            };
            take_back(parts, waiting_size);
            if (team == 1) {  // a small call: one trip
                const auto both = [&](int64_t, int, const Stop& stop) {
                    for (int64_t index = 0; index < last - first; ++index) attend(index, 0, stop);
                    merge(0, 0, stop);
                };
                if (!parallel_for(1, 1, interrupt, both)) return false;
            } else {
                if (!parallel_for(last - first, team, interrupt, attend)) return false;
                if (slice.stretches > int64_t(slice.members.size())) {
                    parallel_for(1, 1, {}, merge);
                }
            }
        }
        return true;
    }

    size_t heads() const { return size_t(call_.args.kv_heads); }
    size_t rows(const Member& member) const { return size_t(member.sequence.q_len * call_.group); }

    // The rows, not head_dim, lie along the vector lanes.
    bool along_lanes(const Member& member) const {
        return int64_t(rows(member)) > functions_.few_rows;
    }

    static size_t rows_bytes(int64_t rows) { return room_for(size_t(rows) * sizeof(Row)); }

    // Positions grow with the queries, and so do both ends of what they see.
    void find_stretches(Member& member) const {
        const Sequence& sequence = member.sequence;
        member.end = call_.interval(sequence, sequence.q_len - 1).end;
        member.begin = std::min(call_.interval(sequence, 0).begin, member.end);
        member.first_stretch = member.begin / kStretch;
        member.last_stretch =
            std::max((member.end + kStretch - 1) / kStretch - 1, member.first_stretch);
    }

    void add_pieces(const Slice& slice, int64_t stretch, Pieces& pieces) const {
        std::vector<int>& order = pieces.order;
        const size_t begin = order.size();
        for (size_t i = 0; i < slice.members.size(); ++i) {
            const Member& member = slice.members[i];
            if (member.first_stretch <= stretch && stretch <= member.last_stretch) {
                order.push_back(int(i));
            }
        }
        const auto member = [&](size_t place) -> const Member& {
            return slice.members[size_t(order[place])];
        };
        if (order.size() - begin > 1) {
            std::stable_sort(order.begin() + int64_t(begin), order.end(), [&](int a, int b) {
                return compare(slice.members[size_t(a)], slice.members[size_t(b)], stretch) < 0;
            });
        }
        const int64_t items = slice.stretches * call_.args.kv_heads;
        const int64_t most_members = items / (slice.team * kItemsPerThread);
        for (size_t i = begin; i < order.size(); ++i) {
            pieces.waiting_at.push_back(pieces.rows);
            pieces.rows += rows(member(i));
            if (i > begin && together(member(i - 1), member(i), stretch)) {
                Piece& before = pieces.list.back();
                const int64_t count = before.count + 1;
                if (count * int64_t(rows(member(i))) <= kMostTogether && count <= most_members) {
                    ++before.count;
                    continue;
                }
            }
            pieces.list.push_back({stretch, int(i), 1});
        }
    }

    // Whether neighbours in a stretch's order share keys there. Panels have the pages of one row;
    // in the other form, one page that both see is enough.
    bool together(const Member& a, const Member& b, int64_t stretch) const {
        if (call_.args.pages == nullptr || along_lanes(a)) return compare(a, b, stretch) == 0;
        if (place(a) != place(b)) return false;
        const Interval columns = columns_of(std::max({a.begin, b.begin, stretch * kStretch}),
                                            std::min({a.end, b.end, (stretch + 1) * kStretch}));
        for (int64_t column = columns.begin; column < columns.end; ++column) {
            if (page(a, column) == page(b, column)) return true;
        }
        return false;
    }

    // 0: the same keys, and as many queries. Sequences whose first pages are the same are
    // neighbours.
    int64_t compare(const Member& a, const Member& b, int64_t stretch) const {
        const auto mine = place(a), other = place(b);
        if (mine != other) return mine < other ? -1 : 1;
        if (call_.args.pages == nullptr) return 0;
        const Interval columns = columns_of(stretch * kStretch, (stretch + 1) * kStretch);
        for (int64_t column = columns.begin; column < columns.end; ++column) {
            const int64_t x = page(a, column), y = page(b, column);
            if (x != y) return x < y ? -1 : 1;
        }
        return 0;
    }

    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> place(const Member& member) const {
        const Sequence& s = member.sequence;
        return {s.q_len, s.kv_start, s.kv_len, call_.offset(call_.args.key, s.batch),
                call_.offset(call_.args.value, s.batch)};
    }

    // The columns of the page table that hold these keys.
    Interval columns_of(int64_t begin, int64_t end) const {
        const int64_t keys = call_.args.page_keys;
        return {begin / keys, std::min((end + keys - 1) / keys, call_.args.page_columns)};
    }

    int64_t page(const Member& member, int64_t column) const {
        return call_.args.pages[member.sequence.batch * call_.args.page_columns + column];
    }

    Block block(const Member& member, int64_t kv_head, Row* rows_here, int64_t count) const {
        Block block = call_.shared_block();
        call_.set_keys(block, member.sequence, kv_head);
        block.rows = rows_here;
        block.row_count = int(count);
        return block;
    }

    // memory: scratch_bytes(); parts: of the piece's rows.
    void attend_piece(const Slice& slice, const Pieces& pieces, int64_t item, char* memory,
                      char* parts, const Stop& stop) const {
        const int64_t kv_head = item / int64_t(pieces.list.size());
        const Piece& piece = pieces.list[size_t(item) % pieces.list.size()];
        const auto member = [&](int i) -> const Member& {
            return slice.members[size_t(pieces.order[size_t(piece.first + i)])];
        };
        const int64_t each = int64_t(rows(member(0))), count = each * piece.count;
        Row* const rows_here = reinterpret_cast<Row*>(memory);
        lend(rows_here, count);
        lend(parts, count * int64_t(part_bytes_));
        for (int i = 0; i < piece.count; ++i) {
            call_.set_rows(rows_here + i * each, int(each), member(i).sequence, kv_head, 0);
        }
        const int64_t begin = piece.stretch * kStretch, end = begin + kStretch;
        for (Row* row = rows_here; row < rows_here + count; ++row) {
            row->begin = std::clamp(row->begin, begin, end);
            row->end = std::clamp(row->end, row->begin, end);
        }
        Block whole = block(member(0), kv_head, rows_here, count);
        whole.scratch = memory + rows_bytes(count);
        whole.stop = stop;
        (along_lanes(member(0)) ? functions_.attend : functions_.attend_few)(whole, parts);
        for (int i = 0; i < piece.count; ++i) {
            if (!member(i).one_stretch()) continue;
            const Block own = block(member(i), kv_head, rows_here + i * each, each);
            functions_.finish_parts(own, parts + size_t(i * each) * part_bytes_);
        }
    }

    // Adds the parts of a piece to what is carried of all heads. memory: of some rows.
    void merge_piece(const Slice& slice, const Pieces& pieces, int64_t item, char* parts,
                     char* carried, char* memory) const {
        const size_t kv_head = size_t(item) / pieces.list.size();
        const Piece& piece = pieces.list[size_t(item) % pieces.list.size()];
        Row* const rows_here = reinterpret_cast<Row*>(memory);
        for (int i = piece.first; i < piece.first + piece.count; ++i) {
            const size_t index = size_t(pieces.order[size_t(i)]);
            const Member& member = slice.members[index];
            const size_t bytes = rows(member) * part_bytes_;
            char* const into = carried +
                               (kv_head * slice.rows + slice.carried_at[index]) * part_bytes_ +
                               (kv_head * slice.members.size() + index) * kRedZone;
            char* const part = parts + size_t(i - piece.first) * bytes;
            if (member.one_stretch()) continue;
            const Block own = block(member, int64_t(kv_head), rows_here, int64_t(rows(member)));
            if (piece.stretch == member.first_stretch) {
                lend(into, int64_t(bytes));
                std::memcpy(into, part, bytes);
            } else {
                functions_.merge_parts(own, into, part);
            }
            if (piece.stretch < member.last_stretch) continue;
            lend(rows_here, own.row_count);
            call_.set_rows(rows_here, own.row_count, member.sequence, int64_t(kv_head), 0);
            functions_.finish_parts(own, into);
        }
    }

    const Call& call_;
    const Functions& functions_;
    const size_t part_bytes_, head_bytes_;  // of a row of one head, of all heads
};

}  // namespace

bool attend_few(const Call& call, Interrupt interrupt) {
    if (call.args.q_heads == 0) return true;
    const Few few(call);
    for (int64_t next = 0; next < call.batches;) {
        const Slice slice = few.take(next);
        if (!slice.members.empty() && !few.run(slice, interrupt)) return false;
    }
    return true;
}

void plan_few(const Call& call, Plan& plan) {
    plan.few_queries = true;
    if (call.args.q_heads == 0) return;
    const Few few(call);
    int64_t batch = 0;
    const Slice slice = few.take(batch);
    if (slice.members.empty()) return;
    int64_t stretch = slice.first_stretch;
    plan.threads = slice.team;
    const Pieces pieces = few.pieces(slice, stretch);
    plan.scratch_bytes = few.scratch_bytes(pieces) * size_t(plan.threads) +
                         few.carried_bytes(slice) + few.waiting_bytes(pieces);
}

}  // namespace fastattn
