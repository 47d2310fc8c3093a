#pragma once
// The K x K stage: weights that are spectral functions of a Gram or of its cosines, for a team of threads as in kxk.h.

#include "kxk_solvers.h"

namespace mtlkernels {

/// Doubles of workspace that a spectrum needs for K tasks.
MTL_HOST_DEVICE constexpr int64_t spectral_doubles(int64_t size) {
  return 2 * (size + size % 2) * (size + size % 2) + 4 * (size + size % 2);
}

/// A positive semidefinite matrix, by its eigenvectors and those eigenvalues that are not 0 to its precision: above
/// K epsilon times the largest. Every thread of the team holds a copy, and calls its functions alike.
template <class Team>
struct Spectrum {
  Team team;
  int size, stride;     // of the rows: K made even, with a row and column of zeros, which no rotation touches
  double tolerance;     // K epsilon
  double* vectors;      // [stride, stride] eigenvectors in rows
  double* matrix;       // [stride, stride] the matrix, then its eigenvalues on the diagonal
  double* along;        // [stride] components of p along the eigenvectors, 0 where the eigenvalue is
  double* coefficient;  // [stride] those of the vector sought
  double *norm, *scratch;
  double largest = 0.0, smallest = 0.0;  // eigenvalues that are not 0; 0 where there are none

  /// The Gram may lie at the start of `doubles`, where the vectors take its place in `decompose`: until then it is to be turned
  /// into `matrix`.
  MTL_HOST_DEVICE Spectrum(const Team& threads, int tasks, double epsilon, double* doubles)
      : team(threads),
        size(tasks),
        stride(tasks + tasks % 2),
        tolerance(tasks * epsilon),
        vectors(doubles),
        matrix(vectors + stride * stride),
        along(matrix + stride * stride),
        coefficient(along + stride),
        norm(coefficient + stride),
        scratch(norm + stride) {}

  /// `matrix` becomes the cosines of the gradients, `norm` their norms.
  MTL_HOST_DEVICE void decompose_cosines(const double* gram) {
    cosine(team, gram, size, matrix, stride, scratch);
    for_owned(team, 0, size, [&](int i) { norm[i] = gram[i * size + i] > 0.0 ? std::sqrt(gram[i * size + i]) : 0.0; });
    decompose();
  }

  /// `matrix` becomes the Gram in units of its largest entry, so that nothing overflows.
  MTL_HOST_DEVICE void decompose_gram(const double* gram) {
    const double unit = largest_magnitude(team, gram, size * size);
    for (int i = 0; i < size; ++i) {
      for_owned(team, 0, size, [&](int j) { matrix[i * stride + j] = unit > 0.0 ? gram[i * size + j] / unit : 0.0; });
    }
    decompose();
  }

  MTL_HOST_DEVICE void decompose() {
    team.sync();  // all have read the Gram
    for (int i = 0; i < stride; ++i) {
      for_owned(team, 0, stride, [&](int j) {
        vectors[i * stride + j] = i == j ? 1.0 : 0.0;
        if (i >= size || j >= size) matrix[i * stride + j] = 0.0;
      });
    }
    team.sync();
    jacobi_rotations(team, matrix, stride, along, [&](int p, int q, double c, double s) {
      if (s == 0.0) return;
      for_owned(team, 0, stride, [&](int k) {
        const double first = vectors[p * stride + k], second = vectors[q * stride + k];
        vectors[p * stride + k] = c * first - s * second;
        vectors[q * stride + k] = s * first + c * second;
      });
    });
    for (int r = 0; r < stride; ++r) largest = std::fmax(largest, eigenvalue(r));
    smallest = largest;
    for (int r = 0; r < stride; ++r) smallest = kept(r) ? std::fmin(smallest, eigenvalue(r)) : smallest;
  }

  MTL_HOST_DEVICE double eigenvalue(int r) const { return matrix[r * stride + r]; }

  MTL_HOST_DEVICE bool kept(int r) const { return eigenvalue(r) > tolerance * largest; }

