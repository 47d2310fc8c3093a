#pragma once
// The K x K stage: a warp, or for projections a warp per row, solves one problem in shared memory with the functions of
// common/kxk.h and common/kxk_weights.h. Compiled without FMA contraction, so that results have the bits of the host's.

#include "../common/kxk_gradvac.h"
#include "../common/kxk_plan.h"
#include "../common/philox.h"

namespace mtlkernels {

/// A warp as a team. Marked for the host, too, where it is never run: the functions that take a team are.
struct Warp {
  static constexpr int size = kTeamThreads;
  int lane;

  MTL_HOST_DEVICE int rank() const { return lane; }

  MTL_HOST_DEVICE void sync() const {
#ifdef __CUDA_ARCH__
    __syncwarp();
#endif
  }

  MTL_HOST_DEVICE int sum(int value) const {
#ifdef __CUDA_ARCH__
    value = __reduce_add_sync(0xffffffffu, value);
#endif
    return value;
  }

  MTL_HOST_DEVICE void first_minimum(double& value, int& index) const {
#ifdef __CUDA_ARCH__
    if (__all_sync(0xffffffffu, index < 0)) return;
    for (int offset = size / 2; offset > 0; offset /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, value, offset);
      const int other_index = __shfl_xor_sync(0xffffffffu, index, offset);
      if (other < value || (other == value && other_index < index)) {
        value = other;
        index = other_index;
      }
    }
#endif
  }
};

/// Copies a Gram to row-major float64 in shared memory. Contract: all threads of the block call it; one barrier at the end.
template <typename T>
__device__ inline void load_gram(const T* gram, int size, double* matrix) {
  for (int i = threadIdx.x; i < size * size; i += blockDim.x) matrix[i] = static_cast<double>(gram[i]);
  __syncthreads();
}

extern __shared__ double kxk_shared[];

// The launch bounds below ask for one block a multiprocessor: what limits registers for more makes the solvers spill.

/// result[problem] = function(gram[problem]), [K, K] or one value, for Grams [problems, K, K]. Launch: gram_function_launch, a
/// block per problem.
template <GramFunction function, typename T>
__global__ void __launch_bounds__(kTeamThreads, 1) gram_function(const T* gram, int size, T* result) {
  const Warp team{static_cast<int>(threadIdx.x)};
  const int64_t problem = blockIdx.x, square = static_cast<int64_t>(size) * size;
  double *matrix = kxk_shared, *workspace = matrix + square;
  load_gram(gram + problem * square, size, matrix);
  if constexpr (function == GramFunction::cosine) {
    cosine(team, matrix, size, result + problem * square, size, workspace);
  } else if constexpr (function == GramFunction::magnitude_similarity) {
    magnitude_similarity(team, matrix, size, result + problem * square, workspace);
  } else {
    double value;
    if constexpr (function == GramFunction::conflict_rate) {
      value = conflict_rate(team, matrix, size);
    } else {
      value = condition_number(team, matrix, size, sizeof(T) == 4 ? double(FLT_EPSILON) : DBL_EPSILON, workspace);
    }
    if (threadIdx.x == 0) result[problem] = static_cast<T>(value);
  }
}

/// Writes the indices of the true values of `active` [size], all where it is null, to `tasks`, ascending; returns their number.
/// Contract: all lanes call it; ends with a sync.
__device__ inline int list_active(const Warp& team, const bool* active, int size, int* tasks) {
  int count = 0;
  for (int begin = 0; begin < size; begin += Warp::size) {
    const int task = begin + team.lane;
    const unsigned there = __ballot_sync(0xffffffffu, task < size && (!active || active[task]));
    if (there >> team.lane & 1) tasks[count + __popc(there & ((1u << team.lane) - 1))] = task;
    count += __popc(there);
  }
  team.sync();
  return count;
}

/// weights[problem] [K] for Grams [problems, K, K], over the tasks where `active` [problems, K] is true (null: all), as if the
/// others did not exist: they get 0. `options.values` [K] are the same for all problems. Launch: solver_launch, a block per
/// problem.
template <Solver solver>
__global__ void __launch_bounds__(kTeamThreads, 1)
    solve(const double* gram, int size, const bool* active, SolverOptions options, double* weights) {
  const Warp team{static_cast<int>(threadIdx.x)};
  const int64_t problem = blockIdx.x, row = problem * size;
  double *workspace = kxk_shared, *packed = workspace + solver_doubles(solver, size), *values = packed + size;
  int *integers = reinterpret_cast<int*>(values + size), *tasks = integers + solver_integers(solver, size);
  const int count = list_active(team, active ? active + row : nullptr, size, tasks);
  for (int i = 0; i < count; ++i) {
    for (int j = team.lane; j < count; j += Warp::size) workspace[i * count + j] = gram[(row + tasks[i]) * size + tasks[j]];
  }
  for (int i = team.lane; options.values && i < count; i += Warp::size) values[i] = options.values[tasks[i]];
  team.sync();
  const SolverOptions own{options.number, options.values ? values : nullptr};
  if (count > 0) find_weights<solver>(team, workspace, count, own, workspace, integers, packed);
  for (int k = team.lane; k < size; k += Warp::size) {
    if (active && !active[row + k]) weights[row + k] = 0.0;
  }
  for (int i = team.lane; i < count; i += Warp::size) weights[row + tasks[i]] = packed[i];
}

