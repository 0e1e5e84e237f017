// What rbm_kernels.cpp and rbm_products.cpp share: random numbers, and units sampled from their inputs.

#pragma once

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

constexpr float UNIT = 0x1p-16f;    // random numbers are 16 bits
constexpr int64_t GRAIN = 1 << 15;  // units that are worth another thread

// 32 random bits for a counter: the finalizer "lowbias32" of C. Wellons' hash-prospector, with a second key between its rounds.
inline uint32_t random_bits(uint32_t counter, uint32_t key) {
  counter ^= counter >> 16;
  counter *= 0x7feb352du;
  counter ^= key;
  counter ^= counter >> 15;
  counter *= 0x846ca68bu;
  return counter ^ (counter >> 16);
}

// exp(-x) to 6e-5 of itself, a quarter of what 16 random bits can tell: 2^t by its whole part, as the bits of a float's exponent, and a
// polynomial in the rest.
inline float exp_of_negative(float x) {
  float t = x * -1.44269504f;
  t = t < -30.0f ? -30.0f : t;
  t = t > 30.0f ? 30.0f : t;
  const float whole = std::rint(t), rest = t - whole;
  float power = 0.99999994f + rest * (0.6931469f + rest * (0.24022661f + rest * (0.05550327f + rest * 0.0096181f)));
  int32_t bits;
  std::memcpy(&bits, &power, sizeof bits);
  bits += static_cast<int32_t>(whole) << 23;
  std::memcpy(&power, &bits, sizeof bits);
  return power;
}

template <typename S>
inline S whole_part(float x) {
  return static_cast<S>(static_cast<float>(static_cast<int32_t>(x)));
}
template <>
inline int8_t whole_part(float x) {
  return static_cast<int8_t>(static_cast<int32_t>(x));
}

// What the outer product takes for a probability: itself, or 127 of it rounded at random, so that its mean is kept.
template <typename S>
inline S encoded(float prob, float u) {
  return std::is_same_v<S, int8_t> ? whole_part<S>(127.0f * prob + u) : static_cast<S>(prob);
}

template <typename A, typename S, bool STATE, bool CODE>
inline void sample_unit(A a, float bias, float scale, float u, S* state, S* code, float* sum) {
  const float inverse = 1.0f + exp_of_negative(bias + scale * static_cast<float>(a));  // of the probability
  if (!CODE) {
    // prob + u >= 1 without a division: 1 - UNIT - u is as random as u. By the sign, as compilers take a comparison for a branch
    const float below = 1.0f - (u + UNIT) * inverse;
    uint32_t bits;
    std::memcpy(&bits, &below, sizeof bits);
    *state = static_cast<S>(1 - static_cast<int32_t>(bits >> 31));
  } else {
    const float prob = 1.0f / inverse;
    if (STATE) *state = whole_part<S>(prob + u);
    *code = encoded<S>(prob, u);
  }
  *sum += static_cast<float>(CODE ? *code : *state);
}

// Two units share 32 random bits: number j of a row's first half and number j of its second.
template <typename A, typename S, bool STATE, bool CODE>
void sample_row(int64_t n, const A* a, const float* bias, const float* scale, uint32_t counter, uint32_t key, S* state, S* code,
                float* sum) {
  const auto unit = [&](int64_t j, uint32_t bits) {
    const float u = UNIT * static_cast<float>(static_cast<int32_t>(bits));
    sample_unit<A, S, STATE, CODE>(a[j], bias[j], scale[j], u, state + j, code + j, sum + j);
  };
  const int64_t half = n / 2;
#pragma GCC ivdep
  for (int64_t j = 0; j < half; ++j) {
    const uint32_t bits = random_bits(counter + static_cast<uint32_t>(j), key);
    unit(j, bits >> 16);
    unit(j + half, bits & 0xffff);
  }
  if (n % 2) unit(n - 1, random_bits(counter + static_cast<uint32_t>(half), key) >> 16);
}

// The bits of a float of which the upper half is the nearest bfloat16. (ATen's conversions mind NaN, which does not occur here.)
inline uint32_t rounded_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits + 0x8000u;
}

// Floats to bfloat16.
inline void narrow(int64_t n, const float* from, uint16_t* to) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) to[j] = static_cast<uint16_t>(rounded_bits(from[j]) >> 16);
}

// Raises for a row number that is none of `rows`.
inline void check_index(const at::Tensor& index, int64_t rows) {
  const auto* which = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_INDEX(which[i] >= 0 && which[i] < rows, "row ", which[i], " of ", rows);
  }
}

// f(rows [begin, end), a row of `n` floats of this thread's own) for all rows; `merge` is then called with every thread's.
template <typename F, typename M>
void for_rows(int64_t rows, int64_t n, const F& f, const M& merge) {
  std::vector<std::vector<float>> own(at::get_num_threads());
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / n), [&](int64_t begin, int64_t end) {
    auto& mine = own[at::get_thread_num()];
    if (mine.empty()) mine.resize(n);
    f(begin, end, mine.data());
  });
  for (const auto& row : own) {
    if (!row.empty()) merge(row.data());
  }
}

}  // namespace
