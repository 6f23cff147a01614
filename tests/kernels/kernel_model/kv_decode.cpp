// Runs the decode attention on the model of Hopper and compares it with plain loops in double.
//   kv_decode SEED    prints a line for each launch; returns 1 where a value is off, or where a
//                     launch differs from the same launch in another order of threads
#include "common/mma.cuh"  // the model
#include "kv/decode_kernel.cuh"

using namespace qoq::kv;

namespace {

std::mt19937 values;
int random_int(int low, int high) { return low + static_cast<int>(values() % (high - low)); }
float random_float(float low, float high) { return low + (high - low) * (values() % 4096) / 4096; }

uint16_t bits_of(__half v) { return static_cast<__half_raw>(v).x; }
float from_16_bits(bool is_bfloat16, uint16_t bits) {
  return is_bfloat16 ? std::bit_cast<float>(uint32_t{bits} << 16) : model::half_of(bits, 0);
}
uint16_t to_16_bits(bool is_bfloat16, float v) {
  return is_bfloat16 ? static_cast<__nv_bfloat16_raw>(__float2bfloat16(v)).x
                     : bits_of(__float2half(v));
}

struct Problem {
  std::vector<int> lengths;
  int group, kv_heads, page_tokens, blocks;
  int window = 0;
  bool is_bfloat16 = false;
  float query_size = 1;
  float soft_cap = 0;
  bool has_sinks = false;
  int query_len = 1;  // sequences have up to so many new tokens, and some have none
};

// Codes, scales and zeros of one token and head, and where they lie in a page of the contract.
struct Token {
  std::vector<int> codes;
  float scale, zero;
  double at(int i) const { return double{scale} * (codes[i] - double{zero}); }
};

template <class A>
struct Cache {
  int page_tokens, head_bytes, kv_heads;
  std::vector<uint8_t> bytes;

  Cache(int pages, int kv_heads, int page_tokens)
      : page_tokens(page_tokens),
        head_bytes(page_tokens * (A::K::kRow + A::V::kRow + 8)),
        kv_heads(kv_heads),
        bytes(static_cast<size_t>(pages) * kv_heads * head_bytes) {
    for (auto& b : bytes) b = random_int(0, 256);  // what is not written may be NaN
  }

