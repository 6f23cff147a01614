// Runs what writes pages of the KV cache and what reads them back on the model of Hopper.
//   kv_pages SEED    prints a line for each launch; returns 1 where a byte of the cache is not what
//                    quantization in plain loops gives, or where what is read back is not what that
//                    byte stands for
#include "common/mma.cuh"  // the model
#include "kv/dequantize.cuh"
#include "kv/write.cuh"

using namespace qoq::kv;

namespace {

std::mt19937 values;
int random_int(int low, int high) { return low + static_cast<int>(values() % (high - low)); }

uint16_t bits_of(__half v) { return static_cast<__half_raw>(v).x; }
uint16_t half_bits(float v) { return bits_of(__float2half(v)); }

// One token and head; in place of `x` what its codes stand for.
template <class Codes>
struct Vector {
  std::vector<float> x;
  std::vector<int> codes;
  uint16_t scale, zero;

  void rotate() {
    for (size_t half = 1; half < x.size(); half *= 2) {
      const std::vector<float> old = x;
      for (size_t i = 0; i < x.size(); ++i)
        x[i] = (i & half) != 0 ? old[i ^ half] - old[i] : old[i] + old[i ^ half];
    }
    for (float& v : x) v /= std::sqrt(static_cast<float>(x.size()));
  }

  void quantize() {
    const float levels = Codes::kLevels;
    for (float& v : x) v = std::clamp(v, -65504.f, 65504.f);
    const auto [low, high] = std::ranges::minmax(x);
    float least = std::max(-low, high) / (Codes::kBits == 4 ? 1024 : 128);
    least = std::max(least, static_cast<float>(6.2e-5 * Codes::kLevels));
    const float span = std::max(high - low, least), exact_zero = -levels * low / span;
    scale = half_bits(span / levels);
    zero = half_bits(exact_zero);
    for (float& v : x) {
      const float scaled = v * (1 / span * levels);  // torch's levels / span
      codes.push_back(std::clamp(std::nearbyint(scaled + exact_zero), 0.f, levels));
      v = model::half_of(scale, 0) * (codes.back() - model::half_of(zero, 0));
    }
  }

