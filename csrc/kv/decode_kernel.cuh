// Attention of the last tokens of each sequence, one or a few, over the sequence's quantized pages.
//
// The tiles of all sequences and KV heads are cut into as many equal ranges as there are warps,
// from the lengths on the device, so a graph stays right when they change. A warp loads its tiles
// for itself, and no warp waits for another before the end, when what several have of one KV head
// of a sequence is added up.
#pragma once

#include "kv/decode_load.cuh"
#include "kv/decode_merge.cuh"

namespace qoq::kv {

// Writes zeros for sequences without a token that is seen.
template <class A>
__device__ inline void write_zeros(const Params& p) {
  auto write_row = [&](int row, int heads) {
    auto* out = static_cast<uint16_t*>(p.out) + row * p.out_stride;
    for (int j = threadIdx.x; j < heads * A::kHeadSize; j += A::kThreads)
      out[j / A::kHeadSize * p.out_head_stride + j % A::kHeadSize] = 0;
  };
  for (int i = blockIdx.x; i < p.sequences; i += gridDim.x) {
    if (p.seq_lens[i] > 0) continue;
    if constexpr (A::kHasManyQueries) {
      NewTokens<true> tokens;
      tokens.read_tokens(p, i);
      for (int token = 0; token < tokens.count; ++token)
        write_row(tokens.first_row + token, (p.kv_heads >> p.head_shift) * p.heads_of_kv);
    } else {
      write_row(i, p.kv_heads * p.group);
    }
  }
}

// Fetches the tables of a step into the L2. The first layer reads them first, and the weights of
// any layer may drive them out. This happens while the kernel before still runs; if that one writes
// them, the L2 has what it wrote.
template <class A>
__device__ inline void prefetch(const Params& p) {
  const int thread = blockIdx.x * A::kThreads + threadIdx.x;
  if (thread < p.sequences * p.row_lines)
    ptx::prefetch_l2(p.block_table + thread / p.row_lines * p.table_stride +
                     thread % p.row_lines * kLineInts);
  if (thread < divide_up(p.sequences, kLineInts)) ptx::prefetch_l2(p.seq_lens + thread * kLineInts);
  if constexpr (A::kHasManyQueries)
    if (thread <= p.sequences / kLineInts) ptx::prefetch_l2(p.query_start + thread * kLineInts);
}

template <class A>
__global__ void __launch_bounds__(A::kThreads, A::kResident)
    kv_decode_kernel(const __grid_constant__ Params p) {
  extern __shared__ char unaligned[];
  const int warp = threadIdx.x / 32;
  const uint32_t start = ptx::shared_address(unaligned), ring_of_block = (start + 127) / 128 * 128;
  char* shared = unaligned + (ring_of_block - start);
  const uint32_t ring = ring_of_block + warp * A::kWarpRingBytes;
  Copies<A>::prepare(ring + A::kWarpTilesBytes);
  const int lane = threadIdx.x % 32;
  const Copy copy = lane < p.copy_count ? p.copies[lane] : Copy{};
  prefetch<A>(p);
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();

  const Range<A> range = range_of_warp<A>(p);
  if (range.block.begin == range.block.end) return write_zeros<A>(p);
  const bool has_tiles = range.begin < range.end;
  uint2 raw_query[A::kHeadTiles][Query<A>::kRaw];
  if (has_tiles) Query<A>::fetch(p, range.first, raw_query);
  Loader<A> loader(p, copy, range, ring);
  write_zeros<A>(p);

  Merger<A> merger(p, range, shared);
  Segment<A> segment = range.first;
  int tile = range.begin;
  while (has_tiles) {
    const int end = min(segment.end(), range.end);
    Query<A> query;
    query.set(p, raw_query);
    Sums<A> sums;
    sums.clear();
    for (; tile < end; ++tile) {
      TileOfColumns<A>(p, loader.wait(tile), segment, segment.token_of(p, tile))
          .attend(query, sums);
      __syncwarp();
      loader.replace(tile);
    }
    merger.finish(segment, query, sums);
    if (end == range.end) break;
    segment.next(p);
    Query<A>::fetch(p, segment, raw_query);
  }
  merger.add_warps(segment);
  merger.add_blocks();
}

}  // namespace qoq::kv
