// perturb_ on the CPU: chunks of every column in parallel.

#include "perturb.h"

namespace mtlkernels {
namespace {

void run(const TensorList& rows, const Tensor& radii, bool adaptive, std::vector<Tensor>& out) {
  const Columns columns(rows, 2, false, &out, 1);
  const std::vector<double> values = read_matrix(radii, "radii is not float32 or float64 on the CPU");
  int64_t bytes = 0;
  for (int64_t n = 0; n < columns.size(); ++n) bytes += columns[n].layout.numel * element_size(columns[n].dtype);
  std::vector<cpu::Output> outputs;
  for (int64_t n = 0; n < columns.size(); ++n) {
    outputs.push_back(columns.output(n));
    void* to = outputs[n].rows[0];
    outputs[n].stream = bytes >= kStreamBytes && to != columns[n].rows[0] && to != columns[n].rows[1];
  }
  const std::vector<Piece> pieces = cut(columns);
  const auto perturb = cpu::kernels().perturb;
  for_each(int64_t(pieces.size()), columns.total_elements(), [&](int64_t p) {
    const auto [n, begin, end] = pieces[p];
    perturb(columns[n], values[n], adaptive, begin, end, outputs[n]);
  });
}

void perturb_cpu(std::vector<Tensor> out, std::vector<Tensor> params, std::vector<Tensor> grads, Tensor radii, bool adaptive) {
  perturb_into(out, params, grads, radii, adaptive, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) { m.impl("perturb_", TORCH_BOX(&perturb_cpu)); }

}  // namespace mtlkernels
