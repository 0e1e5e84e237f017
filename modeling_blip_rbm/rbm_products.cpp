// Matrix products in bfloat16 for rbm_fast.py, with what follows them done while the sums are still in registers: units are sampled from
// sums that were never written, and the gradient comes in fp32. For processors with AVX512_BF16, whose instruction multiplies pairs of
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

// Numbers of 32 bits that (n, m) takes, packed: pairs of rows, in panels as wide as a tile is high (the left factor) or wide.
int64_t packed_size(int64_t n, int64_t m, bool left) {
  const int64_t width = left ? ROWS : WIDE;
  return panels(m, width) * panel_size((n + 1) / 2, width);
}

// Up to 16 numbers of one row and of the next, side by side.
inline void pair_up(int64_t count, const uint16_t* low, const uint16_t* high, uint32_t* out) {
  const auto some = static_cast<__mmask16>((1u << count) - 1);
  const auto first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, low));
  const auto second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, high));
  _mm512_mask_storeu_epi32(out, some, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

// X (n, m), rows 2k and 2k + 1 side by side as pairs, in panels of WIDTH columns: out[panel][k][column]. Columns beyond m, and a row beyond
// n, are 0.
template <int64_t WIDTH>
void pack_pairs_of_rows(const uint16_t* x, int64_t n, int64_t m, uint32_t* out) {
  const int64_t pairs = (n + 1) / 2, size = panel_size(pairs, WIDTH);
  at::parallel_for(0, pairs, 64, [&](int64_t begin, int64_t end) {
    const std::vector<uint16_t> zeros(m);
    for (int64_t k = begin; k < end; ++k) {
      const auto *low = x + 2 * k * m, *high = 2 * k + 1 < n ? low + m : zeros.data();
      auto* to = out + k * WIDTH;
      for (int64_t j = 0; j < m; j += WIDTH, to += size) {
        const int64_t count = std::min(WIDTH, m - j);
        for (int64_t i = 0; i < count; i += LANES) pair_up(std::min(LANES, count - i), low + j + i, high + j + i, to + i);
        std::fill(to + count, to + WIDTH, 0);
      }
    }
  });
}

// X (n, 2 pairs) transposed, columns 2k and 2k + 1 side by side as pairs, in panels of WIDE rows: out[panel][k][row].
void pack_pairs_of_columns(const uint16_t* x, int64_t n, int64_t pairs, uint32_t* out) {
  const int64_t size = panel_size(pairs, WIDE);
  at::parallel_for(0, panels(n, WIDE), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t rows = std::min(WIDE, n - p * WIDE);
      const auto* from = x + p * WIDE * 2 * pairs;
      for (int64_t k = 0; k < pairs; ++k) {
        auto* to = out + p * size + k * WIDE;
        for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i, from + 2 * (i * pairs + k), sizeof *to);
        std::fill(to + rows, to + WIDE, 0);
      }
    }
  });
}

const uint16_t* bits(const at::Tensor& x) { return reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>()); }
uint16_t* bits_out(const at::Tensor& x) { return reinterpret_cast<uint16_t*>(x.mutable_data_ptr<at::BFloat16>()); }
uint32_t* words(const at::Tensor& x) { return reinterpret_cast<uint32_t*>(x.mutable_data_ptr<int32_t>()); }

// Whole rows of a tile: bias + sum -> state, code; their sum.
template <bool STATE, bool CODE>
void sample_tile(int64_t rows, int64_t columns, const float* sums, const float* bias, const float* scale, uint32_t counter, uint32_t step,
                 uint32_t key, uint16_t* state, uint16_t* code, int64_t ld, float* total) {
  alignas(64) float wide_state[WIDE], wide_code[WIDE], all[WIDE] = {};
  for (int64_t r = 0; r < rows; ++r) {
    sample_row<float, float, STATE, CODE>(WIDE, sums + r * WIDE, bias, scale, counter + static_cast<uint32_t>(r) * step, key, wide_state,
                                          wide_code, all);
    if (STATE) narrow(columns, wide_state, state + r * ld);
    if (CODE) narrow(columns, wide_code, code + r * ld);
  }
  for (int64_t j = 0; j < columns; ++j) total[j] += all[j];
}

template <bool STATE, bool CODE>
void sample_product_typed(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias, int64_t seed, uint16_t* state,
                          uint16_t* code, const at::Tensor& sum) {
  const int64_t n = x.size(0), pairs = x.size(1) / 2, units = bias.numel(), size = panel_size(pairs, WIDE);
  const auto* a = reinterpret_cast<const uint32_t*>(bits(x));
  const auto* b = words(packed);
  const auto counter = static_cast<uint32_t>(seed), key = static_cast<uint32_t>(seed >> 32);
  const int64_t across = panels(units, WIDE);
  std::vector<float> biases(across * WIDE), ones(WIDE, 1.0f);
  std::copy_n(bias.const_data_ptr<float>(), units, biases.data());
  std::vector<float> parts(panels(n, ROWS) * units);  // sums, added in one order whoever found them
  const auto row_of_tiles = [&](int64_t t) {
    alignas(64) float sums[ROWS * WIDE];
    const int64_t first = t * ROWS, rows = std::min(ROWS, n - first);
    for (int64_t p = 0; p < across; ++p) {
      multiply(rows, pairs, a + first * pairs, pairs, 1, b + p * size, sums);
      const int64_t at = first * units + p * WIDE, columns = std::min(WIDE, units - p * WIDE);
      const auto start = counter + static_cast<uint32_t>((first * across + p) * LANES);
      sample_tile<STATE, CODE>(rows, columns, sums, biases.data() + p * WIDE, ones.data(), start, across * LANES, key, state + at, code + at,
                               units, parts.data() + t * units + p * WIDE);
    }
  };
  share_out(panels(n, ROWS), row_of_tiles);
  auto* total = sum.mutable_data_ptr<float>();
  std::fill_n(total, units, 0.0f);
  for (size_t i = 0; i < parts.size(); i += units) {
    for (int64_t j = 0; j < units; ++j) total[j] += parts[i + j];
  }
}

