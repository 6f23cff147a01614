// Runs the Hopper path of the W4A8 GEMM on the model and compares it with plain loops, bit by bit.
//   gemm SEED    prints a line for each launch; returns 1 where an element differs or a schedule is
//                wrong
// The work of a launch is laid out here, so that every kind is reached whatever it costs; what
// `schedule` lays out for real sizes is checked without a launch. Nothing here comes from
// csrc/gemm/hopper/tensor_maps.h: the tensor maps are written a second time.
#include "gemm/hopper/costs.h"
#include "gemm/hopper/kernel.cuh"
#include "gemm_case.h"

namespace {

CUtensorMap tensor_map(const model::TensorMap& fields) {
  CUtensorMap map;
  static_assert(sizeof fields <= sizeof map);
  std::memcpy(&map, &fields, sizeof fields);
  return map;
}

template <class Tile, Weights kWeights>
int count_wrong(const char* name, const Problem& problem, Planes planes) {
  Case<kWeights> layer(problem, planes);
  const std::string kind = layer.template lay_out<Tile>();
  const int m = layer.m, n = layer.n, k = layer.k, k_blocks = layer.k_blocks;
  auto x_tensor_map = [&](int tokens) {
    return tensor_map({.base = reinterpret_cast<char*>(layer.x.data()),
                       .element_bytes = 1,
                       .sizes = {kBlockK, m, k_blocks},
                       .strides = {1, k, kBlockK},
                       .box = {kBlockK, tokens, Tile::kStepBlocks}});
  };
  const CUtensorMap x_map = x_tensor_map(Tile::kTokens / Tile::kClusterTiles);
  const CUtensorMap x_tail_map = x_tensor_map(layer.p.tail_tokens);
  const CUtensorMap out_map = tensor_map({.base = reinterpret_cast<char*>(layer.out.data()),
                                          .element_bytes = 2,
                                          .sizes = {n, m, 1},
                                          .strides = {2, 2 * n, 0},
                                          .box = {kBlockN, Tile::kUnitTokens, 1}});
  model::launch(problem.schedule.clusters, Tile::kCluster, Tile::kThreads,
                Tile::template kSharedBytes<kWeights>, random_int(1, 4),
                [&] { w4a8_gemm_hopper<Tile, kWeights, Params>(x_map, x_tail_map, out_map, layer.p); });
  return layer.count_wrong(name, kind);
}

template <class Tile, Weights kWeights>
int count_wrong_of_kinds(const char* name) {
  constexpr int kTokens = Tile::kTokens, kChannels = Tile::kChannels * Tile::kClusterTiles;
  constexpr int kStepBlocks = Tile::kStepBlocks;
  constexpr int kRing = Tile::template kStages<kWeights> * Tile::kCluster / Tile::kClusterTiles;  // in steps
  std::vector<Problem> problems;
  if (Tile::kByInputs) {
    problems = {
        // Two channel tiles, the last one in part; the ring comes round; a part of a step left.
        {kTokens - 3, kChannels + 72, (kRing + 2) * kStepBlocks + 1, {3, 1}, Bias::kFloat32},
        {5, kChannels, 7 * kStepBlocks, {3, 3}, Bias::kBfloat16, Output::kFloat16},
        {kTokens, kChannels, 3 * kStepBlocks - 1, {3, 3}},
    };
  } else {
    // Four tiles, of which three are not full: whole ones, and a last one over three clusters.
    const int m = kTokens + 3, n = kChannels + 72;
    problems = {
        {kTokens - 3, n, Tile::template kStages<kWeights> + 3, {2, 1}, Bias::kFloat32},
        {3, kChannels, 7, {3, 3}, Bias::kFloat16},
        {m, n, Tile::template kStages<kWeights>, {3, 0, 4}, Bias::kBfloat16, Output::kFloat16},
        {m, n, 5, {3, 0, 3, 2}},
        // Two tiles of four steps: the second cluster works on both, the last on none.
        {m, kChannels, 4, {4, 0, 0, 3}, Bias::kFloat32},
    };
  }
  int wrong = 0;
  int i = 0;
  for (const Problem& problem : problems)
    wrong += count_wrong<Tile, kWeights>(name, problem, static_cast<Planes>(i++ % 3));
  return wrong;
}

template <class Tile, Weights kWeights>
int count_wrong_of_experts(const char* name) {
  const int tokens = Tile::kTokens, ring = Tile::template kStages<kWeights>;
  int wrong = 0;
  for (int i = 0; const Problem& problem : problems_of_experts(tokens, Tile::kChannels + 72, ring + 1)) {
    Case<kWeights> layer(problem, static_cast<Planes>(i % 3));
    const ExpertParams p = layer.template lay_out_experts<Tile>();
    const CUtensorMap x_map = tensor_map({.base = reinterpret_cast<char*>(layer.x.data()),
                                          .element_bytes = 1,
                                          .sizes = {kBlockK, layer.m, layer.k_blocks},
                                          .strides = {1, layer.k, kBlockK},
                                          .box = {kBlockK, tokens, 1}});
    const CUtensorMap out_map = tensor_map({.base = reinterpret_cast<char*>(layer.out.data()),
                                            .element_bytes = 2,
                                            .sizes = {layer.n, layer.m, 1},
                                            .strides = {2, 2 * layer.n, 0},
                                            .box = {kBlockN, Tile::kUnitTokens, 1}});
    model::launch(problem.schedule.clusters, 1, Tile::kThreads,
                  Tile::template kSharedBytes<kWeights>, random_int(1, 4), [&] {
                    w4a8_gemm_hopper<Tile, kWeights, ExpertParams>(x_map, x_map, out_map, p);
                  });
    wrong += layer.count_wrong(name, kExpertKinds[i++]);
  }
  return wrong;
}

template <class Tile, Weights... kWeights>
int count_wrong_of_tile(const char* name) {
  return count_wrong_schedules<Tile>(name, kCost<Tile>) + (count_wrong_of_kinds<Tile, kWeights>(name) + ...);
}

}  // namespace

