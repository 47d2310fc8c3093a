#pragma once
// The K x K stage on one Gram matrix of K task gradients: what it tells, and what weights it gives.
//
// No torch, no containers, no allocation: the caller gives row-major float64 arrays and a workspace, so that the host and a
// device thread run the same source (without FMA contraction on either side). Notation: G the Gram, n_i = sqrt(G_ii).

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "numeric.h"

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
  const double negligible =
      DBL_EPSILON / 16 * largest;  // what is left off the diagonal moves no eigenvalue by more than K of it
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

// --- the quadratic program --------------------------------------------------------------------------------------------

/// Doubles and integers of workspace that the solvers below need for K tasks.
MTL_HOST_DEVICE constexpr int64_t solver_doubles(int64_t size) { return 2 * size * size + 8 * size; }
MTL_HOST_DEVICE constexpr int64_t solver_integers(int64_t size) { return 2 * size; }

/// min_{u >= 0} u' R u / 2 - right(t)' u with right(t) = t slope - offset and R positive semidefinite with unit diagonal.
///
/// R is solved with a ridge of 64 K eps on its diagonal, which exceeds the rounding error of a Gram and its factor, so that
/// M = R + ridge is positive definite; where R has several solutions, any may come out. `recentre` then takes the ridge's pull
/// from zero to the last solution, a proximal point step: what the ridge changed shrinks by ridge / (eigenvalue + ridge).
///
/// One solve is Lawson and Hanson's active-set method (1974, chapter 23) on the normal equations: u stays feasible and the
/// value falls with every step, from whatever u and positive set the last solve left. At the solution
/// z = M u - right(t) - ridge centre is not negative, and zero where u is positive.
struct QuadraticProgram {
  int size;
  double ridge;
  double* matrix;          // M [K, K]
  double* factor;          // [K, K] Cholesky factor of M over the positive indices, in the order they came
  double *offset, *slope;  // [K]
  double* solution;        // [K] u
  double* centre;          // [K] where the ridge pulls u to
  double *trial, *rate;    // [K] by position in the order: the minimiser without u >= 0, and its derivative in t
  double *norm, *scratch;  // [K] norms of the gradients; free for use
  int* order;              // [K] position -> index; positions from `count` on hold the indices where u is zero
  int* rejected;           // [K] whether rounding alone made an index look promising
  int count;               // positive indices

  MTL_HOST_DEVICE QuadraticProgram(int tasks, double* doubles, int* integers)
      : size(tasks), ridge(64 * tasks * DBL_EPSILON), order(integers), rejected(integers + tasks), count(0) {
    matrix = doubles;
    factor = matrix + tasks * tasks;
    double** vectors[] = {&offset, &slope, &solution, &centre, &trial, &rate, &norm, &scratch};
    for (int i = 0; i < 8; ++i) *vectors[i] = factor + tasks * tasks + i * tasks;
    for (int i = 0; i < tasks; ++i) {
      solution[i] = centre[i] = 0.0;
      order[i] = i;
    }
  }

  /// Sets M to the cosines of the gradients plus the ridge, and `norm` to their norms.
  MTL_HOST_DEVICE void set_gram(const double* gram) {
    cosine(gram, size, matrix, scratch);
    for (int i = 0; i < size; ++i) {
      norm[i] = gram[i * size + i] > 0.0 ? std::sqrt(gram[i * size + i]) : 0.0;
      matrix[i * size + i] = 1.0 + ridge;
    }
  }

  MTL_HOST_DEVICE void recentre() {
    for (int i = 0; i < size; ++i) centre[i] = solution[i];
  }

  MTL_HOST_DEVICE double right(int i, double t) const { return t * slope[i] - offset[i]; }

  /// Rows of the factor from position `first` on.
  MTL_HOST_DEVICE void refactor(int first) {
    for (int p = first; p < count; ++p) {
      for (int q = 0; q <= p; ++q) {
        double sum = matrix[order[p] * size + order[q]];
        for (int k = 0; k < q; ++k) sum -= factor[p * size + k] * factor[q * size + k];
        factor[p * size + q] =
            q < p ? sum / factor[q * size + q] : std::sqrt(std::fmax(sum, ridge));  // rounding may leave less
      }
    }
  }

  MTL_HOST_DEVICE void enter(int place) {
    const int i = order[place];
    order[place] = order[count];
    order[count++] = i;
    refactor(count - 1);
  }

  MTL_HOST_DEVICE void leave(int place) {
    const int i = order[place];
    --count;
    for (int p = place; p < count; ++p) order[p] = order[p + 1];
    order[count] = i;
    solution[i] = 0.0;
    refactor(place);
  }

  /// Solves M_PP x = right-hand side over the positive indices, by position, in place.
  MTL_HOST_DEVICE void substitute(double* x) const {
    for (int p = 0; p < count; ++p) {
      for (int q = 0; q < p; ++q) x[p] -= factor[p * size + q] * x[q];
      x[p] /= factor[p * size + p];
    }
    for (int p = count - 1; p >= 0; --p) {
      for (int q = p + 1; q < count; ++q) x[p] -= factor[q * size + p] * x[q];
      x[p] /= factor[p * size + p];
    }
  }

