// How a step's attention is cut into pieces of work. Knows lengths, no numbers.
//
// A sequence whose new tokens make up to 16 rows (a row is a token and a query head of one kv head) is one narrow tile, a
// longer one is cut into wide tiles. An item is a tile, a kv head and a share of the keys. Shares of a narrow tile follow
// from its number of keys and from the number of sequences up to a power of two, so that a token's bits hardly depend on
// what else is in the step.
#pragma once
#include "numbers.cuh"

namespace tw {

struct AttentionLengths {
  const int* query_starts;  // [sequences]; rising where lengths are not 0
  const int* query_lengths;
  const int* kv_lengths;    // the new tokens included
  int sequences, tokens;
};

struct AttentionItem {
  int sequence, start, length, past;  // of the sequence: its first token's row, new tokens, tokens before them
  int tile, kv_head, share, shares;   // shares: of this tile's keys
  int begin, end;                     // keys of this share
  int slot;                           // of the tile's first share among all partial results
  int group;                          // of the tile and kv head among all that have shares
  bool is_narrow;
};

// MOST_NARROW and MOST_WIDE: items that may leave partial results.
template <int GROUP, int KV_HEADS, int WINDOW, int ROWS> struct AttentionItems {
  static constexpr int NARROW_ROWS = 16, ALIGNED = 64, LEAST_KEYS = 256, LEAST_KEYS_WIDE = 512, MOST_SHARES = 64;
  static constexpr int MOST_NARROW = 2048, MOST_WIDE = 132;
  static constexpr int PART_ROWS = MOST_NARROW * NARROW_ROWS + MOST_WIDE * ROWS, GROUPS = (MOST_NARROW + MOST_WIDE) / 2;

  int most_narrow, most_wide, wide_tiles;

  __device__ AttentionItems(const AttentionLengths& p) {
    int rounded = 1;
    while (rounded < p.sequences) rounded *= 2;
    most_narrow = max(1, min(MOST_SHARES, MOST_NARROW / KV_HEADS / rounded));
    wide_tiles = (p.tokens * GROUP + ROWS - 1) / ROWS + p.sequences;  // at most
    most_wide = max(1, min(MOST_SHARES, MOST_WIDE / KV_HEADS / wide_tiles));
  }

  // The first key that a row of tile `tile` sees, and the end of what its rows see.
  __device__ static int first_key(int past, int tile, int rows) {
    return WINDOW > 0 ? max(0, past + tile * rows / GROUP - WINDOW + 1) / ALIGNED * ALIGNED : 0;
  }
  __device__ static int end_key(int past, int length, int tile, int rows) { return past + min(length, ((tile + 1) * rows - 1) / GROUP + 1); }
  __device__ static int share_keys(int keys, int most, int least) {
    return max(least, ((keys + most - 1) / most + ALIGNED - 1) / ALIGNED * ALIGNED);
  }

  // Item number `item` of the step, the same in all lanes of a warp; false: there are fewer.
  __device__ bool find(const AttentionLengths& p, int item, AttentionItem& found) const {
    const int lane = threadIdx.x % LANES;
    for (int first = 0, before = 0; first < p.sequences; first += LANES) {
      const int sequence = first + lane;
      const int length = sequence < p.sequences ? p.query_lengths[sequence] : 0;
      const int past = length > 0 ? p.kv_lengths[sequence] - length : 0;
      const bool is_narrow = length * GROUP <= NARROW_ROWS;
      const int rows = is_narrow ? NARROW_ROWS : ROWS, tiles = (length * GROUP + rows - 1) / rows;
      const int keys = WINDOW > 0 ? min(past + length, WINDOW + rows / GROUP + 1 + ALIGNED) : past + length;  // of a tile, at most
      const int share = share_keys(keys, is_narrow ? most_narrow : most_wide, is_narrow ? LEAST_KEYS : LEAST_KEYS_WIDE);
      const int shares = (keys + share - 1) / share;
      const int count = tiles * shares * KV_HEADS;
      int end = count;
      for (int o = 1; o < LANES; o *= 2) {
        const int other = __shfl_up_sync(~0u, end, o);
        if (lane >= o) end += other;
      }
      const u32 holders = __ballot_sync(~0u, item < before + end);
      if (holders == 0) {
        before += __shfl_sync(~0u, end, LANES - 1);
        continue;
      }
      const int holder = LANES - __popc(holders);  // the first of them: ends rise
      int rest = item - before - __shfl_sync(~0u, end - count, holder);
      const int its_shares = __shfl_sync(~0u, shares, holder), its_keys = __shfl_sync(~0u, share, holder);
      const int its_tiles = __shfl_sync(~0u, tiles, holder);
      found.sequence = first + holder;
      found.length = __shfl_sync(~0u, length, holder), found.past = __shfl_sync(~0u, past, holder);
      found.is_narrow = found.length * GROUP <= NARROW_ROWS;
      found.start = p.query_starts[found.sequence];
      found.kv_head = rest % KV_HEADS, rest /= KV_HEADS;
      found.share = rest % its_shares, found.tile = its_tiles - 1 - rest / its_shares;  // the longest first
      const int its_rows = found.is_narrow ? NARROW_ROWS : ROWS;
      const int first_of_all = first_key(found.past, found.tile, its_rows), end_of_all = end_key(found.past, found.length, found.tile, its_rows);
      found.shares = (end_of_all - first_of_all + its_keys - 1) / its_keys;
      found.begin = first_of_all + found.share * its_keys;
      found.end = min(end_of_all, found.begin + its_keys);
      if (found.is_narrow) {
        found.group = found.sequence * KV_HEADS + found.kv_head;
        found.slot = found.group * most_narrow;
      } else {
        found.group = (found.start * GROUP / ROWS + found.sequence + found.tile) * KV_HEADS + found.kv_head;
        found.slot = found.group * most_wide;
      }
      return true;
    }
    return false;
  }
};

}  // namespace tw
