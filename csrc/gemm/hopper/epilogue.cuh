// From the sums in registers to the output: straight, over a block and its cluster, or over the L2.
#pragma once

#include "common/ptx.cuh"
#include "gemm/hopper/shared_memory.cuh"
#include "gemm/w4a8_epilogue.cuh"

namespace qoq::w4a8 {

template <class Tile>
using Accumulators = int32_t[Tile::kWeightBlocks][Tile::kAccumulators];
template <class Tile>
using OutAccumulators = int32_t[Tile::kWeightBlocks][Tile::kOutAccumulators];

// The first token of this thread's warpgroup in the tile.
template <class Tile>
__device__ inline int first_out_token() {
  if constexpr (!Tile::kByInputs) return 0;
  const int rank = Tile::kCluster == 1 ? 0 : ptx::cluster_rank();
  return (rank * Tile::kGroups + threadIdx.x / 128) * Tile::kOutTokens;
}

// Where the warpgroups have divided k, gives each of them the sums of its share of the tokens.
template <class Tile, Weights kWeights>
__device__ void add_up_groups(const Accumulators<Tile>& acc, OutAccumulators<Tile>& sums,
                              const SharedMemory<Tile, kWeights>& shared) {
  if constexpr (!Tile::kByInputs) {
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kAccumulators; ++i) sums[b][i] = acc[b][i];
  } else {
    constexpr int kOctets = Tile::kTokens / 8;  // of tokens, 4 registers each
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    auto address = [&](int part, int octet) {
      return shared.base + ((part * kOctets + octet) * 128 + thread) * 16;
    };
    ptx::named_barrier_sync(1, Tile::kConsumers);  // nobody reads the ring any more
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
      ptx::store_shared_16(address(group, octet), &acc[0][4 * octet]);
    if constexpr (Tile::kCluster == 1) {
      ptx::named_barrier_sync(1, Tile::kConsumers);
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
    const int first = first_out_token<Tile>() / 8;
#pragma unroll
    for (int i = 0; i < Tile::kOutAccumulators; ++i) sums[0][i] = 0;
    if (first >= kOctets) return;
#pragma unroll
    for (int octet = 0; octet < Tile::kOutTokens / 8; ++octet) {
#pragma unroll
      for (int rank = 0; rank < Tile::kCluster; ++rank) {
#pragma unroll
        for (int part = 0; part < Tile::kGroups; ++part) {
          const uint32_t from = address(part, first + octet);
          const uint4 v = Tile::kCluster == 1 ? ptx::load_shared_16(from)
                                              : ptx::load_cluster_16(ptx::map_to_rank(from, rank));
          const uint32_t values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[0][4 * octet + i] += static_cast<int32_t>(values[i]);
        }
      }
    }
  }
}

// Adds this block's share of a tile to those of other blocks; true where it completes the sum.
template <class Tile, Weights kWeights>
__device__ bool add_to_others(OutAccumulators<Tile>& acc, const Params& p, const Work& work,
                              const SharedMemory<Tile, kWeights>& shared, char* shared_base) {
  constexpr int kCount = Tile::kWeightBlocks * Tile::kOutAccumulators;
  const bool is_active = first_out_token<Tile>() < Tile::kTokens;
  const int slot = (work.tile - p.whole_tiles) * Tile::kCluster + blockIdx.x % Tile::kCluster;
  int* is_last = reinterpret_cast<int*>(shared_base + (shared.flag() - shared.base));
  return add_to_shared_tile<Tile, Tile::kConsumers, kCount>(&acc[0][0], is_active, p, slot,
                                                            work.end - work.begin, is_last);
}

// Writes a tile from registers to `out`, through shared memory that holds 64 channels of a token as
// a row of 128 bytes in the copy engine's swizzle. Returns before the last units have left.
template <class Tile, Weights kWeights>
__device__ void write_output(const OutAccumulators<Tile>& acc, const CUtensorMap& out_map,
                             const Params& p, TilePosition at,
                             const SharedMemory<Tile, kWeights>& shared, char* shared_base) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32;
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  const uint32_t buffers = shared.output() + group * Tile::kOutputBuffers * Tile::kUnitBytes;
  const bool has_bias = p.bias_type != Bias::kNone;
  const int first_token = first_out_token<Tile>();  // in the tile
  if (first_token >= Tile::kTokens) return;
  constexpr int kMatrices = Tile::kUnitTokens > 8 ? 2 : 1;  // of 8 tokens x 16 channels at a time

  int unit = 0;
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b) {
    const int first_channel = Tile::kByInputs ? 0 : (group * Tile::kWeightBlocks + b) * kBlockN;
    float scale[2], zero[2], bias[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = first_channel + warp * 16 + half * 8 + lane / 4;
      scale[half] = constants.scale[channel];
      zero[half] = constants.zero[channel];
      bias[half] = constants.bias[channel];
    }
#pragma unroll
    for (int first = 0; first < Tile::kOutTokens; first += Tile::kUnitTokens, ++unit) {
      const uint32_t buffer = buffers + unit % Tile::kOutputBuffers * Tile::kUnitBytes;
      if (thread == 0) ptx::cp_async_bulk_wait_group_read<Tile::kOutputBuffers - 1>();
      __syncwarp();
      ptx::named_barrier_sync(2 + group, 128);
#pragma unroll
      for (int row = 0; row < Tile::kUnitTokens; row += 8 * kMatrices) {
        uint32_t fragments[4];
#pragma unroll
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
          const int j = (first + row) / 8 + matrix;
          const int token = first_token + 8 * j + 2 * (lane % 4);
          const float2 x_scale = *reinterpret_cast<const float2*>(constants.x_scale + token);
          const int2 row_sum = *reinterpret_cast<const int2*>(constants.row_sum + token);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = 4 * j + 2 * half;
            const float low = epilogue<kWeights>(acc[b][i], x_scale.x, row_sum.x, scale[half],
                                                 zero[half], bias[half], has_bias);
            const float high = epilogue<kWeights>(acc[b][i + 1], x_scale.y, row_sum.y, scale[half],
                                                  zero[half], bias[half], has_bias);
            fragments[2 * matrix + half] = round_to_output(p.out_type, low, high);
          }
        }
        // Lane 8 q + i has the address of row i of matrix q.
        const int q = lane / 8 % (2 * kMatrices), unit_row = row + q / 2 * 8 + lane % 8;
        const uint32_t address =
            buffer + unit_row * (kBlockN * 2) + (((2 * warp + q % 2) ^ (unit_row % 8)) * 16);
        if constexpr (kMatrices == 2) {
          ptx::stmatrix_x4_trans(address, fragments);
        } else {
          ptx::stmatrix_x2_trans(address, fragments[0], fragments[1]);
        }
      }
      ptx::fence_proxy_async_shared();
      ptx::named_barrier_sync(2 + group, 128);
      if (thread == 0) {
        ptx::cp_async_bulk_tensor_2d_store(&out_map, at.n * Tile::kChannels + first_channel,
                                           at.m * Tile::kTokens + first_token + first, buffer);
        ptx::cp_async_bulk_commit_group();
      }
      __syncwarp();
    }
  }
}

}  // namespace qoq::w4a8
