// graddrop and graddrop_ on the CPU: chunks of every column in parallel.

#include "elementwise.h"

namespace mtlkernels {
namespace {

void run(const TensorList& grads, const Draw& given, std::vector<Tensor>& out) {
  const int64_t num_tasks = given.num_tasks();
  const Columns columns(grads, num_tasks, true, &out, 1, true);
  const Draw draw = checked(given, columns);
  const std::vector<cpu::Output> outputs = outputs_of(columns);
  const std::vector<Piece> pieces = cut(columns);
  const auto* leak = static_cast<const double*>(draw.leak.const_data_ptr());
  const auto* active = draw.active ? static_cast<const bool*>(draw.active->const_data_ptr()) : nullptr;
  const uint64_t seed = uint64_t(*static_cast<const int64_t*>(draw.seed.const_data_ptr()));
  const auto graddrop = cpu::kernels().graddrop;
  for_each(int64_t(pieces.size()), columns.total_elements(), [&](int64_t p) {
    const auto [n, begin, end] = pieces[p];
    graddrop(columns[n], {leak, active, seed, uint32_t(draw.places[n])}, begin, end, outputs[n]);
  });
}

std::vector<Tensor> graddrop_cpu(TensorList grads, Tensor leak, std::optional<Tensor> active, Tensor seed,
                                 std::vector<int64_t> places) {
  const Draw draw{leak, active, seed, places};
  return into_new(grads, draw.num_tasks(), [&](std::vector<Tensor>& out) { run(grads, draw, out); });
}

void graddrop_inplace_cpu(std::vector<Tensor> out, TensorList grads, Tensor leak, std::optional<Tensor> active, Tensor seed,
                          std::vector<int64_t> places) {
  const Draw draw{leak, active, seed, places};
  into_buffers(out, grads, draw.num_tasks(), [&](std::vector<Tensor>& targets) { run(grads, draw, targets); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("graddrop", TORCH_BOX(&graddrop_cpu));
  m.impl("graddrop_", TORCH_BOX(&graddrop_inplace_cpu));
}

}  // namespace mtlkernels
