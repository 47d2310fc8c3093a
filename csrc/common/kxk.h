#pragma once
// The K x K stage on one Gram matrix of K task gradients: what it tells, and what weights it gives.
//
// No torch, no containers, no allocation: the caller gives row-major float64 arrays and a workspace, so that the host and a
// device thread run the same source (without FMA contraction on either side). Notation: G the Gram, n_i = sqrt(G_ii).

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifndef MTL_HOST_DEVICE
#ifdef __CUDACC__
#define MTL_HOST_DEVICE __host__ __device__
#else
#define MTL_HOST_DEVICE
#endif
#endif

namespace mtlkernels {

// --- what a Gram tells ------------------------------------------------------------------------------------------------

MTL_HOST_DEVICE inline bool all_finite(const double* values, int count) {
  for (int i = 0; i < count; ++i) {
    if (!(std::fabs(values[i]) <= DBL_MAX)) return false;
  }
  return true;
}

/// -1 or 1 beyond them; NaN stays NaN.
MTL_HOST_DEVICE inline double clamp_cosine(double value) { return value > 1.0 ? 1.0 : value < -1.0 ? -1.0 : value; }

/// Cosines [K, K]: unit diagonal, 0 in the row and column of a zero gradient, NaN where a gradient is not finite.
/// `scratch` holds K doubles.
MTL_HOST_DEVICE inline void cosine(const double* gram, int size, double* result, double* scratch) {
  for (int i = 0; i < size; ++i) {
    const double square = gram[i * size + i];
    scratch[i] = square == 0.0 ? 0.0 : 1.0 / std::sqrt(square);
  }
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) result[i * size + j] = clamp_cosine(gram[i * size + j] * scratch[i] * scratch[j]);
    double& unit = result[i * size + i];
    if (unit == unit) unit = scratch[i] != 0.0 ? 1.0 : 0.0;
  }
}

/// Gradient magnitude similarity [K, K], 2 n_i n_j / (n_i^2 + n_j^2); 0 where a gradient is 0. `scratch` holds K doubles.
MTL_HOST_DEVICE inline void magnitude_similarity(const double* gram, int size, double* result, double* scratch) {
  for (int i = 0; i < size; ++i) {
    const double square = gram[i * size + i];
    scratch[i] = std::sqrt(square < 0.0 ? 0.0 : square);
  }
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      const double largest = scratch[i] >= scratch[j] ? scratch[i] : scratch[j] >= scratch[i] ? scratch[j] : NAN;
      const double safe = largest == 0.0 ? 1.0 : largest;
      const double a = scratch[i] / safe, b = scratch[j] / safe;
      const double total = a * a + b * b;
      result[i * size + j] = 2 * a * b / (total == 0.0 ? 1.0 : total);
    }
  }
}

/// Share of the task pairs with G_ij < 0; 0 for a single task.
MTL_HOST_DEVICE inline double conflict_rate(const double* gram, int size) {
  int conflicts = 0;
  for (int i = 0; i < size; ++i) {
    for (int j = i + 1; j < size; ++j) conflicts += gram[i * size + j] < 0.0;
  }
  const int pairs = size * (size - 1) / 2;
  return pairs > 0 ? static_cast<double>(conflicts) / pairs : 0.0;
}

