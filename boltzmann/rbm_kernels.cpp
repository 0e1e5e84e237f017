// What a step of contrastive divergence does beside its matrix products, in one pass over memory each, for rbm_fast.py, which compiles
// this file (torch.utils.cpp_extension) and says what the functions are for. The loops are plain C, so that the compiler makes vectors of them;
// at::parallel_for runs them on PyTorch's own threads.

#include "rbm_kernels.h"

namespace {

constexpr float TINY = 1e-10f;  // least size of a weight that is rounded

// A row in bfloat16, the upper half of a float's bits: by way of floats of this thread's own, as the compiler makes good vectors of
// loops over numbers of one width only.
template <bool STATE, bool CODE>
void sample_row_bf16(int64_t n, const uint16_t* a, const float* bias, const float* scale, uint32_t counter, uint32_t key,
                     uint16_t* state, uint16_t* code, float* own) {
  auto *sum = own, *wide = own + n, *wide_state = own + 2 * n;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = static_cast<uint32_t>(a[j]) << 16;
    std::memcpy(wide + j, &bits, sizeof bits);
  }
  sample_row<float, float, STATE, CODE>(n, wide, bias, scale, counter, key, wide_state, wide, sum);
  if (STATE) narrow(n, wide_state, state);
  if (CODE) narrow(n, wide, code);
}

template <typename A, typename S, bool STATE, bool CODE>
void sample_rows(const at::Tensor& a, const at::Tensor& bias, const at::Tensor& scale, int64_t seed, S* state, S* code,
                 const at::Tensor& sum) {
  const int64_t n = a.size(1);
  const auto counter = static_cast<uint32_t>(seed), key = static_cast<uint32_t>(seed >> 32);
  const auto* inputs = a.const_data_ptr<A>();
  const auto *b = bias.const_data_ptr<float>(), *s = scale.const_data_ptr<float>();
  auto* total = sum.mutable_data_ptr<float>();
  std::fill_n(total, n, 0.0f);
  const auto sample = [&](int64_t begin, int64_t end, float* own) {
    for (int64_t i = begin; i < end; ++i) {
      const auto start = counter + static_cast<uint32_t>(i * (n / 2 + 1));
      if constexpr (std::is_same_v<S, at::BFloat16>) {
        const auto bits = [](auto* row) { return reinterpret_cast<uint16_t*>(const_cast<S*>(row)); };
        sample_row_bf16<STATE, CODE>(n, bits(inputs + i * n), b, s, start, key, bits(state + i * n), bits(code + i * n), own);
      } else {
        sample_row<A, S, STATE, CODE>(n, inputs + i * n, b, s, start, key, state + i * n, code + i * n, own);
      }
    }
  };
  // the sum, and for bfloat16 two rows of floats
  for_rows(a.size(0), std::is_same_v<S, at::BFloat16> ? 3 * n : n, sample, [&](const float* own) {
    for (int64_t j = 0; j < n; ++j) total[j] += own[j];
  });
}

template <typename A, typename S>
void sample_typed(const at::Tensor& a, const at::Tensor& bias, const at::Tensor& scale, int64_t seed,
                  const std::optional<at::Tensor>& state, const std::optional<at::Tensor>& code, const at::Tensor& sum) {
  auto* states = (state ? *state : *code).mutable_data_ptr<S>();
  auto* codes = (code ? *code : *state).mutable_data_ptr<S>();
  const auto run = state && code ? sample_rows<A, S, true, true> : state ? sample_rows<A, S, true, false> : sample_rows<A, S, false, true>;
  run(a, bias, scale, seed, states, codes, sum);
}

