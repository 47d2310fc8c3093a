#include "error.h"
#include "kxk.cuh"
#include "launchers.h"

namespace mtlkernels::cuda {
namespace {

/// A block per problem; asks for the shared memory that a kernel does not get by itself.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t problems, KxkLaunch shape, Stream stream, Arguments... arguments) {
  if (const char* error = allow_shared(kernel, int(shape.shared_bytes))) return error;
  kernel<<<unsigned(problems), shape.threads, shape.shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return last_error();
}

template <typename T>
void (*pick(GramFunction function))(const T*, int, T*) {
  switch (function) {
    case GramFunction::cosine: return mtlkernels::gram_function<GramFunction::cosine, T>;
    case GramFunction::magnitude_similarity: return mtlkernels::gram_function<GramFunction::magnitude_similarity, T>;
    case GramFunction::conflict_rate: return mtlkernels::gram_function<GramFunction::conflict_rate, T>;
    default: return mtlkernels::gram_function<GramFunction::condition_number, T>;
  }
}

}  // namespace

const char* gram_function(GramFunction function, DType dtype, const void* gram, int64_t problems, int size, void* result,
                          Stream stream) {
  const KxkLaunch shape = gram_function_launch(function, size);
  return dtype == DType::float32 ? launch(pick<float>(function), problems, shape, stream, static_cast<const float*>(gram), size,
                                          static_cast<float*>(result))
                                 : launch(pick<double>(function), problems, shape, stream, static_cast<const double*>(gram),
                                          size, static_cast<double*>(result));
}

const char* solve(Solver solver, const double* gram, int64_t problems, int size, const bool* active, SolverOptions options,
                  double* weights, Stream stream) {
  const auto kernel = with_solver(solver, [](auto constant) { return &mtlkernels::solve<constant()>; });
  return launch(kernel, problems, solver_launch(solver, size), stream, gram, size, active, options, weights);
}

const char* projection_coefficients(const double* gram, int64_t problems, int size, const int64_t* order, int64_t steps,
                                    bool conflict_only, double* result, Stream stream) {
  return launch(mtlkernels::projection_coefficients, problems, projection_launch(size, false), stream, gram, size, order, steps,
                conflict_only, result);
}

const char* pcgrad_weights(const double* gram, int64_t problems, int size, const int64_t* seed, double* result, Stream stream) {
  return launch(mtlkernels::pcgrad_weights, problems, projection_launch(size, true), stream, gram, size, seed, result);
}

const char* gradvac_weights(const double* gram, int64_t problems, int size, const double* phi, const int64_t* order,
                            int64_t steps, const int64_t* seed, double beta, double epsilon, double* weights, double* new_phi,
                            Stream stream) {
  return launch(mtlkernels::gradvac_weights, problems, projection_launch(size, true), stream, gram, size, phi, order, steps,
                seed, beta, epsilon, weights, new_phi);
}

}  // namespace mtlkernels::cuda
