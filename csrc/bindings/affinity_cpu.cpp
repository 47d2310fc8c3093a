// Inter-task affinity and its clusters on the CPU, around common/kxk_affinity.h.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../common/kxk_affinity.h"
#include "columns.h"

namespace mtlkernels {
namespace {

using torch::headeronly::ScalarType;

const double* doubles(const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); }

double scalar(const Tensor& tensor, int64_t task) {
  require(tensor.numel() == 1, "a loss is not a scalar", task);
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return *static_cast<const float*>(data);
    case ScalarType::Double: return *static_cast<const double*>(data);
    case ScalarType::Half: return float(*static_cast<const torch::headeronly::Half*>(data));
    case ScalarType::BFloat16: return float(*static_cast<const torch::headeronly::BFloat16*>(data));
    default: require(false, "a loss is not float32, float64, float16 or bfloat16", task); return NAN;
  }
}

/// A vector (`dim` 1) or a scalar (`dim` 0) on the host, allocated past the dispatcher.
Tensor host_tensor(int64_t dim, int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(dim, &size, &stride, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::tuple<Tensor, Tensor> proximal_affinity_op(Tensor affinity, Tensor previous, TensorList losses,
                                                std::vector<int64_t> credited, std::vector<int64_t> group, double decay,
                                                const std::optional<Tensor>& skipped) {
  require(affinity.dim() == 2 && affinity.size(0) == affinity.size(1) && affinity.scalar_type() == ScalarType::Double,
          "affinity must be float64 [K, K]");
  const int64_t size = affinity.size(0);
  require(previous.dim() == 1 && previous.size(0) == size && previous.scalar_type() == ScalarType::Double,
          "previous must be float64 [K]");
  require(int64_t(losses.size()) == size, "losses must list K scalars");
  require(affinity.is_contiguous() && previous.is_contiguous(), "affinity and previous must be contiguous");
  require(!skipped || (skipped->numel() == 1 && skipped->scalar_type() == ScalarType::Bool), "skipped must be one bool");
  for (const std::vector<int64_t>* tasks : {&credited, &group}) {
    require(std::all_of(tasks->begin(), tasks->end(), [=](int64_t task) { return task >= 0 && task < size; }),
            "credited and group must hold task indices from 0 to K - 1");
  }
  Tensor values = host_tensor(1, size, aoti_torch_dtype_float64()), nonfinite = host_tensor(0, 0, aoti_torch_dtype_bool());
  double* after = static_cast<double*>(values.mutable_data_ptr());
  double* before = static_cast<double*>(previous.mutable_data_ptr());
  for (int64_t k = 0; k < size; ++k) after[k] = losses[k] ? scalar(*losses[k], k) : NAN;
  if (!skipped || !*static_cast<const bool*>(skipped->const_data_ptr())) {
    proximal_affinity(static_cast<double*>(affinity.mutable_data_ptr()), before, after, int(size), credited.data(),
                      int64_t(credited.size()), decay);
  }
  std::copy_n(after, size, before);
  *static_cast<bool*>(nonfinite.mutable_data_ptr()) =
      std::any_of(group.begin(), group.end(), [=](int64_t task) { return !std::isfinite(after[task]); });
  return {values, nonfinite};
}

/// Of the K^2 entries; the mean of the middle two where their number is even. Reorders them.
double median(std::vector<double>& values) {
  if (values.empty()) return 0.0;
  const auto middle = values.begin() + int64_t(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return values.size() % 2 ? *middle : (*std::max_element(values.begin(), middle) + *middle) / 2;
}

std::tuple<Tensor, Tensor> affinity_propagation_op(const Tensor& similarity, std::optional<double> preference, double damping,
                                                   int64_t max_iter, int64_t convergence_iter) {
  require(similarity.dim() >= 2 && similarity.size(-1) == similarity.size(-2), "similarity must be [..., K, K]");
  require(similarity.scalar_type() == ScalarType::Double, "similarity must be float64");
  const int64_t size = similarity.size(-1), square = size * size;
  const Tensor dense = torch::stable::contiguous(similarity);
  const std::vector<int64_t> lead(similarity.sizes().begin(), similarity.sizes().end() - 2);
  std::vector<int64_t> shape = lead;
  shape.push_back(size);
  Tensor labels = torch::stable::new_empty(similarity, shape, ScalarType::Long);
  Tensor converged = torch::stable::new_empty(similarity, lead, ScalarType::Bool);
  const int64_t count = converged.numel(), work = std::max<int64_t>(1, square * 100);
  const double* matrices = doubles(dense);
  int64_t* label = static_cast<int64_t*>(labels.mutable_data_ptr());
  bool* settled = static_cast<bool*>(converged.mutable_data_ptr());
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 100000 / work), [&](int64_t begin, int64_t end) {
    AffinityPropagation problem{int(size)};
    for (int64_t b = begin; b < end; ++b) {
      const double* matrix = matrices + b * square;
      double value = preference.value_or(0.0);
      if (!preference) {
        std::vector<double> sorted(matrix, matrix + square);
        const bool ordered = std::none_of(sorted.begin(), sorted.end(), [](double entry) { return entry != entry; });
        value = ordered ? median(sorted) : NAN;
      }
      settled[b] = problem.cluster(matrix, value, damping, max_iter, convergence_iter, label + b * size);
    }
  });
  return {labels, converged};
}

/// Affinity propagation on the similarity of one affinity matrix, of the tasks with a measured effect on themselves; another
/// task t has the label -1 - t. A matrix that is not finite does not converge.
std::tuple<Tensor, Tensor> proximal_groups_op(const Tensor& affinity, bool released, std::optional<double> preference,
                                              double damping, int64_t max_iter, int64_t convergence_iter) {
  require(affinity.dim() == 2 && affinity.size(0) == affinity.size(1) && affinity.scalar_type() == ScalarType::Double,
          "affinity must be float64 [K, K]");
  const Tensor dense = torch::stable::contiguous(affinity);
  const int64_t size = affinity.size(0);
  const double* matrix = doubles(dense);
  Tensor labels = host_tensor(1, size, aoti_torch_dtype_int64()), converged = host_tensor(0, 0, aoti_torch_dtype_bool());
  int64_t* label = static_cast<int64_t*>(labels.mutable_data_ptr());
  bool& settled = *static_cast<bool*>(converged.mutable_data_ptr());
  for (int64_t t = 0; t < size; ++t) label[t] = -1 - t;
  settled = std::all_of(matrix, matrix + size * size, [](double entry) { return std::isfinite(entry); });
  if (!settled) return {labels, converged};

  const std::vector<int64_t> known = measured_tasks(matrix, size);
  const std::vector<double> similarity = proximal_similarity(matrix, size, known, released);
  std::vector<int64_t> exemplars(known.size());
  std::vector<double> reordered = similarity;
  AffinityPropagation problem{int(known.size())};
  settled = problem.cluster(similarity.data(), preference ? *preference : median(reordered), damping, max_iter,
                            convergence_iter, exemplars.data());
  for (size_t i = 0; i < known.size(); ++i) label[known[i]] = exemplars[i] < 0 ? -1 : known[exemplars[i]];
  return {labels, converged};
}

}  // namespace
}  // namespace mtlkernels

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("proximal_affinity_", TORCH_BOX(&mtlkernels::proximal_affinity_op));
  m.impl("affinity_propagation", TORCH_BOX(&mtlkernels::affinity_propagation_op));
  m.impl("proximal_groups", TORCH_BOX(&mtlkernels::proximal_groups_op));
}