// Units with inputs bias + scale * a (n, K): their states and encoded probabilities, where asked for, and the sum over the rows
// of the probabilities as encoded, or else of the states.
void sample(const at::Tensor& a, const at::Tensor& bias, const at::Tensor& scale, int64_t seed,
            const std::optional<at::Tensor>& state, const std::optional<at::Tensor>& code, const at::Tensor& sum) {
  TORCH_CHECK(state || code, "a state or a code must be asked for");
  for (const auto* out : {&state, &code}) {
    TORCH_CHECK(!*out || ((*out)->sizes() == a.sizes() && (*out)->is_contiguous()), "states and codes: contiguous, of the shape of a");
  }
  for (const auto* row : {&bias, &scale, &sum}) {
    TORCH_CHECK(row->is_contiguous() && row->numel() == a.size(1), "bias, scale and sum (K,) for a (n, K)");
  }
  TORCH_CHECK(a.is_contiguous(), "a must be contiguous");
  const auto in = a.scalar_type(), out = (state ? *state : *code).scalar_type();
  if (in == at::kInt && out == at::kChar) return sample_typed<int32_t, int8_t>(a, bias, scale, seed, state, code, sum);
  if (in == at::kBFloat16 && out == at::kBFloat16)
    return sample_typed<at::BFloat16, at::BFloat16>(a, bias, scale, seed, state, code, sum);
  TORCH_CHECK(in == at::kFloat && out == at::kFloat, "no kernel for ", in, " and ", out);
  sample_typed<float, float>(a, bias, scale, seed, state, code, sum);
}

// U (V, H) rounded to 8 bits with a scale per column, and with a scale per row: that of 1/127 of its greatest weight.
void round_weights(const at::Tensor& U, const at::Tensor& by_column, const at::Tensor& by_row, const at::Tensor& column_scale,
                   const at::Tensor& row_scale) {
  TORCH_CHECK(U.is_contiguous() && by_column.is_contiguous() && by_row.is_contiguous(), "contiguous weights are needed");
  const int64_t rows = U.size(0), n = U.size(1);
  const auto* weights = U.const_data_ptr<float>();
  auto *c = column_scale.mutable_data_ptr<float>(), *r = row_scale.mutable_data_ptr<float>();
  auto *columns_out = by_column.mutable_data_ptr<int8_t>(), *rows_out = by_row.mutable_data_ptr<int8_t>();
  std::fill_n(c, n, TINY);
  const auto measure = [&](int64_t begin, int64_t end, float* own) {
    for (int64_t i = begin; i < end; ++i) {
      float greatest = TINY;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const float size = std::fabs(weights[i * n + j]);
        own[j] = own[j] > size ? own[j] : size;
        greatest = greatest > size ? greatest : size;
      }
      r[i] = greatest;
    }
  };
  for_rows(rows, n, measure, [&](const float* own) {
    for (int64_t j = 0; j < n; ++j) c[j] = c[j] > own[j] ? c[j] : own[j];
  });
  std::vector<float> inverse(n);
  for (int64_t j = 0; j < n; ++j) {
    c[j] /= 127.0f;
    inverse[j] = 1.0f / c[j];
  }
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      r[i] /= 127.0f;
      const float inverse_row = 1.0f / r[i];
      const auto* columns = inverse.data();
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const float weight = weights[i * n + j];
        columns_out[i * n + j] = static_cast<int8_t>(static_cast<int32_t>(std::rint(weight * columns[j])));
        rows_out[i * n + j] = static_cast<int8_t>(static_cast<int32_t>(std::rint(weight * inverse_row)));
      }
    }
  });
}

// Counters are as wide as the states, so that vectors are full, and emptied before they run over.
template <typename S>
void take_typed(const at::Tensor& X, const at::Tensor& index, const at::Tensor& out, const at::Tensor& sum) {
  using Bits = std::conditional_t<sizeof(S) == 1, uint8_t, std::conditional_t<sizeof(S) == 2, uint16_t, uint32_t>>;
  constexpr int64_t MOST = sizeof(S) == 1 ? UINT8_MAX : UINT16_MAX;
  const int64_t n = X.size(1);
  const auto* rows = static_cast<const Bits*>(X.const_data_ptr());
  const auto* which = index.const_data_ptr<int64_t>();
  auto* to = static_cast<Bits*>(out.mutable_data_ptr());
  auto* total = sum.mutable_data_ptr<float>();
  std::fill_n(total, n, 0.0f);
  const auto copy = [&](int64_t begin, int64_t end, float* own) {
    std::vector<Bits> count(n);
    while (begin < end) {
      const int64_t stop = std::min(end, begin + MOST);
      for (; begin < stop; ++begin) {
        const auto* row = rows + which[begin] * n;
        auto* taken = to + begin * n;
        if (begin + 2 < end) {  // rows are in no order, so that the processor does not guess the next
          const auto* next = reinterpret_cast<const char*>(rows + which[begin + 2] * n);
          for (int64_t j = 0; j < n * static_cast<int64_t>(sizeof(S)); j += 64) __builtin_prefetch(next + j);
        }
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) {
          taken[j] = row[j];
          count[j] += row[j] != 0;
        }
      }
      for (int64_t j = 0; j < n; ++j) own[j] += static_cast<float>(count[j]);
      std::fill(count.begin(), count.end(), Bits{0});
    }
  };
  for_rows(index.size(0), n, copy, [&](const float* own) {
    for (int64_t j = 0; j < n; ++j) total[j] += own[j];
  });
}