// Units with inputs bias + x B: x (n, K) and B packed by `pack_weights`. State and code (n, units) as in `sample` of rbm_kernels.cpp.
void sample_product(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias, int64_t seed,
                    const std::optional<at::Tensor>& state, const std::optional<at::Tensor>& code, const at::Tensor& sum) {
  TORCH_CHECK(state || code, "a state or a code must be asked for");
  TORCH_CHECK(x.is_contiguous() && x.size(1) % 2 == 0 && bias.is_contiguous() && sum.is_contiguous(), "contiguous tensors are needed, of an even width");
  TORCH_CHECK(packed.numel() == packed_size(x.size(1), bias.numel(), false), "weights packed for another size");
  for (const auto* out : {&state, &code}) {
    TORCH_CHECK(!*out || ((*out)->is_contiguous() && (*out)->size(0) == x.size(0) && (*out)->size(1) == bias.numel()),
                "states and codes: contiguous, a row for each of x, as wide as bias");
  }
  auto* states = bits_out(state ? *state : *code);
  auto* codes = bits_out(code ? *code : *state);
  const auto run = state && code ? sample_product_typed<true, true> : state ? sample_product_typed<true, false> : sample_product_typed<false, true>;
  run(x, packed, bias, seed, states, codes, sum);
}

// U (V, H) fp32 in bfloat16, packed for v U and for h U'.
void pack_weights(const at::Tensor& U, const at::Tensor& rounded, const at::Tensor& up, const at::Tensor& down) {
  const int64_t visible = U.size(0), hidden = U.size(1);
  TORCH_CHECK(visible % 2 == 0 && hidden % 2 == 0 && U.is_contiguous() && rounded.is_contiguous(), "even sizes and contiguous weights are needed");
  TORCH_CHECK(up.numel() == packed_size(visible, hidden, false), "up: of another size");
  TORCH_CHECK(down.numel() == packed_size(hidden, visible, false), "down: of another size");
  const auto* from = U.const_data_ptr<float>();
  auto* to = bits_out(rounded);
  at::parallel_for(0, visible, 32, [&](int64_t begin, int64_t end) { narrow((end - begin) * hidden, from + begin * hidden, to + begin * hidden); });
  pack_pairs_of_rows<WIDE>(to, visible, hidden, words(up));
  pack_pairs_of_columns(to, visible, hidden / 2, words(down));
}

// out (V, H) fp32 = weight * states' codes, of states (n, V) and codes (n, H); packed_states and packed_codes are memory to work in.
void outer_product(const at::Tensor& states, const at::Tensor& codes, double weight, const at::Tensor& packed_states,
                   const at::Tensor& packed_codes, const at::Tensor& out) {
  const int64_t n = states.size(0), visible = states.size(1), hidden = codes.size(1), pairs = (n + 1) / 2;
  TORCH_CHECK(codes.size(0) == n && out.size(0) == visible && out.size(1) == hidden, "states (n, V), codes (n, H), out (V, H)");
  TORCH_CHECK(states.is_contiguous() && codes.is_contiguous() && out.is_contiguous(), "contiguous tensors are needed");
  TORCH_CHECK(packed_states.numel() == packed_size(n, visible, true) && packed_codes.numel() == packed_size(n, hidden, false), "packed: of another size");
  pack_pairs_of_rows<ROWS>(bits(states), n, visible, words(packed_states));
  pack_pairs_of_rows<WIDE>(bits(codes), n, hidden, words(packed_codes));
  const auto *a = words(packed_states), *b = words(packed_codes);
  auto* to = out.mutable_data_ptr<float>();
  const int64_t across = panels(hidden, WIDE), along = panels(visible, ROWS);
  const auto by = static_cast<float>(weight);
  const int64_t parts = panels(along, TOGETHER);
  const auto tiles = [&](int64_t number) {
    alignas(64) float sums[ROWS * WIDE];
    const int64_t p = number / parts, first = number % parts * TOGETHER, columns = std::min(WIDE, hidden - p * WIDE);
    for (int64_t t = first; t < std::min(first + TOGETHER, along); ++t) {
      const int64_t rows = std::min(ROWS, visible - t * ROWS);
      auto* corner = to + t * ROWS * hidden + p * WIDE;
      multiply(rows, pairs, a + t * panel_size(pairs, ROWS), 1, ROWS, b + p * panel_size(pairs, WIDE), sums);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < columns; ++j) corner[r * hidden + j] = by * sums[r * WIDE + j];
      }
    }
  };
  share_out(parts * across, tiles);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_rbm, library) {
  library.def("pack_weights(Tensor U, Tensor rounded, Tensor up, Tensor down) -> ()");
  library.def("packed_size(int n, int m, bool left) -> int", packed_size);
  library.def("sample_product(Tensor x, Tensor packed, Tensor bias, int seed, Tensor? state, Tensor? code, Tensor sum) -> ()");
  library.def("outer_product(Tensor states, Tensor codes, float weight, Tensor packed_states, Tensor packed_codes, Tensor out) -> ()");
}

TORCH_LIBRARY_IMPL(blip_rbm, CPU, library) {
  library.impl("pack_weights", pack_weights);
  library.impl("sample_product", sample_product);
  library.impl("outer_product", outer_product);
}

#endif