  /// Sets `along` to the components of the vector of task -> p(task), and `coefficient` to change(component, eigenvalue).
  template <class Vector, class Change>
  MTL_HOST_DEVICE void project(const Vector& p, const Change& change) {
    for_owned(team, 0, stride, [&](int r) {
      double inner = 0.0;
      for (int k = 0; k < size; ++k) inner += vectors[r * stride + k] * p(k);
      along[r] = kept(r) ? inner : 0.0;
      coefficient[r] = kept(r) ? change(inner, eigenvalue(r)) : 0.0;
    });
    team.sync();
  }

  /// The same with `coefficient` that of the pseudo-inverse times the vector.
  template <class Vector>
  MTL_HOST_DEVICE void project(const Vector& p) {
    project(p, [](double component, double eigenvalue) { return component / eigenvalue; });
  }

  /// Task i of the vector with these components.
  MTL_HOST_DEVICE double task(const double* components, int i) const {
    double sum = 0.0;
    for (int r = 0; r < stride; ++r) sum += components[r] * vectors[r * stride + i];
    return sum;
  }

  /// Whether what is projected of a vector of this length is rounding.
  MTL_HOST_DEVICE bool negligible(double length_square) const {
    double sum = 0.0;
    for (int r = 0; r < stride; ++r) sum += along[r] * along[r];
    return !(sum > 16 * tolerance * tolerance * length_square);
  }

