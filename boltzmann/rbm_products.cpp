// A step of contrastive divergence in bfloat16 for rbm_fast.py, in one call: its matrix products, and what follows each done while the
// sums are still in registers. Units are sampled from sums that were never written, states and probabilities are written as the product
// of the gradient reads them, and the gradient comes in fp32. For processors with AVX512_BF16, whose instruction multiplies pairs of
// bfloat16 and adds them to 16 sums; elsewhere, and for odd sizes, PyTorch multiplies and rbm_kernels.cpp samples.

#include "rbm_kernels.h"

#include <atomic>

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t ROWS = 14, LANES = 16, WIDE = 2 * LANES;  // a tile: 28 registers of sums, of 32
constexpr int64_t TOGETHER = 8;  // tiles of an outer product that are a piece of work

// out (R, WIDE) = sum over k of pairs a[r * row + k * step] times the pairs b[k * WIDE ...].
template <int R>
inline void multiply_tile(int64_t pairs, const uint32_t* a, int64_t row, int64_t step, const uint32_t* b, float* out) {
  __m512 sums[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, a += step, b += WIDE) {
    const auto left = (__m512bh)_mm512_loadu_si512(b), right = (__m512bh)_mm512_loadu_si512(b + LANES);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * row]));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, left);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, right);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(out + r * WIDE, sums[r][0]);
    _mm512_storeu_ps(out + r * WIDE + LANES, sums[r][1]);
  }
}

// The last rows of a matrix need smaller tiles.
template <int R = ROWS>
inline void multiply(int64_t rows, int64_t pairs, const uint32_t* a, int64_t row, int64_t step, const uint32_t* b, float* out) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<R - 1>(rows, pairs, a, row, step, b, out);
  }
  multiply_tile<R>(pairs, a, row, step, b, out);
}

// f(number) for all numbers, each in whichever thread is free, as other programs may slow one of them. So what f sums must not depend on
// the thread.
template <typename F>
void share_out(int64_t numbers, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), numbers), 1, [&](int64_t, int64_t) {
    for (int64_t number; (number = next++) < numbers;) f(number);
  });
}

int64_t panels(int64_t n, int64_t width) { return (n + width - 1) / width; }

// Memory from one panel to the next: an odd number of cache lines, so that panels do not share the same few places of the cache.
int64_t panel_size(int64_t pairs, int64_t width) { return (pairs * width + LANES - 1) / LANES / 2 * 2 * LANES + 3 * LANES; }

// Up to 16 numbers of one row and of the next, side by side.
inline void pair_up(int64_t count, const uint16_t* low, const uint16_t* high, uint32_t* out) {
  const auto some = static_cast<__mmask16>((1u << count) - 1);
  const auto first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, low));
  const auto second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, high));
  _mm512_mask_storeu_epi32(out, some, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

// scale * low and scale * high in bfloat16, side by side.
inline void narrow_pair(int64_t n, float scale, const float* low, const float* high, uint32_t* out) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) out[j] = rounded_bits(scale * low[j]) >> 16 | (rounded_bits(scale * high[j]) & 0xffff0000u);
}

// X (rows, m), `width` from row to row, two rows side by side as pairs, in panels of WIDTH columns: out[panel][pair][column]. Columns beyond
// m, and a row beyond the last, are 0.
template <int64_t WIDTH>
void pack_pairs_of_rows(int64_t rows, int64_t m, const uint16_t* x, int64_t width, uint32_t* out, int64_t panel) {
  constexpr uint16_t NONE[WIDTH] = {};
  for (int64_t j = 0; j < m; j += WIDTH, out += panel) {
    const int64_t count = std::min(WIDTH, m - j);
    auto* to = out;
    for (int64_t r = 0; r < rows; r += 2, to += WIDTH) {
      const auto *low = x + r * width + j, *high = r + 1 < rows ? low + width : NONE;
      for (int64_t i = 0; i < count; i += LANES) pair_up(std::min(LANES, count - i), low + i, high + i, to + i);
      std::fill(to + count, to + WIDTH, 0);
    }
  }
}

