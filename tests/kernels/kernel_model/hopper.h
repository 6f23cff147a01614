// A model of the parts of Hopper that the kernels of csrc/ use, for machines without a GPU.
//
// Every thread is a fiber; those that can run do so in random order. Copies into shared memory
// happen at once, wgmmas and copies out of it as late as they are waited for: so what is given back
// too early is overwritten, and a barrier that counts wrong stands still. It knows nothing of time
// or memory order, but that the copy engine needs a fence and a kernel waits for the one before it.
// Takes the place of csrc/common/ptx.cuh and wgmma.cuh.
#pragma once

#include <cuda.h>
#include <emmintrin.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <vector>

// Stores the stack pointer at `from` and goes on where the one in `to` was stored; on the stacks
// are the registers that a call keeps. swapcontext would also make a system call, at every switch.
extern "C" void model_switch(void** from, void* to);
asm(R"(
.text
.type model_switch, @function
model_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size model_switch, .-model_switch
)");

namespace model {

constexpr uint32_t kFirstAddress = 0x440;  // of shared memory: not a multiple of 1024
constexpr uint32_t kAddressBits = 24;      // above: 1 + rank in the cluster
constexpr uint32_t kAddressMask = (1u << kAddressBits) - 1;
constexpr int kLongestSleep = 64;  // rounds

[[noreturn]] inline void fail(const char* what) {
  std::printf("the model stops: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

inline void check(bool is_right, const char* what) {
  if (!is_right) fail(what);
}

struct Mbarrier {
  int expected = 0, pending = 0;
  long bytes = 0;
  uint32_t phase = 0;
  bool is_initialised = false;

  void update() {
    check(pending >= 0, "too many arrivals at a barrier");
    if (pending > 0 || bytes != 0) return;
    phase ^= 1;
    pending = expected;
  }
};

// Threads that wait for each other: bar.sync, or a warp's stmatrix.
struct Rendezvous {
  int count = 0, generation = 0;
};

struct Wgmma {
  int n;
  uint64_t descriptor;
  int issued = 0;  // by how many of the 128 threads
  std::array<const uint32_t*, 128> a;
  std::array<int32_t*, 128> d;
};

struct WgmmaGroup {
  std::deque<Wgmma> instructions;
  int first_round;  // in which it may be complete
  bool is_done = false;
};

struct Stmatrix : Rendezvous {
  uint32_t address[32], registers[32][4];
};

struct Cluster;

// A copy by a thread into shared memory.
struct Copy {
  uint32_t destination;
  std::array<char, 16> bytes;
};

// Copies of a thread that are not made yet, and the barrier that it arrives at once they are.
struct Thread;
struct Arrival {
  const Thread* thread;
  uint32_t barrier;
  std::vector<Copy> copies;
};

struct Block {
  int index, rank, alive;
  Cluster* cluster;
  std::vector<char> shared;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::map<int, Rendezvous> named, warps;
  std::map<int, std::deque<WgmmaGroup>> wgmmas;  // by warpgroup
  std::map<int, Stmatrix> stmatrix;              // by warp
  std::deque<Arrival> arrivals;
  std::set<uint32_t> unfenced;  // addresses of 16 bytes that the copy engine may not see yet
};

struct Cluster {
  std::vector<Block> blocks;
  int arrived = 0, generation = 0, alive = 0;

  // Threads that have ended do not hold the others up.
  void update() {
    if (alive == 0 || arrived < alive) return;
    arrived = 0;
    ++generation;
  }
};

// What the model puts in the place of a tensor map. The first dimension is without gaps.
struct TensorMap {
  char* base;
  int element_bytes;
  std::array<int64_t, 3> sizes, strides;  // in elements, in bytes
  std::array<int, 3> box;
};

// A copy out of shared memory.
struct Store {
  TensorMap map;
  std::array<int, 3> at;
  uint32_t source;
  std::vector<std::array<char, 16>> bytes;  // as they were when it was issued
};

struct Thread {
  void* stack_pointer;
  std::unique_ptr<char[]> stack;
  int index;
  Block* block;
  bool has_ended = false;
  size_t group = 0, instruction = 0;  // of its next wgmma
  int cluster_generation = 0;
  bool is_after_previous_kernel = false;
  std::vector<uint32_t> unfenced;  // what it wrote of Block::unfenced
  // In groups, of which the last one is not committed.
  std::deque<std::vector<Store>> stores = {{}};
  std::deque<std::vector<Copy>> copies = {{}};
};

inline void* scheduler;  // its stack pointer while a thread runs
inline Thread* self;
inline int grid_blocks, block_threads;
inline int round_now;                         // every thread that does not sleep runs once
inline int most_rounds = 10000;               // more of them are a deadlock
inline std::span<const uint8_t> bulk_memory;  // where copies of weights may read
// Where copies by threads may read what the kernel before this one wrote.
inline std::span<const uint8_t> previous_memory;
inline std::mt19937 random_order;
inline std::function<void()> kernel;

inline void yield() { model_switch(&self->stack_pointer, scheduler); }
inline void yield_perhaps(int one_in = 4) {
  if (random_order() % one_in == 0) yield();
}

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
}

inline void meet(Rendezvous& r, int threads, const std::function<void()>& last = [] {}) {
  const int generation = r.generation;
  if (++r.count == threads) {
    last();
    r.count = 0;
    ++r.generation;
  }
  wait_until([&] { return r.generation != generation; });
}

inline Block& block_of(uint32_t address) {
  const uint32_t tag = address >> kAddressBits;
  Block& block = tag == 0 ? *self->block : self->block->cluster->blocks.at(tag - 1);
  check(block.alive > 0, "shared memory of a block that has ended");
  return block;
}

inline char* shared_pointer(uint32_t address, uint32_t bytes) {
  Block& block = block_of(address);
  const uint32_t offset = (address & kAddressMask) - kFirstAddress;
  check(offset + bytes <= block.shared.size(), "an address outside of shared memory");
  return block.shared.data() + offset;
}

inline char* shared_begin() { return self->block->shared.data(); }

inline uint32_t swizzle_128b(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Visits a box in pieces of 16 bytes, which the swizzle leaves together: where each lies in shared
// memory, and in the tensor (null outside).
template <class Visit>
void visit_box(const TensorMap& map, const std::array<int, 3>& at, uint32_t address, Visit visit) {
  const int elements = 16 / map.element_bytes;
  check(address % 128 == 0 && map.box[0] * map.element_bytes == 128 && map.sizes[0] % elements == 0,
        "a box that does not suit its swizzle");
  auto is_inside = [&](int d, int i) { return i >= 0 && i < map.sizes[d]; };
  for (int z = at[2]; z < at[2] + map.box[2]; ++z)
    for (int y = at[1]; y < at[1] + map.box[1]; ++y)
      for (int x = at[0]; x < at[0] + map.box[0]; x += elements, address += 16) {
        char* global = map.base + x * map.element_bytes + y * map.strides[1] + z * map.strides[2];
        visit(swizzle_128b(address),
              is_inside(0, x) && is_inside(1, y) && is_inside(2, z) ? global : nullptr);
      }
}

inline TensorMap tensor_map(const CUtensorMap* map) {
  TensorMap t;
  std::memcpy(&t, map, sizeof t);
  return t;
}

// The latest moment at which a store may read its source.
inline void finish(const std::vector<Store>& stores) {
  for (const Store& s : stores) {
    size_t i = 0;
    visit_box(s.map, s.at, s.source, [&](uint32_t address, char* global) {
      const char* from = shared_pointer(address, 16);
      check(std::memcmp(from, s.bytes[i++].data(), 16) == 0,
            "the source of a store changes before it is read");
      if (global != nullptr) std::memcpy(global, from, 16);
    });
  }
}

// The sum of 32 products. In 16 bits, because a processor multiplies eight of those at once: GEMMs
// do little else here.
inline int dot(const int16_t* a, const int16_t* b) {
  const auto* a8 = reinterpret_cast<const __m128i*>(a);
  const auto* b8 = reinterpret_cast<const __m128i*>(b);
  __m128i sums = _mm_setzero_si128();
  for (int i = 0; i < 4; ++i)
    sums = _mm_add_epi32(sums, _mm_madd_epi16(_mm_loadu_si128(a8 + i), _mm_loadu_si128(b8 + i)));
  int sum[4];
  std::memcpy(sum, &sums, sizeof sum);
  return sum[0] + sum[1] + sum[2] + sum[3];
}

inline void multiply(Block& block, Wgmma& w) {
  auto half = [](int row) { return row % 16 / 8; };
  auto quad = [](int row) { return row / 16 * 32 + row % 8 * 4; };  // first of 4 threads
  int16_t a[64][32];
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 32; ++k)
      a[row][k] = w.a[quad(row) + k % 16 / 4][half(row) + 2 * (k / 16)] >> 8 * (k % 4) & 255;
  const uint32_t start = (w.descriptor & 0x3FFF) << 4;
  for (int n = 0; n < w.n; ++n) {
    int16_t b[32];
    for (int k = 0; k < 32; ++k) {
      const uint32_t address = swizzle_128b(start + n / 8 * 1024 + n % 8 * 128 + k);
      b[k] = static_cast<int8_t>(block.shared.at(address - kFirstAddress));
    }
    for (int row = 0; row < 64; ++row)
      w.d[quad(row) + n % 8 / 2][n / 8 * 4 + 2 * half(row) + n % 2] += dot(a[row], b);
  }
}

inline void run_thread() {
  kernel();
  check(self->stores.size() == 1 && self->stores[0].empty(),
        "a thread ends before its stores have read");
  for (const auto& group : self->copies) check(group.empty(), "a thread ends before its copies");
  self->has_ended = true;
  --self->block->alive;
  --self->block->cluster->alive;
  self->block->cluster->update();
  yield();
}

// Gives a thread a stack from which `model_switch` enters `run_thread`.
inline void prepare(Thread& thread) {
  constexpr size_t kBytes = 24 << 10, kKeptRegisters = 6;
  thread.stack.reset(new char[kBytes]);
  const auto end = reinterpret_cast<uintptr_t>(thread.stack.get() + kBytes) & ~uintptr_t{15};
  // Aligned, so that `run_thread` begins as after a call: the return address off by 8.
  auto* frame = reinterpret_cast<void**>(end) - (kKeptRegisters + 2);
  std::fill_n(frame, kKeptRegisters + 2, nullptr);
  frame[kKeptRegisters] = reinterpret_cast<void*>(&run_thread);
  thread.stack_pointer = frame;
}

inline void run_until_all_end(const std::vector<std::unique_ptr<Thread>>& threads) {
  std::vector<Thread*> live;
  for (const auto& thread : threads) live.push_back(thread.get());
  // Some warps or warpgroups sleep for some rounds, so that others get as far ahead as the barriers
  // let them.
  uint32_t asleep = 0;
  int sleepers = 32;  // threads that sleep together
  int until = 0;
  for (round_now = 0; !live.empty(); ++round_now) {
    check(round_now < most_rounds, "deadlock");
    if (round_now == until) {
      asleep = random_order() & random_order();
      sleepers = random_order() % 2 == 0 ? 32 : 128;
      until += 1 + random_order() % kLongestSleep;
    }
    std::shuffle(live.begin(), live.end(), random_order);
    for (Thread* thread : live) {
      if (asleep >> (16 * thread->block->rank + thread->index / sleepers) % 32 & 1) continue;
      self = thread;
      model_switch(&scheduler, thread->stack_pointer);
    }
    std::erase_if(live, [](const Thread* thread) { return thread->has_ended; });
  }
}

// Runs a grid, so many clusters at a time.
inline void launch(int clusters, int cluster_size, int threads_of_block, int shared_bytes,
                   int clusters_at_a_time, std::function<void()> body) {
  kernel = std::move(body);
  grid_blocks = clusters * cluster_size;
  block_threads = threads_of_block;
  for (int first = 0; first < clusters; first += clusters_at_a_time) {
    std::deque<Cluster> running;
    std::vector<std::unique_ptr<Thread>> threads;
    for (int c = first; c < std::min(first + clusters_at_a_time, clusters); ++c) {
      Cluster& cluster = running.emplace_back();
      cluster.blocks.resize(cluster_size);
      cluster.alive = cluster_size * block_threads;
      for (int rank = 0; rank < cluster_size; ++rank) {
        Block& block = cluster.blocks[rank];
        block.index = c * cluster_size + rank;
        block.rank = rank;
        block.alive = block_threads;
        block.cluster = &cluster;
        block.shared.assign(shared_bytes, 0x5A);
        for (int i = 0; i < block_threads; ++i) {
          Thread& thread = *threads.emplace_back(std::make_unique<Thread>());
          thread.index = i;
          thread.block = &block;
          prepare(thread);
        }
      }
    }
    run_until_all_end(threads);
  }
}

// Runs `body` outside of a launch, as a thread of each block of a grid.
inline void as_each_block(int clusters, int cluster_size, const std::function<void()>& body) {
  grid_blocks = clusters * cluster_size;
  Thread thread;
  Block block;
  thread.block = &block;
  self = &thread;
  for (block.index = 0; block.index < grid_blocks; ++block.index) {
    block.rank = block.index % cluster_size;
    body();
  }
}

// What the kernel before this one in the stream may still write.
inline void check_previous_kernel() {
  check(self->is_after_previous_kernel, "memory that the previous kernel may still write");
}

struct Dimension {
  int x;
};

}  // namespace model

// ---- what nvcc knows -----------------------------------------------------------------

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (model::Dimension{model::self->index})
#define blockIdx (model::Dimension{model::self->block->index})
#define gridDim (model::Dimension{model::grid_blocks})

using std::max;
using std::min;

inline void __syncthreads() { model::meet(model::self->block->named[0], model::block_threads); }
inline void __syncwarp() { model::meet(model::self->block->warps[model::self->index / 32], 32); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  model::check_previous_kernel();
  return *p;
}
inline void __stcg(int* p, int v) { *p = v; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __int2float_rn(int a) { return static_cast<float>(a); }

// ---- csrc/common/ptx.cuh and wgmma.cuh -----------------------------------------------

namespace qoq::ptx {

using namespace model;

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - shared_begin()) + kFirstAddress;
}

#ifdef MODEL_WITHOUT_COPY_ENGINE
constexpr bool kHasCopyEngine = false;
#else
constexpr bool kHasCopyEngine = true;
#endif

inline Mbarrier& mbarrier(uint32_t address) {
  Mbarrier& barrier = block_of(address).mbarriers[address & kAddressMask];
  check(barrier.is_initialised, "a barrier that is not initialised");
  return barrier;
}
inline void mbarrier_init(uint32_t address, uint32_t arrivals) {
  const int n = static_cast<int>(arrivals);
  self->block->mbarriers[address] = {n, n, 0, 0, true};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_if(bool is_arriving, uint32_t address) {
  if (!is_arriving) return;
  --mbarrier(address).pending;
  mbarrier(address).update();
  yield_perhaps();
}
inline void mbarrier_arrive_cluster_if(bool is_arriving, uint32_t mapped) {
  mbarrier_arrive_if(is_arriving, mapped);
}
inline void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  mbarrier(address).bytes += bytes;
  mbarrier_arrive_if(true, address);
}
// Makes some of the copies that barriers wait for: those of a thread in the order in which they were
// begun, those of different threads in any.
inline void make_some_copies() {
  auto& arrivals = self->block->arrivals;
  while (!arrivals.empty() && random_order() % 8 != 0) {
    const Thread* thread = arrivals[random_order() % arrivals.size()].thread;
    const auto first = std::find_if(arrivals.begin(), arrivals.end(),
                                    [&](const Arrival& one) { return one.thread == thread; });
    for (const Copy& copy : first->copies)
      std::memcpy(shared_pointer(copy.destination, 16), copy.bytes.data(), 16);
    --mbarrier(first->barrier).pending;
    mbarrier(first->barrier).update();
    arrivals.erase(first);
  }
}
inline bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  make_some_copies();
  return mbarrier(address).phase != parity;
}
inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  wait_until([&] { return mbarrier_try_wait(address, parity); });
}

