#pragma once
// The weights of an equilibrium, G w = w^(-1 / alpha), for a team of threads as in kxk.h.

#include "kxk_solvers.h"

namespace mtlkernels {

/// x^y for x > 0, with a relative error of a few eps (1 + |y log2 x|) and the same bits on every machine, which the libraries'
/// pow does not have. No infinity: results end at 2^-1021 and 2^1023.
MTL_HOST_DEVICE inline double power(double x, double y) {
  if (y == 1.0) return x;
  if (y == -1.0) return 1.0 / x;
  constexpr double kLn2 = 0.69314718055994530942, kSqrt2 = 1.41421356237309504880;
  int exponent = 0;
  double mantissa = std::frexp(x, &exponent) * 2.0;  // 1 to 2
  exponent -= 1;
  if (mantissa > kSqrt2) {
    mantissa *= 0.5;
    exponent += 1;
  }
  const double s = (mantissa - 1.0) / (mantissa + 1.0), square = s * s;
  double series = 0.0;  // log m = 2 atanh s = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), s^2 < 0.0295
  for (int k = 10; k >= 0; --k) series = series * square + 1.0 / (2 * k + 1);
  const double whole = std::fmin(std::fmax(y * exponent, -4000.0), 4000.0);
  const double rounded = std::floor(whole + 0.5);
  const double part = (whole - rounded) * kLn2 + y * (2.0 * s * series);
  const double again = std::fmin(std::fmax(std::floor(part / kLn2 + 0.5), -4000.0), 4000.0);
  const double rest = part - again * kLn2;  // at most log(2) / 2, or NaN
  double exponential = 1.0;
  for (int k = 14; k >= 1; --k) exponential = 1.0 + rest * exponential / k;
  return std::ldexp(exponential, static_cast<int>(std::fmin(std::fmax(rounded + again, -1021.0), 1023.0)));
}

/// Doubles of workspace that the equilibrium needs for K tasks.
MTL_HOST_DEVICE constexpr int64_t equilibrium_doubles(int64_t size) { return 2 * size * solver_stride(size) + 7 * size; }

/// FairGrad (Ban and Ji 2024, equation 4): the w > 0 with (G w)_i = w_i^(-1 / alpha); alpha = 1 is Nash-MTL (Navon et al. 2022,
/// equation 2). A zero gradient gets weight 0. All 0 where some w >= 0 has G w = 0 to the precision of G (a Pareto-stationary
/// point: there is no equilibrium), all NaN where G is not finite.
/// Guarantee: |(G w)_i - w_i^(-1 / alpha)| <= 1e-11 n_i sum_j w_j n_j for every i with a gradient, for norms within
/// 10^(100 min(alpha, 1 / alpha)) of each other.
///
/// With p = 1 / alpha, u = n o w and R the cosines, (R u)_i = a_i u_i^-p with a_i = n_i^(p - 1) minimises the convex function
/// u' R u / 2 - sum_i a_i u_i^(1 - p) / (1 - p), or - sum_i log u_i. Newton's step in units of u, e, solves
/// (D R D + p A) e = A - D R u with D = diag(u) and A = diag(a_i u_i^(1 - p)). The second derivative along it grows at most as
/// (1 - t m)^(-p - 1) with m the largest -e_i, so that t = 1 / (1 + m (1 + max(p, 1)) / 2) never passes the minimum: the value
/// falls with every step, from anywhere, and convergence is quadratic. R gets the ridge and the proximal point steps of
/// QuadraticProgram.
template <class Team>
struct Equilibrium {
  Team team;
  int size, stride;
  double exponent, ridge;                    // p
  double *factor, *matrix;                   // [K, K] lower Cholesky factor, with reciprocal pivots; M = R + ridge
  double *norm, *solution, *centre, *scale;  // [K] n, u, where the ridge pulls u to, a (0: no gradient)
  double *step, *product, *barrier;          // [K] e; u_i (M u - ridge centre)_i; A

  MTL_HOST_DEVICE Equilibrium(const Team& threads, const double* gram, int tasks, double p, double* doubles)
      : team(threads),
        size(tasks),
        stride(solver_stride(tasks)),
        exponent(p),
        ridge(64 * tasks * DBL_EPSILON),
        factor(doubles),
        matrix(factor + size * stride),
        norm(matrix + size * stride),
        solution(norm + size),
        centre(solution + size),
        scale(centre + size),
        step(scale + size),
        product(step + size),
        barrier(product + size) {
    ridged_cosines(team, gram, size, ridge, matrix, norm, step);
    for_owned(team, 0, size, [&](int i) { centre[i] = 0.0; });
    team.sync();
  }

  MTL_HOST_DEVICE bool there(int i) const { return scale[i] > 0.0; }

  /// Leaves u_i (M u - ridge centre)_i in `product` and a_i u_i^(1 - p) in `barrier`; returns whether they are equal to
  /// rounding.
  MTL_HOST_DEVICE bool balance() {
    double total = 0.0;
    for (int j = 0; j < size; ++j) total += solution[j];
    int apart = 0;
    for_owned(team, 0, size, [&](int i) {
      if (!there(i)) return;
      double inner = -ridge * centre[i];
      for (int j = 0; j < size; ++j) inner += matrix[i * stride + j] * solution[j];
      product[i] = solution[i] * inner;
      barrier[i] = exponent == 1.0 ? 1.0 : scale[i] * power(solution[i], 1.0 - exponent);
      apart += !(std::fabs(barrier[i] - product[i]) <= 4 * DBL_EPSILON * (solution[i] * total + barrier[i]));
    });
    apart = team.sum(apart);
    team.sync();
    return apart == 0;
  }

