#pragma once
// Weightings that keep the update from opposing any gradient, or some: each is a quadratic program, or one per task, on the
// cone of combinations with weights that are bounded from below. As in kxk_solvers.h, `gram` may lie at the start of `doubles`;
// `weights` [K] may not.

#include "kxk_solvers.h"

namespace mtlkernels {

/// Solves for `program.offset` at t = 0, whatever was solved before with the same matrix. The offset may have been written just
/// before, by the threads that own its elements.
template <class Team>
MTL_HOST_DEVICE void minimise(QuadraticProgram<Team>& program) {
  for_owned(program.team, 0, program.size, [&](int i) { program.slope[i] = 0.0; });
  program.restart();
  for (int round = 0; round < kRounds; ++round) {
    program.solve(0.0);
    program.recentre();
  }
}

/// The preference of a task; null: they share 1.
MTL_HOST_DEVICE inline double preference_of(const double* preference, int size, int task) {
  return preference ? preference[task] : 1.0 / size;
}

/// UPGrad (Quinton and Rey 2024, equation 3 and proposition 1): the sum over i of the v that minimises v' G v over v >= p_i
/// e_i, which is p_i g_i projected onto the cone of what opposes no gradient. A zero gradient keeps weight p_i. All NaN where G
/// is not finite.
/// Guarantee, with every v and so with their sum: (G v)_j >= -1e-11 n_j sum_k v_k n_k for every j, and no more than that beyond
/// zero where v_j is above its bound.
///
/// With n o v = p_i n_i (e_i + s) and R the cosines, the problem is min_{s >= 0} s' R s / 2 + s' R e_i.
template <class Team>
MTL_HOST_DEVICE void upgrad_weights(const Team& team, const double* gram, int size, const double* preference, double* doubles,
                                    int* integers, double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  QuadraticProgram<Team> program(team, gram, size, doubles, integers);
  const double *norm = program.norm, *matrix = program.matrix;
  for_owned(team, 0, size, [&](int j) { weights[j] = preference_of(preference, size, j); });
  for (int task = 0; task < size; ++task) {
    const double bound = preference_of(preference, size, task) * norm[task];
    if (!(bound > 0.0)) continue;
    for_owned(team, 0, size, [&](int j) { program.offset[j] = j == task ? 1.0 : matrix[task * program.stride + j]; });
    minimise(program);
    for_owned(team, 0, size, [&](int j) { weights[j] += norm[j] > 0.0 ? bound * program.solution[j] / norm[j] : 0.0; });
  }
  team.sync();
}

/// DualProj (Lopez-Paz and Ranzato 2017, equation 11): the v that minimises v' G v over v >= p, which is sum_i p_i g_i
/// projected onto the cone of what opposes no gradient. A zero gradient keeps weight p_i. Guarantee: that of upgrad_weights.
/// All NaN where G is not finite.
///
/// With n o v = b + s, b = p o n and R the cosines, the problem is min_{s >= 0} s' R s / 2 + s' R b.
template <class Team>
MTL_HOST_DEVICE void dualproj_weights(const Team& team, const double* gram, int size, const double* preference, double* doubles,
                                      int* integers, double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  QuadraticProgram<Team> program(team, gram, size, doubles, integers);
  const double *norm = program.norm, *matrix = program.matrix;
  double *bound = program.scratch, largest = 0.0;
  for (int i = 0; i < size; ++i) largest = std::fmax(largest, norm[i]);
  for_owned(team, 0, size, [&](int i) {
    weights[i] = preference_of(preference, size, i);
    bound[i] = largest > 0.0 ? weights[i] * (norm[i] / largest) : 0.0;
  });
  team.sync();
  for_owned(team, 0, size, [&](int i) {
    double inner = 0.0;
    for (int j = 0; j < size; ++j) inner += (i == j ? 1.0 : matrix[i * program.stride + j]) * bound[j];
    program.offset[i] = inner;
  });
  minimise(program);
  for_owned(team, 0, size, [&](int i) { weights[i] += norm[i] > 0.0 ? program.solution[i] * largest / norm[i] : 0.0; });
  team.sync();
}

/// PCD's direction: d' closest to the primary gradient g_0 with <g_j, d'> >= tau_j G_jj for every j > 0, d = |g_0| d' / |d'|;
/// tau [K], tau_0 is not used. The weights of d are e_0 where no d' is within the constraints, and 0 where g_0 or d' is 0 to
/// the precision of G. All NaN where G is not finite. Guarantee: where the weights w are not 0, w_0 > 0, w >= 0 and |d| = |g_0|
/// to the precision of G. Where they are not e_0, either, <g_j, d> >= w_0 tau_j G_jj - 1e-11 n_j sum_k w_k n_k for every j > 0,
/// with no more than that in between where w_j > 0.
///
/// With d' = n_0 (g_0 / n_0 + sum_j u_j g_j / n_j) and R the cosines, the problem is min_{u >= 0} u' R u / 2 + u' b with b_j =
/// R_j0 - tau_j n_j / n_0. Where it has no minimum, the constraints contradict each other: u then grows until the ridge holds
/// it, and u' R u stays behind -u' b, to which it is equal at a minimum.
template <class Team>
MTL_HOST_DEVICE void pcd_weights(const Team& team, const double* gram, int size, const double* tau, double* doubles,
                                 int* integers, double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  QuadraticProgram<Team> program(team, gram, size, doubles, integers);
  const double *norm = program.norm, *solution = program.solution;
  double *along = program.scratch, *inner = program.rate;
  if (!(norm[0] > 0.0)) return fill(team, weights, size, 0.0);
  for_owned(team, 0, size, [&](int j) {  // the primary leaves the program
    along[j] = j > 0 ? program.matrix[j] : 1.0;
    program.offset[j] = j > 0 ? along[j] - tau[j] * norm[j] / norm[0] : 0.0;
    if (j > 0) program.matrix[j] = program.matrix[j * program.stride] = 0.0;
  });
  minimise(program);
  for_owned(team, 0, size, [&](int i) {
    double sum = 0.0;
    for (int j = 0; j < size; ++j) sum += (i == j ? 1.0 : program.matrix[i * program.stride + j]) * solution[j];
    inner[i] = sum;
  });
  team.sync();
  double curvature = 0.0, overlap = 0.0, gain = 0.0, total = 1.0;
  for (int j = 1; j < size; ++j) {
    curvature += solution[j] * inner[j];
    overlap += solution[j] * along[j];
    gain -= solution[j] * program.offset[j];
    total += solution[j];
  }
  if (curvature < gain / 2) {
    for_owned(team, 0, size, [&](int j) { weights[j] = j == 0 ? 1.0 : 0.0; });
    return team.sync();
  }
  const double square = 1.0 + 2 * overlap + curvature;  // |d'|^2 / n_0^2
  if (!(square > 10 * DBL_EPSILON * total * total)) return fill(team, weights, size, 0.0);
  const double scale = 1.0 / std::sqrt(square);
  for_owned(team, 0, size, [&](int j) {
    const double share = norm[j] > 0.0 ? solution[j] * norm[0] / norm[j] : 0.0;
    weights[j] = scale * (j == 0 ? 1.0 : share);
  });
  team.sync();
}

}  // namespace mtlkernels
