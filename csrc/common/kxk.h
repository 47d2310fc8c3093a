#pragma once
// The K x K stage on one Gram matrix of K task gradients: what it tells, and its rows projected off each other. The weights
// are in kxk_solvers.h.
//
// No torch, no containers, no allocation: a team of threads (team.h) is given row-major float64 arrays that all of it sees and
// a workspace, so that the host and a device run the same source (without FMA contraction on either side). Every function is
// called by all threads of the team after a sync of its inputs, and ends with a sync of its results; a returned value is known
// to every thread. Notation: G the Gram, n_i = sqrt(G_ii).

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "team.h"

namespace mtlkernels {

// --- what a Gram tells ------------------------------------------------------------------------------------------------

/// Whether all values are finite.
template <class Team>
MTL_HOST_DEVICE bool all_finite(const Team& team, const double* values, int count) {
  int bad = 0;
  for_owned(team, 0, count, [&](int i) { bad += !(std::fabs(values[i]) <= DBL_MAX); });
  return team.sum(bad) == 0;
}

/// The largest magnitude of values that are finite.
template <class Team>
MTL_HOST_DEVICE double largest_magnitude(const Team& team, const double* values, int count) {
  double negated = 0.0;
  int index = 0;
  for_owned(team, 0, count, [&](int i) { negated = std::fmin(negated, -std::fabs(values[i])); });
  team.first_minimum(negated, index);
  return -negated;
}

/// -1 or 1 beyond them; NaN stays NaN.
MTL_HOST_DEVICE inline double clamp_cosine(double value) { return value > 1.0 ? 1.0 : value < -1.0 ? -1.0 : value; }

/// Cosines [K, K] with rows `stride` apart: unit diagonal, 0 in the row and column of a zero gradient, NaN where a gradient is
/// not finite. `scratch` holds K doubles.
template <class Team, class Result>
MTL_HOST_DEVICE void cosine(const Team& team, const double* gram, int size, Result* result, int stride, double* scratch) {
  for_owned(team, 0, size, [&](int i) {
    const double square = gram[i * size + i];
    scratch[i] = square == 0.0 ? 0.0 : 1.0 / std::sqrt(square);
  });
  team.sync();
  for (int i = 0; i < size; ++i) {
    for_owned(team, 0, size, [&](int j) {
      result[i * stride + j] = static_cast<Result>(clamp_cosine(gram[i * size + j] * scratch[i] * scratch[j]));
    });
  }
  for_owned(team, 0, size, [&](int i) {  // of the thread that has written it
    const double square = gram[i * size + i] * scratch[i] * scratch[i];
    if (square == square) result[i * stride + i] = scratch[i] != 0.0 ? 1 : 0;
  });
  team.sync();
}

/// Gradient magnitude similarity [K, K], 2 n_i n_j / (n_i^2 + n_j^2); 0 where a gradient is 0. `scratch` holds K doubles.
template <class Team, class Result>
MTL_HOST_DEVICE void magnitude_similarity(const Team& team, const double* gram, int size, Result* result, double* scratch) {
  for_owned(team, 0, size, [&](int i) {
    const double square = gram[i * size + i];
    scratch[i] = std::sqrt(square < 0.0 ? 0.0 : square);
  });
  team.sync();
  for (int i = 0; i < size; ++i) {
    for_owned(team, 0, size, [&](int j) {
      const double largest = scratch[i] >= scratch[j] ? scratch[i] : scratch[j] >= scratch[i] ? scratch[j] : NAN;
      const double safe = largest == 0.0 ? 1.0 : largest;
      const double a = scratch[i] / safe, b = scratch[j] / safe;
      const double total = a * a + b * b;
      result[i * size + j] = static_cast<Result>(2 * a * b / (total == 0.0 ? 1.0 : total));
    });
  }
  team.sync();
}

/// Share of the task pairs with G_ij < 0; 0 for a single task.
template <class Team>
MTL_HOST_DEVICE double conflict_rate(const Team& team, const double* gram, int size) {
  int conflicts = 0;
  for (int i = 0; i < size; ++i) {
    for_owned(team, i + 1, size, [&](int j) { conflicts += gram[i * size + j] < 0.0; });
  }
  const int pairs = size * (size - 1) / 2;
  conflicts = team.sum(conflicts);
  return pairs > 0 ? static_cast<double>(conflicts) / pairs : 0.0;
}

/// Turns a symmetric matrix of even size into its eigenvalues, on the diagonal in no order, by cyclic Jacobi rotations (Golub
/// and Van Loan, section 8.5). Errors stay within a few K eps of the largest magnitude; converges quadratically, in 6 to 10
/// sweeps. `rotations` holds K doubles.
///
/// A sweep is K - 1 rounds of K / 2 rotations of disjoint pairs, as of a tournament where the last player keeps its place: the
/// rotations of a round do not depend on each other. All threads call follow(p, q, c, s) for each: rows p and q become
/// c row_p - s row_q and s row_p + c row_q, and the identity under them the eigenvectors.
template <class Team, class Follow>
MTL_HOST_DEVICE void jacobi_rotations(const Team& team, double* matrix, int size, double* rotations, const Follow& follow) {
  constexpr int kMaxSweeps = 40;
  const int pairs = size / 2, players = size - 1;
  double *cosines = rotations, *sines = rotations + pairs;
  // What is left off the diagonal moves no eigenvalue by more than K of it.
  const double negligible = DBL_EPSILON / 16 * largest_magnitude(team, matrix, size * size);
  team.sync();
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    int rotated = 0;
    for (int round = 0; round < players; ++round) {
      const auto left = [=](int pair) { return round + pair < players ? round + pair : round + pair - players; };
      const auto right = [=](int pair) { return pair == 0 ? players : round >= pair ? round - pair : round - pair + players; };
      for_owned(team, 0, pairs, [&](int pair) {
        const int p = left(pair), q = right(pair);
        const double off = matrix[p * size + q], first = matrix[p * size + p], second = matrix[q * size + q];
        cosines[pair] = 1.0;
        sines[pair] = 0.0;
        if (std::fabs(off) <= negligible) return;
        rotated = 1;
        const double theta = (second - first) / (2 * off);
        const double tangent = (theta >= 0 ? 1.0 : -1.0) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
        cosines[pair] = 1 / std::sqrt(tangent * tangent + 1);
        sines[pair] = tangent * cosines[pair];
        matrix[p * size + p] = first - tangent * off;
        matrix[q * size + q] = second + tangent * off;
        matrix[p * size + q] = matrix[q * size + p] = 0.0;
      });
      team.sync();
      for (int a = 0; a < pairs; ++a) {  // the four elements where pair a meets pair b, and their mirror images
        const int p = left(a), q = right(a);
        for_owned(team, a + 1, pairs, [&](int b) {
          const double ca = cosines[a], sa = sines[a], cb = cosines[b], sb = sines[b];
          if (sa == 0.0 && sb == 0.0) return;
          const int r = left(b), s = right(b);
          const double pr = matrix[p * size + r], ps = matrix[p * size + s];
          const double qr = matrix[q * size + r], qs = matrix[q * size + s];
          const double top_r = ca * pr - sa * qr, top_s = ca * ps - sa * qs;
          const double low_r = sa * pr + ca * qr, low_s = sa * ps + ca * qs;
          matrix[p * size + r] = matrix[r * size + p] = cb * top_r - sb * top_s;
          matrix[p * size + s] = matrix[s * size + p] = sb * top_r + cb * top_s;
          matrix[q * size + r] = matrix[r * size + q] = cb * low_r - sb * low_s;
          matrix[q * size + s] = matrix[s * size + q] = sb * low_r + cb * low_s;
        });
        follow(p, q, cosines[a], sines[a]);
      }
      team.sync();
    }
    if (team.sum(rotated) == 0) return;
  }
}