  /// Replaces `step`, D R u - A there and 0 elsewhere, by Newton's step.
  MTL_HOST_DEVICE void newton() {
    for_owned(team, 0, size, [&](int i) {
      step[i] = there(i) ? barrier[i] - product[i] : 0.0;
      for (int j = 0; j < i; ++j) factor[i * stride + j] = solution[i] * matrix[i * stride + j] * solution[j];
      factor[i * stride + i] = there(i) ? solution[i] * matrix[i * stride + i] * solution[i] + exponent * barrier[i] : 1.0;
    });
    team.sync();
    for (int p = 0; p < size; ++p) {  // right-looking, and the right-hand side with it
      const double pivot = factor[p * stride + p], least = there(p) ? ridge * solution[p] * solution[p] : 1.0;
      const double reciprocal = 1.0 / std::sqrt(pivot > least ? pivot : least);  // rounding may leave less
      const double value = step[p] * reciprocal;
      team.sync();  // all have read row p
      for_owned(team, p, size, [&](int i) {
        if (i == p) {
          factor[p * stride + p] = reciprocal;
          step[p] = value;
        } else {
          factor[i * stride + p] *= reciprocal;
          step[i] -= factor[i * stride + p] * value;
        }
      });
      team.sync();
      for_owned(team, p + 1, size, [&](int i) {
        const double left = factor[i * stride + p];
        for (int j = p + 1; j <= i; ++j) factor[i * stride + j] -= left * factor[j * stride + p];
      });
      team.sync();
    }
    for (int p = size - 1; p >= 0; --p) {
      const double value = step[p] * factor[p * stride + p];
      team.sync();
      for_owned(team, 0, p + 1, [&](int i) { step[i] = i == p ? value : step[i] - factor[p * stride + i] * value; });
      team.sync();
    }
  }

  /// Minimises from the solution that there is.
  MTL_HOST_DEVICE void solve() {
    const double curve = 0.5 * (1.0 + (exponent > 1.0 ? exponent : 1.0));
    const int max_steps = 200;  // several times what the hardest problems take
    for (int count = 0; count < max_steps && !balance(); ++count) {
      newton();
      double lowest = 0.0, largest = 0.0;
      for (int i = 0; i < size; ++i) {
        lowest = step[i] < lowest ? step[i] : lowest;
        largest = std::fabs(step[i]) > largest ? std::fabs(step[i]) : largest;
      }
      const double length = 1.0 / (1.0 - curve * lowest);
      for_owned(team, 0, size, [&](int i) { solution[i] += length * step[i] * solution[i]; });
      team.sync();
      if (largest <= 1e-9) return;  // the next would change the last bit
    }
  }

  /// Leaves the solution in `solution`, in units where the largest a is 1; false where there is none.
  MTL_HOST_DEVICE bool find(double unit) {
    for_owned(team, 0, size, [&](int i) {
      scale[i] = norm[i] > 0.0 ? std::fmax(power(norm[i] / unit, exponent - 1.0), DBL_MIN) : 0.0;
      if (exponent == 1.0 && norm[i] > 0.0) scale[i] = 1.0;
      solution[i] = there(i) ? power(scale[i], 1.0 / (1.0 + exponent)) : 0.0;
    });
    team.sync();
    bool solved = true;
    for (int round = 0; round < kRounds && solved; ++round) {
      solve();
      double target = 0.0, square = 0.0;
      for (int i = 0; i < size; ++i) {
        if (there(i)) target += exponent == 1.0 ? 1.0 : scale[i] * power(solution[i], 1.0 - exponent);
        square += solution[i] * solution[i];
      }
      solved = round > 0 || !(ridge * square > 1e-3 * target);  // the ridge shows in u' M u: M u is 0 to the precision of G
      team.sync();
      for_owned(team, 0, size, [&](int i) { centre[i] = solution[i]; });
      team.sync();
    }
    return solved;
  }
};

/// See Equilibrium. `gram` may lie at the start of `doubles`; `weights` [K] may not.
template <class Team>
MTL_HOST_DEVICE void fairgrad_weights(const Team& team, const double* gram, int size, double alpha, double* doubles,
                                      double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  const double exponent = 1.0 / alpha;
  Equilibrium<Team> equilibrium(team, gram, size, exponent, doubles);
  double largest = 0.0, smallest = INFINITY;
  for (int i = 0; i < size; ++i) {
    if (!(equilibrium.norm[i] > 0.0)) continue;
    largest = std::fmax(largest, equilibrium.norm[i]);
    smallest = std::fmin(smallest, equilibrium.norm[i]);
  }
  if (largest == 0.0) return fill(team, weights, size, 0.0);
  const double unit = exponent < 1.0 ? smallest : largest;
  if (!equilibrium.find(unit)) return fill(team, weights, size, 0.0);
  const double factor = exponent == 1.0 ? 1.0 : power(unit, (exponent - 1.0) / (exponent + 1.0));
  for_owned(team, 0, size,
            [&](int i) { weights[i] = equilibrium.there(i) ? equilibrium.solution[i] * factor / equilibrium.norm[i] : 0.0; });
  team.sync();
}

}  // namespace mtlkernels
