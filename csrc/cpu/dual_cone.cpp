// gradstats::_dual_cone for CPU tensors: the quadratic programs of UPGrad and DualProj. Everything here has its
// counterpart in gradstats/weighting/solvers.py, which explains it; the schema is in gradstats/ops/dual_cone.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "clones.h"

namespace gradstats {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kRidge = 1e-12, kTolerance = 1e-10;
constexpr int64_t kExchanges = 8, kShifts = 14;
constexpr double kFirstShift = 0.05, kShiftRatio = 1.6;

// a[i] += scale * b[i]
[[gnu::always_inline]] inline void add(double* __restrict a, double scale, const double* __restrict b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] += scale * b[i];
}

[[gnu::always_inline]] inline double dot(const double* a, const double* b, int64_t n) {
  using Lanes [[gnu::vector_size(64)]] = double;  // which the compiler may not make up itself, as it reorders the sum
  Lanes sums{}, x, y;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    std::memcpy(&x, a + i, sizeof x);
    std::memcpy(&y, b + i, sizeof y);
    sums += x * y;
  }
  double sum = 0;
  for (int64_t lane = 0; lane < 8; ++lane) sum += sums[lane];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Replaces the upper triangle of `a` [n, n] by u with uᵀ u = a; false where `a` is not positive definite. Four rows of u
// at a time are taken off those below, which are so read and written a quarter as often.
GRADSTATS_CLONES bool factorize(double* a, int64_t n) {
  for (int64_t first = 0; first < n; first += 4) {
    const int64_t last = std::min(first + 4, n);
    for (int64_t k = first; k < last; ++k) {
      double* const row = a + k * n;
      for (int64_t above = first; above < k; ++above) add(row + k, -a[above * n + k], a + above * n + k, n - k);
      if (!(row[k] > 0)) return false;
      const double scale = 1 / std::sqrt(row[k]);
      for (int64_t j = k; j < n; ++j) row[j] *= scale;
    }
    const double *const u = a + first * n, *const v = u + n, *const w = v + n, *const x = w + n;
    for (int64_t i = last; i < n; ++i) {
      double* __restrict const row = a + i * n;
      const double s = u[i], t = v[i], p = w[i], q = x[i];
      for (int64_t j = i; j < n; ++j) row[j] -= s * u[j] + t * v[j] + p * w[j] + q * x[j];
    }
  }
  return true;
}

// Replaces `x` by the solution of uᵀ u y = x.
GRADSTATS_CLONES void solve(const double* u, double* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    x[k] /= u[k * n + k];
    add(x + k + 1, -x[k], u + k * n + k + 1, n - k - 1);
  }
  for (int64_t k = n - 1; k >= 0; --k)
    x[k] = (x[k] - dot(u + k * n + k + 1, x + k + 1, n - k - 1)) / u[k * n + k];
}

// slack = Σ_r x[r] · a[inside[r]] - b
GRADSTATS_CLONES void slopes(const double* a, const double* b, const double* x, const std::vector<int64_t>& inside,
                             double* slack, int64_t n) {
  for (int64_t j = 0; j < n; ++j) slack[j] = -b[j];
  for (size_t r = 0; r < inside.size(); ++r) add(slack, x[r], a + inside[r] * n, n);
}

struct Solver {
  const double* a;  // [n, n], positive definite
  int64_t n;
  std::vector<int64_t> inside = {};
  std::vector<char> passive = std::vector<char>(n);
  std::vector<double> block = std::vector<double>(n * n), x = std::vector<double>(n), slack = std::vector<double>(n);

  // z = argmin ½ zᵀ a z - bᵀ z over z >= 0; false where that was not found.
  bool run(const double* b, double* z) { return pivot(b, z) || descend(b, z); }

  // By block principal pivoting.
  bool pivot(const double* b, double* z) {
    for (int64_t j = 0; j < n; ++j) passive[j] = b[j] > 0;
    for (int64_t round = 0; round < 2 * kExchanges + kShifts; ++round) {
      const bool shifted = kExchanges <= round && round < kExchanges + kShifts;
      if (!solve_inside(b, shifted ? kFirstShift * std::pow(kShiftRatio, kExchanges - round) : 0.0)) return false;
      double largest = 0;
      for (size_t r = 0; r < inside.size(); ++r) {
        slack[inside[r]] = x[r];
        largest = std::max(largest, std::abs(x[r]));
      }
      const double least = -kTolerance * (1 + largest);
      if (!shifted && *std::min_element(slack.begin(), slack.end()) >= least) {
        std::fill(z, z + n, 0.0);
        for (size_t r = 0; r < inside.size(); ++r) z[inside[r]] = std::max(x[r], 0.0);
        return true;
      }
      for (int64_t j = 0; j < n; ++j)
        if (slack[j] < least) passive[j] ^= 1;
    }
    return false;
  }

