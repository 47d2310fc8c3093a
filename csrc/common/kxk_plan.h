#pragma once
// How the kernels of the K x K stage are launched: threads and dynamic shared memory of a block. Plain C++ for host and device.

#include "kxk_weights.h"

namespace mtlkernels {

constexpr int kKxkMaxTasks = 64;
constexpr int kTeamThreads = 32;  // a warp
constexpr int kMaxRowTeams = 16;

enum class GramFunction : int { cosine, magnitude_similarity, conflict_rate, condition_number };

struct KxkLaunch {
  int threads;
  int64_t shared_bytes;
};

/// One problem a block, of one team: the Gram and the function's workspace.
constexpr KxkLaunch gram_function_launch(GramFunction function, int64_t size) {
  const int64_t workspace = function == GramFunction::condition_number ? condition_doubles(size)
                            : function == GramFunction::conflict_rate  ? 0
                                                                       : size;
  return {kTeamThreads, (size * size + workspace) * 8};
}

/// One problem a block, of one team: the solver's workspace with the Gram at its start, the weights, the values of the active
/// tasks, and which these are.
constexpr KxkLaunch solver_launch(Solver solver, int64_t size) {
  return {kTeamThreads, (solver_doubles(solver, size) + 2 * size) * 8 + (solver_integers(solver, size) + size) * 4};
}

/// One problem a block, of a team per row, as many rows at a time as there are teams: the Gram and the coefficients, and for
/// each team the inner products of its row and, where orders are random, its order and its keys.
constexpr KxkLaunch projection_launch(int64_t size, bool random) {
  const int64_t teams = size < 1 ? 1 : size < kMaxRowTeams ? size : kMaxRowTeams;
  return {int(teams) * kTeamThreads, (2 * size * size + teams * size) * 8 + (random ? teams * size * 12 : 0)};
}

}  // namespace mtlkernels