// U (V, H) fp32 in bfloat16, packed for v U (`up`) and for h U' (`down`), as many rows at a time as are a panel of the latter.
void pack_weights(int64_t visible, int64_t hidden, const float* U, uint32_t* up, uint32_t* down) {
  const int64_t up_panel = panel_size(visible / 2, WIDE), down_panel = panel_size(hidden / 2, WIDE);
  const int64_t width = hidden + WIDE;  // rows that are a power of two apart would share the same few places of the cache
  at::parallel_for(0, panels(visible, WIDE), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> rounded(WIDE * width);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * WIDE, rows = std::min(WIDE, visible - first);
      for (int64_t i = 0; i < rows; ++i) narrow(hidden, U + (first + i) * hidden, rounded.data() + i * width);
      pack_pairs_of_rows<WIDE>(rows, hidden, rounded.data(), width, up + first / 2 * WIDE, up_panel);
      auto* to = down + p * down_panel;
      for (int64_t k = 0; k < hidden / 2; ++k, to += WIDE) {
        for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i, rounded.data() + i * width + 2 * k, sizeof *to);
        std::fill(to + rows, to + WIDE, 0);
      }
    }
  });
}

// The units of one layer given the other's states: bias + x B goes into them.
struct Layer {
  int64_t pairs, units;
  const uint32_t* weights;  // B (2 pairs, units), packed
  std::vector<float> bias;  // to whole tiles

  Layer(int64_t pairs, int64_t units, const uint32_t* weights, const float* biases)
      : pairs(pairs), units(units), weights(weights), bias(panels(units, WIDE) * WIDE) {
    std::copy_n(biases, units, bias.data());
  }
};

// Random numbers of one layer of one step: a counter for each of its rows and columns, see `random_bits`.
struct Randomness {
  uint32_t counter, key;
};

// Where the probabilities of a row of tiles go: `scale` times them, in pairs of rows, packed.
struct Code {
  uint32_t* pairs;
  int64_t panel;
  float scale;
};

// Up to ROWS rows of a layer, from number `first` on, given x: their states (rows, units), and their probabilities if CODE, of which the
// sum, as they are written, is added to `total` (units,), or else that of the states.
template <bool STATE, bool CODE>
void sample_rows(const Layer& layer, int64_t first, int64_t rows, const uint16_t* x, Randomness random, uint16_t* state, Code code,
                 float* total) {
  alignas(64) float sums[ROWS * WIDE], wide_state[WIDE], probs[2][WIDE], ones[WIDE];
  std::fill_n(ones, WIDE, 1.0f);
  const auto* a = reinterpret_cast<const uint32_t*>(x);
  const int64_t across = panels(layer.units, WIDE), panel = panel_size(layer.pairs, WIDE);
  for (int64_t p = 0; p < across; ++p) {
    multiply(rows, layer.pairs, a, layer.pairs, 1, layer.weights + p * panel, sums);
    const int64_t columns = std::min(WIDE, layer.units - p * WIDE);
    alignas(64) float all[WIDE] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const auto counter = random.counter + static_cast<uint32_t>(((first + r) * across + p) * LANES);
      sample_row<float, float, STATE, CODE>(WIDE, sums + r * WIDE, layer.bias.data() + p * WIDE, ones, counter, random.key, wide_state,
                                            probs[r % 2], all);
      if (STATE) narrow(columns, wide_state, state + r * layer.units + p * WIDE);
      if (CODE && r % 2 == 1) narrow_pair(WIDE, code.scale, probs[0], probs[1], code.pairs + p * code.panel + r / 2 * WIDE);
    }
    if (CODE && rows % 2 == 1) {
      std::fill_n(probs[1], WIDE, 0.0f);
      narrow_pair(WIDE, code.scale, probs[0], probs[1], code.pairs + p * code.panel + rows / 2 * WIDE);
    }
    for (int64_t j = 0; j < columns; ++j) total[p * WIDE + j] += CODE ? code.scale * all[j] : all[j];
  }
}

