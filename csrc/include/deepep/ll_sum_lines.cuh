// Low-latency combine of few tokens: weighted sums travel as lines. Lines need no flag, so teams share a row where
// there are more of them than rows, each thread has one vector, and all terms of it are on their way at once.
#pragma once

#include <deepep/ll_lines.cuh>
#include <deepep/ll_sums.cuh>

namespace deepep {

constexpr uint32_t kRanksAtOnce = 2;  // ranks whose sums a thread waits for at the same time

__device__ __forceinline__ uint64_t sum_lines_of(const LlShape& shape, const LlWindow& window, uint32_t token,
                                                 uint32_t rank) {
    return window.combine_lines + (static_cast<uint64_t>(token) * shape.num_ranks + rank) * shape.combine_line_bytes;
}

// By a team: the `part`th of `parts` of a token's weighted sum, to its home. What list_terms() found is in `terms`;
// where the weights are yet to come, rows are loaded before they are waited for.
__device__ void push_lines(const LlCombineArgs& args, const LlCall& call, const Team& team, const Item& item,
                           bool awaits_weights, uint32_t part, uint32_t parts, Terms& terms) {
    const LlShape& shape = args.common.shape;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec, end = octets_end(row_vecs);
    const Bits owes = terms.owed();
    Vec16* out = reinterpret_cast<Vec16*>(call.transport.peer_ptr(
        item.source, sum_lines_of(shape, args.common.window, item.token, shape.rank) + call.bank));
    for (uint32_t base = part * team.threads; base < row_vecs; base += parts * team.threads) {
        const uint32_t vec = base + team.thread;
        const uint32_t inside[] = {min_of(vec, row_vecs - 1)};
        const auto ready = [&] {
            if (!awaits_weights) return;
            await_weights(args, call, team, item, terms);
            team.sync();
            awaits_weights = false;
        };
        Vec16 sum[1];
        sum_rows(args, terms, owes, inside, sum, ready);
        const LinePair lines = fold(sum[0], 0, call.epoch);
        if (vec < row_vecs) store_line(out + vec, lines.own);
        if (vec < end && has_rest()) store_line(out + rest_line(row_vecs, vec), lines.rest);
    }
}

// What one thread waits for of some ranks' sums: its vector of each, then its lines of the rest of the octets.
struct SumLines : Lines<2 * kRanksAtOnce> {
    uint32_t rank[kRanksAtOnce];
    uint32_t count;
    static __device__ constexpr uint32_t bits_of(uint32_t t) { return (1u << t) | (1u << (kRanksAtOnce + t)); }
};

// Wait for all of them. Those of a rank that is lost stay missing. (A rank that dies while it sends may so leave a row
// of which parts count and others do not; the mask, or the error, says that it was lost.)
__device__ __forceinline__ void await_sums(const LlCombineArgs& args, const LlCall& call, const Team& team,
                                           const Vec16* lines, uint32_t row_vecs, uint32_t vec, SumLines& sums) {
    constexpr uint32_t kSpinsPerCheck = 64;
    const uint32_t stride = args.common.shape.combine_line_bytes / sizeof(Vec16), rest = rest_line(row_vecs, vec);
    const bool notes_waits = args.common.wait_stats != 0 && team.thread == 0;
    const uint64_t start = notes_waits ? global_timer_ns() : 0;
    uint32_t lost = 0;
    for (uint32_t spin = 1; sums.missing != 0; ++spin) {
        const uint32_t before = sums.missing;
        sums.look(call.epoch, [&](uint32_t i) {
            return lines + (sums.rank[i % kRanksAtOnce] * stride + (i < kRanksAtOnce ? vec : rest));
        });
        const bool checks = spin % kSpinsPerCheck == 0;
        if (!checks && !notes_waits) continue;
#pragma unroll
        for (uint32_t t = 0; t < kRanksAtOnce; ++t) {
            const uint32_t bits = SumLines::bits_of(t);
            const bool is_missing = (sums.missing & bits) != 0;
            if (notes_waits && (before & bits) != 0 && !is_missing) call.note_wait(sums.rank[t], start);
            if (!checks || !is_missing || !call.has_given_up(sums.rank[t])) continue;
            lost |= bits;
            sums.missing &= ~bits;
        }
    }
    sums.missing = lost;
}

// By a team: add up what comes home for one part of a token, in the order of `terms`, whose rows are ranks.
__device__ void add_lines(const LlCombineArgs& args, const LlCall& call, const Team& team, uint32_t token,
                          uint32_t part, uint32_t parts, const Terms& terms) {
    const LlShape& shape = args.common.shape;
    const uint32_t row_vecs = shape.hidden / Bf16::kPerVec, end = octets_end(row_vecs);
    const Vec16* lines =
        reinterpret_cast<const Vec16*>(call.own_bytes(sum_lines_of(shape, args.common.window, token, 0)));
    Vec16* out = pointer<Vec16>(args.out) + static_cast<uint64_t>(token) * row_vecs;
    for (uint32_t vec = part * team.threads + team.thread; warp_begins_before(vec, end); vec += parts * team.threads) {
        float sum[8] = {};
        for (Bits left = terms.bits(); left != 0;) {
            SumLines sums;
            sums.missing = sums.count = 0;
#pragma unroll
            for (uint32_t t = 0; t < kRanksAtOnce; ++t) {
                if (left == 0) break;
                sums.rank[t] = terms.row[pop_bit(left)];
                sums.count = t + 1;
                if (vec < row_vecs) sums.missing |= 1u << t;
                if (vec < end && has_rest()) sums.missing |= 1u << (kRanksAtOnce + t);
            }
            await_sums(args, call, team, lines, row_vecs, vec, sums);
#pragma unroll
            for (uint32_t t = 0; t < kRanksAtOnce; ++t) {
                if (t >= sums.count) break;
                const uint32_t lost = __ballot_sync(kFullMask, (sums.missing & SumLines::bits_of(t)) != 0);
                uint32_t extra;
                float values[8];
                Bf16::unpack(unfold(sums.line[t], sums.line[kRanksAtOnce + t], extra), values);
                if ((lost & octet_mask()) != 0) continue;
#pragma unroll
                for (int c = 0; c < 8; ++c) sum[c] = sum[c] + values[c];
            }
        }
        if (vec < row_vecs) out[vec] = Bf16::pack(sum);
    }
}

}  // namespace deepep
