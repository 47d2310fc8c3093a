// Inter-task affinity and its clusters on the CPU: a loop over problems around common/kxk_affinity.h.

#include <algorithm>

#include "../common/kxk_affinity.h"
#include "columns.h"

namespace mtlkernels {
namespace {

using torch::headeronly::ScalarType;

const double* doubles(const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); }

void proximal_affinity_op(Tensor affinity, Tensor previous, const Tensor& losses, std::vector<int64_t> group, double decay,
                          const std::optional<Tensor>& skipped) {
  require(affinity.dim() == 2 && affinity.size(0) == affinity.size(1) && affinity.scalar_type() == ScalarType::Double,
          "affinity must be float64 [K, K]");
  const int64_t size = affinity.size(0);
  for (const Tensor* values : {static_cast<const Tensor*>(&previous), &losses}) {
    require(values->dim() == 1 && values->size(0) == size && values->scalar_type() == ScalarType::Double,
            "previous and losses must be float64 [K]");
  }
  require(affinity.is_contiguous() && previous.is_contiguous(), "affinity and previous must be contiguous");
  require(!skipped || (skipped->numel() == 1 && skipped->scalar_type() == ScalarType::Bool), "skipped must be one bool");
  require(std::all_of(group.begin(), group.end(), [=](int64_t task) { return task >= 0 && task < size; }),
          "group must hold task indices from 0 to K - 1");
  const Tensor after = torch::stable::contiguous(losses);
  double* before = static_cast<double*>(previous.mutable_data_ptr());
  proximal_affinity(static_cast<double*>(affinity.mutable_data_ptr()), before, doubles(after), int(size), group.data(),
                    int64_t(group.size()), decay);
  const bool forget = skipped && *static_cast<const bool*>(skipped->const_data_ptr());
  std::transform(doubles(after), doubles(after) + size, before, [=](double loss) { return forget ? NAN : loss; });
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

}  // namespace
}  // namespace mtlkernels

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("proximal_affinity_", TORCH_BOX(&mtlkernels::proximal_affinity_op));
  m.impl("affinity_propagation", TORCH_BOX(&mtlkernels::affinity_propagation_op));
}