  /// The place of the zero index with the most negative z, -1 where none is below rounding error.
  MTL_HOST_DEVICE int candidate(double t) const {
    double total = 0.0, lowest = 0.0;
    for (int p = 0; p < count; ++p) total += solution[order[p]];
    int best = -1;
    for (int place = count; place < size; ++place) {
      const int i = order[place];
      double z = -right(i, t) - ridge * centre[i];
      for (int p = 0; p < count; ++p) z += matrix[i * size + order[p]] * solution[order[p]];
      const double rounding = 2 * size * DBL_EPSILON * (total + std::fabs(offset[i]) + std::fabs(t * slope[i]));
      if (z < -rounding && z < lowest && !rejected[i]) {
        lowest = z;
        best = place;
      }
    }
    return best;
  }

  /// Leaves the solution at t in `solution`.
  MTL_HOST_DEVICE void solve(double t) {
    for (int i = 0; i < size; ++i) rejected[i] = 0;
    int newest = -1;
    const int max_steps = 16 * size + 64;  // several times what the hardest problems take
    for (int step = 0; step < max_steps; ++step) {
      for (int p = 0; p < count; ++p) trial[p] = right(order[p], t) + ridge * centre[order[p]];
      substitute(trial);
      double length = 1.0;
      int blocking = -1;
      for (int p = 0; p < count; ++p) {
        if (trial[p] > 0.0) continue;
        const double u = solution[order[p]], reach = u > 0.0 ? u / (u - trial[p]) : 0.0;
        if (blocking < 0 || reach < length) {
          length = reach;
          blocking = p;
        }
      }
      for (int p = 0; p < count; ++p) solution[order[p]] += length * (trial[p] - solution[order[p]]);
      if (blocking >= 0) {
        if (order[blocking] == newest) rejected[newest] = 1;
        leave(blocking);
        continue;
      }
      const int place = candidate(t);
      if (place < 0) return;
      newest = order[place];
      enter(place);
    }
  }

  /// u' right(t) at the solution for t: u' R u, but for what the ridge changes.
  MTL_HOST_DEVICE double square(double t) const {
    double sum = 0.0;
    for (int p = 0; p < count; ++p) sum += solution[order[p]] * right(order[p], t);
    return sum;
  }

  /// Whether the ridge shows in u' M u = target: then M u is 0 to the precision of the Gram.
  MTL_HOST_DEVICE bool negligible(double target) const {
    double sum = 0.0;
    for (int i = 0; i < size; ++i) sum += solution[i] * solution[i];
    return ridge * sum > 1e-3 * target;
  }

  /// The index that becomes positive first as t grows, at t = offset / slope.
  MTL_HOST_DEVICE int first() const {
    int best = -1;
    for (int i = 0; i < size; ++i) {
      if (slope[i] > 0.0 && (best < 0 || offset[i] / slope[i] < offset[best] / slope[best])) best = i;
    }
    return best;
  }

  /// Solves for the t where `square` reaches `target`, beginning at t; returns that t. The square grows with t and is
  /// piecewise quadratic: each step solves the current piece exactly, within a bracket that is halved every fourth step.
  /// With `stop_early` it gives up where the result will be negligible.
  MTL_HOST_DEVICE double reach(double target, double t, bool stop_early) {
    double low = offset[first()] / slope[first()], high = INFINITY;
    const int max_steps = 400;
    for (int step = 0; step < max_steps; ++step) {
      solve(t);
      const double missing = target - square(t);
      double rounding = target;
      for (int p = 0; p < count; ++p)
        rounding += solution[order[p]] * (std::fabs(t * slope[order[p]]) + std::fabs(offset[order[p]]));
      if (std::fabs(missing) <= 4 * DBL_EPSILON * rounding || (stop_early && missing > 0.0 && negligible(target))) break;
      (missing > 0.0 ? low : high) = t;
      double next = crossing(t, missing);
      if (!(next > low && next < high) || (step % 4 == 3 && high < INFINITY)) next = low + (high - low) / 2;
      if (next <= low || next >= high) break;
      t = next;
    }
    return t;
  }

  /// Where `square` changes by `missing` if the positive set stays as it is; NaN where u is zero.
  MTL_HOST_DEVICE double crossing(double t, double missing) {
    for (int p = 0; p < count; ++p) rate[p] = slope[order[p]];
    substitute(rate);
    double first = 0.0, second = 0.0;
    for (int p = 0; p < count; ++p) {
      first += solution[order[p]] * slope[order[p]];
      second += rate[p] * slope[order[p]];
    }
    const double root = std::sqrt(std::fmax(first * first + second * missing, 0.0));
    return t + missing / (first + root);
  }
};

/// Solves per problem: one, and proximal point steps.
constexpr int kRounds = 3;

MTL_HOST_DEVICE inline void fill(double* values, int count, double value) {
  for (int i = 0; i < count; ++i) values[i] = value;
}

// --- weightings -------------------------------------------------------------------------------------------------------

