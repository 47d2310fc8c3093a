// excess_risk on the CPU: chunks of every gradient in parallel, added in order.

#include "excess_risk.h"
#include "gram.h"

namespace mtlkernels {
namespace {

Tensor excess_risk_cpu(TensorList grads, std::vector<Tensor> memory, Tensor factor, double epsilon) {
  const GradientMemories given(grads, memory, factor);
  const std::vector<double> factors = read_matrix(factor, "factor is not float32 or float64 on the CPU");
  const Columns columns = given.columns();
  std::vector<double> sums(columns.size(), 0.0);
  sum_chunks(columns, true, 1, sums.data(), [&](const Piece& piece, double* partial) {
    const auto [n, begin, end] = piece;
    *partial += cpu::kernels().excess_risk(columns[n], factors[given.tasks[n]], epsilon, begin, end);
  });
  Tensor result = zeros({given.num_tasks});
  double* risks = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t n = 0; n < columns.size(); ++n) risks[given.tasks[n]] += sums[n];
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) { m.impl("excess_risk", TORCH_BOX(&excess_risk_cpu)); }

}  // namespace mtlkernels