  // By the method of Lawson & Hanson, one more entry at a time.
  bool descend(const double* b, double* z) {
    std::fill(passive.begin(), passive.end(), 0);
    std::fill(z, z + n, 0.0);
    if (!solve_inside(b, 0)) return false;
    for (int64_t round = 0; round < 20 * n; ++round) {
      for (int64_t j : inside) slack[j] = 0;
      const int64_t worst = std::min_element(slack.begin(), slack.end()) - slack.begin();
      if (slack[worst] >= -kTolerance * (1 + *std::max_element(z, z + n))) return true;
      passive[worst] = 1;
      while (true) {
        if (!solve_inside(b, 0)) return false;
        int64_t ending = -1;
        double fraction = 1;
        for (size_t r = 0; r < inside.size(); ++r)
          if (const double from = z[inside[r]]; x[r] < 0 && from / (from - x[r]) < fraction) {
            fraction = from / (from - x[r]);
            ending = inside[r];
          }
        for (size_t r = 0; r < inside.size(); ++r) z[inside[r]] += fraction * (x[r] - z[inside[r]]);
        if (ending < 0) break;
        z[ending] = passive[ending] = 0;
      }
    }
    return false;
  }

  // The passive entries, the solution on them with so much more on the diagonal, and the slack of all others.
  bool solve_inside(const double* b, double shift) {
    inside.clear();
    for (int64_t j = 0; j < n; ++j)
      if (passive[j]) inside.push_back(j);
    const int64_t size = inside.size();
    for (int64_t r = 0; r < size; ++r) {
      x[r] = b[inside[r]];
      for (int64_t c = r; c < size; ++c) block[r * size + c] = a[inside[r] * n + inside[c]];
      block[r * size + r] += shift;
    }
    if (!factorize(block.data(), size)) return false;
    solve(block.data(), x.data(), size);
    slopes(a, b, x.data(), inside, slack.data(), n);
    return true;
  }
};

// Norms relative to the largest, and cosines; false where a gradient is zero or something is not finite.
bool normalize(const Tensor& gram, std::vector<double>& lengths, std::vector<double>& cosine) {
  const double* const data = gram.const_data_ptr<double>();
  const int64_t n = gram.size(0), down = gram.stride(0), right = gram.stride(1);
  for (int64_t i = 0; i < n; ++i) lengths[i] = std::sqrt(data[i * (down + right)]);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      sum += cosine[i * n + j] = data[i * down + j * right] / lengths[i] / lengths[j];
  const double longest = *std::max_element(lengths.begin(), lengths.end());
  for (double& length : lengths) length /= longest;
  return std::isfinite(sum);
}

// The increments z [K, T] of the coefficients of unit gradients; false where something has to be looked at more closely.
bool project(const std::vector<double>& cosine, const std::vector<double>& linear, int64_t n, std::vector<double>& z) {
  if (*std::max_element(linear.begin(), linear.end()) <= 0) return true;  // no conflict
  std::vector<double> matrix = cosine;
  for (int64_t i = 0; i < n; ++i) matrix[i * (n + 1)] += kRidge;
  std::vector<double> factor = matrix;
  if (!factorize(factor.data(), n)) return false;
  std::atomic<bool> solved = true;
  const int64_t grain = 1 + (int64_t{1} << 20) / (n * n * n);  // worth a thread
  torch::stable::parallel_for(0, linear.size() / n, grain, [&](int64_t first, int64_t last) {
    Solver solver{matrix.data(), n};
    for (int64_t k = first; k < last; ++k)
      if (!solver.run(linear.data() + k * n, z.data() + k * n)) solved = false;
  });
  return solved;
}

// What the projection of the sum of all gradients, or with `each` the sum of all their projections, adds to the
// coefficients of the unit gradients; false as above.
bool increments(const std::vector<double>& cosine, const std::vector<double>& lengths, bool each, int64_t n,
                std::vector<double>& sum) {
  std::vector<double> linear(n), units = lengths;
  for (int64_t i = 0; i < n; ++i) add(linear.data(), -lengths[i], cosine.data() + i * n, n);
  if (!project(cosine, linear, n, sum)) return false;
  if (!each) return true;
  add(units.data(), 1, sum.data(), n);
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += units[i] * dot(cosine.data() + i * n, units.data(), n);
  if (square <= 4 * kRidge * dot(units.data(), units.data(), n)) return true;  // the projections vanish, each of them
  std::vector<double> z(n * n);
  linear = cosine;
  for (double& entry : linear) entry = -entry;
  if (!project(cosine, linear, n, z)) return false;
  std::fill(sum.begin(), sum.end(), 0.0);
  for (int64_t i = 0; i < n; ++i) add(sum.data(), lengths[i], z.data() + i * n, n);
  return true;
}

Tensor dual_cone(Tensor gram, bool each) {
  STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Double && gram.dim() == 2 && gram.size(0) == gram.size(1) &&
                      gram.size(0) > 0,
                  "gradstats::_dual_cone: expected a float64 Gramian of shape [T, T]");
  const int64_t n = gram.size(0);
  Tensor result = torch::stable::new_empty(gram, {n});
  double* const weights = result.mutable_data_ptr<double>();
  std::vector<double> lengths(n), cosine(n * n), sum(n);
  const bool solved = normalize(gram, lengths, cosine) && increments(cosine, lengths, each, n, sum);
  for (int64_t j = 0; j < n; ++j)
    weights[j] = solved ? (1 + sum[j] / lengths[j]) / n : std::numeric_limits<double>::quiet_NaN();
  return result;
}

}  // namespace
}  // namespace gradstats

STABLE_TORCH_LIBRARY_IMPL(gradstats, CPU, library) { library.impl("_dual_cone", TORCH_BOX(&gradstats::dual_cone)); }