inline void complete(uint32_t barrier, long bytes) {
  mbarrier(barrier).bytes -= bytes;
  mbarrier(barrier).update();
  yield_perhaps();
}
inline void cp_async_bulk(uint32_t destination, const void* source, uint32_t bytes,
                          uint32_t barrier, uint64_t) {
  check(destination % 16 == 0 && bytes % 16 == 0, "an unaligned bulk copy");
  const ptrdiff_t first = static_cast<const uint8_t*>(source) - bulk_memory.data();
  check(first >= 0 && first + bytes <= bulk_memory.size(), "a bulk copy from outside");
  std::memcpy(shared_pointer(destination, bytes), source, bytes);
  complete(barrier, bytes);
}
inline void copy_box(uint32_t destination, const CUtensorMap* map, std::array<int, 3> at,
                     uint32_t barrier, uint32_t tag) {
  check_previous_kernel();
  const TensorMap t = tensor_map(map);
  visit_box(t, at, destination, [&](uint32_t address, const char* global) {
    constexpr char kZeros[16] = {};
    std::memcpy(shared_pointer(address | tag, 16), global != nullptr ? global : kZeros, 16);
  });
  complete(barrier | tag, t.element_bytes * t.box[0] * t.box[1] * t.box[2]);
}
inline void cp_async_bulk_tensor_3d(uint32_t destination, const CUtensorMap* map, int x, int y,
                                    int z, uint32_t barrier) {
  copy_box(destination, map, {x, y, z}, barrier, 0);
}
inline void cp_async_bulk_tensor_3d_multicast(uint32_t destination, const CUtensorMap* map, int x,
                                              int y, int z, uint32_t barrier, uint16_t blocks) {
  for (uint32_t rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1)
      copy_box(destination, map, {x, y, z}, barrier, (rank + 1) << kAddressBits);
}
inline void cp_async_bulk_tensor_2d_store(const CUtensorMap* map, int x, int y, uint32_t source) {
  check_previous_kernel();
  Store store{tensor_map(map), {x, y, 0}, source};
  visit_box(store.map, store.at, source, [&](uint32_t address, char*) {
    check(!self->block->unfenced.contains(address), "a store without a fence before it");
    std::memcpy(store.bytes.emplace_back().data(), shared_pointer(address, 16), 16);
  });
  self->stores.back().push_back(std::move(store));
  yield_perhaps();
}
inline void cp_async_bulk_commit_group() { self->stores.emplace_back(); }
template <int kPending>
void cp_async_bulk_wait_group_read() {
  for (; self->stores.size() > kPending + 1; self->stores.pop_front()) finish(self->stores.front());
}
inline void fence_proxy_async_shared() {
  for (const uint32_t address : self->unfenced) self->block->unfenced.erase(address);
  self->unfenced.clear();
}
inline void prefetch_tensormap(const CUtensorMap*) {}
inline void prefetch_l2(const void*) {}
inline int32_t load_l2(const int32_t* p) { return *p; }
inline uint64_t l2_policy_evict_first() { return 0; }
inline uint64_t l2_policy_evict_normal() { return 0; }
inline void griddepcontrol_wait() { self->is_after_previous_kernel = true; }
inline void griddepcontrol_launch_dependents() {}
template <int kRegisters>
void setmaxnreg_increase() {}
template <int kRegisters>
void setmaxnreg_decrease() {}

