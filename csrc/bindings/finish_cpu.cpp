// combine_sgd_ and combine_adam_ on the CPU: chunks of every column in parallel.

#include "finish.h"

namespace mtlkernels {
namespace {

double value_of(const Tensor& scalar, const char* what) { return read_matrix(scalar, what)[0]; }

/// Whether the flag says that nothing is to change.
bool skips(const std::optional<Tensor>& skip) {
  if (!skip) return false;
  int32_t type = 0;
  check_torch(aoti_torch_get_device_type(skip->get(), &type));
  require(type == aoti_torch_device_type_cpu(), "skip is not on the CPU");
  return *static_cast<const bool*>(skip->const_data_ptr());
}

/// Calls move(column, weights, n, begin, end, moved) for every chunk, unless the update is skipped.
template <typename Move>
void run(const Finish& finish, const Move& move) {
  const Columns columns(finish.grads, finish.num_tasks, false, &finish.moved, finish.num_moved);
  const std::vector<double> weights = read_matrix(finish.weights, "weights is not float32 or float64 on the CPU");
  if (skips(finish.skip)) return;
  std::vector<cpu::Output> moved;
  for (int64_t n = 0; n < columns.size(); ++n) moved.push_back(columns.output(n));
  const std::vector<Piece> pieces = cut(columns);
  for_each(int64_t(pieces.size()), columns.total_elements(), [&](int64_t p) {
    const auto [n, begin, end] = pieces[p];
    move(columns[n], weights.data() + finish.weight_row(n) * finish.num_tasks, n, begin, end, moved[n]);
  });
}

void run_sgd(const Finish& finish, const SgdOptions& options) {
  const auto combine_sgd = cpu::kernels().combine_sgd;
  const double lr = value_of(finish.lr, "lr is not on the CPU");
  run(finish, [&](const cpu::Column& column, const double* weights, int64_t, int64_t begin, int64_t end,
                  const cpu::Output& moved) { combine_sgd(column, weights, options, lr, begin, end, moved); });
}

void run_adam(const Finish& finish, const std::vector<Tensor>& steps, const AdamOptions& options) {
  const auto combine_adam = cpu::kernels().combine_adam;
  const double lr = value_of(finish.lr, "lr is not on the CPU");
  std::vector<double> numbers;
  for (const Tensor& step : steps) numbers.push_back(value_of(step, "a step is not on the CPU"));
  run(finish, [&](const cpu::Column& column, const double* weights, int64_t n, int64_t begin, int64_t end,
                  const cpu::Output& moved) { combine_adam(column, weights, options, lr, numbers[n], begin, end, moved); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("combine_sgd_", TORCH_BOX(&combine_sgd_op<run_sgd>));
  m.impl("combine_adam_", TORCH_BOX(&combine_adam_op<run_adam>));
}

}  // namespace mtlkernels