  // Rows of keys have `k_row` bytes, those of values `v_row`.
  void put(uint8_t* page, int tokens, int k_row, int v_row, int place, bool is_value) const {
    const int row = Codes::kRow;
    for (int i = 0; i < row; ++i) {
      const int byte = Codes::kBits == 4 ? codes[2 * i] | codes[2 * i + 1] << 4 : codes[i];
      const int unit = 2 * (i / 2) + place % 2, pair = place / 2;
      const int rotated = (2 * unit + i % 2 + 32 * (pair % 4)) % (2 * row);
      page[is_value ? tokens * k_row + pair * 2 * row + rotated : place * row + i] = byte;
    }
    const uint16_t parameters[2] = {scale, zero};
    const int after_keys = is_value ? 4 * tokens : 0;
    std::memcpy(page + tokens * (k_row + v_row) + after_keys + 4 * place, parameters, 4);
  }
};

template <class P>
int count_wrong(int page_tokens, int heads, bool is_rotated, bool has_mean) {
  const int pages = 4, d = P::kHeadSize, slots = pages * page_tokens, tokens = slots - 9;
  const int page_bytes = page_tokens * (P::K::kRow + P::V::kRow + 8);
  std::vector<uint8_t> cache(pages * heads * page_bytes);
  for (auto& b : cache) b = random_int(0, 256);
  std::vector<uint8_t> expected = cache;
  std::vector<int64_t> slot(slots);
  for (int i = 0; i < slots; ++i) slot[i] = i;
  std::shuffle(slot.begin(), slot.end(), values);
  for (int i = 0; i < tokens; i += 5) slot[i] = i % 2 == 0 ? -1 : slots + i;

  std::vector<float> mean(heads * d);
  for (float& m : mean) m = random_int(-999, 1000) / 7.f;

  std::vector<uint16_t> in[2];
  std::map<std::pair<int, int>, std::vector<float>> written[2];  // by slot and head
  auto prepare = [&]<class Codes>(int is_value) {
    for (int t = 0; t < tokens; ++t)
      for (int h = 0; h < heads; ++h) {
        Vector<Codes> v;
        const float size = std::ldexp(1.f, random_int(-20, 12)), middle = random_int(-1, 2) * 9.f;
        const bool is_constant = random_int(0, 8) == 0;
        for (int i = 0; i < d; ++i) {
          const float x = size * (middle + (is_constant ? 0 : random_int(-999, 1000) / 1e3f));
          in[is_value].push_back(half_bits(x));
          v.x.push_back(model::half_of(in[is_value].back(), 0));
        }
        if (slot[t] < 0 || slot[t] >= slots) continue;
        if (has_mean && is_value == 0)
          for (int i = 0; i < d; ++i) v.x[i] -= mean[h * d + i];
        if (is_rotated && is_value == 0) v.rotate();
        v.quantize();
        const int page = slot[t] / page_tokens;
        v.put(expected.data() + (page * heads + h) * page_bytes, page_tokens, P::K::kRow,
              P::V::kRow, slot[t] % page_tokens, is_value);
        if (is_rotated && is_value == 0) v.rotate();
        written[is_value][{slot[t], h}] = v.x;
      }
  };
  prepare.template operator()<typename P::K>(0);
  prepare.template operator()<typename P::V>(1);
  const WriteParams write{
      .key = in[0].data(),
      .value = in[1].data(),
      .slots = slot.data(),
      .k_mean = has_mean ? mean.data() : nullptr,
      .cache = cache.data(),
      .key_stride = heads * d,
      .key_head_stride = d,
      .value_stride = heads * d,
      .value_head_stride = d,
      .block_stride = heads * page_bytes,
      .head_stride = page_bytes,
      .slot_count = slots,
      .tokens = tokens,
      .kv_heads = heads,
      .page_tokens = page_tokens,
      .is_rotated = is_rotated,
  };
  auto launch = [](int threads, int threads_of_block, const std::function<void()>& kernel) {
    model::exchanges.clear();
    model::launch(divide_up(threads, threads_of_block), 1, threads_of_block, 4096, 2, kernel);
  };
  launch(tokens * heads * kWriteLanes<P>, kWriteThreads, [&] { kv_write_kernel<P>(write); });
  int wrong = 0;
  for (size_t i = 0; i < cache.size(); ++i) wrong += cache[i] != expected[i];

  // Two sequences of two pages, the pages in reverse; rows before and after them stay as they are.
  const int table[] = {3, 2, 1, 0}, counts[] = {page_tokens + 3, 2 * page_tokens};
  const int first[] = {page_tokens - 5, 0};
  const int start[] = {2, 2 + counts[0], 2 + counts[0] + counts[1]}, rows = start[2] + 1;
  std::vector<uint16_t> key(rows * heads * d, 0x7FFF), value = key;
  const DequantizeParams read{
      .cache = cache.data(),
      .block_table = table,
      .first_token = first,
      .row_start = start,
      .key = key.data(),
      .value = value.data(),
      .key_stride = heads * d,
      .key_head_stride = d,
      .value_stride = heads * d,
      .value_head_stride = d,
      .block_stride = heads * page_bytes,
      .head_stride = page_bytes,
      .table_stride = 2,
      .sequences = 2,
      .kv_heads = heads,
      .page_tokens = page_tokens,
      .max_tokens = 2 * page_tokens,
      .rows = rows,
      .is_rotated = is_rotated,
  };
  launch(divide_up(rows, kDequantizeRows) * kDequantizeThreads, kDequantizeThreads,
         [&] { kv_dequantize_kernel<P>(read); });
  for (int row = 0; row < rows; ++row)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < d; ++i)
        for (int is_value = 0; is_value < 2; ++is_value) {
          const uint16_t got = (is_value ? value : key)[(row * heads + h) * d + i];
          const int sequence = row >= start[1];
          if (row < start[0] || row >= start[2]) {
            wrong += got != 0x7FFF;
            continue;
          }
          const int token = first[sequence] + row - start[sequence];
          const int page = table[2 * sequence + token / page_tokens];
          const auto at = written[is_value].find({page * page_tokens + token % page_tokens, h});
          if (at != written[is_value].end()) wrong += got != half_bits(at->second[i]);
        }
  std::printf("D %d, %d and %d bits, %d heads, pages of %d%s%s: %d wrong\n", d, P::K::kBits,
              P::V::kBits, heads, page_tokens, has_mean ? ", without a mean" : "",
              is_rotated ? ", rotated" : "", wrong);
  std::fflush(stdout);
  return wrong;
}

template <class P>
int count_wrong_of() {
  return count_wrong<P>(16, 3, false, false) + count_wrong<P>(48, 1, true, false) +
         count_wrong<P>(32, 2, false, true) + count_wrong<P>(16, 2, true, true);
}

template <class P>
int count_wrong_of_other_size() {
  return count_wrong<P>(16, 3, false, false) + count_wrong<P>(48, 1, P::kCanRotate, true);
}

}  // namespace

int main(int, char** arguments) {
  const int seed = std::atoi(arguments[1]);
  model::random_order.seed(seed);
  values.seed(seed);
  const int wrong =
      count_wrong_of<Page<128, 4, 4>>() + count_wrong_of<Page<64, 4, 4>>() +
      count_wrong_of<Page<128, 8, 8>>() + count_wrong_of<Page<64, 8, 8>>() +
      count_wrong_of<Page<128, 8, 4>>() + count_wrong_of<Page<64, 8, 4>>() +
      count_wrong_of_other_size<Page<96, 4, 4>>() + count_wrong_of_other_size<Page<96, 8, 8>>() +
      count_wrong_of_other_size<Page<256, 4, 4>>() + count_wrong_of_other_size<Page<256, 8, 8>>();
  return wrong != 0;
}