#define COUNT_WRONG(tile) count_wrong_of_tile<tile, Weights::kG128, Weights::kChannel>(#tile)
#define COUNT_WRONG_NESTED(tile) count_wrong_of_tile<tile, Weights::kNestedG128>(#tile)
// Smaller groups change what a thread reads of a stage and how many stages there are, which a few
// tiles show.
#define COUNT_WRONG_FINE(tile) \
  (count_wrong_of_kinds<tile, Weights::kG64>(#tile) + count_wrong_of_kinds<tile, Weights::kG32>(#tile))
#define COUNT_WRONG_NESTED_FINE(tile)                    \
  (count_wrong_of_kinds<tile, Weights::kNestedG64>(#tile) + \
   count_wrong_of_kinds<tile, Weights::kNestedG32>(#tile))

#define COUNT_WRONG_EXPERTS(tile)                         \
  (count_wrong_of_experts<tile, Weights::kG128>(#tile) + \
   count_wrong_of_experts<tile, Weights::kChannel>(#tile))
#define COUNT_WRONG_NESTED_EXPERTS(tile) count_wrong_of_experts<tile, Weights::kNestedG128>(#tile)

int main(int, char** arguments) {
  const int seed = std::atoi(arguments[1]);
  model::random_order.seed(seed);
  values.seed(seed);
  const int wrong = COUNT_WRONG(Tile8) + COUNT_WRONG(Tile16) + COUNT_WRONG(Tile32) +
                    COUNT_WRONG(Tile64) + COUNT_WRONG(Tile128) + COUNT_WRONG(Tile128Wide) +
                    COUNT_WRONG(Tile192) + COUNT_WRONG(Tile256) + COUNT_WRONG(Inputs64) +
                    COUNT_WRONG(Inputs64Deep) + COUNT_WRONG(Inputs128) +
                    COUNT_WRONG(Inputs128Pair) + COUNT_WRONG_NESTED(Nested16) +
                    COUNT_WRONG_NESTED(Nested64) + COUNT_WRONG_NESTED(Nested128) +
                    COUNT_WRONG_NESTED(Nested192) + COUNT_WRONG_NESTED(Nested256) +
                    COUNT_WRONG_FINE(Tile16) + COUNT_WRONG_FINE(Tile128Wide) +
                    COUNT_WRONG_FINE(Inputs64) + COUNT_WRONG_NESTED_FINE(Nested16) +
                    COUNT_WRONG_EXPERTS(Tile16) + COUNT_WRONG_EXPERTS(Tile64) +
                    COUNT_WRONG_EXPERTS(Tile128) + COUNT_WRONG_NESTED_EXPERTS(Nested16) +
                    COUNT_WRONG_NESTED_EXPERTS(Nested64) + COUNT_WRONG_NESTED_EXPERTS(Nested128);
  return wrong != 0;
}