/// Turns a symmetric matrix into its eigenvalues, on the diagonal in no order, by cyclic Jacobi rotations (Golub and Van Loan,
/// section 8.5). Errors stay within a few K eps of the largest magnitude; converges quadratically, in 6 to 10 sweeps.
MTL_HOST_DEVICE inline void jacobi_eigenvalues(double* matrix, int size) {
  constexpr int kMaxSweeps = 40;
  double largest = 0.0;
  for (int i = 0; i < size * size; ++i) largest = std::fmax(largest, std::fabs(matrix[i]));
  const double negligible = DBL_EPSILON / 16 * largest;  // what is left off the diagonal moves no eigenvalue by more than K of it
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool rotated = false;
    for (int p = 0; p < size; ++p) {
      for (int q = p + 1; q < size; ++q) {
        const double off = matrix[p * size + q], first = matrix[p * size + p], second = matrix[q * size + q];
        if (std::fabs(off) <= negligible) continue;
        rotated = true;
        const double theta = (second - first) / (2 * off);
        const double tangent = (theta >= 0 ? 1.0 : -1.0) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
        const double cosine = 1 / std::sqrt(tangent * tangent + 1), sine = tangent * cosine;
        for (int k = 0; k < size; ++k) {
          if (k == p || k == q) continue;
          const double left = matrix[k * size + p], right = matrix[k * size + q];
          matrix[k * size + p] = matrix[p * size + k] = cosine * left - sine * right;
          matrix[k * size + q] = matrix[q * size + k] = sine * left + cosine * right;
        }
        matrix[p * size + p] = first - tangent * off;
        matrix[q * size + q] = second + tangent * off;
        matrix[p * size + q] = matrix[q * size + p] = 0.0;
      }
    }
    if (!rotated) return;
  }
}

/// sigma_max / sigma_min of the gradient matrix; inf where lambda_min <= K epsilon lambda_max, NaN where G is not finite.
/// `epsilon` is the precision of the Gram as stored; `scratch` holds K * K doubles.
MTL_HOST_DEVICE inline double condition_number(const double* gram, int size, double epsilon, double* scratch) {
  if (!all_finite(gram, size * size)) return NAN;
  double largest = 0.0;
  for (int i = 0; i < size * size; ++i) largest = std::fmax(largest, std::fabs(gram[i]));
  if (largest == 0.0) return INFINITY;
  for (int i = 0; i < size * size; ++i) scratch[i] = gram[i] / largest;
  jacobi_eigenvalues(scratch, size);
  double high = scratch[0], low = scratch[0];
  for (int i = 1; i < size; ++i) {
    high = std::fmax(high, scratch[i * size + i]);
    low = std::fmin(low, scratch[i * size + i]);
  }
  return low > size * epsilon * high ? std::sqrt(high / low) : INFINITY;
}

// --- projections ------------------------------------------------------------------------------------------------------

/// Row `row` of the coefficients of successive projections (PCGrad, Yu et al. 2020, Algorithm 1): starting from e_row, for each
/// j != row in `order`: s = sum_k c_k G_kj, and c_j -= s / G_jj where s < 0, or always without `conflict_only`.
/// A zero g_j is skipped. Only the gradients a row is made of are read, so that a NaN stays in its own task.
MTL_HOST_DEVICE inline void projection_row(const double* gram, int size, int row, const int64_t* order, int64_t steps,
                                           bool conflict_only, double* coefficients) {
  for (int k = 0; k < size; ++k) coefficients[k] = k == row ? 1.0 : 0.0;
  for (int64_t step = 0; step < steps; ++step) {
    const int j = static_cast<int>(order[step]);
    const double square = gram[j * size + j];
    if (j == row || !(square > 0.0)) continue;
    double inner = 0.0;
    for (int k = 0; k < size; ++k) {
      if (coefficients[k] != 0.0) inner += coefficients[k] * gram[k * size + j];
    }
    if (inner < 0.0 || !conflict_only) coefficients[j] -= inner / square;
  }
}

// --- the path solver --------------------------------------------------------------------------------------------------

/// Doubles and integers of workspace that the solvers below need for K tasks.
constexpr int64_t solver_doubles(int64_t size) { return 2 * size * size + 10 * size; }
constexpr int64_t solver_integers(int64_t size) { return 2 * size; }

/// min_{u >= 0} u' M u / 2 + (offset - t slope)' u, followed from u = 0 as t grows: its solution is piecewise linear in t, and one
/// index becomes positive or zero at each breakpoint (the critical-line method, Markowitz 1956). Every point is solved afresh
/// from the set of positive indices, so that errors do not build up along the path.
struct Path {
  int size;
  double* matrix;   // M [K, K], symmetric positive definite
  double* offset;   // [K]
  double* slope;    // [K], positive; 0 keeps an index out for good
  double* factor;   // [K, K] Cholesky factor of M over the positive indices, in the order they came
  double *solved_offset, *solved_slope;  // [K] factor^-1 of both right-hand sides
  double *value, *change;                // [K] u, and du / dt, by position in the order
  double *residual, *residual_change;    // [K] z = M u + offset - t slope, and dz / dt, by index
  double *norm, *solution;               // [K] gradient norms and u, by index
  int* position;                         // [K] index -> position in the order, -1 where u is zero
  int* order;                            // [K] position -> index
  int count;                             // positive indices