  void write(int page, int head, int slot, bool is_value, const Token& t) {
    uint8_t* base = bytes.data() + (static_cast<size_t>(page) * kv_heads + head) * head_bytes;
    const int keys = page_tokens * A::K::kRow, values = page_tokens * A::V::kRow;
    const int row = is_value ? A::V::kRow : A::K::kRow;
    const int bits = is_value ? A::V::kBits : A::K::kBits;
    for (int i = 0; i < row; ++i) {
      const int byte = bits == 4 ? t.codes[2 * i] | t.codes[2 * i + 1] << 4 : t.codes[i];
      const int pair = slot / 2, unit = 2 * (i / 2) + slot % 2;
      const int offset = (2 * unit + i % 2 + 32 * (pair % 4)) % (2 * row);
      base[is_value ? keys + pair * 2 * row + offset : slot * row + i] = byte;
    }
    const uint16_t parameters[2] = {bits_of(__float2half(t.scale)), bits_of(__float2half(t.zero))};
    const int after_keys = is_value ? 4 * page_tokens : 0;
    std::memcpy(base + keys + values + after_keys + 4 * slot, parameters, 4);
  }
};

template <int kHeadSize, class Codes>
Token random_token(float size) {
  Token t;
  constexpr int kCodes = 1 << Codes::kBits;
  for (int i = 0; i < kHeadSize; ++i) t.codes.push_back(random_int(0, kCodes));
  t.scale = __half2float(__float2half(size * random_float(0.5f, 1.5f) / kCodes));
  t.zero = __half2float(__float2half(random_float(0.2f, 0.8f) * kCodes));
  return t;
}

template <class A>
int count_wrong(const Problem& problem) {
  const auto& [lengths, group, kv_heads, page_tokens, blocks, window, is_bfloat16, size, soft_cap,
               has_sinks, query_len] = problem;
  const int sequences = lengths.size(), heads = group * kv_heads, d = A::kHeadSize;
  const int table_pages = divide_up(*std::ranges::max_element(lengths), page_tokens);
  std::vector<int> table(sequences * table_pages, 1 << 30), free_pages;
  int pages = 0;
  for (const int length : lengths) pages += divide_up(length, page_tokens);
  for (int i = 0; i < pages; ++i) free_pages.push_back(i);
  std::shuffle(free_pages.begin(), free_pages.end(), values);
  Cache<A> cache(pages, kv_heads, page_tokens);
  std::vector<int> starts{0};
  for (int s = 0; s < sequences; ++s)
    starts.push_back(starts[s] + (!A::kHasManyQueries ? 1
                                  : s % 3 == 0        ? query_len
                                                      : random_int(0, query_len + 1)));
  // Rows of no sequence are left as they are.
  const int rows = starts.back() + (A::kHasManyQueries ? 2 : 0);
  std::vector<uint16_t> q(rows * heads * d), out(q.size(), 0x7FFF);
  for (auto& v : q) v = to_16_bits(is_bfloat16, size * random_float(-1, 1));
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  std::vector<uint16_t> sinks;  // around the scores, and one that hides all tokens
  for (int i = 0; i < heads; ++i)
    sinks.push_back(to_16_bits(is_bfloat16, i == 1 ? 1000 : random_float(-3, 8)));

  std::vector<double> expected(q.size()), tolerance(q.size());
  for (int s = 0; s < sequences; ++s) {
    const int count = starts[s + 1] - starts[s], earliest = lengths[s] - std::max(count, 1) + 1;
    const int written = window > 0 ? std::max(0, earliest - window) : 0;
    for (int i = 0; i < divide_up(lengths[s], page_tokens); ++i) {
      table[s * table_pages + i] = free_pages.back();
      free_pages.pop_back();
    }
    for (int h = 0; h < kv_heads; ++h) {
      std::vector<Token> k, v;
      for (int t = 0; t < lengths[s]; ++t) {
        k.push_back(random_token<A::kHeadSize, typename A::K>(4));
        v.push_back(random_token<A::kHeadSize, typename A::V>(1));
        const int page = table[s * table_pages + t / page_tokens];
        if (t < written) continue;
        cache.write(page, h, t % page_tokens, false, k.back());
        cache.write(page, h, t % page_tokens, true, v.back());
      }
      for (int i = 0; i < count * group; ++i) {
        const int j = i % group, row = ((starts[s] + i / group) * heads + h * group + j) * d;
        const int end = earliest + i / group, first = window > 0 ? std::max(0, end - window) : 0;
        if (end <= 0) continue;  // zeros
        std::vector<double> scores(lengths[s], -INFINITY);
        for (int t = first; t < end; ++t) {
          scores[t] = 0;
          for (int i = 0; i < d; ++i)
            scores[t] += from_16_bits(is_bfloat16, q[row + i]) * k[t].at(i) * scale;
          if (soft_cap > 0) scores[t] = soft_cap * std::tanh(scores[t] / soft_cap);
        }
        const double largest = *std::ranges::max_element(scores);
        const double sink = from_16_bits(is_bfloat16, sinks[h * group + j]);
        double sum = has_sinks ? std::exp(sink - largest) : 0;
        for (int t = first; t < end; ++t) {
          const double weight = std::exp(scores[t] - largest);
          sum += weight;
          for (int i = 0; i < d; ++i) {
            expected[row + i] += weight * v[t].at(i);
            tolerance[row + i] += weight * std::abs(v[t].at(i));
          }
        }
        for (int i = 0; i < d; ++i) {
          expected[row + i] /= sum;
          // The output's rounding, two roundings of a weight to fp16, and for weights or values of
          // next to nothing a millionth of what values are.
          tolerance[row + i] *= ((is_bfloat16 ? 0x1p-8 : 0x1p-11) + 0x1p-10) / sum;
          tolerance[row + i] += 1e-6;
        }
      }
    }
  }

  const Columns columns = columns_of(d, group, query_len);
  std::vector<int> counters(kMaxBlocks);
  std::vector<float> partials(blocks * 2 * columns.count * A::kPartial, NAN);
  Params p{
      .q = q.data(),
      .cache = cache.bytes.data(),
      .block_table = table.data(),
      .seq_lens = lengths.data(),
      .out = out.data(),
      .counters = counters.data(),
      .partials = partials.data(),
      .q_stride = heads * d,
      .q_head_stride = d,
      .out_stride = heads * d,
      .out_head_stride = d,
      .block_stride = int64_t{kv_heads} * cache.head_bytes,
      .head_stride = cache.head_bytes,
      .table_stride = table_pages,
      .sequences = sequences,
      .kv_heads = kv_heads << columns.shift,
      .group = columns.count,
      .head_shift = columns.shift,
      .page_tokens = page_tokens,
      .max_tokens = table_pages * page_tokens,
      .window = window,
      .scale_log2 = scale * std::numbers::log2e_v<float>,
      .cap_log2 = soft_cap * std::numbers::log2e_v<float>,
      .cap_exponent = soft_cap > 0 ? 2 / soft_cap : 0,
      .sinks = has_sinks ? sinks.data() : nullptr,
      .is_bfloat16 = is_bfloat16,
      .query_start = starts.data(),
      .rows = rows,
      .query_len = query_len,
      .heads_of_kv = group,
      .inverse_heads = static_cast<uint32_t>(divide_up(1 << 16, group)),
  };
  lay_out<A>(p, blocks, random_int(1, A::kResident + 1));
  model::bulk_memory = cache.bytes;
  auto run = [&] {
    std::ranges::fill(out, 0x7FFF);
    model::exchanges.clear();
    model::launch(blocks, 1, A::kThreads, A::shared_bytes(p.group), random_int(1, 4),
                  [&] { kv_decode_kernel<A>(p); });
  };
  run();
  const std::vector<uint16_t> once = out;
  run();
  int wrong = once != out;
  double worst = 0;
  const size_t used = size_t{1} * starts.back() * heads * d;
  for (size_t i = used; i < out.size(); ++i) wrong += out[i] != 0x7FFF;
  for (size_t i = 0; i < used; ++i) {
    const double off = std::abs(from_16_bits(is_bfloat16, out[i]) - expected[i]);
    worst = std::max(worst, off / (tolerance[i] + 1e-9));
    wrong += !(off <= tolerance[i]);
  }
  for (const int v : counters) wrong += v != 0;
  std::printf(
      "D %d, %d and %d bits, %d x %d heads, %d tokens, pages of %d, %zu sequences, %d blocks, "
      "window %d%s%s: ",
      d, A::K::kBits, A::V::kBits, kv_heads, group, query_len, page_tokens, lengths.size(), blocks,
      window, soft_cap > 0 ? ", capped" : "", has_sinks ? ", sinks" : "");
  std::printf("%d wrong, at most %.2f of what is allowed\n", wrong, worst);
  std::fflush(stdout);
  return wrong;
}

std::vector<int> random_lengths(int count, int most) {
  std::vector<int> lengths;
  for (int i = 0; i < count; ++i) lengths.push_back(random_int(0, most));
  return lengths;
}

template <class P>
int count_wrong_of() {
  using One = Attention<P, 1, kMostWarps, false>;
  using Two = Attention<P, 2, kMostWarps, false>;
  using Narrow = Attention<P, 1, kFewestWarps, false>;
  using ManyOne = Attention<P, 1, kMostWarps, true>;
  using ManyTwo = Attention<P, 2, kFewestWarps, true>;
  // What a GPU with room for it takes.
  using ManyMost = Attention<P, 2, P::K::kBits == 4 ? kWideWarps : kMostWarps, true>;
  int wrong = 0;
  // Edges of pages and tiles, and rows that a graph has left empty.
  wrong += count_wrong<One>({{0, 1, 0, 16, 17, 31, 32, 33, 64, 0}, 4, 2, 16, 3});
  wrong += count_wrong<Two>({random_lengths(3, 300), 11, 2, 128, 3, 100, true, 1, 0.5, true});
  wrong += count_wrong<Narrow>({random_lengths(30, 200), 5, 2, 32, 2, 0, false, 1, 0, true});
  // Several new tokens: sequences that are shorter, and that begin a tile with them.
  wrong += count_wrong<ManyTwo>(
      {{0, 1, 3, 16, 17, 31, 32, 33, 34, 35, 36, 64, 0}, 4, 2, 16, 3, 0, true, 1, 0, false, 4});
  wrong += count_wrong<ManyMost>({random_lengths(4, 200), 7, 1, 32, 3, 60, false, 1, 1, true, 5});
  // Where the widths differ, the rest is as where they are the same.
  if constexpr (P::K::kBits != P::V::kBits) return wrong;
  wrong += count_wrong<One>({{0, 0}, 4, 2, 16, 3});          // no column in the block table
  wrong += count_wrong<One>({{700}, 1, 1, 64, 5, 0, true});  // one over many blocks
  wrong += count_wrong<One>({random_lengths(5, 200), 8, 1, 32, 2, 50, false, 1, 2});  // a window
  wrong += count_wrong<One>({random_lengths(70, 40), 7, 1, 48, 4, 0, true, 50});
  wrong += count_wrong<Two>({random_lengths(4, 150), 16, 1, 16, 6});
  // Warps with several whole segments, and segments over two warps or blocks.
  wrong += count_wrong<One>({random_lengths(60, 90), 3, 2, 64, 2});
  wrong += count_wrong<ManyOne>({random_lengths(60, 90), 4, 2, 64, 2, 0, true, 1, 0, false, 2});
  wrong += count_wrong<ManyTwo>({{700, 3}, 16, 1, 64, 5, 1, false, 1, 0, false, 8});
  return wrong;
}

// Head sizes whose heads are added up in more or fewer slices, and lie in runs.
template <class P>
int count_wrong_of_other_size() {
  using Narrow = Attention<P, 1, kFewestWarps, false>;
  using Many = Attention<P, 1, kFewestWarps, true>;
  int wrong = 0;
  wrong += count_wrong<Narrow>({{0, 1, 0, 16, 17, 31, 32, 33, 0}, 3, 1, 16, 2, 0, true});
  // Halves of a group; warps, and blocks, with parts of a segment.
  wrong += count_wrong<Narrow>({random_lengths(2, 150), 10, 1, 32, 3, 100, false, 1, 1, true});
  wrong += count_wrong<Narrow>({random_lengths(9, 60), 2, 2, 48, 2});
  wrong += count_wrong<Many>({{33, 100, 2}, 10, 1, 32, 2, 40, true, 1, 0, true, 3});
  return wrong;
}

}  // namespace

int main(int, char** arguments) {
  const int seed = std::atoi(arguments[1]);
  model::random_order.seed(seed);
  model::most_rounds = 1 << 24;
  values.seed(seed);
#ifdef MODEL_WITHOUT_COPY_ENGINE  // the copies are all that differs
  const int wrong = count_wrong_of<Page<128, 4, 4>>() + count_wrong_of<Page<64, 8, 8>>() +
                    count_wrong_of<Page<128, 8, 4>>() + count_wrong_of_other_size<Page<96, 4, 4>>();
#else
  const int wrong =
      count_wrong_of<Page<128, 4, 4>>() + count_wrong_of<Page<64, 4, 4>>() +
      count_wrong_of<Page<128, 8, 8>>() + count_wrong_of<Page<64, 8, 8>>() +
      count_wrong_of<Page<128, 8, 4>>() + count_wrong_of<Page<64, 8, 4>>() +
      count_wrong_of_other_size<Page<96, 4, 4>>() + count_wrong_of_other_size<Page<96, 8, 8>>() +
      count_wrong_of_other_size<Page<256, 4, 4>>() + count_wrong_of_other_size<Page<256, 8, 8>>();
#endif
  return wrong != 0;
}
