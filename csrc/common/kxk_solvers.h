#pragma once
// The K x K stage: the weights that a Gram gives, for a team of threads as in kxk.h.

#include "kxk.h"

namespace mtlkernels {

// --- the quadratic program --------------------------------------------------------------------------------------------

/// Between the rows of a solver's matrices: odd, so that threads that read a column meet in no bank of shared memory.
MTL_HOST_DEVICE constexpr int solver_stride(int size) { return size | 1; }

/// Doubles and integers of workspace that a quadratic program needs for K tasks.
MTL_HOST_DEVICE constexpr int64_t program_doubles(int64_t size) { return 2 * size * (size | 1) + 8 * size; }
MTL_HOST_DEVICE constexpr int64_t program_integers(int64_t size) { return 2 * size; }

/// M = R + ridge [K, K], R the cosines of the gradients with unit diagonal, and their norms. Ends without a sync: elements have
/// their owners. `scratch` holds K doubles.
template <class Team>
MTL_HOST_DEVICE void ridged_cosines(const Team& team, const double* gram, int size, double ridge, double* matrix, double* norm,
                                    double* scratch) {
  const int stride = solver_stride(size);
  cosine(team, gram, size, matrix, stride, scratch);
  for_owned(team, 0, size, [&](int i) {
    norm[i] = gram[i * size + i] > 0.0 ? std::sqrt(gram[i * size + i]) : 0.0;
    matrix[i * stride + i] = 1.0 + ridge;
  });
}

/// Sums over a solution u at t: slope' u, offset' u, the sizes of what the latter adds up, and the derivatives of both in t.
/// u' R u = t gain - along.
struct Path {
  double t, gain, along, along_terms, gain_rate, along_rate;
};

/// min_{u >= 0} u' R u / 2 - right(t)' u with right(t) = t slope - offset and R positive semidefinite with unit diagonal.
///
/// R is solved with a ridge of 64 K eps on its diagonal, which exceeds the rounding error of a Gram and its factor, so that
/// M = R + ridge is positive definite; where R has several solutions, any may come out. `recentre` then takes the ridge's pull
/// from zero to the last solution, a proximal point step: what the ridge changed shrinks by ridge / (eigenvalue + ridge).
///
/// One solve is Lawson and Hanson's active-set method (1974, chapter 23) on the normal equations: u stays feasible and the
/// value falls with every step, from whatever u and positive set the last solve left. At the solution
/// z = M u - right(t) - ridge centre is not negative, and zero where u is positive.
///
/// Every thread of the team holds a copy of the program, and calls its functions alike.
template <class Team>
struct QuadraticProgram {
  Team team;
  int size, stride;
  double ridge;
  double* factor;          // U [K, K], M = U' U over the positive indices in the order they came; the pivots are reciprocals
  double* matrix;          // M [K, K]
  double *offset, *slope;  // [K]
  double* solution;        // [K] u
  double* centre;          // [K] where the ridge pulls u to
  double *trial, *rate;    // [K] by position in the order: the minimiser without u >= 0, and its derivative in t
  double *norm, *scratch;  // [K] norms of the gradients; free for use
  int* order;              // [K] position -> index; positions from `count` on hold the indices where u is zero
  int* rejected;           // [K] whether rounding alone made an index look promising
  int count;               // positive indices

  /// Sets M to the cosines of the gradients plus the ridge, and `norm` to their norms. The Gram may lie at the start of
  /// `doubles`: the factor takes that place when it is no longer needed.
  MTL_HOST_DEVICE QuadraticProgram(const Team& threads, const double* gram, int tasks, double* doubles, int* integers)
      : team(threads),
        size(tasks),
        stride(solver_stride(tasks)),
        ridge(64 * tasks * DBL_EPSILON),
        factor(doubles),
        matrix(factor + size * stride),
        offset(matrix + size * stride),
        slope(offset + size),
        solution(slope + size),
        centre(solution + size),
        trial(centre + size),
        rate(trial + size),
        norm(rate + size),
        scratch(norm + size),
        order(integers),
        rejected(order + size),
        count(0) {
    ridged_cosines(team, gram, size, ridge, matrix, norm, scratch);
    restart();
  }

