// The K x K stage on CUDA: one launch a call, a block per problem, and no value read on the host.

#include "cuda_call.h"
#include "kxk.h"

namespace mtlkernels {
namespace {

int64_t count_problems(const Tensor& gram) {
  int64_t count = 1;
  for (int64_t dim = 0; dim < gram.dim() - 2; ++dim) count *= gram.size(dim);
  require(gram.size(-1) <= kKxkMaxTasks, "on CUDA, gram takes at most 64 tasks");
  require(count < (int64_t(1) << 31), "gram holds too many matrices for one call");
  return count;
}

/// `tensor` contiguous, on gram's device; its memory lives as long as the result.
Tensor beside(const Tensor& tensor, const Tensor& gram, const char* complaint) {
  require(tensor.is_cuda() && tensor.get_device_index() == gram.get_device_index(), complaint);
  return torch::stable::contiguous(tensor);
}

/// Runs call(contiguous gram, problems, K, stream) on gram's device, unless the result is empty.
template <class Call>
void launch(const Tensor& gram, const Tensor& result, const Call& call) {
  const int64_t problems = count_problems(gram);
  if (result.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(gram.get_device_index());
  const Tensor dense = torch::stable::contiguous(gram);
  const char* error = call(dense.const_data_ptr(), problems, int(gram.size(-1)), current_stream(gram.get_device_index()));
  require(!error, error);
}

// --- what a Gram tells ------------------------------------------------------------------------------------------------

Tensor apply(GramFunction function, const Tensor& gram) {
  require_gram(gram);
  const DType dtype = gram.scalar_type() == ScalarType::Float ? DType::float32 : DType::float64;
  const bool scalar = function == GramFunction::conflict_rate || function == GramFunction::condition_number;
  Tensor result = scalar ? empty_of_problems(gram, {}) : empty_of_problems(gram, {gram.size(-1), gram.size(-1)});
  launch(gram, result, [&](const void* data, int64_t problems, int size, cuda::Stream stream) {
    return cuda::gram_function(function, dtype, data, problems, size, result.mutable_data_ptr(), stream);
  });
  return result;
}

Tensor cosine_op(const Tensor& gram) { return apply(GramFunction::cosine, gram); }

Tensor magnitude_similarity_op(const Tensor& gram) { return apply(GramFunction::magnitude_similarity, gram); }

Tensor conflict_rate_op(const Tensor& gram) { return apply(GramFunction::conflict_rate, gram); }

Tensor condition_number_op(const Tensor& gram) { return apply(GramFunction::condition_number, gram); }

// --- weightings over the active tasks ---------------------------------------------------------------------------------

void solve(Solver solver, const Tensor& gram, const std::optional<Tensor>& active, double number,
           const std::optional<Tensor>& values, const Tensor& result) {
  launch(gram, result, [&](const void* data, int64_t problems, int size, cuda::Stream stream) {
    std::optional<Tensor> mask, own;
    if (active) mask = beside(*active, gram, "active is not on gram's device");
    if (values) own = beside(*values, gram, "the values of the tasks are not on gram's device");
    const SolverOptions options{number, own ? static_cast<const double*>(own->const_data_ptr()) : nullptr};
    return cuda::solve(solver, static_cast<const double*>(data), problems, size,
                       mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, options,
                       static_cast<double*>(result.mutable_data_ptr()), stream);
  });
}

// --- projections ------------------------------------------------------------------------------------------------------

Tensor projection_coefficients_op(const Tensor& gram, const Tensor& order, bool conflict_only) {
  require_exact_gram(gram);
  require_order(order, gram);
  Tensor result = empty_of_problems(gram, {gram.size(-1), gram.size(-1)});
  launch(gram, result, [&](const void* data, int64_t problems, int size, cuda::Stream stream) {
    const Tensor orders = beside(order, gram, "order is not on gram's device");
    return cuda::projection_coefficients(static_cast<const double*>(data), problems, size,
                                         static_cast<const int64_t*>(orders.const_data_ptr()), order.size(-1), conflict_only,
                                         static_cast<double*>(result.mutable_data_ptr()), stream);
  });
  return result;
}

Tensor pcgrad_weights_op(const Tensor& gram, const Tensor& seed) {
  require_exact_gram(gram);
  require_seed(seed);
  Tensor result = empty_of_problems(gram, {gram.size(-1)});
  launch(gram, result, [&](const void* data, int64_t problems, int size, cuda::Stream stream) {
    const Tensor drawn = beside(seed, gram, "seed is not on gram's device");
    return cuda::pcgrad_weights(static_cast<const double*>(data), problems, size,
                                static_cast<const int64_t*>(drawn.const_data_ptr()),
                                static_cast<double*>(result.mutable_data_ptr()), stream);
  });
  return result;
}

std::tuple<Tensor, Tensor> gradvac_weights_op(const Tensor& gram, const Tensor& phi, const std::optional<Tensor>& order,
                                              const std::optional<Tensor>& seed, double beta, double epsilon) {
  require_gradvac(gram, phi, order, seed);
  Tensor result = empty_of_problems(gram, {gram.size(-1)}), new_phi = empty_of_problems(gram, {gram.size(-1), gram.size(-1)});
  launch(gram, result, [&](const void* data, int64_t problems, int size, cuda::Stream stream) {
    const Tensor targets = beside(phi, gram, "phi is not on gram's device");
    std::optional<Tensor> orders, drawn;
    if (order) orders = beside(*order, gram, "order is not on gram's device");
    if (seed) drawn = beside(*seed, gram, "seed is not on gram's device");
    return cuda::gradvac_weights(
        static_cast<const double*>(data), problems, size, static_cast<const double*>(targets.const_data_ptr()),
        orders ? static_cast<const int64_t*>(orders->const_data_ptr()) : nullptr, orders ? orders->size(-1) : 0,
        drawn ? static_cast<const int64_t*>(drawn->const_data_ptr()) : nullptr, beta, epsilon,
        static_cast<double*>(result.mutable_data_ptr()), static_cast<double*>(new_phi.mutable_data_ptr()), stream);
  });
  return {result, new_phi};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("cosine", TORCH_BOX(&cosine_op));
  m.impl("magnitude_similarity", TORCH_BOX(&magnitude_similarity_op));
  m.impl("conflict_rate", TORCH_BOX(&conflict_rate_op));
  m.impl("condition_number", TORCH_BOX(&condition_number_op));
  WeightOps<solve>::add_to(m);
  m.impl("projection_coefficients", TORCH_BOX(&projection_coefficients_op));
  m.impl("pcgrad_weights", TORCH_BOX(&pcgrad_weights_op));
  m.impl("gradvac_weights", TORCH_BOX(&gradvac_weights_op));
}

}  // namespace mtlkernels
