// Runs the portable path of the W4A8 GEMM on the model and compares it with plain loops, bit by bit.
//   gemm_portable SEED    prints a line for each launch; returns 1 where an element differs, or a
//                         schedule is wrong or has no room on one of the cards
#include "common/mma.cuh"  // the model
#include "gemm/portable/costs.h"
#include "gemm/portable/kernel.cuh"
#include "gemm_case.h"

namespace {

using namespace portable;
using qoq::Card;

// What limits a tile on the cards that there are.
constexpr Card kCards[] = {
    {.capability = 80, .multiprocessors = 108, .shared_bytes = 163 << 10,
     .multiprocessor_shared_bytes = 164 << 10, .clock = 1.41f, .bandwidth = 2039},
    {.capability = 86, .multiprocessors = 20, .shared_bytes = 99 << 10,
     .multiprocessor_shared_bytes = 100 << 10, .clock = 1.7f, .bandwidth = 192},
    {.capability = 100, .multiprocessors = 148, .shared_bytes = 227 << 10,
     .multiprocessor_shared_bytes = 228 << 10, .clock = 1.9f, .bandwidth = 7700},
    {.capability = 120, .multiprocessors = 188, .shared_bytes = 99 << 10,
     .multiprocessor_shared_bytes = 100 << 10, .clock = 2.4f, .bandwidth = 0},
};

template <class Tile, Weights kWeights>
int count_wrong(const char* name, const Problem& problem, Planes planes, int stages) {
  Case<kWeights> layer(problem, planes);
  const std::string kind = layer.template lay_out<Tile>();
  layer.p.stages = stages;
  model::launch(problem.schedule.clusters, 1, Tile::kBlockThreads,
                Tile::template shared_bytes<kWeights>(stages), random_int(1, 3),
                [&] { w4a8_gemm_portable<Tile, kWeights, Params>(layer.p); });
  return layer.count_wrong(name, kind);
}

template <class Tile, Weights kWeights>
int count_wrong_of_kinds(const char* name) {
  constexpr int kTokens = Tile::kTokens, kChannels = Tile::kChannels;
  constexpr int kBlocks = Tile::kStepBlocks, kMissing = kBlocks - 1;  // of a last step
  const int m = kTokens + 3, n = kChannels + 40;
  const Problem problems[] = {
      {kTokens - 3, n, (Tile::kMinStages + 3) * kBlocks, {2, 1}, Bias::kFloat32},
      {3, kChannels, 7 * kBlocks - kMissing, {3, 3}, Bias::kFloat16},
      {m, n, 2 * kBlocks, {3, 0, 4}, Bias::kBfloat16, Output::kFloat16},
      {m, n, 3 * kBlocks - kMissing, {3, 0, 3, 2}},
      // Two tiles of four steps: the second block works on both, the last on none.
      {m, kChannels, 4 * kBlocks, {4, 0, 0, 3}, Bias::kFloat32},
  };
  int wrong = 0, i = 0;
  for (const Problem& problem : problems) {
    // The fewest stages, the most, and one between, which is deeper than some work is long.
    const int stages[] = {Tile::kMinStages, 5, Tile::kMaxStages};
    wrong += count_wrong<Tile, kWeights>(name, problem, static_cast<Planes>(i % 3), stages[i % 3]);
    ++i;
  }
  return wrong;
}

template <class Tile, Weights kWeights>
int count_wrong_of_experts(const char* name) {
  const int stages = 3, k_blocks = (stages + 2) * Tile::kStepBlocks;
  int wrong = 0;
  for (int i = 0; const Problem& problem :
                  problems_of_experts(Tile::kTokens, Tile::kChannels + 40, k_blocks)) {
    Case<kWeights> layer(problem, static_cast<Planes>(i % 3));
    ExpertParams p = layer.template lay_out_experts<Tile>();
    p.stages = stages;
    model::launch(problem.schedule.clusters, 1, Tile::kBlockThreads,
                  Tile::template shared_bytes<kWeights>(stages), random_int(1, 3),
                  [&] { w4a8_gemm_portable<Tile, kWeights, ExpertParams>(p); });
    wrong += layer.count_wrong(name, kExpertKinds[i++]);
  }
  return wrong;
}

template <class Tile, Weights kWeights>
int count_wrong_on_cards(const char* name) {
  int wrong = 0;
  for (const Card& card : kCards) {
    const int stages = stages_on<Tile, kWeights>(card);
    if (stages < Tile::kMinStages) {
      // Where two blocks have no room for the long stages of a nested weight, Tile64 is launched.
      constexpr bool kIsLong = kIsNested<kWeights> && kKGroups<kWeights> > 1;
      if (std::is_same_v<Tile, Tile32> && kIsNested<kWeights>) continue;
      if (std::is_same_v<Tile, Tile16> && kIsLong) continue;
      std::printf("%s has %d stages on %d\n", name, stages, card.capability);
      ++wrong;
      continue;
    }
    const int blocks_bytes = Tile::kResident * (Tile::template shared_bytes<kWeights>(stages) + 1024);
    wrong += blocks_bytes > card.multiprocessor_shared_bytes;
    wrong += Tile::template shared_bytes<kWeights>(stages) > card.shared_bytes;
    wrong += count_wrong_schedules<Tile>(name, cost_on<Tile, kWeights>(card));
  }
  return wrong;
}

template <class Tile, Weights... kWeights>
int count_wrong_of_tile(const char* name) {
  return (count_wrong_on_cards<Tile, kWeights>(name) + ...) +
         (count_wrong_of_kinds<Tile, kWeights>(name) + ...);
}

// The same of weights in smaller groups: of what a tile takes on cards, and on request of its sums,
// as groups change only what a warp reads of a stage, which a few tiles show.
template <class Tile, bool kComputes, Weights... kWeights>
int count_wrong_of_fine(const char* name) {
  int wrong = (count_wrong_on_cards<Tile, kWeights>(name) + ...);
  if constexpr (kComputes) wrong += (count_wrong_of_kinds<Tile, kWeights>(name) + ...);
  return wrong;
}

}  // namespace