inline uint32_t cluster_rank() { return self->block->rank; }
inline void cluster_arrive() {
  Cluster& cluster = *self->block->cluster;
  self->cluster_generation = cluster.generation;
  ++cluster.arrived;
  cluster.update();
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  wait_until([] { return self->block->cluster->generation != self->cluster_generation; });
}
inline uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  check(rank < self->block->cluster->blocks.size(), "a rank outside of the cluster");
  return (address & kAddressMask) | (rank + 1) << kAddressBits;
}
inline void named_barrier_sync(int id, int threads) { meet(self->block->named[id], threads); }

template <class T>
T load(uint32_t address) {
  check(address % sizeof(T) == 0, "an unaligned load");
  T v;
  std::memcpy(&v, shared_pointer(address, sizeof v), sizeof v);
  return v;
}
inline uint4 load_cluster_16(uint32_t mapped) { return load<uint4>(mapped); }
inline uint4 load_shared_16(uint32_t address) { return load<uint4>(address); }
inline uint2 load_shared_8(uint32_t address) { return load<uint2>(address); }
inline uint32_t load_shared_4(uint32_t address) { return load<uint32_t>(address); }
inline void store_shared_4(uint32_t address, uint32_t v) {
  check(address % 4 == 0, "an unaligned store");
  std::memcpy(shared_pointer(address, 4), &v, 4);
}
inline void store_shared_16(uint32_t address, const int32_t* v) {
  check(address % 16 == 0, "an unaligned store");
  std::memcpy(shared_pointer(address, 16), v, 16);
}
inline void red_add(int32_t* address, int32_t value) {
  check_previous_kernel();
  *address += value;
  yield_perhaps(64);
}
inline int atomic_add_acq_rel(int32_t* address, int32_t value) {
  check_previous_kernel();
  const int before = *address;
  *address += value;
  yield_perhaps();
  return before;
}

