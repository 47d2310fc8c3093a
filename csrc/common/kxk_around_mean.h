#pragma once
// Weightings whose update stays around the mean gradient: in CAGrad's ball, in ConicGrad's cone. As in kxk_solvers.h, `gram`
// may lie at the start of `doubles`; `weights` [K] may not.
//
// Both go along one path. Of all d with <g_i, d> >= t for every i, the closest to g_0 is d = g_0 + |g_0| sum_i u_i g_i / n_i,
// and with R the cosines and b_i = cos(g_i, g_0) its u is optimal where R u + b - t |g_0| / n >= 0, complementary to u >= 0. As
// t grows, |d - g_0| and the angle between d and g_0 grow, from 0 to those of MGDA's direction; the update is where d reaches
// the boundary of the region. A zero gradient keeps t from becoming positive.

#include "kxk_solvers.h"

namespace mtlkernels {

/// |d - g_0| <= c |g_0|. For QuadraticProgram::reach: what is missing to the boundary, the sizes of the terms of that, half its
/// first and second derivative in t with the sign turned, and a square against which what the ridge changes must be small.
struct Ball {
  double c;
  MTL_HOST_DEVICE double missing(const Path& path) const { return c * c - (path.t * path.gain - path.along); }
  MTL_HOST_DEVICE double terms(const Path& path) const { return c * c + std::fabs(path.t) * path.gain + path.along_terms; }
  MTL_HOST_DEVICE double first(const Path& path) const { return path.gain; }
  MTL_HOST_DEVICE double second(const Path& path) const { return path.gain_rate; }
  MTL_HOST_DEVICE double square(const Path&) const { return c * c; }
};

/// <g_0, d> >= c |g_0| |d|, in units of |g_0| as the ball: <g_0, d> = 1 + along and |d|^2 = <g_0, d> + t gain.
struct Cone {
  double c;
  MTL_HOST_DEVICE static double axial(const Path& path) { return 1.0 + path.along; }
  MTL_HOST_DEVICE double missing(const Path& path) const { return axial(path) * std::fabs(axial(path)) - c * c * square(path); }
  MTL_HOST_DEVICE double terms(const Path& path) const {
    const double along = 1.0 + path.along_terms;
    return std::fabs(axial(path)) * along + c * c * (along + std::fabs(path.t) * path.gain);
  }
  MTL_HOST_DEVICE double first(const Path& path) const {
    return c * c * path.t * path.gain_rate - axial(path) * path.along_rate;
  }
  MTL_HOST_DEVICE double second(const Path& path) const { return c * c * path.gain_rate - path.along_rate * path.along_rate; }
  MTL_HOST_DEVICE double square(const Path& path) const { return axial(path) + path.t * path.gain; }
};

/// The mean gradient of a program's tasks, in units of the largest gradient.
struct MeanGradient {
  double largest, smallest;  // norms of the gradients, the smallest of those that are not 0
  double norm, terms;        // |g_0|, and the mean of the norms that it adds up; |g_0| is 0 where less is rounding
  bool any_zero;             // whether there is a zero gradient
};

/// Sets the program's offset to b, its slope to the smallest norm over each, 0 for a zero gradient.
template <class Team>
MTL_HOST_DEVICE MeanGradient aim_at_mean(QuadraticProgram<Team>& program) {
  const int size = program.size;
  const double *norm = program.norm, *matrix = program.matrix;
  double* relative = program.trial;
  MeanGradient mean{0.0, INFINITY, 0.0, 0.0, false};
  for (int i = 0; i < size; ++i) {
    mean.largest = std::fmax(mean.largest, norm[i]);
    if (norm[i] > 0.0) mean.smallest = std::fmin(mean.smallest, norm[i]);
    mean.any_zero = mean.any_zero || norm[i] == 0.0;
  }
  for_owned(program.team, 0, size, [&](int i) { relative[i] = norm[i] / mean.largest; });  // so that nothing overflows
  program.team.sync();
  for_owned(program.team, 0, size, [&](int i) {
    double inner = 0.0;
    for (int j = 0; j < size; ++j) inner += (i == j ? 1.0 : matrix[i * program.stride + j]) * relative[j];
    program.offset[i] = norm[i] > 0.0 ? inner / size : 0.0;  // <g_i, g_0> / n_i
  });
  program.team.sync();
  double square = 0.0;
  for (int i = 0; i < size; ++i) {
    square += program.offset[i] * relative[i];
    mean.terms += relative[i];
  }
  square /= size;
  mean.terms /= size;
  if (!(square > 8 * DBL_EPSILON * mean.terms * mean.terms)) return mean;
  mean.norm = std::sqrt(square);
  program.team.sync();
  for_owned(program.team, 0, size, [&](int i) {
    program.offset[i] /= mean.norm;
    program.slope[i] = norm[i] > 0.0 ? mean.smallest / norm[i] : 0.0;
  });
  program.team.sync();
  return mean;
}

/// Goes along the path up to the boundary of the region, `radius` away or so; returns the t of it, NaN where the boundary is
/// reached only by combinations that are 0 to the precision of the Gram.
template <class Region, class Team>
MTL_HOST_DEVICE double follow_path(QuadraticProgram<Team>& program, const MeanGradient& mean, const Region& region,
                                   double radius) {
  const int first = program.first();
  const double start = program.offset[first] / program.slope[first];  // u is zero up to it
  double t = (program.offset[first] + radius) / program.slope[first];
  for (int round = 0; round < kRounds; ++round) {
    t = program.reach(region, t, start, mean.any_zero ? 0.0 : INFINITY, round == 0);
    const bool vague = round == 0 && program.negligible(region.square(program.path(t)));
    if (vague || (mean.any_zero && t >= 0.0)) return NAN;
    program.recentre();
  }
  return t;
}

/// CAGrad (Liu et al. 2021, Algorithm 1): 1 / K + c |g_0| / |g_w| w with g_0 the mean gradient and w on the simplex minimising
/// <g_w, g_0> + c |g_0| |g_w|. All 0 where g_0, the minimising g_w or the update is 0 to the precision of G (a
/// Pareto-stationary point; the update can only be where c is 1 or next to it), all NaN where G is not finite. Guarantee: with
/// d the update, <g_i, d> >= <g_w, d> - 1e-11 n_i sum_j |d_j| n_j for every i, d_j its weights.
template <class Team>
MTL_HOST_DEVICE void cagrad_weights(const Team& team, const double* gram, int size, double c, double* doubles, int* integers,
                                    double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  QuadraticProgram<Team> program(team, gram, size, doubles, integers);
  const double *norm = program.norm, *matrix = program.matrix, *solution = program.solution;
  const MeanGradient mean = aim_at_mean(program);
  if (mean.norm == 0.0) return fill(team, weights, size, 0.0);
  if (c <= 64 * DBL_EPSILON) return fill(team, weights, size, 1.0 / size);  // the ball is no larger than the rounding of g_0
  const double t = follow_path(program, mean, Ball{c}, c);
  if (t != t) return fill(team, weights, size, 0.0);
  const Path path = program.path(t);
  double square = t * path.gain - path.along, total = 0.0;  // u' R u as it stands rounds by eps (sum u)^2, so by eps sum u
  for (int i = 0; i < size; ++i) total += solution[i];
  if (total <= 1.0) {
    double* products = program.scratch;
    for_owned(team, 0, size, [&](int i) {
      double inner = 0.0;
      for (int j = 0; j < size; ++j) inner += (i == j ? 1.0 : matrix[i * program.stride + j]) * solution[j];
      products[i] = solution[i] * inner;
    });
    team.sync();
    square = 0.0;
    for (int i = 0; i < size; ++i) square += products[i];
  }
  const double terms = mean.terms / mean.norm + total;
  if (!(1.0 + 2 * path.along + c * c > 16 * DBL_EPSILON * terms * terms)) return fill(team, weights, size, 0.0);
  const double scale = c * mean.norm / std::sqrt(square);
  for_owned(team, 0, size,
            [&](int i) { weights[i] = 1.0 / size + (norm[i] > 0.0 ? scale * solution[i] * (mean.largest / norm[i]) : 0.0); });
  team.sync();
}

/// ConicGrad (Hassanpour et al. 2025): the d in the cone <g_0, d> >= c |g_0| |d| around the mean gradient g_0, 0 <= c <= 1, of
/// norm |g_0|, that maximises min_i <g_i, d>. All 0 at a Pareto-stationary point, where g_0 or what d reaches the boundary with
/// is 0 to the precision of G; all NaN where G is not finite.
/// Guarantee: with d_j the weights of d, g_w the combination of the gradients with the weights' excess over their smallest part
/// d = a g_0 + v, a, v >= 0, w = v / sum v: <g_i, d> >= <g_w, d> - 1e-11 n_i sum_j d_j n_j for every i, and a is 0 or
/// <g_0, d> = c |g_0| |d| to the precision of G.
///
/// MGDA's direction where the cone holds it, and otherwise the path's where it reaches the cone's boundary: a combination of
/// g_0 and a g_v, the solution of max_d lambda min_i <g_i, d> + <g_0, d> over |d| = 1 for the lambda that the boundary takes.
template <class Team>
MTL_HOST_DEVICE void conicgrad_weights(const Team& team, const double* gram, int size, double c, double* doubles, int* integers,
                                       double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  QuadraticProgram<Team> program(team, gram, size, doubles, integers);
  const double *norm = program.norm, *solution = program.solution;
  const MeanGradient mean = aim_at_mean(program);
  if (mean.norm == 0.0) return fill(team, weights, size, 0.0);
  const double sine_square = (1.0 - c) * (1.0 + c);
  if (sine_square <= 64 * DBL_EPSILON) return fill(team, weights, size, 1.0 / size);  // an angle below the rounding of g_0
  double own = 0.0, length = 0.0;                                                     // d = own g_0 + |g_0| u / length
  if (!mean.any_zero) {
    double* along = program.scratch;
    for_owned(team, 0, size, [&](int i) {
      along[i] = program.offset[i];
      program.offset[i] = 0.0;
    });
    for (int round = 0; round < kRounds; ++round) {  // MGDA: min u' R u / 2 - slope' u
      program.solve(1.0);
      program.recentre();
    }
    const double square = program.path(1.0).gain;
    double inner = 0.0;
    for (int i = 0; i < size; ++i) inner += solution[i] * along[i];
    length = std::sqrt(square);
    if (program.negligible(square) || !(inner >= c * length)) length = 0.0;
    team.sync();  // all have read the solution
    for_owned(team, 0, size, [&](int i) { program.offset[i] = along[i]; });
  }
  if (length == 0.0) {
    program.restart();
    const Cone cone{c};
    const double t = follow_path(program, mean, cone, std::sqrt(sine_square));
    if (t != t) return fill(team, weights, size, 0.0);
    length = std::sqrt(cone.square(program.path(t)));
    own = 1.0 / (size * length);
  }
  for_owned(team, 0, size, [&](int i) {
    weights[i] = own + (norm[i] > 0.0 ? mean.norm / length * solution[i] * (mean.largest / norm[i]) : 0.0);
  });
  team.sync();
}

}  // namespace mtlkernels