  /// Forgets the solution.
  MTL_HOST_DEVICE void restart() {
    count = 0;
    for_owned(team, 0, size, [&](int i) {
      solution[i] = centre[i] = 0.0;
      order[i] = i;
    });
    team.sync();
  }

  MTL_HOST_DEVICE void recentre() {
    for_owned(team, 0, size, [&](int i) { centre[i] = solution[i]; });
    team.sync();
  }

  MTL_HOST_DEVICE double right(int i, double t) const { return t * slope[i] - offset[i]; }

  /// Solves U' y = x over the first `end` positions, in place.
  MTL_HOST_DEVICE void forward(double* x, int end) {
    for (int p = 0; p < end; ++p) {
      const double value = x[p] * factor[p * stride + p];
      for_owned(team, p + 1, end, [&](int q) { x[q] -= factor[p * stride + q] * value; });
      team.sync();
    }
    for_owned(team, 0, end, [&](int p) { x[p] *= factor[p * stride + p]; });
    team.sync();
  }

  /// Solves M x = right-hand side over the positive indices, by position, in place.
  MTL_HOST_DEVICE void substitute(double* x) {
    forward(x, count);
    for (int p = count - 1; p >= 0; --p) {
      const double value = x[p] * factor[p * stride + p];
      for_owned(team, 0, p, [&](int q) { x[q] -= factor[q * stride + p] * value; });
      team.sync();
    }
    for_owned(team, 0, count, [&](int p) { x[p] *= factor[p * stride + p]; });
    team.sync();
  }

  /// Makes the index at `place`, where u is zero, the last of the positive ones.
  MTL_HOST_DEVICE void enter(int place) {
    const int last = count, entering = order[place], displaced = order[last];
    team.sync();
    if (owns(team, last)) {
      order[place] = displaced;
      order[last] = entering;
    }
    for_owned(team, 0, last, [&](int p) { trial[p] = matrix[entering * stride + order[p]]; });
    team.sync();
    forward(trial, last);
    double rest = matrix[entering * stride + entering];
    for (int p = 0; p < last; ++p) rest -= trial[p] * trial[p];
    for_owned(team, 0, last, [&](int p) { factor[p * stride + last] = trial[p]; });
    if (owns(team, last)) factor[last * stride + last] = 1.0 / std::sqrt(std::fmax(rest, ridge));  // rounding may leave less
    ++count;
    team.sync();
  }

  /// Sets u to zero at the positive index at `place`.
  MTL_HOST_DEVICE void leave(int place) {
    const int leaving = order[place];
    --count;
    for (int begin = place; begin <= count; begin += Team::size) {
      const int p = begin + team.rank(), next = p < count ? order[p + 1] : leaving;
      team.sync();
      if (p <= count) order[p] = next;
      team.sync();
    }
    if (owns(team, leaving)) solution[leaving] = 0.0;
    for_owned(team, 0, place, [&](int p) {
      for (int q = place; q < count; ++q) factor[p * stride + q] = factor[p * stride + q + 1];
    });
    double* row = trial;  // of the factor: it leaves, and rotations work it into those below
    for_owned(team, place, count, [&](int q) { row[q] = factor[place * stride + q + 1]; });
    team.sync();
    for (int p = place; p < count; ++p) {
      const double reciprocal = factor[(p + 1) * stride + p + 1], tangent = row[p] * reciprocal;
      const double cosine = 1.0 / std::sqrt(1.0 + tangent * tangent), sine = tangent * cosine;
      for_owned(team, p + 1, count, [&](int q) {
        const double below = factor[(p + 1) * stride + q + 1], rest = row[q];
        factor[p * stride + q] = cosine * below + sine * rest;
        row[q] = cosine * rest - sine * below;
      });
      if (owns(team, p)) factor[p * stride + p] = reciprocal * cosine;
      team.sync();
    }
  }