template <int kMatrices>
void stmatrix_trans(uint32_t address, const uint32_t* registers) {
  Stmatrix& s = self->block->stmatrix[self->index / 32];
  const int lane = self->index % 32;
  s.address[lane] = address;
  std::copy_n(registers, kMatrices, s.registers[lane]);
  if (lane < 8 * kMatrices) {
    self->block->unfenced.insert(address);
    self->unfenced.push_back(address);
  }
  meet(s, 32, [&] {
    for (int q = 0; q < kMatrices; ++q)
      for (int row = 0; row < 8; ++row)
        for (int column = 0; column < 8; ++column) {
          const uint16_t v = s.registers[column * 4 + row / 2][q] >> 16 * (row % 2);
          std::memcpy(shared_pointer(s.address[8 * q + row], 16) + 2 * column, &v, sizeof v);
        }
  });
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  stmatrix_trans<4>(address, r);
}
inline void stmatrix_x2_trans(uint32_t address, uint32_t r0, uint32_t r1) {
  const uint32_t r[2] = {r0, r1};
  stmatrix_trans<2>(address, r);
}

inline void wgmma_fence() {}
template <class T, int kCount>
void keep_in_registers(T (&)[kCount]) {}
inline WgmmaGroup& wgmma_group(size_t index) {
  auto& groups = self->block->wgmmas[self->index / 128];
  if (groups.size() <= index) {
    groups.resize(index + 1);
    const int delay = random_order() % 4 == 0 ? random_order() % 16 : 0;
    groups[index].first_round = round_now + 1 + delay;
  }
  return groups[index];
}
inline void wgmma_commit_group() {
  ++self->group;
  self->instruction = 0;
}
template <int kPending>
void wgmma_wait_group() {
  for (size_t g = 0; g + kPending < self->group; ++g) {
    WgmmaGroup& group = wgmma_group(g);
    wait_until([&] {
      return round_now >= group.first_round &&
             std::all_of(group.instructions.begin(), group.instructions.end(),
                         [](const Wgmma& w) { return w.issued == 128; });
    });
    if (group.is_done) continue;
    for (Wgmma& w : group.instructions) multiply(*self->block, w);
    group.instructions.clear();
    group.is_done = true;
  }
}
inline uint64_t descriptor_k_major_128b(uint32_t address) {
  check(address % 1024 == 0, "an operand that is not aligned to its swizzle");
  return (address & 0x3FFFF) >> 4;
}
inline uint64_t move_descriptor(uint64_t descriptor, uint32_t bytes) {
  return descriptor + bytes / 16;
}
template <int kN>
struct WgmmaU8S8 {
  static void issue(int32_t (&d)[kN / 2], const uint32_t* a, uint64_t b) {
    auto& instructions = wgmma_group(self->group).instructions;
    if (instructions.size() <= self->instruction) instructions.push_back({kN, b});
    Wgmma& w = instructions[self->instruction++];
    check(w.descriptor == b && w.n == kN, "a warpgroup that does not agree");
    w.a[self->index % 128] = a;
    w.d[self->index % 128] = d;
    ++w.issued;
  }
};

}  // namespace qoq::ptx
