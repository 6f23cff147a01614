// out^T = W x^T on Hopper: the weights are the register operand of wgmma, tokens are its n.
//
//   global --bulk copy--> shared ring --16-byte loads--> registers --4 to 8 bits--> wgmma
//   x      --bulk tensor copy--> shared ring, 128-byte swizzle -------------------> wgmma
//
// One warp keeps the ring full, two warpgroups empty it. A thread finds the codes of its fragment
// in 16 bytes, and turns four codes at once into what wgmma reads, u8 = W8 + 128:
//   q group_scale + (group_offset + 128)
// as one 32-bit multiply-add of four bytes. Nothing carries: every byte stays in 0..255
// (`vllm_qoq.format`). The 128 leaves in the epilogue with the row sum of x.
//
// A tile whose k is split is summed as int32, so the order does not matter and the result is always
// the same: over the shared memory of a cluster while there are few tiles, in the L2 where the last
// round of many tiles leaves multiprocessors idle.
//
// The pipeline carries blocks of bytes that `unpack_half` alone understands: a second plane of
// 4-bit weights means longer blocks and one more 16-byte load there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/ptx.cuh"
#include "w4a8_gemm_config.h"

namespace qoq::w4a8 {

// k_blocks [k_begin, k_end) of one tile.
struct Work {
  int tile, k_begin, k_end;
};

// The pieces of one block of threads, in the same order for those who load and who multiply.
template <int kShare>
class WorkList {
 public:
  __device__ explicit WorkList(const Params& p) : p_(p), whole_(blockIdx.x / kShare) {
    if (p.split > 1) {
      const int tile = whole_ / p.split, rank = whole_ - tile * p.split;
      unit_ = tile * p.k_blocks + rank * p.k_blocks / p.split;
      unit_end_ = tile * p.k_blocks + (rank + 1) * p.k_blocks / p.split;
      whole_ = p.whole_tiles;
      return;
    }
    unit_ = whole_ * p.piece;
    const int units = (p.tiles_m * p.tiles_n - p.whole_tiles) * p.k_blocks;
    unit_end_ = min(unit_ + p.piece, units);
  }

  __device__ bool next(Work& work) {
    if (whole_ < p_.whole_tiles) {
      work = {whole_, 0, p_.k_blocks};
      whole_ += gridDim.x / kShare;
      return true;
    }
    if (unit_ >= unit_end_) return false;
    const int tile = unit_ / p_.k_blocks;
    const int begin = unit_ - tile * p_.k_blocks;
    const int end = min(p_.k_blocks, begin + unit_end_ - unit_);
    work = {p_.whole_tiles + tile, begin, end};
    unit_ += end - begin;
    return true;
  }

 private:
  const Params& p_;
  int whole_, unit_, unit_end_;
};

struct TilePosition {
  int m, n;  // in tiles
};

// Neighbouring tiles share weights, and no more than kBand x-tiles are in use at a time, so that
// both stay in the L2. Params::tiles_n counts clusters where blocks share tokens.
template <int kShare>
__device__ inline TilePosition position(int tile, const Params& p) {
  constexpr int kBand = 16;
  const int per_band = kBand * p.tiles_n;
  const int band = tile / per_band;
  const int in_band = tile - band * per_band;
  const int height = min(kBand, p.tiles_m - band * kBand);
  const int n = in_band / height;
  const int rank = kShare == 1 ? 0 : blockIdx.x % kShare;
  return {band * kBand + in_band - n * height, n * kShare + rank};
}

// Addresses of one stage and its barriers.
template <class Tile, bool kGrouped>
struct SharedMemory {
  uint32_t base;

