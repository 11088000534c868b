// How tiles exchange carries inside one launch, and the memory they do it through.
//
// Blocks take tiles from the right end by ticket. A block publishes its tile's total (with nothing to the right) as one
// 64-bit word before it waits for anything, so a block only ever waits for smaller tickets, which publish without
// waiting: no deadlock, whatever the number of resident blocks. gamma is constant, so the carry is the sum of
// gamma^(2048 k) times the total of the k-th tile to the right, up to a sequence end or until the weight vanishes in
// fp32: at a half-life of 32 tokens that is one tile, at 2048 at most 126. One warp sums 32 tiles per step, in an order
// that does not depend on timing.
//
// A word counts only if it carries this launch's epoch. The last block of a launch advances the epoch and clears the
// ticket, so nothing needs clearing in between and a captured graph can be replayed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/statistics.h"
#include "cuda/kernels.h"
#include "cuda/tile.cuh"

namespace megatron_fipo::cuda {

constexpr int kFanIn = 32;   // of the tree that reduces statistics (statistics.cuh)
constexpr float kVanished = 1e-38f;

struct Header {
  unsigned ticket;
  unsigned finished;   // blocks, where no statistics count them
  unsigned epoch;      // of the last launch
  unsigned unused;
};

struct Workspace {
  Header* header;
  uint64_t* published;         // [tiles] {epoch * 2 + closed, total}
  uint64_t* sequence_parts;    // [tiles, 2, 2] sums of sequences that span tiles (sequence_sums.cuh)
  unsigned* sequence_arrivals; // [tiles] zero between launches
  unsigned* node_arrivals;     // [nodes] likewise
  uint64_t* nodes;             // [nodes, kNumStatistics]
};

inline int64_t tiles_of(int64_t tokens) { return tokens > kTile ? (tokens + kTile - 1) / kTile : 1; }

// Levels of ceil(n / 32) nodes above n tiles hold at most this many in all, tiles included.
inline int64_t tree_nodes(int64_t tiles) { return tiles + tiles / 31 + 16; }

inline Workspace workspace_of(const WorkspaceMemory& memory) {
  const int64_t tiles = tiles_of(memory.tokens);
  Workspace w;
  w.header = static_cast<Header*>(memory.data);
  w.published = reinterpret_cast<uint64_t*>(w.header + 1);
  w.sequence_parts = w.published + tiles;
  w.nodes = w.sequence_parts + 4 * tiles;
  w.sequence_arrivals = reinterpret_cast<unsigned*>(w.nodes + tree_nodes(tiles) * kNumStatistics);
  w.node_arrivals = w.sequence_arrivals + tiles;
  return w;
}

inline size_t workspace_size(int64_t tokens) {
  const size_t tiles = tiles_of(tokens), nodes = tree_nodes(tiles);
  return sizeof(Header) + sizeof(uint64_t) * (5 * tiles + nodes * kNumStatistics) + sizeof(unsigned) * (tiles + nodes);
}

struct Claim {
  int64_t tile;
  unsigned epoch;
};

// Thread 0 takes the next tile from the right. The epoch is never 0: fresh memory must not look published.
__device__ __forceinline__ Claim claim_tile(const Workspace& workspace, int64_t tiles) {
  const unsigned last_epoch = *static_cast<volatile unsigned*>(&workspace.header->epoch);
  return {tiles - 1 - static_cast<int64_t>(atomicAdd(&workspace.header->ticket, 1u)), last_epoch + 1};
}

// By one thread, once every block of the launch has claimed and read what it needs.
__device__ __forceinline__ void reset_header(const Workspace& workspace, unsigned epoch) {
  workspace.header->ticket = 0;
  workspace.header->finished = 0;
  workspace.header->epoch = epoch & 0x3fffffffu;
}

// By the whole block, at its very end, where no tree of statistics finds the last block.
__device__ __forceinline__ void finish_block(const Workspace& workspace, unsigned epoch, int64_t tiles) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(&workspace.header->finished, 1u) == static_cast<unsigned>(tiles - 1)) reset_header(workspace, epoch);
}

__device__ __forceinline__ uint64_t published_word(unsigned epoch, bool closed, float total) {
  return static_cast<uint64_t>(epoch << 1 | (closed ? 1u : 0u)) << 32 | __float_as_uint(total);
}

// By a whole warp: the scan value just right of `tile`. closed: the tile's last token ends a sequence.
__device__ __forceinline__ float look_ahead(const Workspace& workspace, int64_t tile, int64_t tiles, unsigned epoch,
                                            bool closed, const GammaPowers& gamma) {
  if (closed) return 0.0f;
  const int lane = threadIdx.x & 31;
  const float lane_weight = power_below_32(gamma.tiles, lane);
  float carry = 0.0f, scale = 1.0f;
  for (int64_t base = tile + 1; base < tiles; base += 32) {
    const float weight = scale * lane_weight;
    const bool counts = base + lane < tiles && fabsf(weight) > kVanished;
    uint64_t word = 0;
    unsigned waiting, closed_lanes, wanted;
    do {   // until every tile up to the first one that holds a sequence end has published
      if (counts) word = load_relaxed(workspace.published + base + lane);
      const bool ready = !counts || static_cast<unsigned>(word >> 33) == epoch;
      waiting = ~__ballot_sync(kAllLanes, ready);
      closed_lanes = __ballot_sync(kAllLanes, counts && ready && ((word >> 32) & 1u));
      wanted = closed_lanes ? closed_lanes ^ (closed_lanes - 1u) : kAllLanes;
    } while (waiting & wanted);
    float part = counts && ((wanted >> lane) & 1u) ? __uint_as_float(static_cast<unsigned>(word)) * weight : 0.0f;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) part += __shfl_xor_sync(kAllLanes, part, distance);
    carry += part;
    scale *= gamma.tiles[5];
    if (closed_lanes || fabsf(scale) < kVanished) break;
  }
  return carry;
}

// Publishes the tile's total, then finds the carry behind the tile. By warp 0, after `warps` is complete.
__device__ __forceinline__ float exchange_carries(const Workspace& workspace, const Claim& claim, int64_t tiles,
                                                  const WarpTotals& warps, bool closed, const GammaPowers& gamma) {
  bool has_end = false;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) has_end |= warps.has_end[w];
  const float total = carry_across_warps(warps, 0, 0.0f, gamma);
  if ((threadIdx.x & 31) == 0)
    store_relaxed(workspace.published + claim.tile, published_word(claim.epoch, has_end, total));
  return look_ahead(workspace, claim.tile, tiles, claim.epoch, closed, gamma);
}

}  // namespace megatron_fipo::cuda