  /// The place of the zero index with the most negative z, -1 where none is below rounding error.
  MTL_HOST_DEVICE int candidate(double t) const {
    double total = 0.0, lowest = 0.0;
    for (int p = 0; p < count; ++p) total += solution[order[p]];
    int best = -1;
    for_owned(team, count, size, [&](int place) {
      const int i = order[place];
      double z = -right(i, t) - ridge * centre[i];
      for (int p = 0; p < count; ++p) z += matrix[i * stride + order[p]] * solution[order[p]];
      const double rounding = 2 * size * DBL_EPSILON * (total + std::fabs(offset[i]) + std::fabs(t * slope[i]));
      if (z < -rounding && z < lowest && !rejected[i]) {
        lowest = z;
        best = place;
      }
    });
    team.first_minimum(lowest, best);
    team.sync();
    return best;
  }

  /// Leaves the solution at t in `solution`.
  MTL_HOST_DEVICE void solve(double t) {
    for_owned(team, 0, size, [&](int i) { rejected[i] = 0; });
    int newest = -1;
    const int max_steps = 16 * size + 64;  // several times what the hardest problems take
    for (int step = 0; step < max_steps; ++step) {
      for_owned(team, 0, count, [&](int p) { trial[p] = right(order[p], t) + ridge * centre[order[p]]; });
      team.sync();
      substitute(trial);
      double length = INFINITY;
      int blocking = -1;
      for_owned(team, 0, count, [&](int p) {
        if (trial[p] > 0.0) return;
        const double u = solution[order[p]], reach = u > 0.0 ? u / (u - trial[p]) : 0.0;
        if (reach < length) {
          length = reach;
          blocking = p;
        }
      });
      team.first_minimum(length, blocking);
      if (blocking < 0) length = 1.0;
      for_owned(team, 0, count, [&](int p) { solution[order[p]] += length * (trial[p] - solution[order[p]]); });
      team.sync();
      if (blocking >= 0) {
        const int leaving = order[blocking];
        if (leaving == newest && owns(team, leaving)) rejected[leaving] = 1;
        leave(blocking);
        continue;
      }
      const int place = candidate(t);
      if (place < 0) return;
      newest = order[place];
      enter(place);
    }
  }

  /// Whether the ridge shows in u' M u or whatever else is of the size `target`: then M u is 0 to the precision of the Gram.
  MTL_HOST_DEVICE bool negligible(double target) const {
    double sum = 0.0;
    for (int i = 0; i < size; ++i) sum += solution[i] * solution[i];
    return ridge * sum > 1e-3 * target;
  }

  /// The index that becomes positive first as t grows, at t = offset / slope; there is one with a positive slope.
  MTL_HOST_DEVICE int first() const {
    double earliest = INFINITY;
    int best = -1;
    for_owned(team, 0, size, [&](int i) {
      if (!(slope[i] > 0.0)) return;
      const double start = std::fmin(offset[i] / slope[i], DBL_MAX);  // never NaN, and below the infinity of none
      if (start < earliest) {
        earliest = start;
        best = i;
      }
    });
    team.first_minimum(earliest, best);
    return best;
  }

  /// Sums over the solution u at t: what `reach` knows of it.
  MTL_HOST_DEVICE Path path(double t) const {
    Path sums{t, 0.0, 0.0, 0.0, 0.0, 0.0};
    for (int p = 0; p < count; ++p) {
      const int i = order[p];
      sums.gain += solution[i] * slope[i];
      sums.along += solution[i] * offset[i];
      sums.along_terms += solution[i] * std::fabs(offset[i]);
    }
    return sums;
  }