// out (visible, hidden) fp32 = weight * states' codes, of both packed in pairs of rows.
void outer_product(int64_t pairs, int64_t visible, int64_t hidden, const uint32_t* states, const uint32_t* codes, float weight, float* out) {
  const int64_t across = panels(hidden, WIDE), along = panels(visible, ROWS), parts = panels(along, TOGETHER);
  share_out(parts * across, [&](int64_t number) {
    alignas(64) float sums[ROWS * WIDE];
    const int64_t p = number / parts, first = number % parts * TOGETHER, columns = std::min(WIDE, hidden - p * WIDE);
    for (int64_t t = first; t < std::min(first + TOGETHER, along); ++t) {
      const int64_t rows = std::min(ROWS, visible - t * ROWS);
      auto* corner = out + t * ROWS * hidden + p * WIDE;
      multiply(rows, pairs, states + t * panel_size(pairs, ROWS), 1, ROWS, codes + p * panel_size(pairs, WIDE), sums);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < columns; ++j) corner[r * hidden + j] = weight * sums[r * WIDE + j];
      }
    }
  });
}

// Where in a step's memory its parts begin, in numbers of 32 bits. The n rows of data come first in the packed ones, then the m chains;
// either may end with half a pair.
struct Layout {
  int64_t pairs, up, down, states, packed_states, packed_codes, sums, size = 0;

  Layout(int64_t n, int64_t m, int64_t visible, int64_t hidden) : pairs((n + 1) / 2 + (m + 1) / 2) {
    const auto next = [&](int64_t count) {
      const int64_t at = size;
      size += panels(count, LANES) * LANES;
      return at;
    };
    up = next(panels(hidden, WIDE) * panel_size(visible / 2, WIDE));
    down = next(panels(visible, WIDE) * panel_size(hidden / 2, WIDE));
    states = next(m * visible / 2);
    packed_states = next(panels(visible, ROWS) * panel_size(pairs, ROWS));
    packed_codes = next(panels(hidden, WIDE) * panel_size(pairs, WIDE));
    sums = next((panels(n, ROWS) + panels(m, ROWS)) * hidden);  // of codes by rows of tiles: added in one order, whoever found them
  }
};

int64_t memory_size(int64_t n, int64_t m, int64_t visible, int64_t hidden) { return Layout(n, m, visible, hidden).size; }

uint16_t* bits(const at::Tensor& x) { return reinterpret_cast<uint16_t*>(x.mutable_data_ptr<at::BFloat16>()); }

// A step on checked sizes. See `gradient`.
class Step {
 public:
  Step(int64_t n, int64_t m, const at::Tensor& U, const at::Tensor& b, const at::Tensor& c, int64_t seed, const at::Tensor& memory)
      : n_(n), m_(m), visible_(U.size(0)), hidden_(U.size(1)), at_(n, m, visible_, hidden_),
        memory_(reinterpret_cast<uint32_t*>(memory.mutable_data_ptr<int32_t>())),
        up_(visible_ / 2, hidden_, memory_ + at_.up, c.const_data_ptr<float>()),
        down_(hidden_ / 2, visible_, memory_ + at_.down, b.const_data_ptr<float>()),
        random_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        sum_data_(at::get_num_threads(), std::vector<float>(visible_)), sum_chains_(sum_data_),
        rows_(at::get_num_threads(), std::vector<uint16_t>(ROWS * visible_)) {
    pack_weights(visible_, hidden_, U.const_data_ptr<float>(), memory_ + at_.up, memory_ + at_.down);
  }