  __device__ uint32_t x(int stage) const { return base + stage * Tile::kXBytes; }
  __device__ uint32_t weight(int stage, int block) const {
    return base + Tile::kStages * Tile::kXBytes + stage * Tile::template kWeightBytes<kGrouped> +
           block * kBlockBytes<kGrouped>;
  }
  __device__ uint32_t output() const { return weight(Tile::kStages, 0); }
  __device__ uint32_t constants() const { return output() + Tile::kOutputBytes; }
  __device__ uint32_t full(int stage) const {
    return constants() + Tile::kConstantBytes + 8 * stage;
  }
  __device__ uint32_t empty(int stage) const { return full(Tile::kStages + stage); }
  __device__ uint32_t flag() const { return full(2 * Tile::kStages); }
};

template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- the loading warp ----------------------------------------------------------------

template <class Tile, bool kGrouped>
__device__ void load(const CUtensorMap& x_map, const Params& p,
                     const SharedMemory<Tile, kGrouped>& shared) {
  constexpr int kBytes = kBlockBytes<kGrouped>;
  const bool is_streamed = p.tiles_m == 1;
  const uint64_t policy =
      is_streamed ? ptx::l2_policy_evict_first() : ptx::l2_policy_evict_normal();

  auto load_weight = [&](int stage, int tile_n, int k) {
    ptx::mbarrier_arrive_expect_tx(shared.full(stage),
                                   Tile::kXBytes + Tile::template kWeightBytes<kGrouped>);
    const int first = min(tile_n * Tile::kBlocks, p.weight_blocks - 1);
    const uint8_t* source = p.weight + (static_cast<int64_t>(first) * p.k_blocks + k) * kBytes;
    uint32_t destination = shared.weight(stage, 0);
#pragma unroll 1
    for (int i = 0; i < Tile::kBlocks; ++i) {
      ptx::cp_async_bulk(destination, source, kBytes, shared.full(stage), policy);
      destination += kBytes;
      // Past the last channel: any block will do, nothing of it is written.
      if (first + i + 1 < p.weight_blocks) source += p.k_blocks * kBytes;
    }
  };

  // 1. Weights do not depend on the kernel before this one.
  {
    WorkList<Tile::kShare> list(p);
    Work work;
    int filled = 0;
    while (filled < Tile::kStages && list.next(work)) {
      const int n = position<Tile::kShare>(work.tile, p).n;
      for (int k = work.k_begin; k < work.k_end && filled < Tile::kStages; ++k)
        load_weight(filled++, n, k);
    }
  }
  ptx::griddepcontrol_wait();

  // 2. Everything else.
  WorkList<Tile::kShare> list(p);
  Work work;
  RingPosition<Tile::kStages> ring;
  int count = 0;
  while (list.next(work)) {
    const auto [m, n] = position<Tile::kShare>(work.tile, p);
    for (int k = work.k_begin; k < work.k_end; ++k, ++count) {
      if (count >= Tile::kStages) {
        ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
        load_weight(ring.stage, n, k);
      }
      if constexpr (Tile::kShare == 1) {
        ptx::cp_async_bulk_tensor_2d(shared.x(ring.stage), &x_map, k * kBlockK, m * Tile::kTokens,
                                     shared.full(ring.stage));
      } else {
        constexpr int kPart = Tile::kTokens / Tile::kShare;
        const int part = blockIdx.x % Tile::kShare;
        const uint32_t first = ptx::cluster_rank() - part;
        ptx::cp_async_bulk_tensor_2d_multicast(
            shared.x(ring.stage) + part * kPart * kBlockK, &x_map, k * kBlockK,
            m * Tile::kTokens + part * kPart, shared.full(ring.stage),
            ((1 << Tile::kShare) - 1) << first);
      }
      ring.advance();
    }
  }
}

// ---- the multiplying warpgroups ------------------------------------------------------

// Codes of 64 inputs to the A registers of two k32 steps. In a word, the low nibbles are inputs
// 0..15 of the step, the high ones 16..31; words alternate between rows r and r + 8.
template <bool kGrouped>
__device__ inline void unpack_half(uint4 codes, uint32_t params, uint32_t (&a)[8]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t word = words[2 * step + row];
      uint32_t low = word & 0x0F0F0F0F;
      uint32_t high = (word >> 4) & 0x0F0F0F0F;
      if constexpr (kGrouped) {
        const uint32_t scale = row == 0 ? params & 0xFF : (params >> 16) & 0xFF;
        const uint32_t offset = __byte_perm(params, 0, row == 0 ? 0x1111 : 0x3333);
        low = low * scale + offset;
        high = high * scale + offset;
      }
      a[4 * step + row] = low;
      a[4 * step + row + 2] = high;
    }
  }
}

// What one thread multiplies of a stage.
template <class Tile, bool kGrouped>
struct Fragments {
  uint4 codes[Tile::kWeightBlocks][2];
  uint32_t params[Tile::kWeightBlocks];