  MTL_HOST_DEVICE Path(int tasks, double* doubles, int* integers) : size(tasks), position(integers), order(integers + tasks), count(0) {
    matrix = doubles;
    factor = matrix + tasks * tasks;
    double** vectors[] = {&offset, &slope, &solved_offset, &solved_slope, &value, &change, &residual, &residual_change, &norm, &solution};
    for (int i = 0; i < 10; ++i) *vectors[i] = factor + tasks * tasks + i * tasks;
  }

  /// Cholesky rows and solved right-hand sides from position `first` on.
  MTL_HOST_DEVICE void refactor(int first) {
    for (int p = first; p < count; ++p) {
      const int i = order[p];
      double b = offset[i], a = slope[i];
      for (int q = 0; q <= p; ++q) {
        double sum = matrix[i * size + order[q]];
        for (int k = 0; k < q; ++k) sum -= factor[p * size + k] * factor[q * size + k];
        if (q < p) {
          factor[p * size + q] = sum / factor[q * size + q];
          b -= factor[p * size + q] * solved_offset[q];
          a -= factor[p * size + q] * solved_slope[q];
        } else {
          // The matrix exceeds the unit-diagonal Gram by its ridge; rounding may leave less than that of the pivot.
          const double ridge = matrix[i * size + i] - 1.0;
          factor[p * size + p] = std::sqrt(sum > ridge ? sum : ridge);
        }
      }
      solved_offset[p] = b / factor[p * size + p];
      solved_slope[p] = a / factor[p * size + p];
      position[i] = p;
    }
  }

  /// Moves an index into or out of the positive set.
  MTL_HOST_DEVICE void toggle(int i) {
    if (position[i] < 0) {
      order[count++] = i;
      refactor(count - 1);
      return;
    }
    const int gap = position[i];
    position[i] = -1;
    --count;
    for (int p = gap; p < count; ++p) order[p] = order[p + 1];
    refactor(gap);
  }

  /// u, z and their derivatives at t on the line that the current positive set defines.
  MTL_HOST_DEVICE void evaluate(double t) {
    for (int p = count - 1; p >= 0; --p) {
      double u = t * solved_slope[p] - solved_offset[p], du = solved_slope[p];
      for (int q = p + 1; q < count; ++q) {
        u -= factor[q * size + p] * value[q];
        du -= factor[q * size + p] * change[q];
      }
      value[p] = u / factor[p * size + p];
      change[p] = du / factor[p * size + p];
    }
    double total = 0.0;
    for (int p = 0; p < count; ++p) total += std::fabs(change[p]);
    for (int i = 0; i < size; ++i) {
      if (position[i] >= 0) continue;
      double z = offset[i] - t * slope[i], dz = -slope[i];
      for (int p = 0; p < count; ++p) {
        z += matrix[i * size + order[p]] * value[p];
        dz += matrix[i * size + order[p]] * change[p];
      }
      residual[i] = z;
      // A rate below its own rounding error would let an index come and go for ever; ignoring it costs z_i no more than that error.
      residual_change[i] = dz < -(count + 1) * DBL_EPSILON * (slope[i] + total) ? dz : 0.0;
    }
  }

  /// The next breakpoint after `t` as seen from the last evaluated `anchor`, and its index (-1: there is none).
  MTL_HOST_DEVICE double breakpoint(double anchor, double t, int* which) const {
    double first = INFINITY;
    *which = -1;
    double total = 0.0;
    for (int p = 0; p < count; ++p) total += std::fabs(value[p]);
    const double tolerance = 32 * size * DBL_EPSILON;
    for (int i = 0; i < size; ++i) {
      const int p = position[i];
      const double distance = p >= 0 ? value[p] : residual[i], rate = p >= 0 ? change[p] : residual_change[i];
      const bool wrong = p < 0 && anchor == t && distance < -tolerance * (total + std::fabs(offset[i]) + std::fabs(t * slope[i]));
      if (!(rate < 0.0) && !wrong) continue;
      const double at = wrong ? t : std::fmax(anchor - distance / rate, t);
      if (at < first) {
        first = at;
        *which = i;
      }
    }
    return first;
  }

