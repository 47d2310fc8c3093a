#pragma once
// GradVac's row of coefficients, for a team of threads as in kxk.h.

#include "kxk.h"

namespace mtlkernels {

/// Row `row` of the coefficients of GradVac (Wang et al. 2021, Algorithm 1): starting from v = g_row, for each j != row in
/// `order` with r = cos(v, g_j): where r < phi_j, v += |v| (phi_j sqrt(1 - r^2) - r sqrt(1 - phi_j^2)) / (|g_j| sqrt(1 -
/// phi_j^2)) g_j, which makes the cosine phi_j; then phi_j becomes (1 - beta) phi_j + beta r. Where v or g_j is 0 there is no
/// cosine, and nothing happens. `epsilon` is added to the denominators of r and of the step; 1 - phi_j^2 counts as 2^-52 at
/// least. `inner` [K] holds <v, g_k>; `phi` [K] may have been written just before by the threads that own its elements.
template <class Team>
MTL_HOST_DEVICE void vaccine_row(const Team& team, const double* gram, int size, int row, const int64_t* order, int64_t steps,
                                 double beta, double epsilon, double* phi, double* coefficients, double* inner) {
  for_owned(team, 0, size, [&](int k) {
    coefficients[k] = k == row ? 1.0 : 0.0;
    inner[k] = gram[row * size + k];
  });
  double square = gram[row * size + row];
  team.sync();
  for (int64_t step = 0; step < steps; ++step) {
    const int j = static_cast<int>(order[step]);
    const double other = gram[j * size + j];
    if (j == row || !(other > 0.0) || !(square > 0.0)) continue;
    const double length = std::sqrt(square), norm = std::sqrt(other), target = phi[j];
    const double cosine = clamp_cosine(inner[j] / (length * norm + epsilon));
    const double sine = std::sqrt(1.0 - cosine * cosine), rest = 1.0 - target * target;
    const double target_sine = std::sqrt(rest > DBL_EPSILON ? rest : DBL_EPSILON);
    const double factor = length * (target * sine - cosine * target_sine) / (norm * target_sine + epsilon);
    team.sync();  // all have read inner[j] and phi[j]
    if (owns(team, j)) phi[j] = (1.0 - beta) * target + beta * cosine;
    if (cosine < target) {
      if (owns(team, j)) coefficients[j] += factor;
      for_owned(team, 0, size, [&](int k) { inner[k] += factor * gram[j * size + k]; });
      team.sync();
      square = 0.0;
      for (int k = 0; k < size; ++k) square += coefficients[k] * inner[k];
    }
    team.sync();
  }
}

}  // namespace mtlkernels