#define COUNT_WRONG(tile) \
  count_wrong_of_tile<tile, Weights::kG128, Weights::kChannel, Weights::kNestedG128>(#tile)
#define COUNT_WRONG_FLAT(tile) count_wrong_of_tile<tile, Weights::kG128, Weights::kChannel>(#tile)
#define COUNT_WRONG_FINE(tile, computes)                                            \
  count_wrong_of_fine<tile, computes, Weights::kG64, Weights::kG32, Weights::kNestedG64, \
                      Weights::kNestedG32>(#tile)
#define COUNT_WRONG_FLAT_FINE(tile, computes) \
  count_wrong_of_fine<tile, computes, Weights::kG64, Weights::kG32>(#tile)

#define COUNT_WRONG_EXPERTS(tile)                           \
  (count_wrong_of_experts<tile, Weights::kG128>(#tile) +    \
   count_wrong_of_experts<tile, Weights::kChannel>(#tile) + \
   count_wrong_of_experts<tile, Weights::kNestedG128>(#tile))

int main(int, char** arguments) {
  const int seed = std::atoi(arguments[1]);
  model::random_order.seed(seed);
  values.seed(seed);
  const int wrong = COUNT_WRONG(Tile8) + COUNT_WRONG(Tile16) + COUNT_WRONG(Tile32) +
                    COUNT_WRONG(Tile64) + COUNT_WRONG(Tile128) +
                    COUNT_WRONG_FLAT(Tile256) + COUNT_WRONG_FINE(Tile8, true) +
                    COUNT_WRONG_FINE(Tile16, false) + COUNT_WRONG_FINE(Tile32, false) +
                    COUNT_WRONG_FINE(Tile64, true) + COUNT_WRONG_FINE(Tile128, false) +
                    COUNT_WRONG_FLAT_FINE(Tile256, true) + COUNT_WRONG_EXPERTS(Tile16) +
                    COUNT_WRONG_EXPERTS(Tile64) + COUNT_WRONG_EXPERTS(Tile128);
  return wrong != 0;
}
