// gram, cross_gram and paired_gram on CUDA: the chunks of each dtype, then one launch that adds them in order; or a launch per
// dtype for channels. The cross Gram is a block of the Gram of all rows: reading them is the cost, and each is read once either
// way.

#include <algorithm>
#include <string>

#include "cuda_call.h"
#include "gram.h"

namespace mtlkernels {
namespace {

constexpr int64_t kMaxRows = 64;  // of one launch

Tensor empty_like_device(const Tensor& model, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(model, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()),
                                  torch::headeronly::ScalarType::Double);
}

/// Rows whose products are wanted: num_left from `left` on with num_right from `right` on, or with each other if that is 0.
struct Rows {
  int64_t left, num_left, right, num_right;

  int64_t all() const { return num_left + num_right; }
  int64_t columns() const { return num_right ? num_right : num_left; }
  /// Their pointers in a column.
  void gather(const void* const* rows, void** pointers) const {
    for (int64_t k = 0; k < num_left; ++k) pointers[k] = const_cast<void*>(rows[left + k]);
    for (int64_t k = 0; k < num_right; ++k) pointers[num_left + k] = const_cast<void*>(rows[right + k]);
  }
};

/// What the Gram matrices are made of: the columns, what pairs of their rows make, a tensor on their device, and where to
/// launch.
struct Gradients {
  const Columns& columns;
  PairForm form;
  const Tensor& model;
  cuda::Stream stream;
};

Tensor gram_per_channel(const Gradients& grads, Rows rows) {
  const Columns& columns = grads.columns;
  int64_t total = 0;
  for (int64_t n = 0; n < columns.size(); ++n) total += columns.channels(n);
  Tensor result = empty_like_device(grads.model, {total, rows.num_left, rows.columns()});
  torch::stable::zero_(result);  // channels without elements
  double* out = static_cast<double*>(result.mutable_data_ptr());
  const int64_t num_pointers = rows.all() + 2;
  std::vector<void*> pointers(columns.size() * num_pointers);
  for (DType dtype : kDTypes) {
    std::vector<PlannedTensor> tensors;
    int64_t first = 0;
    for (int64_t n = 0; n < columns.size(); first += columns.channels(n++)) {
      if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
      void** own = pointers.data() + n * num_pointers;
      rows.gather(columns[n].rows, own);
      own[rows.all()] = out + first * rows.num_left * rows.columns();
      own[rows.all() + 1] = reinterpret_cast<void*>(columns[n].layout.numel / columns.channels(n));
      tensors.push_back({own, columns.channels(n)});
    }
    if (tensors.empty()) continue;
    const char* error = cuda::gram_channels(dtype, tensors, int(rows.num_left), int(rows.num_right), grads.stream);
    require(!error, error);
  }
  return result;
}

Tensor gram_of_chunks(const Gradients& grads, Rows rows, bool per_tensor) {
  const Columns& columns = grads.columns;
  std::vector<int64_t> shape{rows.num_left, rows.columns()};
  if (per_tensor) shape.insert(shape.begin(), columns.size());
  Tensor result = empty_like_device(grads.model, shape);
  std::vector<void*> pointers(columns.size() * rows.all());
  std::vector<cuda::Slot> slots;
  struct Group {  // of one dtype, as the plan sees it
    std::vector<PlannedTensor> tensors;
    int32_t first_block;
  };
  Group groups[4];
  int64_t blocks = 0;
  for (DType dtype : kDTypes) {
    Group& group = groups[int(dtype)];
    group.first_block = int32_t(blocks);
    for (int64_t n = 0; n < columns.size(); ++n) {
      if (columns[n].dtype != dtype) continue;
      const int64_t own = (columns[n].layout.numel + kDeviceChunk - 1) / kDeviceChunk;
      if (per_tensor) slots.push_back({int32_t(n), int32_t(blocks), int32_t(blocks + own)});
      blocks += own;
      if (own == 0) continue;
      rows.gather(columns[n].rows, pointers.data() + n * rows.all());
      group.tensors.push_back({pointers.data() + n * rows.all(), columns[n].layout.numel});
    }
  }
  require(blocks < (int64_t(1) << 31), "the gradients have too many elements for one call");
  if (!per_tensor) slots.push_back({0, 0, int32_t(blocks)});
  const Tensor partials = empty_like_device(grads.model, {blocks, num_pairs(gram_class(int(rows.all())))});
  double* sums = static_cast<double*>(partials.mutable_data_ptr());
  for (DType dtype : kDTypes) {
    const Group& group = groups[int(dtype)];
    if (group.tensors.empty()) continue;
    const int all = int(rows.all());
    const char* error =
        grads.form == PairForm::none
            ? cuda::gram_chunks(dtype, group.tensors, all, group.first_block, sums, grads.stream)
            : cuda::paired_gram_chunks(dtype, group.tensors, all, grads.form, group.first_block, sums, grads.stream);
    require(!error, error);
  }
  const char* error = cuda::gram_finish(slots, int(rows.num_left), int(rows.num_right), sums,
                                        static_cast<double*>(result.mutable_data_ptr()), grads.stream);
  require(!error, error);
  return result;
}

/// Products of the first num_left rows with the num_right after them, or with each other if that is 0. More rows than a launch
/// takes go in blocks of half as many against each other, and are read again for every block; a pair is in one block.
Tensor products(const TensorList& rows, int64_t num_left, int64_t num_right, const std::string& per,
                PairForm form = PairForm::none) {
  const bool per_channel = per == "channel", per_tensor = per == "tensor";
  require(per_channel || per_tensor || per == "model", "per is none of model, tensor, channel");
  require(!per_channel || form == PairForm::none, "per is none of model, tensor");
  const int64_t all = num_left + num_right;
  const Columns given(rows, all, per_channel);
  const Tensor* model = nullptr;
  for (const std::optional<Tensor>& tensor : rows)
    if (tensor && !model) model = &*tensor;
  require(model, "no task has a gradient");
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const TensorList flat = flat_gradients(given, rows);
  const Columns columns(flat, all, per_channel);
  const Gradients grads{columns, form, *model, current_stream(given.device_index())};
  const auto run = [&](Rows part) {
    return per_channel ? gram_per_channel(grads, part) : gram_of_chunks(grads, part, per_tensor);
  };
  if (all <= kMaxRows) return run({0, num_left, num_left, num_right});

  Tensor result;
  const auto place = [&](const Tensor& block, int64_t row, int64_t column) {
    if (!result.defined()) {
      std::vector<int64_t> shape(block.sizes().begin(), block.sizes().end());
      shape[shape.size() - 2] = num_left;
      shape[shape.size() - 1] = num_right ? num_right : num_left;
      result = empty_like_device(*model, shape);
    }
    Tensor lines = torch::stable::narrow(result, -2, row, block.size(-2));
    Tensor target = torch::stable::narrow(lines, -1, column, block.size(-1));
    torch::stable::copy_(target, block);
  };
  constexpr int64_t side = kMaxRows / 2;
  for (int64_t i = 0; i < num_left; i += side) {
    const int64_t left = std::min(side, num_left - i);
    if (num_right == 0) place(run({i, left, 0, 0}), i, i);
    for (int64_t j = num_right ? 0 : i + side; j < (num_right ? num_right : num_left); j += side) {
      const int64_t right = std::min(side, (num_right ? num_right : num_left) - j);
      const Tensor block = run({i, left, num_right ? num_left + j : j, right});
      place(block, i, j);
      if (num_right == 0) place(torch::stable::transpose(block, -2, -1), j, i);
    }
  }
  return result;
}

}  // namespace

Tensor gram_cuda(TensorList grads, int64_t num_tasks, std::string per) { return products(grads, num_tasks, 0, per); }

namespace {

Tensor cross_gram_cuda(TensorList grads, TensorList other, int64_t num_tasks, int64_t num_other, std::string per) {
  if (num_tasks == 0 || num_other == 0) {  // an empty side of the square that the other one makes
    Tensor square = num_tasks == 0 ? gram_cuda(other, num_other, per) : gram_cuda(grads, num_tasks, per);
    return torch::stable::narrow(square, num_tasks == 0 ? -2 : -1, 0, 0);
  }
  TensorList rows = std::move(grads);
  rows.insert(rows.end(), other.begin(), other.end());
  return products(rows, num_tasks, num_other, per);
}

Tensor paired_gram_cuda(TensorList grads, TensorList other, int64_t num_tasks, std::string per, std::string form) {
  return products(in_pairs(grads, other, num_tasks), 2 * num_tasks, 0, per, pair_form(form));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gram_cuda));
  m.impl("cross_gram", TORCH_BOX(&cross_gram_cuda));
  m.impl("paired_gram", TORCH_BOX(&paired_gram_cuda));
}

}  // namespace mtlkernels