  __device__ void fetch(const SharedMemory<Tile, kGrouped>& shared, int stage) {
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b) {
      const uint32_t block = shared.weight(stage, group * Tile::kWeightBlocks + b);
      params[b] = kGrouped ? ptx::load_shared_4(block + kCodeBytes + thread / 4 * 4) : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        codes[b][half] = ptx::load_shared_16(block + half * (kCodeBytes / 2) + thread * 16);
    }
  }
};

__device__ inline float load_bias(const Params& p, int channel) {
  switch (p.bias_type) {
    case Bias::kFloat32:
      return static_cast<const float*>(p.bias)[channel];
    case Bias::kBfloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[channel]);
    case Bias::kFloat16:
      return __half2float(static_cast<const __half*>(p.bias)[channel]);
    default:
      return 0.f;
  }
}

// Two tokens of one channel in 32 bits.
__device__ inline uint32_t round_to_output(Output type, float low, float high) {
  if (type == Output::kBfloat16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

// The constants of a tile, one channel and one token a thread. They are fetched before the sums
// are made and put into shared memory after.
template <class Tile>
struct Constants {
  float scale = 0.f, zero = 0.f, bias = 0.f, x_scale = 0.f;
  int32_t row_sum = 0;

  __device__ void fetch(const Params& p, int first_token, int first_channel, int thread) {
    const int channel = first_channel + thread;
    if (thread < Tile::kChannels && channel < p.n) {
      scale = __ldg(p.channel_scale + channel);
      if (p.channel_zero != nullptr) zero = __ldg(p.channel_zero + channel);
      bias = load_bias(p, channel);
    }
    const int token = first_token + thread;
    if (thread < Tile::kTokens && token < p.m) {
      x_scale = __ldcg(p.x_scale + token);
      row_sum = __ldcg(p.x_row_sum + token);
    }
  }
};

// Constants in shared memory.
template <class Tile>
struct SharedConstants {
  float* scale;
  float* zero;
  float* bias;
  float* x_scale;
  int32_t* row_sum;

  __device__ explicit SharedConstants(char* base)
      : scale(reinterpret_cast<float*>(base)),
        zero(scale + Tile::kChannels),
        bias(zero + Tile::kChannels),
        x_scale(bias + Tile::kChannels),
        row_sum(reinterpret_cast<int32_t*>(x_scale + Tile::kTokens)) {}

  __device__ void store(const Constants<Tile>& c, int thread) const {
    if (thread < Tile::kChannels) {
      scale[thread] = c.scale;
      zero[thread] = c.zero;
      bias[thread] = c.bias;
    }
    if (thread < Tile::kTokens) {
      x_scale[thread] = c.x_scale;
      row_sum[thread] = c.row_sum;
    }
  }
};

// The stage may be filled again, by all whose tokens it holds. Nothing for stage -1.
template <class Tile, bool kGrouped>
__device__ inline void release(const SharedMemory<Tile, kGrouped>& shared, int stage) {
  const int lane = threadIdx.x % 32;
  if constexpr (Tile::kShare == 1) {
    ptx::mbarrier_arrive_if(lane == 0 && stage >= 0, shared.empty(stage));
  } else {
    const uint32_t first = ptx::cluster_rank() / Tile::kShare * Tile::kShare;
    ptx::mbarrier_arrive_cluster_if(
        lane < Tile::kShare && stage >= 0,
        ptx::map_to_rank(shared.empty(max(stage, 0)), first + lane % Tile::kShare));
  }
}

template <class Tile>
using Accumulators = int32_t[Tile::kWeightBlocks][Tile::kAccumulators];

// Adds this block's share of a tile to the others'. True in the block that completes the sum,
// which then holds it in its registers.
template <class Tile, bool kGrouped>
__device__ bool add_to_shared_tile(Accumulators<Tile>& acc, const Params& p, const Work& work,
                                   const SharedMemory<Tile, kGrouped>& shared, char* shared_base) {
  const int thread = threadIdx.x;
  const int slot = (work.tile - p.whole_tiles) * Tile::kShare + blockIdx.x % Tile::kShare;
  int32_t* sums = p.workspace + kCounters + static_cast<int64_t>(slot) * Tile::kTileInts + thread;
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
    for (int i = 0; i < Tile::kAccumulators; ++i)
      ptx::red_add(sums + (b * Tile::kAccumulators + i) * kConsumers, acc[b][i]);

  int* is_last = reinterpret_cast<int*>(shared_base + (shared.flag() - shared.base));
  ptx::named_barrier_sync(1, kConsumers);
  if (thread == 0) {
    __threadfence();
    const int share = work.k_end - work.k_begin;
    const int before = atomicAdd(p.workspace + slot, share);
    *is_last = before + share == p.k_blocks;
    __threadfence();
  }
  ptx::named_barrier_sync(1, kConsumers);
  if (!*is_last) return false;

  if (thread == 0) p.workspace[slot] = 0;
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
    for (int i = 0; i < Tile::kAccumulators; ++i)
      acc[b][i] = __ldcg(sums + (b * Tile::kAccumulators + i) * kConsumers);
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
    for (int i = 0; i < Tile::kAccumulators; ++i)
      __stcg(sums + (b * Tile::kAccumulators + i) * kConsumers, 0);
  return true;
}

// The order of `reference.epilogue`, and no fused multiply-adds.
template <bool kGrouped>
__device__ inline float epilogue(int32_t sum, float x_scale, int32_t row_sum, float scale,
                                 float zero, float bias, bool has_bias) {
  if constexpr (kGrouped) sum -= 128 * row_sum;
  float y = __fmul_rn(__int2float_rn(sum), scale);
  if constexpr (!kGrouped) y = __fsub_rn(y, __fmul_rn(__int2float_rn(row_sum), zero));
  y = __fmul_rn(y, x_scale);
  return has_bias ? __fadd_rn(y, bias) : y;
}

// Adds up the tile of a cluster: every block puts its sums into its own shared memory, then takes
// an equal part of the output and reads all the others' sums of it.
template <class Tile, bool kGrouped>
__device__ void add_up_cluster(const Accumulators<Tile>& acc, const Params& p, TilePosition at,
                               const SharedMemory<Tile, kGrouped>& shared, char* shared_base) {
  const int thread = threadIdx.x, lane = thread % 32;
  const int group = thread / 128, warp = thread % 128 / 32;
  ptx::named_barrier_sync(1, kConsumers);  // nobody reads the ring any more

  // 1. Registers to [token][channel].
#pragma unroll
  for (int b = 0; b < Tile::kWeightBlocks; ++b) {
    const int channel = group * Tile::kGroupChannels + b * kBlockN + warp * 16 + lane / 4;
    const uint32_t sums = shared.base + (2 * (lane % 4) * Tile::kSumPitch + channel) * 4;
#pragma unroll
    for (int i = 0; i < Tile::kAccumulators; ++i) {
      const int token = i / 4 * 8 + i % 2, half = i / 2 % 2;
      ptx::store_shared_4(sums + (token * Tile::kSumPitch + half * 8) * 4, acc[b][i]);
    }
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();

  // 2. Eight channels of a token at a time.
  constexpr int kVectors = Tile::kChannels / 8;
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  const int first_token = at.m * Tile::kTokens, first_channel = at.n * Tile::kChannels;
  const int items = min(Tile::kTokens, p.m - first_token) * kVectors;
  const bool has_bias = p.bias_type != Bias::kNone;
  const uint32_t share = ptx::cluster_rank() % Tile::kShare,
                 part = ptx::cluster_rank() / Tile::kShare;
  for (int i = part * kConsumers + thread; i < items; i += p.split * kConsumers) {
    const int token = i / kVectors, channel = i % kVectors * 8;
    if (first_channel + channel >= p.n) continue;
    const uint32_t address = shared.base + (token * Tile::kSumPitch + channel) * 4;
    int32_t sums[8] = {};
#pragma unroll 4
    for (int rank = 0; rank < p.split; ++rank) {
      const uint32_t mapped = ptx::map_to_rank(address, rank * Tile::kShare + share);
      const int4 low = ptx::load_cluster_16(mapped), high = ptx::load_cluster_16(mapped + 16);
      const int32_t values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += values[j];
    }
    const float x_scale = constants.x_scale[token];
    const int32_t row_sum = constants.row_sum[token];
    float y[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      y[j] = epilogue<kGrouped>(sums[j], x_scale, row_sum, constants.scale[channel + j],
                                constants.zero[channel + j], constants.bias[channel + j], has_bias);
    uint4 v;
    v.x = round_to_output(p.out_type, y[0], y[1]);
    v.y = round_to_output(p.out_type, y[2], y[3]);
    v.z = round_to_output(p.out_type, y[4], y[5]);
    v.w = round_to_output(p.out_type, y[6], y[7]);
    char* out = static_cast<char*>(p.out) +
                (static_cast<int64_t>(first_token + token) * p.n + first_channel + channel) * 2;
    *reinterpret_cast<uint4*>(out) = v;
  }
}

// Writes kChunk tokens at a time: registers to rows in shared memory, rows to `out`.
template <class Tile, bool kGrouped>
__device__ void write_output(const Accumulators<Tile>& acc, const Params& p, TilePosition at,
                             const SharedMemory<Tile, kGrouped>& shared, char* shared_base) {
  constexpr int kChunk = Tile::kChunk, kRowBytes = Tile::kRowBytes;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32;
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  const uint32_t rows = shared.output() + group * kChunk * kRowBytes;
  const char* rows_pointer = shared_base + (rows - shared.base);
  const int first_channel = at.n * Tile::kChannels + group * Tile::kGroupChannels;
  const int first_token = at.m * Tile::kTokens;

#pragma unroll
  for (int chunk = 0; chunk < Tile::kTokens / kChunk; ++chunk) {
#pragma unroll
    for (int j8 = 0; j8 < kChunk / 8; ++j8) {
      const int j = chunk * (kChunk / 8) + j8;
      const int token = 8 * j + 2 * (lane % 4);
      const float2 x_scale = *reinterpret_cast<const float2*>(constants.x_scale + token);
      const int2 row_sum = *reinterpret_cast<const int2*>(constants.row_sum + token);
      uint32_t fragments[2 * Tile::kWeightBlocks];
#pragma unroll
      for (int b = 0; b < Tile::kWeightBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel =
              group * Tile::kGroupChannels + b * kBlockN + warp * 16 + half * 8 + lane / 4;
          const float scale = constants.scale[channel], zero = constants.zero[channel];
          const float bias = constants.bias[channel];
          const int i = 4 * j + 2 * half;
          const float low = epilogue<kGrouped>(acc[b][i], x_scale.x, row_sum.x, scale, zero, bias,
                                               p.bias_type != Bias::kNone);
          const float high = epilogue<kGrouped>(acc[b][i + 1], x_scale.y, row_sum.y, scale, zero,
                                                bias, p.bias_type != Bias::kNone);
          fragments[2 * b + half] = round_to_output(p.out_type, low, high);
        }
      }
      const uint32_t row = rows + (8 * j8 + lane % 8) * kRowBytes + warp * 32;
      const int matrix = lane / 8;
      if constexpr (Tile::kWeightBlocks == 2) {
        ptx::stmatrix_x4_trans(row + (matrix / 2) * (kBlockN * 2) + (matrix % 2) * 16, fragments);
      } else {
        ptx::stmatrix_x2_trans(row + (matrix % 2) * 16, fragments[0], fragments[1]);
      }
    }
    ptx::named_barrier_sync(2 + group, 128);
    constexpr int kVectors = Tile::kGroupChannels / 8;  // of 16 bytes, in a row
    for (int i = thread; i < kChunk * kVectors; i += 128) {
      const int row = i / kVectors, column = i % kVectors;
      const int token = first_token + chunk * kChunk + row;
      const int channel = first_channel + column * 8;
      if (token < p.m && channel < p.n) {
        const uint4 v =
            *reinterpret_cast<const uint4*>(rows_pointer + row * kRowBytes + column * 16);
        char* out = static_cast<char*>(p.out) + (static_cast<int64_t>(token) * p.n + channel) * 2;
        *reinterpret_cast<uint4*>(out) = v;
      }
    }
    ptx::named_barrier_sync(2 + group, 128);
  }
}

template <class Tile, bool kGrouped>
__device__ void multiply(const Params& p, const SharedMemory<Tile, kGrouped>& shared,
                         char* shared_base) {
  const SharedConstants<Tile> constants(shared_base + (shared.constants() - shared.base));
  ptx::griddepcontrol_wait();  // for x_scale, the workspace and `out`

  WorkList<Tile::kShare> list(p);
  Work work;
  RingPosition<Tile::kStages> ring;
  while (list.next(work)) {
    const TilePosition at = position<Tile::kShare>(work.tile, p);
    Constants<Tile> fetched;
    fetched.fetch(p, at.m * Tile::kTokens, at.n * Tile::kChannels, threadIdx.x);

    Accumulators<Tile> acc;
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b)
#pragma unroll
      for (int i = 0; i < Tile::kAccumulators; ++i) acc[b][i] = 0;

    // Two sets of A registers: one is filled while the wgmmas of the other run. The codes of a
    // stage are fetched while the wgmmas of the one before it run.
    uint32_t a[2][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) a[0][i] = a[1][i] = 0;
    Fragments<Tile, kGrouped> fragments;
    ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
    fragments.fetch(shared, ring.stage);
    int previous = -1, k = work.k_begin;
    while (true) {
      const uint64_t x = ptx::descriptor_k_major_128b(shared.x(ring.stage));
#pragma unroll
      for (int b = 0; b < Tile::kWeightBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ptx::wgmma_wait_group<1>();
          ptx::keep_in_registers(a[half]);
          if (b == 0 && half == 1) release(shared, previous);
          unpack_half<kGrouped>(fragments.codes[b][half], fragments.params[b], a[half]);
          ptx::keep_in_registers(a[half]);
          ptx::wgmma_fence();
#pragma unroll
          for (int step = 0; step < 2; ++step)
            ptx::WgmmaU8S8<Tile::kTokens>::issue(acc[b], &a[half][4 * step],
                                                 x + 2 * (2 * half + step));
          ptx::wgmma_commit_group();
        }
      }
      previous = ring.stage;
      ring.advance();
      if (++k == work.k_end) break;
      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
      fragments.fetch(shared, ring.stage);
    }
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int b = 0; b < Tile::kWeightBlocks; ++b) ptx::keep_in_registers(acc[b]);
    release(shared, previous);

    constants.store(fetched, threadIdx.x);
    if (p.split > 1) {
      add_up_cluster<Tile, kGrouped>(acc, p, at, shared, shared_base);
      return;
    }
    const bool is_whole = work.k_end - work.k_begin == p.k_blocks;
    if (is_whole) {
      ptx::named_barrier_sync(1, kConsumers);
    } else if (!add_to_shared_tile<Tile, kGrouped>(acc, p, work, shared, shared_base)) {
      continue;
    }
    write_output<Tile, kGrouped>(acc, p, at, shared, shared_base);
    ptx::named_barrier_sync(1, kConsumers);  // the constants may be overwritten
  }
}