/// MGDA (Sener and Koltun 2018): the weights on the simplex with the smallest w' G w. Zero gradients share the whole weight.
/// Guarantee: (G w)_i >= w' G w - 1e-11 n_i sum_j w_j n_j for every i. All NaN where G is not finite.
///
/// In u_i = n_i w_i the problem is min u' R u with R the cosines and u / n on the simplex; up to scale its solution is the one
/// of min_{u >= 0} u' R u / 2 - u' (1 / n).
MTL_HOST_DEVICE inline void mgda_weights(const double* gram, int size, double* doubles, int* integers, double* weights) {
  if (!all_finite(gram, size * size)) return fill(weights, size, NAN);
  QuadraticProgram program(size, doubles, integers);
  program.set_gram(gram);
  double smallest = INFINITY, total = 0.0;
  for (int i = 0; i < size; ++i) smallest = std::fmin(smallest, program.norm[i]);
  for (int i = 0; i < size; ++i) {
    program.offset[i] = smallest > 0.0 ? -smallest / program.norm[i] : 0.0;
    program.slope[i] = 0.0;
  }
  for (int round = 0; round < kRounds && smallest > 0.0; ++round) {
    program.solve(0.0);
    program.recentre();
  }
  for (int i = 0; i < size; ++i) {
    weights[i] = smallest > 0.0 ? -program.solution[i] * program.offset[i] : program.norm[i] == 0.0;
    total += weights[i];
  }
  for (int i = 0; i < size; ++i) weights[i] /= total;
}

/// CAGrad (Liu et al. 2021, Algorithm 1): 1 / K + c |g_0| / |g_w| w with g_0 the mean gradient and w on the simplex minimising
/// <g_w, g_0> + c |g_0| |g_w|. All 0 where g_0 or the minimising g_w is 0 to the precision of G
/// (a Pareto-stationary point), all NaN where G is not finite.
/// Guarantee: with d the update, <g_i, d> >= <g_w, d> - 1e-11 n_i sum_j |d_j| n_j for every i, d_j its weights. Not kept for c
/// within 1e-12 of 1 where g_w opposes g_0 exactly: the two parts of the update then cancel, and what is left is rounding.
///
/// With v = c |g_0| / |g_w| w and u_i = n_i v_i / |g_0|, optimality reads R u + b - t / n >= 0, complementary to u >= 0, and
/// u' R u = c^2, where R are the cosines and b_i = cos(g_i, g_0). A zero gradient keeps t from becoming positive.
MTL_HOST_DEVICE inline void cagrad_weights(const double* gram, int size, double c, double* doubles, int* integers,
                                           double* weights) {
  if (!all_finite(gram, size * size)) return fill(weights, size, NAN);
  QuadraticProgram program(size, doubles, integers);
  program.set_gram(gram);
  const double* norm = program.norm;
  double smallest = INFINITY, largest = 0.0, mean_square = 0.0, mean_norm = 0.0;
  for (int i = 0; i < size; ++i) {
    largest = std::fmax(largest, norm[i]);
    if (norm[i] > 0.0) smallest = std::fmin(smallest, norm[i]);
  }
  for (int i = 0; i < size; ++i) {  // in units of the largest norm, so that nothing overflows
    double inner = 0.0;
    for (int j = 0; j < size && norm[i] > 0.0; ++j) inner += gram[i * size + j] / norm[i] / largest / size;
    program.offset[i] = inner;
    mean_square += inner * (norm[i] / largest) / size;
    mean_norm += norm[i] / largest / size;
  }
  if (!(mean_square > 8 * DBL_EPSILON * mean_norm * mean_norm)) return fill(weights, size, 0.0);  // less is rounding
  if (c <= 64 * DBL_EPSILON) return fill(weights, size, 1.0 / size);  // the ball is no larger than the rounding of g_0
  const double mean = std::sqrt(mean_square), target = c * c;
  bool any_zero = false;
  for (int i = 0; i < size; ++i) {
    program.offset[i] /= mean;
    program.slope[i] = norm[i] > 0.0 ? smallest / norm[i] : 0.0;
    any_zero = any_zero || norm[i] == 0.0;
  }
  const int first = program.first();
  double t = (program.offset[first] + c) / program.slope[first];  // exact while the first index is alone
  for (int round = 0; round < kRounds; ++round) {
    t = program.reach(target, t, round == 0);
    const bool stationary = (round == 0 && program.negligible(target)) || (any_zero && t >= 0.0);
    if (stationary) return fill(weights, size, 0.0);
    program.recentre();
  }
  double square = 0.0, total = 0.0;  // u' R u as it stands rounds by eps (sum u)^2, through t by eps sum u
  for (int i = 0; i < size; ++i) {
    total += program.solution[i];
    for (int j = 0; j < size; ++j)
      square += program.solution[i] * program.solution[j] * (i == j ? 1.0 : program.matrix[i * size + j]);
  }
  if (total > 1.0) square = program.square(t);
  const double scale = c * mean / std::sqrt(square);
  for (int i = 0; i < size; ++i)
    weights[i] = 1.0 / size + (norm[i] > 0.0 ? scale * program.solution[i] * (largest / norm[i]) : 0.0);
}

}  // namespace mtlkernels