  // A step of Gibbs sampling for the chains h (m, hidden), which are those of the data if `from_data`.
  void run(const uint16_t* v, const int64_t* which, uint16_t* h, bool from_data, int64_t steps) {
    const int64_t tiles = panels(n_, ROWS), chain_tiles = panels(m_, ROWS);
    const auto data = next_randomness();
    if (from_data) share_out(tiles, [&](int64_t t) { data_up<true>(t, v, which, h, data); });
    for (int64_t step = 0; step < steps; ++step) {
      const bool last = step + 1 == steps;
      const int64_t besides = last && !from_data ? tiles : 0;  // rows of data that go up with the chains
      const auto down = next_randomness(), up = next_randomness();
      for (auto& sum : sum_chains_) std::fill(sum.begin(), sum.end(), 0.0f);
      share_out(chain_tiles, [&](int64_t t) { chains_down(t, h, down, last); });
      share_out(besides + chain_tiles, [&](int64_t t) {
        t < besides ? data_up<false>(t, v, which, nullptr, data) : chains_up(t - besides, h, up);
      });
    }
  }

  void write(float* dU, float* db, float* dc, float* mean_q) {
    outer_product(at_.pairs, visible_, hidden_, memory_ + at_.packed_states, memory_ + at_.packed_codes, 1.0f / n_, dU);
    std::fill_n(db, visible_, 0.0f);
    for (size_t thread = 0; thread < sum_data_.size(); ++thread) {
      for (int64_t i = 0; i < visible_; ++i) db[i] += sum_chains_[thread][i] / m_ - sum_data_[thread][i] / n_;
    }
    std::fill_n(dc, hidden_, 0.0f);
    const int64_t tiles = panels(n_, ROWS), all = tiles + panels(m_, ROWS);
    for (int64_t t = 0; t < all; ++t) {
      if (t == tiles) {
        for (int64_t j = 0; j < hidden_; ++j) mean_q[j] = -dc[j] / n_;
      }
      for (int64_t j = 0; j < hidden_; ++j) dc[j] += code_sums(t)[j];
    }
    for (int64_t j = 0; j < hidden_; ++j) dc[j] /= n_;
  }

 private:
  uint16_t* states(int64_t row) const { return reinterpret_cast<uint16_t*>(memory_ + at_.states) + row * visible_; }
  float* code_sums(int64_t tile) const { return reinterpret_cast<float*>(memory_ + at_.sums) + tile * hidden_; }
  Randomness next_randomness() { return {random_.counter, random_bits(++layers_, random_.key)}; }

  // Rows x (rows, visible), from pair number `pair` on, as `outer_product` takes them.
  void pack(int64_t rows, const uint16_t* x, int64_t pair) const {
    pack_pairs_of_rows<ROWS>(rows, visible_, x, visible_, memory_ + at_.packed_states + pair * ROWS, panel_size(at_.pairs, ROWS));
  }

  template <bool STATE>
  void hidden_units(int64_t tile, int64_t first, int64_t rows, const uint16_t* x, Randomness random, uint16_t* h, int64_t pair, float scale) {
    const Code code{memory_ + at_.packed_codes + pair * WIDE, panel_size(at_.pairs, WIDE), scale};
    std::fill_n(code_sums(tile), hidden_, 0.0f);
    sample_rows<STATE, true>(up_, first, rows, x, random, h, code, code_sums(tile));
  }

  // A row of tiles: rows of data, taken from v, and the negative of their hidden units' probabilities.
  template <bool STATE>
  void data_up(int64_t t, const uint16_t* v, const int64_t* which, uint16_t* h, Randomness random) {
    const int64_t first = t * ROWS, rows = std::min(ROWS, n_ - first);
    auto *x = rows_[at::get_thread_num()].data(), *row = x;
    auto* sum = sum_data_[at::get_thread_num()].data();  // whole numbers: exact in any order
    for (int64_t r = first; r < first + rows; ++r, row += visible_) {
      const auto* from = v + (which ? which[r] : r) * visible_;
#pragma GCC ivdep
      for (int64_t i = 0; i < visible_; ++i) {
        row[i] = from[i];
        sum[i] += from[i] ? 1.0f : 0.0f;
      }
    }
    pack(rows, x, first / 2);
    hidden_units<STATE>(t, first, rows, x, random, STATE ? h + first * hidden_ : nullptr, first / 2, -1.0f);
  }

