#pragma once
// Lists of tensors as the kernels see them: one Column per tensor, checked for what memory safety needs.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../common/paired_plan.h"
#include "../cpu/kernels.h"

namespace mtlkernels {

using torch::stable::Tensor;
using TensorList = std::vector<std::optional<Tensor>>;

/// Elements of a chunk, the unit of work of one thread. Partial sums are kept per chunk and added in order, so results have the
/// same bits for any number of threads.
constexpr int64_t kChunk = 65536;

/// Results of at least this many bytes are stored past the caches: more than a second-level cache keeps.
constexpr int64_t kStreamBytes = 8 << 20;

/// Below this many elements in all, a call stays on its own thread.
constexpr int64_t kSerialWork = 1 << 17;

/// Throws std::runtime_error with `message` and the place unless `condition` holds.
void require(bool condition, const char* message, int64_t task = -1, int64_t tensor = -1);

/// Throws where a call of torch's C interface failed, which has said why on stderr. (torch has this as a macro, whose name
/// depends on the version.)
inline void check_torch(AOTITorchError code) { require(code == AOTI_TORCH_SUCCESS, "a call of torch's C interface failed"); }

struct View;

/// The gradients of `grads` (task-major, num_tasks rows) column by column, optionally with the results beside them.
class Columns {
 public:
  /// `grads` and `out` must outlive this. `row_major`: element i of a column is its i-th in logical order, channels being rows;
  /// otherwise any common order of a dense column will do. `out` holds num_out results per column, result-major, or is null.
  /// `logical`: element i is the i-th in logical order, within channels, too. The last `num_wide` rows, of which none is
  /// absent, are float64 beside float64 results (or, without results, float64 rows before them), else float32.
  Columns(const TensorList& grads, int64_t num_tasks, bool row_major, const std::vector<Tensor>* out = nullptr,
          int64_t num_out = 0, bool logical = false, int64_t num_wide = 0);

  int64_t size() const { return int64_t(columns_.size()); }
  const cpu::Column& operator[](int64_t n) const { return columns_[n]; }
  cpu::Output output(int64_t n) const { return {&outputs_[n * num_out_], out_strides_[n], int(num_out_), false}; }
  /// Rows of the tensor viewed as [out, rest]; 0 where no task has a gradient.
  int64_t channels(int64_t n) const { return channels_[n]; }
  int64_t total_elements() const { return total_elements_; }
  /// Index of the device that all tensors are on.
  int32_t device_index() const { return device_index_; }
  bool same_device(const Tensor& tensor) const;

 private:
  void add(const TensorList& grads, int64_t n, int64_t num_columns, int64_t num_tasks, bool row_major,
           const std::vector<Tensor>* out, std::vector<View>& views, std::vector<int64_t>& present);

  std::vector<cpu::Column> columns_;
  std::vector<const void*> rows_;
  std::vector<void*> outputs_;
  std::vector<const int64_t* const*> out_strides_;
  std::vector<int64_t> channels_;
  std::vector<std::vector<int64_t>> sizes_, strides_;  // of columns that are not flat
  std::vector<std::vector<const int64_t*>> stride_tables_;
  const bool logical_;
  int64_t num_out_ = 0, num_wide_ = 0, total_elements_ = 0;
  int32_t device_type_ = -1, device_index_ = -1;
};

/// Elements [begin, end) of one column.
struct Piece {
  int64_t column, begin, end;
};

/// The columns cut into chunks of at most kChunk elements, in order.
std::vector<Piece> cut(const Columns& columns);

/// Calls run(i) for i in [0, count), on several threads when the call reads enough to pay for them.
template <typename Run>
void for_each(int64_t count, int64_t total_elements, const Run& run) {
  if (total_elements < kSerialWork || count < 2) {
    for (int64_t i = 0; i < count; ++i) run(i);
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

/// The rows of two lists of num_pairs rows in turn: grads[0], other[0], grads[1], other[1], ...
TensorList in_pairs(const TensorList& grads, const TensorList& other, int64_t num_pairs);

/// The form that an op's argument names.
PairForm pair_form(const std::string& name);

/// A tensor of the given shape on the CPU, float64, zeroed.
Tensor zeros(const std::vector<int64_t>& shape);

/// A float32 or float64 matrix [rows, columns] (or vector, rows = 1) of any strides as float64 values.
std::vector<double> read_matrix(const Tensor& tensor, const char* what);

}  // namespace mtlkernels