template <class Tile, bool kGrouped>
__global__ void __launch_bounds__(kThreads, Tile::kResident)
    w4a8_gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ Params p) {
  extern __shared__ char unaligned[];
  const uint32_t offset = -ptx::shared_address(unaligned) & 1023;
  char* shared_base = unaligned + offset;
  const SharedMemory<Tile, kGrouped> shared{ptx::shared_address(shared_base)};

  ptx::griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(shared.full(i), 1);
      ptx::mbarrier_init(shared.empty(i), Tile::kShare * kConsumers / 32);
    }
    ptx::fence_mbarrier_init();
  }
  const bool is_cluster = Tile::kShare > 1 || p.split > 1;
  __syncwarp();
  if (Tile::kShare > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }

  if (threadIdx.x >= kConsumers) {
    ptx::setmaxnreg_decrease<Tile::kLoadRegisters>();
    if (threadIdx.x == kConsumers) {
      ptx::prefetch_tensormap(&x_map);
      load<Tile, kGrouped>(x_map, p, shared);
    }
  } else {
    ptx::setmaxnreg_increase<Tile::kMultiplyRegisters>();
    multiply<Tile, kGrouped>(p, shared, shared_base);
    // Others may still read what is in shared memory here, or arrive at its barriers.
    if (is_cluster) {
      __syncwarp();
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
}

}  // namespace qoq::w4a8
