// Checks of the ops that combine gradients element by element.

#include "elementwise.h"

#include <algorithm>

namespace mtlkernels {

using torch::headeronly::ScalarType;

std::optional<Tensor> checked_active(const std::optional<Tensor>& active, const Columns& columns, int64_t num_tasks) {
  if (!active) return active;
  require(active->scalar_type() == ScalarType::Bool && active->dim() == 1 && active->size(0) == num_tasks,
          "active is not bool [K]");
  require(columns.size() == 0 || columns.same_device(*active), "active is not on the gradients' device");
  return torch::stable::contiguous(*active);
}

void check_random(const Tensor& seed, const std::vector<int64_t>& places, const Columns& columns) {
  require(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed is not one int64");
  require(int64_t(places.size()) == columns.size(), "places has the wrong number of indices");
  require(std::all_of(places.begin(), places.end(), [](int64_t n) { return n >= 0 && n >> 32 == 0; }),
          "places holds an index that is not from 0 to 2^32 - 1");
  require(columns.size() == 0 || columns.same_device(seed), "seed is not on the gradients' device");
}

void check_trim(int64_t trim, int64_t num_tasks) {
  require(trim >= 0 && num_tasks > 0 && trim <= (num_tasks - 1) / 2, "trim leaves no task");
}

Draw checked(const Draw& draw, const Columns& columns) {
  require(draw.leak.scalar_type() == ScalarType::Double && draw.leak.dim() == 1, "leak is not float64 [K]");
  require(columns.size() == 0 || columns.same_device(draw.leak), "leak is not on the gradients' device");
  check_random(draw.seed, draw.places, columns);
  return {torch::stable::contiguous(draw.leak), checked_active(draw.active, columns, draw.num_tasks()), draw.seed, draw.places};
}

std::vector<cpu::Output> outputs_of(const Columns& columns) {
  int64_t result_bytes = 0;
  for (int64_t n = 0; n < columns.size(); ++n) result_bytes += columns[n].layout.numel * element_size(columns[n].dtype);
  std::vector<cpu::Output> outputs(columns.size());
  for (int64_t n = 0; n < columns.size(); ++n) {
    outputs[n] = columns.output(n);
    const auto *rows = columns[n].rows, *end = rows + columns[n].num_rows;
    outputs[n].stream = result_bytes >= kStreamBytes && std::find(rows, end, outputs[n].rows[0]) == end;
  }
  return outputs;
}

}  // namespace mtlkernels