  /// Where u' M u reaches `square` on the current line, seen from the last evaluated `anchor`; inf: nowhere.
  MTL_HOST_DEVICE double crossing(double anchor, double square) const {
    double norm = 0.0, rate = 0.0, curvature = 0.0;
    for (int p = 0; p < count; ++p) {
      norm += value[p] * (anchor * slope[order[p]] - offset[order[p]]);  // u' M u = u' (t slope - offset)
      rate += value[p] * slope[order[p]];
      curvature += change[p] * slope[order[p]];
    }
    const double missing = square - norm, root = std::sqrt(std::fmax(rate * rate + curvature * missing, 0.0));
    const double denominator = rate + root;
    return denominator > 0.0 ? anchor + missing / denominator : INFINITY;
  }

  /// Follows the path until t = end or u' M u = square, whichever comes first; writes u to `solution`. Returns whether `square` was reached.
  MTL_HOST_DEVICE bool follow(double end, double square) {
    count = 0;
    double t = INFINITY;
    int which = -1;
    for (int i = 0; i < size; ++i) {
      solution[i] = 0.0;
      position[i] = -1;
      if (offset[i] / slope[i] < t) {
        t = offset[i] / slope[i];
        which = i;
      }
    }
    if (which < 0 || t >= end) return false;
    toggle(which);
    bool reached = false;
    const int max_breakpoints = 16 * size + 64;  // several times what the hardest problems take
    for (int step = 0;; ++step) {
      // Seen from t, a point much closer to zero would lose its digits; seen from zero, it keeps them.
      double stop = 0.0, next = 0.0, anchor = t;
      for (int pass = 0; pass < 2; ++pass) {
        evaluate(anchor);
        const double crosses = square < INFINITY ? std::fmax(crossing(anchor, square), t) : INFINITY;
        reached = crosses <= end;
        stop = reached ? crosses : end;
        next = breakpoint(anchor, t, &which);
        if (anchor == 0.0 || std::fabs(std::fmin(stop, next)) >= 0.5 * std::fabs(t)) break;
        anchor = 0.0;
      }
      if (stop <= next || step == max_breakpoints) {
        evaluate(stop <= next ? stop : t);
        break;
      }
      t = next;
      toggle(which);
    }
    for (int p = 0; p < count; ++p) solution[order[p]] = std::fmax(value[p], 0.0);
    return reached;
  }
};

/// Sets M to the cosines of the gradients plus a ridge of 16 K eps, a few times the rounding error of a Gram. The ridge makes the path
/// unique (equal gradients get equal weights) and moves (G w)_i by at most 16 K eps n_i sum_j w_j n_j. Returns the ridge.
MTL_HOST_DEVICE inline double set_cosines(const double* gram, Path& path) {
  const int size = path.size;
  const double ridge = 16 * size * DBL_EPSILON;
  cosine(gram, size, path.matrix, path.value);
  for (int i = 0; i < size; ++i) {
    path.norm[i] = gram[i * size + i] > 0.0 ? std::sqrt(gram[i * size + i]) : 0.0;
    path.matrix[i * size + i] = 1.0 + ridge;
  }
  return ridge;
}

MTL_HOST_DEVICE inline void fill(double* values, int count, double value) {
  for (int i = 0; i < count; ++i) values[i] = value;
}

// --- weightings -------------------------------------------------------------------------------------------------------

