// Low-latency dispatch lays out tokens that come as lines. A thread waits for its part of a row where it will be
// stored from, beside the counts that say where to.
#pragma once

#include <deepep/ll_lay_out.cuh>
#include <deepep/ll_push_lines.cuh>

namespace deepep {

constexpr uint32_t kPartsAtOnce = 2;  // vectors of a row per thread, a team apart

// A thread's part of a token's lines: vectors, then the rest of their octets, then choice `team.thread`.
struct TokenLines : Lines<2 * kPartsAtOnce + 1> {
    const Vec16* slot;
    const Vec16* row;
    uint32_t num_vecs, first;  // vectors of the row, first one of the thread

    // The part from `base` on; choices come with the first one.
    __device__ TokenLines(const LlDispatchArgs& args, const LlCall& call, const Team& team, const Item& item,
                          uint32_t base, uint32_t row_vecs)
        : num_vecs(row_vecs), first(base + team.thread) {
        const LlShape& shape = args.common.shape;
        const uint8_t* lines = call.own_bytes(token_lines(shape, args.common.window, item.source, item.token));
        slot = reinterpret_cast<const Vec16*>(lines) + team.thread;
        row = reinterpret_cast<const Vec16*>(lines + shape.line_row_offset);
        missing = base == 0 && team.thread < shape.num_topk ? 1u << (2 * kPartsAtOnce) : 0;
#pragma unroll
        for (uint32_t i = 0; i < kPartsAtOnce; ++i) {
            const uint32_t vec = first + i * team.threads;
            if (vec < num_vecs) missing |= 1u << i;
            if (vec < octets_end(num_vecs) && has_rest()) missing |= 1u << (kPartsAtOnce + i);
        }
    }

    __device__ __forceinline__ void look_once(uint32_t epoch, const Team& team) {
        look(epoch, [&](uint32_t i) {
            if (i == 2 * kPartsAtOnce) return slot;
            const uint32_t vec = first + i % kPartsAtOnce * team.threads;
            return row + (i < kPartsAtOnce ? vec : rest_line(num_vecs, vec));
        });
    }
};

// By each thread: wait for a token's lines and, with `table`, for the thread's first word among the counts, side by
// side. Lines stay missing if the source does not send them: it has fewer tokens or too many for lines, the token does
// not come here, or the rank is lost.
__device__ void await_lines(const LlDispatchArgs& args, const LlCall& call, const Team& team, const Item& item,
                            TokenLines& lines, uint32_t* table, Arrivals* from) {
    constexpr uint32_t kSpinsPerCheck = 64;
    const LlCommon& common = args.common;
    const uint64_t* header = call.own_word(common.window.headers, item.source);
    const uint64_t* present = call.own_word(common.window.present, item.slot);
    const uint64_t start = common.wait_stats != 0 ? global_timer_ns() : 0;
    const uint32_t index = threadIdx.x;
    const bool has_word = table != nullptr && index < Announced::count(common.shape);
    const Announced announced(args, call, has_word ? index : 0);
    bool waits_for_word = has_word, waits_for_lines = lines.missing != 0 && !call.is_masked(item.source);
    uint32_t value = 0;
    if (has_word && call.is_masked(announced.rank)) waits_for_word = false;
    for (uint32_t spin = 1; waits_for_word || waits_for_lines; ++spin) {
        uint64_t seen = 0, seen_header = 0, seen_present = 0;
        if (waits_for_word) seen = load_relaxed_sys(announced.word);
        if (waits_for_lines) {
            seen_header = load_relaxed_sys(header);
            seen_present = load_relaxed_sys(present);
            lines.look_once(call.epoch, team);
            waits_for_lines = lines.missing != 0;
            if (waits_for_lines) {
                const uint32_t num_tokens = tokens_of(static_cast<uint32_t>(seen_header));
                // Of this epoch, the word `present` says that the token stays away, since it would come as lines.
                const bool is_elsewhere = static_cast<uint32_t>(seen_present >> 32) == call.epoch;
                const bool has_header = static_cast<uint32_t>(seen_header >> 32) == call.epoch;
                waits_for_lines = !is_elsewhere && !(has_header && (item.token >= num_tokens ||
                                                                    !is_lined(common.shape, num_tokens)));
            }
        }
        if (waits_for_word && static_cast<uint32_t>(seen >> 32) == call.epoch) {
            waits_for_word = false;
            value = static_cast<uint32_t>(seen);
            if (common.wait_stats != 0) call.note_wait(announced.rank, start);
        }
        if (spin % kSpinsPerCheck != 0) continue;
        if (waits_for_word && call.has_given_up(announced.rank)) waits_for_word = false;
        if (waits_for_lines && call.has_given_up(item.source)) waits_for_lines = false;
    }
    if (has_word) announced.keep(common.shape, index, value, table, *from);
}

template <bool kFp8>
__device__ __forceinline__ void store_vec(const LlDispatchArgs& args, const Rows& rows, uint32_t vec,
                                          const Vec16& value, uint32_t sf) {
    const uint32_t stride = 4 * args.common.shape.num_ranks * args.common.shape.num_max_tokens, group = vec / kOctet;
    const bool has_sf = kFp8 && octet_lane() == 0, is_ue8m0 = args.sf_format == kSfUe8m0;
    const uint32_t sf_at = is_ue8m0 ? group / 4 * stride + group % 4 : group * stride;
    rows.for_each([&](uint8_t* row, uint8_t* row_sf) {
        reinterpret_cast<Vec16*>(row)[vec] = value;
        if (!has_sf) return;
        if (is_ue8m0) {
            row_sf[sf_at] = static_cast<uint8_t>(sf);
        } else {
            *reinterpret_cast<uint32_t*>(row_sf + sf_at) = sf;
        }
    });
}

// By a team: lay out a token whose first lines were waited for; it counts only if all of them came.
template <bool kFp8>
__device__ void store_lines(const LlDispatchArgs& args, const LlCall& call, const Team& team, const Item& item,
                            const uint32_t* table, TokenLines& lines, Rows& rows) {
    static_assert(kGroupSize / 16 == kOctet, "an octet of FP8 has one scale factor, its extra word");
    Vec16 choice = lines.line[2 * kPartsAtOnce];
    if (lines.missing >> (2 * kPartsAtOnce) & 1) choice.word[0] = 0xffffffffu;
    list_rows(args, lines.num_vecs * sizeof(Vec16), item, choice, table, team.thread, rows);
    for (uint32_t base = 0;;) {
        if (team.any(lines.missing != 0)) return forget_token(args, item, team.thread);
#pragma unroll
        for (uint32_t i = 0; i < kPartsAtOnce; ++i) {
            const uint32_t vec = lines.first + i * team.threads;
            if (!warp_begins_before(vec, lines.num_vecs)) continue;
            uint32_t sf;
            const Vec16 value = unfold(lines.line[i], lines.line[kPartsAtOnce + i], sf);
            if (vec < lines.num_vecs) store_vec<kFp8>(args, rows, vec, value, sf);
        }
        base += kPartsAtOnce * team.threads;
        if (base >= lines.num_vecs) return;
        lines = TokenLines(args, call, team, item, base, lines.num_vecs);
        await_lines(args, call, team, item, lines, nullptr, nullptr);
    }
}

}  // namespace deepep