/// What a block of projections has in shared memory: the Gram, the coefficients of all rows, and for each team `inner` of its
/// row, its order and its random keys, the last two only where they are drawn.
struct ProjectionBlock {
  Warp team;
  int index, teams;
  double *gram, *coefficients, *inner;
  int64_t* order;
  uint32_t* keys;

  /// weights[k] = the sum of the rows' coefficients. Contract: all threads of the block call it; one barrier at the start.
  __device__ void sum_rows(int size, double* weights) const {
    __syncthreads();
    for (int k = threadIdx.x; k < size; k += blockDim.x) {
      double sum = 0.0;
      for (int row = 0; row < size; ++row) sum += coefficients[row * size + k];
      weights[k] = sum;
    }
  }

  __device__ explicit ProjectionBlock(int size)
      : team{static_cast<int>(threadIdx.x) % Warp::size},
        index(static_cast<int>(threadIdx.x) / Warp::size),
        teams(static_cast<int>(blockDim.x) / Warp::size),
        gram(kxk_shared),
        coefficients(gram + size * size) {
    double* all_inner = coefficients + size * size;
    int64_t* all_orders = reinterpret_cast<int64_t*>(all_inner + teams * size);
    uint32_t* all_keys = reinterpret_cast<uint32_t*>(all_orders + teams * size);
    inner = all_inner + index * size;
    order = all_orders + index * size;
    keys = all_keys + index * size;
  }
};

/// Whether all steps of an order are task indices. Contract: all lanes call it.
__device__ inline bool is_order(const Warp& team, const int64_t* order, int64_t steps, int size) {
  int invalid = 0;
  for (int64_t step = team.lane; step < steps; step += Warp::size) invalid += order[step] < 0 || order[step] >= size;
  return team.sum(invalid) == 0;
}

/// result[problem] [K, K]: coefficients of successive projections for Grams [problems, K, K] in the orders order
/// [problems, K, steps]. A row whose order holds what is no task index is NaN. Launch: projection_launch, a block per problem.
__global__ void __launch_bounds__(kMaxRowTeams* kTeamThreads, 1)
    projection_coefficients(const double* gram, int size, const int64_t* order, int64_t steps, bool conflict_only,
                            double* result) {
  const ProjectionBlock block(size);
  const Warp& team = block.team;
  const int64_t problem = blockIdx.x, square = static_cast<int64_t>(size) * size;
  load_gram(gram + problem * square, size, block.gram);
  for (int row = block.index; row < size; row += block.teams) {
    const int64_t* own = order + (problem * size + row) * steps;
    double* coefficients = block.coefficients + row * size;
    if (is_order(team, own, steps, size)) {
      projection_row(team, block.gram, size, row, own, steps, conflict_only, coefficients, block.inner);
    } else {
      fill(team, coefficients, size, NAN);
    }
    for (int k = team.lane; k < size; k += Warp::size) result[problem * square + row * size + k] = coefficients[k];
  }
}

/// result[problem] [K]: PCGrad's weights for Grams [problems, K, K], each row projected in the order that `seed` gives it.
/// Launch: projection_launch, a block per problem.
__global__ void __launch_bounds__(kMaxRowTeams* kTeamThreads, 1)
    pcgrad_weights(const double* gram, int size, const int64_t* seed, double* result) {
  const ProjectionBlock block(size);
  const int64_t problem = blockIdx.x, square = static_cast<int64_t>(size) * size;
  load_gram(gram + problem * square, size, block.gram);
  for (int row = block.index; row < size; row += block.teams) {
    random_order(block.team, static_cast<uint64_t>(*seed), problem, row, size, block.keys, block.order);
    projection_row(block.team, block.gram, size, row, block.order, size, true, block.coefficients + row * size, block.inner);
  }
  block.sum_rows(size, result + problem * size);
}

/// weights[problem] [K] and new_phi[problem] [K, K]: GradVac's weights and its targets after, for Grams and targets `phi`
/// [problems, K, K]; in the orders order [problems, K, steps], or where it is null in those that `seed` gives. A row whose
/// order holds what is no task index makes the weights NaN, and so does a Gram that is not finite, which keeps its phi. Launch:
/// projection_launch, a block per problem.
__global__ void __launch_bounds__(kMaxRowTeams* kTeamThreads, 1)
    gradvac_weights(const double* gram, int size, const double* phi, const int64_t* order, int64_t steps, const int64_t* seed,
                    double beta, double epsilon, double* weights, double* new_phi) {
  const ProjectionBlock block(size);
  const Warp& team = block.team;
  const int64_t problem = blockIdx.x, square = static_cast<int64_t>(size) * size;
  load_gram(gram + problem * square, size, block.gram);
  const bool finite = all_finite(team, block.gram, size * size);
  for (int row = block.index; row < size; row += block.teams) {
    const int64_t place = problem * square + row * size;
    double *coefficients = block.coefficients + row * size, *targets = new_phi + place;
    for_owned(team, 0, size, [&](int k) { targets[k] = phi[place + k]; });
    const int64_t* own = order ? order + (problem * size + row) * steps : block.order;
    if (!order) random_order(team, static_cast<uint64_t>(*seed), problem, row, size, block.keys, block.order);
    if (finite && (!order || is_order(team, own, steps, size))) {
      vaccine_row(team, block.gram, size, row, own, order ? steps : size, beta, epsilon, targets, coefficients, block.inner);
    } else {
      fill(team, coefficients, size, NAN);
    }
  }
  block.sum_rows(size, weights + problem * size);
}

}  // namespace mtlkernels