/// MGDA (Sener and Koltun 2018): the weights on the simplex with the smallest w' G w. Zero gradients share the whole weight.
/// Guarantee: (G w)_i >= w' G w - 1e-11 n_i sum_j w_j n_j for every i. All NaN where G is not finite.
///
/// In u_i = n_i w_i the problem is min u' R u with R the cosines and u / n on the simplex; up to scale its solution is the one of
/// min_{u >= 0} u' R u / 2 - u' (1 / n), the end t = 0 of the path with offset -1 / n and slope 1.
MTL_HOST_DEVICE inline void mgda_weights(const double* gram, int size, double* doubles, int* integers, double* weights) {
  if (!all_finite(gram, size * size)) return fill(weights, size, NAN);
  Path path(size, doubles, integers);
  set_cosines(gram, path);
  double smallest = INFINITY, total = 0.0;
  for (int i = 0; i < size; ++i) smallest = std::fmin(smallest, path.norm[i]);
  if (smallest > 0.0) {
    for (int i = 0; i < size; ++i) {
      path.offset[i] = -smallest / path.norm[i];
      path.slope[i] = 1.0;
    }
    path.follow(0.0, INFINITY);
  }
  for (int i = 0; i < size; ++i) {
    weights[i] = smallest > 0.0 ? -path.solution[i] * path.offset[i] : path.norm[i] == 0.0;
    total += weights[i];
  }
  for (int i = 0; i < size; ++i) weights[i] /= total;
}

/// CAGrad (Liu et al. 2021, Algorithm 1): 1 / K + c |g_0| / |g_w| w with g_0 the mean gradient and w on the simplex minimising
/// <g_w, g_0> + c |g_0| |g_w|. All 0 where the minimiser is g_w = 0 (a Pareto-stationary point), all NaN where G is not finite.
///
/// With v = c |g_0| / |g_w| w and u_i = n_i v_i / |g_0|, optimality reads R u + b - t / n >= 0, complementary to u >= 0, and
/// u' R u = c^2, where R are the cosines and b_i = cos(g_i, g_0): the point of the path in t where u' R u reaches c^2.
/// A zero gradient keeps t from becoming positive.
MTL_HOST_DEVICE inline void cagrad_weights(const double* gram, int size, double c, double* doubles, int* integers, double* weights) {
  if (!all_finite(gram, size * size)) return fill(weights, size, NAN);
  Path path(size, doubles, integers);
  const double ridge = set_cosines(gram, path);
  double smallest = INFINITY, largest = 0.0, mean_square = 0.0, end = INFINITY;
  for (int i = 0; i < size; ++i) {
    largest = std::fmax(largest, path.norm[i]);
    if (path.norm[i] > 0.0) smallest = std::fmin(smallest, path.norm[i]);
  }
  for (int i = 0; i < size; ++i) {  // in units of the largest norm, so that nothing overflows
    double inner = 0.0;
    for (int j = 0; j < size && path.norm[i] > 0.0; ++j) inner += gram[i * size + j] / path.norm[i] / largest / size;
    path.offset[i] = inner;
    mean_square += inner * (path.norm[i] / largest) / size;
  }
  if (!(mean_square > 0.0)) return fill(weights, size, 0.0);
  if (c == 0.0) return fill(weights, size, 1.0 / size);
  const double mean = std::sqrt(mean_square);
  for (int i = 0; i < size; ++i) {
    const bool zero = path.norm[i] == 0.0;
    path.offset[i] = clamp_cosine(path.offset[i] / mean);
    path.slope[i] = zero ? 0.0 : smallest / path.norm[i];
    if (zero) end = 0.0;
  }
  const bool reached = path.follow(end, c * c);
  double square = 0.0, ridged = 0.0;
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) square += path.solution[i] * path.solution[j] * (path.matrix[i * size + j] - (i == j ? ridge : 0.0));
    ridged += path.solution[i] * path.solution[i] * ridge;
  }
  // Where the ridge shows in the result, g_w is 0 to the precision of the Gram.
  if (!reached || ridged > 1e-3 * square) return fill(weights, size, 0.0);
  const double scale = c * mean / std::sqrt(square);
  for (int i = 0; i < size; ++i) {
    weights[i] = 1.0 / size + (path.norm[i] > 0.0 ? scale * path.solution[i] * (largest / path.norm[i]) : 0.0);
  }
}

}  // namespace mtlkernels