// out (B, V) = the rows `index` (B,) of X (n, V), which are 0 or 1, and their sum (V,).
void take_rows(const at::Tensor& X, const at::Tensor& index, const at::Tensor& out, const at::Tensor& sum) {
  TORCH_CHECK(X.is_contiguous() && out.is_contiguous() && index.is_contiguous() && sum.is_contiguous(), "contiguous tensors are needed");
  TORCH_CHECK(out.scalar_type() == X.scalar_type() && out.size(0) == index.size(0) && out.size(1) == X.size(1),
              "out: as many rows as `index`, as wide as X and of its type");
  check_index(index, X.size(0));
  const auto type = X.scalar_type();
  if (type == at::kChar) return take_typed<int8_t>(X, index, out, sum);
  if (type == at::kBFloat16) return take_typed<at::BFloat16>(X, index, out, sum);
  TORCH_CHECK(type == at::kFloat, "no kernel for ", type);
  take_typed<float>(X, index, out, sum);
}

// `centred_gradient` of rbm.py in place: dU (V, H), db (V,) and dc (H,) of units whose means are subtracted.
void centre(const at::Tensor& dU, const at::Tensor& db, const at::Tensor& dc, const at::Tensor& mean_v, const at::Tensor& mean_h) {
  for (const auto* tensor : {&dU, &db, &dc, &mean_v, &mean_h}) TORCH_CHECK(tensor->is_contiguous(), "contiguous tensors are needed");
  const int64_t rows = dU.size(0), n = dU.size(1);
  TORCH_CHECK(db.numel() == rows && mean_v.numel() == rows && dc.numel() == n && mean_h.numel() == n, "db, mean_v, dc and mean_h: of dU's sizes");
  auto *gradient = dU.mutable_data_ptr<float>(), *b = db.mutable_data_ptr<float>(), *c = dc.mutable_data_ptr<float>();
  const auto *v = mean_v.const_data_ptr<float>(), *h = mean_h.const_data_ptr<float>();
  const std::vector<float> hidden(c, c + n);
  const auto subtract = [&](int64_t begin, int64_t end, float* own) {
    for (int64_t i = begin; i < end; ++i) {
      const float mean = v[i], visible = b[i];
      const auto* before = hidden.data();
      auto* row = gradient + i * n;
      float along = 0.0f;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        row[j] -= mean * before[j] + visible * h[j];
        along += row[j] * h[j];
        own[j] += mean * row[j];
      }
      b[i] = visible - along;
    }
  };
  for_rows(rows, n, subtract, [&](const float* own) {
    for (int64_t j = 0; j < n; ++j) c[j] -= own[j];
  });
}

}  // namespace

TORCH_LIBRARY(blip_rbm, library) {
  library.def("sample(Tensor a, Tensor bias, Tensor scale, int seed, Tensor? state, Tensor? code, Tensor sum) -> ()");
  library.def("round_weights(Tensor U, Tensor by_column, Tensor by_row, Tensor column_scale, Tensor row_scale) -> ()");
  library.def("take_rows(Tensor X, Tensor index, Tensor out, Tensor sum) -> ()");
  library.def("centre(Tensor dU, Tensor db, Tensor dc, Tensor mean_v, Tensor mean_h) -> ()");
}

TORCH_LIBRARY_IMPL(blip_rbm, CPU, library) {
  library.impl("sample", sample);
  library.impl("round_weights", round_weights);
  library.impl("take_rows", take_rows);
  library.impl("centre", centre);
}