  void chains_down(int64_t t, const uint16_t* h, Randomness random, bool last) {
    const int64_t first = t * ROWS, rows = std::min(ROWS, m_ - first);
    auto* sum = sum_chains_[at::get_thread_num()].data();
    sample_rows<true, false>(down_, first, rows, h + first * hidden_, random, states(first), {}, sum);
    if (last) pack(rows, states(first), (n_ + 1) / 2 + first / 2);
  }

  void chains_up(int64_t t, uint16_t* h, Randomness random) {
    const int64_t first = t * ROWS, rows = std::min(ROWS, m_ - first);
    const auto scale = static_cast<float>(n_) / m_;  // so that both halves of the gradient are divided by n
    hidden_units<true>(panels(n_, ROWS) + t, first, rows, states(first), random, h + first * hidden_, (n_ + 1) / 2 + first / 2, scale);
  }

  int64_t n_, m_, visible_, hidden_;
  Layout at_;
  uint32_t* memory_;
  Layer up_, down_;
  Randomness random_;
  uint32_t layers_ = 0;
  std::vector<std::vector<float>> sum_data_, sum_chains_;  // of each thread
  std::vector<std::vector<uint16_t>> rows_;
};

// The gradient of contrastive divergence, as `FastContrastiveDivergence.gradient` in rbm_fast.py says it, of the rows `which` of v, or all,
// and the hidden states h (m, H) to go on from, which are written anew; if `from_data` they are those of the data, and only written.
// `memory` holds `memory_size` numbers of 32 bits.
void gradient(const at::Tensor& U, const at::Tensor& b, const at::Tensor& c, const at::Tensor& v, const std::optional<at::Tensor>& which,
              const at::Tensor& h, bool from_data, int64_t steps, int64_t seed, const at::Tensor& memory, const at::Tensor& dU,
              const at::Tensor& db, const at::Tensor& dc, const at::Tensor& mean_q) {
  const int64_t n = which ? which->numel() : v.size(0), m = h.size(0), visible = U.size(0), hidden = U.size(1);
  TORCH_CHECK(visible % 2 == 0 && hidden % 2 == 0, "layers are of ", visible, " and ", hidden, " units; even sizes are needed");
  TORCH_CHECK(n > 0 && m > 0 && steps > 0 && (!from_data || n == m), "a row, a chain and a step are needed, and chains of the data a row each");
  TORCH_CHECK(v.size(1) == visible && h.size(1) == hidden, "v (n, V) and h (m, H) are needed for U (V, H)");
  TORCH_CHECK(dU.sizes() == U.sizes() && b.numel() == visible && db.numel() == visible && c.numel() == hidden && dc.numel() == hidden &&
                  mean_q.numel() == hidden, "dU, b, db, c, dc and mean_q: of U's sizes");
  TORCH_CHECK(memory.numel() == memory_size(n, m, visible, hidden), "memory of another size");
  for (const auto* tensor : {&U, &b, &c, &v, &h, &memory, &dU, &db, &dc, &mean_q}) {
    TORCH_CHECK(tensor->is_contiguous(), "contiguous tensors are needed");
  }
  if (which) check_index(*which, v.size(0));
  Step step(n, m, U, b, c, seed, memory);
  step.run(bits(v), which ? which->const_data_ptr<int64_t>() : nullptr, bits(h), from_data, steps);
  step.write(dU.mutable_data_ptr<float>(), db.mutable_data_ptr<float>(), dc.mutable_data_ptr<float>(), mean_q.mutable_data_ptr<float>());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_rbm, library) {
  library.def("memory_size(int n, int m, int visible, int hidden) -> int", memory_size);
  library.def("gradient(Tensor U, Tensor b, Tensor c, Tensor v, Tensor? which, Tensor h, bool from_data, int steps, int seed, Tensor memory, "
              "Tensor dU, Tensor db, Tensor dc, Tensor mean_q) -> ()");
}

TORCH_LIBRARY_IMPL(blip_rbm, CPU, library) { library.impl("gradient", gradient); }

#endif