  /// Solves for the t where the solution reaches the boundary of a region, beginning at t and above `start`; returns that t.
  /// What is missing to the boundary falls as t grows, and is piecewise quadratic: each step solves the current piece exactly,
  /// within a bracket that is halved every fourth step. It gives up past `end`, and with `stop_early` where the result will be
  /// negligible.
  template <class Region>
  MTL_HOST_DEVICE double reach(const Region& region, double t, double start, double end, bool stop_early) {
    double low = start, high = INFINITY;
    const int max_steps = 400;
    for (int step = 0; step < max_steps; ++step) {
      solve(t);
      Path sums = path(t);
      const double missing = region.missing(sums);
      if (std::fabs(missing) <= 4 * DBL_EPSILON * region.terms(sums)) break;
      if (missing > 0.0 && (t >= end || (stop_early && negligible(region.square(sums))))) break;
      (missing > 0.0 ? low : high) = t;
      differentiate(sums);
      const double first = region.first(sums), second = region.second(sums);
      double next = t + missing / (first + std::sqrt(std::fmax(first * first + second * missing, 0.0)));
      const double halved = high < INFINITY ? low + (high - low) / 2 : t + (t - start);
      if (!(next > low && next < high) || (step % 4 == 3 && high < INFINITY)) next = halved;
      if (next <= low || next >= high) break;
      t = next;
    }
    return t;
  }

  /// The derivatives in t if the positive set stays as it is.
  MTL_HOST_DEVICE void differentiate(Path& sums) {
    for_owned(team, 0, count, [&](int p) { rate[p] = slope[order[p]]; });
    team.sync();
    substitute(rate);
    for (int p = 0; p < count; ++p) {
      sums.gain_rate += rate[p] * slope[order[p]];
      sums.along_rate += rate[p] * offset[order[p]];
    }
  }
};

/// Solves per problem: one, and proximal point steps.
constexpr int kRounds = 3;

/// All threads leave with every value set.
template <class Team>
MTL_HOST_DEVICE void fill(const Team& team, double* values, int count, double value) {
  for_owned(team, 0, count, [&](int i) { values[i] = value; });
  team.sync();
}

// --- weightings -------------------------------------------------------------------------------------------------------
// `gram` may lie at the start of `doubles`; `weights` [K] may not.

/// MGDA (Sener and Koltun 2018): the weights on the simplex with the smallest w' G w. Zero gradients share the whole weight.
/// Guarantee: (G w)_i >= w' G w - 1e-11 n_i sum_j w_j n_j for every i. All NaN where G is not finite.
///
/// In u_i = n_i w_i the problem is min u' R u with R the cosines and u / n on the simplex; up to scale its solution is the one
/// of min_{u >= 0} u' R u / 2 - u' (1 / n).
template <class Team>
MTL_HOST_DEVICE void mgda_weights(const Team& team, const double* gram, int size, double* doubles, int* integers,
                                  double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  QuadraticProgram<Team> program(team, gram, size, doubles, integers);
  double smallest = INFINITY, total = 0.0;
  for (int i = 0; i < size; ++i) smallest = std::fmin(smallest, program.norm[i]);
  for_owned(team, 0, size, [&](int i) {
    program.offset[i] = smallest > 0.0 ? -smallest / program.norm[i] : 0.0;
    program.slope[i] = 0.0;
  });
  team.sync();
  for (int round = 0; round < kRounds && smallest > 0.0; ++round) {
    program.solve(0.0);
    program.recentre();
  }
  double* shares = program.scratch;
  for_owned(team, 0, size,
            [&](int i) { shares[i] = smallest > 0.0 ? -program.solution[i] * program.offset[i] : program.norm[i] == 0.0; });
  team.sync();
  for (int i = 0; i < size; ++i) total += shares[i];
  for_owned(team, 0, size, [&](int i) { weights[i] = shares[i] / total; });
  team.sync();
}

}  // namespace mtlkernels
