#pragma once
// The weightings that one kernel, and one loop on the CPU, serve: what each takes besides the Gram, the workspace it needs, and
// its function.

#include "kxk_solvers.h"

namespace mtlkernels {

enum class Solver : int { mgda, cagrad };

/// What a weighting takes besides the Gram. Each says what its number and its values, one per task, mean; values is null where
/// none are given.
struct SolverOptions {
  double number;
  const double* values;
};

/// Doubles and integers of workspace that a solver needs for K tasks. The Gram may lie at its start.
MTL_HOST_DEVICE constexpr int64_t solver_doubles(Solver, int64_t size) { return program_doubles(size); }
MTL_HOST_DEVICE constexpr int64_t solver_integers(Solver, int64_t size) { return program_integers(size); }

/// weights [K] from gram [K, K].
template <Solver solver, class Team>
MTL_HOST_DEVICE void find_weights(const Team& team, const double* gram, int size, const SolverOptions& options, double* doubles,
                                  int* integers, double* weights) {
  if constexpr (solver == Solver::mgda) {
    mgda_weights(team, gram, size, doubles, integers, weights);
  } else {
    cagrad_weights(team, gram, size, options.number, doubles, integers, weights);
  }
}

}  // namespace mtlkernels
