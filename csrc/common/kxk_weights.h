#pragma once
// The weightings that one kernel, and one loop on the CPU, serve: what each takes besides the Gram, the workspace it needs, and
// its function.

#include <type_traits>

#include "kxk_around_mean.h"
#include "kxk_newton.h"
#include "kxk_quadratic.h"
#include "kxk_solvers.h"
#include "kxk_spectral.h"

namespace mtlkernels {

enum class Solver : int {
  mgda,
  cagrad,
  config,
  imtl_g,
  aligned_mtl_min,
  aligned_mtl_median,
  aligned_mtl_rmse,
  upgrad,
  dualproj,
  pcd,
  fairgrad,
  conicgrad
};

constexpr int kNumSolvers = static_cast<int>(Solver::conicgrad) + 1;  // the last one

/// body(std::integral_constant<Solver, solver>()): code that is compiled for each solver, chosen at run time.
template <int index = 0, class Body>
auto with_solver(Solver solver, const Body& body) {
  if constexpr (index + 1 < kNumSolvers)
    if (static_cast<int>(solver) != index) return with_solver<index + 1>(solver, body);
  return body(std::integral_constant<Solver, static_cast<Solver>(index)>());
}

/// What a weighting takes besides the Gram. Each says what its number and its values, one per task, mean; values is null where
/// none are given.
struct SolverOptions {
  double number;
  const double* values;
};

/// Doubles and integers of workspace that a solver needs for K tasks. The Gram may lie at its start.
MTL_HOST_DEVICE constexpr int64_t solver_doubles(Solver solver, int64_t size) {
  if (solver == Solver::fairgrad) return equilibrium_doubles(size);
  const bool spectral = solver >= Solver::config && solver <= Solver::aligned_mtl_rmse;
  return spectral ? spectral_doubles(size) : program_doubles(size);
}
MTL_HOST_DEVICE constexpr int64_t solver_integers(Solver, int64_t size) { return program_integers(size); }

/// weights [K] from gram [K, K].
template <Solver solver, class Team>
MTL_HOST_DEVICE void find_weights(const Team& team, const double* gram, int size, const SolverOptions& options, double* doubles,
                                  int* integers, double* weights) {
  if constexpr (solver == Solver::mgda) {
    mgda_weights(team, gram, size, doubles, integers, weights);
  } else if constexpr (solver == Solver::config) {
    config_weights(team, gram, size, options.number, options.values, doubles, weights);
  } else if constexpr (solver == Solver::imtl_g) {
    imtl_g_weights(team, gram, size, options.number, doubles, weights);
  } else if constexpr (solver == Solver::aligned_mtl_min) {
    aligned_mtl_weights<AlignedScale::min>(team, gram, size, options.number, options.values, doubles, weights);
  } else if constexpr (solver == Solver::aligned_mtl_median) {
    aligned_mtl_weights<AlignedScale::median>(team, gram, size, options.number, options.values, doubles, weights);
  } else if constexpr (solver == Solver::aligned_mtl_rmse) {
    aligned_mtl_weights<AlignedScale::rmse>(team, gram, size, options.number, options.values, doubles, weights);
  } else if constexpr (solver == Solver::upgrad) {
    upgrad_weights(team, gram, size, options.values, doubles, integers, weights);
  } else if constexpr (solver == Solver::dualproj) {
    dualproj_weights(team, gram, size, options.values, doubles, integers, weights);
  } else if constexpr (solver == Solver::pcd) {
    pcd_weights(team, gram, size, options.values, doubles, integers, weights);
  } else if constexpr (solver == Solver::conicgrad) {
    conicgrad_weights(team, gram, size, options.number, doubles, integers, weights);
  } else if constexpr (solver == Solver::fairgrad) {
    fairgrad_weights(team, gram, size, options.number, doubles, weights);
  } else {
    cagrad_weights(team, gram, size, options.number, doubles, integers, weights);
  }
}

}  // namespace mtlkernels
