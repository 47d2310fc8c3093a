#include "columns.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mtlkernels {

/// What torch tells of a tensor, asked for once.
struct View {
  void* data;
  const int64_t *sizes, *strides;
  int64_t dim, numel;
  DType dtype;
  int32_t device_type, device_index;
};

namespace {

DType kernel_dtype(int32_t dtype, int64_t task, int64_t tensor) {
  if (dtype == aoti_torch_dtype_float32()) return DType::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return DType::float16;
  require(dtype == aoti_torch_dtype_float64(), "dtype is none of float32, bfloat16, float16, float64", task, tensor);
  return DType::float64;
}

View view(const Tensor& tensor, int64_t task, int64_t n) {
  View v;
  AtenTensorHandle handle = tensor.get();
  int32_t dtype = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  check_torch(aoti_torch_get_device_type(handle, &v.device_type));
  check_torch(aoti_torch_get_device_index(handle, &v.device_index));
  check_torch(aoti_torch_get_data_ptr(handle, &v.data));
  check_torch(aoti_torch_get_dtype(handle, &dtype));
  check_torch(aoti_torch_get_dim(handle, &v.dim));
  check_torch(aoti_torch_get_sizes(handle, &sizes));
  check_torch(aoti_torch_get_strides(handle, &strides));
  v.sizes = sizes;
  v.strides = strides;
  v.numel = 1;
  for (int64_t d = 0; d < v.dim; ++d) v.numel *= sizes[d];
  v.dtype = kernel_dtype(dtype, task, n);
  return v;
}

bool is_row_major(const View& v) {
  int64_t expected = 1;
  for (int64_t d = v.dim - 1; d >= 0; --d) {
    if (v.sizes[d] == 1) continue;
    if (v.strides[d] != expected) return false;
    expected *= v.sizes[d];
  }
  return true;
}

/// Whether the elements fill their memory without gaps or overlaps, in whatever order of the dimensions.
bool is_dense(const View& v) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < v.dim; ++d)
    if (v.sizes[d] != 1) dims.emplace_back(v.strides[d], v.sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_strides(const View& a, const View& b) {
  for (int64_t d = 0; d < a.dim; ++d)
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

/// Whether all views lie in memory in one common order, so that element i of each is at offset i.
bool is_flat(const std::vector<View>& views, bool row_major, bool logical) {
  if (std::all_of(views.begin(), views.end(), is_row_major)) return true;
  if (logical) return false;
  const View& first = views.front();
  if (!is_dense(first)) return false;
  for (const View& v : views)
    if (!same_strides(first, v)) return false;
  if (!row_major) return true;
  return first.sizes[0] == 1 || first.strides[0] == first.numel / first.sizes[0];  // channels are consecutive stretches
}

}  // namespace

void require(bool condition, const char* message, int64_t task, int64_t tensor) {
  if (condition) return;
  std::string text = "mtlkernels: ";
  if (tensor >= 0) text += (task >= 0 ? "task " + std::to_string(task) + ", " : "") + "tensor " + std::to_string(tensor) + ": ";
  throw std::runtime_error(text + message);
}

Columns::Columns(const TensorList& grads, int64_t num_tasks, bool row_major, const std::vector<Tensor>* out, int64_t num_out,
                 bool logical, int64_t num_wide)
    : logical_(logical), num_out_(num_out), num_wide_(num_wide) {
  require(num_tasks > 0 ? int64_t(grads.size()) % num_tasks == 0 : grads.empty(),
          "the gradients are not num_tasks rows of equal length");
  const int64_t num_columns = num_tasks > 0 ? int64_t(grads.size()) / num_tasks : 0;
  require(!out || int64_t(out->size()) == num_columns * num_out, "out has the wrong number of tensors");
  columns_.reserve(num_columns);
  rows_.resize(grads.size());
  outputs_.resize(num_columns * num_out);
  out_strides_.resize(num_columns, nullptr);
  channels_.resize(num_columns, 0);
  std::vector<View> views;  // of a column; here, as a small tensor takes less time than an allocation
  std::vector<int64_t> present;
  views.reserve(num_tasks + num_out);
  present.reserve(num_tasks + num_out);
  for (int64_t n = 0; n < num_columns; ++n) add(grads, n, num_columns, num_tasks, row_major, out, views, present);
}

bool Columns::same_device(const Tensor& tensor) const {
  int32_t type = 0, index = 0;
  check_torch(aoti_torch_get_device_type(tensor.get(), &type));
  check_torch(aoti_torch_get_device_index(tensor.get(), &index));
  return type == device_type_ && index == device_index_;
}

void Columns::add(const TensorList& grads, int64_t n, int64_t num_columns, int64_t num_tasks, bool row_major,
                  const std::vector<Tensor>* out, std::vector<View>& views, std::vector<int64_t>& present) {
  views.clear();
  present.clear();
  int column_dtype = out && num_wide_ > 0 ? int(view((*out)[n], -1, n).dtype) : -1;
  for (int64_t k = 0; k < num_tasks + num_out_; ++k) {
    const bool is_out = k >= num_tasks;
    if (!is_out && !grads[k * num_columns + n]) continue;
    views.push_back(view(is_out ? (*out)[(k - num_tasks) * num_columns + n] : *grads[k * num_columns + n], is_out ? -1 : k, n));
    const View &first = views.front(), &now = views.back();
    const bool is_wide = !is_out && k >= num_tasks - num_wide_;
    if (!is_wide && column_dtype < 0) column_dtype = int(now.dtype);
    const bool same_shape = first.dim == now.dim && std::equal(first.sizes, first.sizes + first.dim, now.sizes);
    require(same_shape, "shape differs from the tensor's first gradient", k, n);
    const bool is_double = column_dtype == int(DType::float64);
    require(is_wide ? now.dtype == (is_double ? DType::float64 : DType::float32) : int(now.dtype) == column_dtype,
            "dtype differs from the tensor's first gradient, or a memory's is not float32 (float64)", k, n);
    if (device_type_ < 0) {
      device_type_ = now.device_type;
      device_index_ = now.device_index;
    }
    require(now.device_type == device_type_ && now.device_index == device_index_, "is on another device than the first", k, n);
    if (is_out) {
      outputs_[n * num_out_ + k - num_tasks] = now.data;
    } else {
      rows_[n * num_tasks + k] = now.numel > 0 ? now.data : nullptr;
    }
    present.push_back(k);
  }
  cpu::Column column{rows_.data() + n * num_tasks, nullptr, int(num_tasks), DType::float32, {0, 0, nullptr}};
  if (!views.empty()) {
    const View& first = views.front();
    column.dtype = DType(column_dtype);
    column.layout.numel = first.numel;
    channels_[n] = first.dim ? first.sizes[0] : 1;
    total_elements_ += first.numel * int64_t(views.size());
    if (first.numel > 0 && !is_flat(views, row_major, logical_)) {
      // Logical order: drop dimensions of size 1 and merge those that every view steps through evenly.
      std::vector<int64_t> dims, &sizes = sizes_.emplace_back();
      for (int64_t d = 0; d < first.dim; ++d) {
        if (first.sizes[d] == 1) continue;
        const bool merges = !dims.empty() && std::all_of(views.begin(), views.end(), [&](const View& v) {
          return v.strides[dims.back()] == v.strides[d] * first.sizes[d];
        });
        if (merges) {
          dims.back() = d;
          sizes.back() *= first.sizes[d];
        } else {
          dims.push_back(d);
          sizes.push_back(first.sizes[d]);
        }
      }
      const int64_t dim = int64_t(dims.size());
      std::vector<int64_t>& strides = strides_.emplace_back(dim * views.size());
      std::vector<const int64_t*>& table = stride_tables_.emplace_back(num_tasks + num_out_, nullptr);
      for (size_t v = 0; v < views.size(); ++v) {
        for (int64_t d = 0; d < dim; ++d) strides[v * dim + d] = views[v].strides[dims[d]];
        table[present[v]] = strides.data() + v * dim;
      }
      column.strides = table.data();
      out_strides_[n] = table.data() + num_tasks;
      column.layout.dim = int(dim);
      column.layout.sizes = sizes.data();
    }
  }
  columns_.push_back(column);
}

std::vector<Piece> cut(const Columns& columns) {
  std::vector<Piece> pieces;
  for (int64_t n = 0; n < columns.size(); ++n)
    for (int64_t begin = 0; begin < columns[n].layout.numel; begin += kChunk)
      pieces.push_back({n, begin, std::min(begin + kChunk, columns[n].layout.numel)});
  return pieces;
}

TensorList in_pairs(const TensorList& grads, const TensorList& other, int64_t num_pairs) {
  require(grads.size() == other.size() && (num_pairs > 0 ? int64_t(grads.size()) % num_pairs == 0 : grads.empty()),
          "the gradients are not num_tasks rows of equal length");
  const int64_t num_columns = num_pairs > 0 ? int64_t(grads.size()) / num_pairs : 0;
  TensorList rows;
  rows.reserve(2 * grads.size());
  for (int64_t k = 0; k < num_pairs; ++k)
    for (const TensorList* list : {&grads, &other})
      rows.insert(rows.end(), list->begin() + k * num_columns, list->begin() + (k + 1) * num_columns);
  return rows;
}

PairForm pair_form(const std::string& name) {
  require(name == "difference" || name == "product", "form is none of difference, product");
  return name == "product" ? PairForm::product : PairForm::difference;
}

Tensor zeros(const std::vector<int64_t>& shape) {
  using torch::headeronly::ScalarType;
  Tensor result =
      torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), ScalarType::Double);
  if (result.numel() > 0) std::fill_n(static_cast<double*>(result.mutable_data_ptr()), result.numel(), 0.0);
  return result;
}

std::vector<double> read_matrix(const Tensor& tensor, const char* what) {
  const View v = view(tensor, -1, -1);
  require(v.device_type == aoti_torch_device_type_cpu(), what);
  require(v.dim <= 2 && (v.dtype == DType::float64 || v.dtype == DType::float32), what);
  const int64_t columns = v.dim > 0 ? v.sizes[v.dim - 1] : 1, rows = v.dim == 2 ? v.sizes[0] : 1;
  std::vector<double> values(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = (v.dim == 2 ? i * v.strides[0] : 0) + (v.dim > 0 ? j * v.strides[v.dim - 1] : 0);
      values[i * columns + j] =
          v.dtype == DType::float64 ? static_cast<const double*>(v.data)[at] : static_cast<const float*>(v.data)[at];
    }
  }
  return values;
}

}  // namespace mtlkernels