  /// The eigenvalue in the middle of those that are not 0, of two the lower; at least one is not. Uses `scratch`.
  MTL_HOST_DEVICE double median() const {
    int count = 0;
    for (int r = 0; r < stride; ++r) count += kept(r);
    for_owned(team, 0, stride, [&](int r) {
      int below = 0;
      for (int other = 0; other < stride; ++other)
        below += kept(other) && (eigenvalue(other) < eigenvalue(r) || (eigenvalue(other) == eigenvalue(r) && other < r));
      if (kept(r) && below == (count - 1) / 2) scratch[0] = eigenvalue(r);
    });
    team.sync();
    return scratch[0];
  }
};

// --- weightings -------------------------------------------------------------------------------------------------------
// `gram` may lie at the start of `doubles`; `weights` [K] may not. Eigenvalues up to K epsilon times the largest count as 0,
// where `epsilon` is the precision of the Gram. All weights are NaN where G is not finite.

/// ConFIG (Liu et al. 2024, equation 2): (sum_i <g_i, v>) v / |v|^2 with v = pinv(U) p, U the unit gradients in rows and p the
/// `preference` [K], null: 1. All 0 where no direction has such projections, as for opposite gradients.
/// Guarantee: <u_i, d> = s (P p)_i for one s and every g_i != 0 to 1e-12 sum_j |d_j| n_j, with P the projector onto the range
/// of the cosines R, the identity for independent gradients.
///
/// a = pinv(R) p, v = sum_i a_i u_i, |v|^2 = p' a, <g_i, v> = n_i (P p)_i.
template <class Team>
MTL_HOST_DEVICE void config_weights(const Team& team, const double* gram, int size, double epsilon, const double* preference,
                                    double* doubles, double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  Spectrum<Team> spectrum(team, size, epsilon, doubles);
  spectrum.decompose_cosines(gram);
  const auto p = [=](int i) { return preference ? preference[i] : 1.0; };
  spectrum.project(p);
  const double* norm = spectrum.norm;
  double longest = 0.0, length_square = 0.0, square = 0.0, total = 0.0;
  for (int i = 0; i < size; ++i) {
    longest = std::fmax(longest, norm[i]);
    length_square += p(i) * p(i);
  }
  for (int r = 0; r < spectrum.stride; ++r) square += spectrum.along[r] * spectrum.coefficient[r];
  const bool none = spectrum.negligible(length_square);
  for_owned(team, 0, size,
            [&](int i) { spectrum.scratch[i] = none ? 0.0 : norm[i] / longest * spectrum.task(spectrum.along, i); });
  team.sync();
  for (int i = 0; i < size; ++i) total += spectrum.scratch[i];
  for_owned(team, 0, size, [&](int i) {
    weights[i] = none || norm[i] == 0.0 ? 0.0 : total / square * spectrum.task(spectrum.coefficient, i) * (longest / norm[i]);
  });
  team.sync();
}

/// IMTL-G (Liu et al. 2021, equation 6): the weights with sum 1 whose update has the same projection on every unit gradient.
/// All 0 where there are none, as for opposite gradients, or where their sum is 0 to rounding. They may be negative.
/// Guarantee: that of `config_weights` for p = 1.
///
/// w_i ~ a_i / n_i with a = pinv(R) 1 and R the cosines.
template <class Team>
MTL_HOST_DEVICE void imtl_g_weights(const Team& team, const double* gram, int size, double epsilon, double* doubles,
                                    double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  Spectrum<Team> spectrum(team, size, epsilon, doubles);
  spectrum.decompose_cosines(gram);
  spectrum.project([](int) { return 1.0; });
  const double* norm = spectrum.norm;
  double shortest = INFINITY, total = 0.0, magnitude = 0.0;
  for (int i = 0; i < size; ++i) shortest = norm[i] > 0.0 ? std::fmin(shortest, norm[i]) : shortest;
  for_owned(team, 0, size, [&](int i) {
    spectrum.scratch[i] = norm[i] > 0.0 ? spectrum.task(spectrum.coefficient, i) * (shortest / norm[i]) : 0.0;
  });
  team.sync();
  for (int i = 0; i < size; ++i) {
    total += spectrum.scratch[i];
    magnitude += std::fabs(spectrum.scratch[i]);
  }
  const bool none = spectrum.negligible(size) || !(std::fabs(total) > 4 * spectrum.tolerance * magnitude);
  for_owned(team, 0, size, [&](int i) { weights[i] = none ? 0.0 : spectrum.scratch[i] / total; });
  team.sync();
}

enum class AlignedScale : int { min, median, rmse };

/// Aligned-MTL (Senushkin et al. 2023, Algorithm 1): B p with B = sqrt(s) G^(-1/2) on the range of G, so that the gradients
/// B' [g_1 ... g_K] are orthogonal and of norm sqrt(s), and p the `preference` [K], null: 1 / K. s is the smallest, the (lower)
/// median or the mean of the eigenvalues of G that are not 0.
/// Guarantee: B is that of a matrix within 1e-13 max_i G_ii of G; so B' G B is s times a projector to 1e-13 s times the
/// condition number of G on its range.
template <AlignedScale scale, class Team>
MTL_HOST_DEVICE void aligned_mtl_weights(const Team& team, const double* gram, int size, double epsilon,
                                         const double* preference, double* doubles, double* weights) {
  if (!all_finite(team, gram, size * size)) return fill(team, weights, size, NAN);
  Spectrum<Team> spectrum(team, size, epsilon, doubles);
  spectrum.decompose_gram(gram);
  double square = spectrum.smallest;
  if constexpr (scale == AlignedScale::median) {
    square = square > 0.0 ? spectrum.median() : 0.0;
  } else if constexpr (scale == AlignedScale::rmse) {
    int count = 0;
    double sum = 0.0;
    for (int r = 0; r < spectrum.stride; ++r) {
      count += spectrum.kept(r);
      sum += spectrum.kept(r) ? spectrum.eigenvalue(r) : 0.0;
    }
    square = count > 0 ? sum / count : 0.0;
  }
  spectrum.project([=](int i) { return preference ? preference[i] : 1.0 / size; },
                   [=](double component, double eigenvalue) { return component * std::sqrt(square / eigenvalue); });
  for_owned(team, 0, size, [&](int i) { weights[i] = spectrum.task(spectrum.coefficient, i); });
  team.sync();
}

}  // namespace mtlkernels