/// Doubles of workspace that condition_number needs for K tasks.
constexpr int64_t condition_doubles(int64_t size) { return (size + size % 2) * (size + size % 2 + 1); }

/// sigma_max / sigma_min of the gradient matrix; inf where lambda_min <= K epsilon lambda_max, NaN where G is not finite.
/// `epsilon` is the precision of the Gram as stored.
template <class Team>
MTL_HOST_DEVICE double condition_number(const Team& team, const double* gram, int size, double epsilon, double* workspace) {
  if (!all_finite(team, gram, size * size)) return NAN;
  const double largest = largest_magnitude(team, gram, size * size);
  if (largest == 0.0) return INFINITY;
  const int even = size + size % 2;  // with a row and column of zeros, which no rotation touches
  for (int i = 0; i < even; ++i) {
    for_owned(team, 0, even,
              [&](int j) { workspace[i * even + j] = i < size && j < size ? gram[i * size + j] / largest : 0.0; });
  }
  team.sync();
  jacobi_rotations(team, workspace, even, workspace + even * even, [](int, int, double, double) {});
  double high = workspace[0], low = workspace[0];
  for (int i = 1; i < size; ++i) {
    high = std::fmax(high, workspace[i * even + i]);
    low = std::fmin(low, workspace[i * even + i]);
  }
  team.sync();
  return low > size * epsilon * high ? std::sqrt(high / low) : INFINITY;
}

// --- projections ------------------------------------------------------------------------------------------------------

/// Row `row` of the coefficients of successive projections (PCGrad, Yu et al. 2020, Algorithm 1): starting from e_row, for each
/// j != row in `order`: c_j -= s_j / G_jj with s = c G, where s_j < 0, or always without `conflict_only`. A zero g_j is
/// skipped. Only the gradients a row is made of move it, so that a NaN stays in its own task. `inner` [K] holds s.
template <class Team>
MTL_HOST_DEVICE void projection_row(const Team& team, const double* gram, int size, int row, const int64_t* order,
                                    int64_t steps, bool conflict_only, double* coefficients, double* inner) {
  for_owned(team, 0, size, [&](int k) {
    coefficients[k] = k == row ? 1.0 : 0.0;
    inner[k] = gram[row * size + k];
  });
  team.sync();
  for (int64_t step = 0; step < steps; ++step) {
    const int j = static_cast<int>(order[step]);
    const double square = gram[j * size + j], along = inner[j];
    if (j == row || !(square > 0.0) || (conflict_only && !(along < 0.0))) continue;
    const double factor = along / square;
    team.sync();  // all have read inner[j]
    if (owns(team, j)) coefficients[j] -= factor;
    for_owned(team, 0, size, [&](int k) { inner[k] -= factor * gram[j * size + k]; });
    team.sync();
  }
  team.sync();
}

}  // namespace mtlkernels
