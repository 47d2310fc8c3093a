// The K x K stage on the CPU: a loop over the problems of a batch around the functions of common/kxk.h.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/kxk_gradvac.h"
#include "../common/kxk_weights.h"
#include "../common/philox.h"
#include "kxk.h"

namespace mtlkernels {
namespace {

/// A tensor [..., inner dims] as a batch of problems, whatever its strides.
class Batch {
 public:
  Batch(const Tensor& tensor, int64_t inner) : strides_(tensor.strides().begin(), tensor.strides().end()) {
    lead_.assign(tensor.sizes().begin(), tensor.sizes().end() - inner);
    for (const int64_t size : lead_) count_ *= size;
  }

  int64_t count() const { return count_; }

  /// Stride of inner dimension `dim`, counted from the last: 0, 1, ...
  int64_t stride(int64_t dim) const { return strides_[strides_.size() - 1 - dim]; }

  /// Elements between the tensor's first and those of problem `index`.
  int64_t offset(int64_t index) const {
    int64_t result = 0;
    for (int64_t dim = int64_t(lead_.size()) - 1; dim >= 0; --dim) {
      result += index % lead_[dim] * strides_[dim];
      index /= lead_[dim];
    }
    return result;
  }

 private:
  std::vector<int64_t> lead_, strides_;
  int64_t count_ = 1;
};

/// Gram matrices [..., K, K] of float32 or float64.
class Grams : public Batch {
 public:
  explicit Grams(const Tensor& gram)
      : Batch(gram, 2),
        size_(int(gram.size(-1))),
        is_float_(gram.scalar_type() == ScalarType::Float),
        data_(gram.const_data_ptr()) {}

  int size() const { return size_; }

  /// Problem `index` as row-major float64.
  void load(int64_t index, double* matrix) const {
    is_float_ ? load_as(static_cast<const float*>(data_), index, matrix)
              : load_as(static_cast<const double*>(data_), index, matrix);
  }

  /// Calls body(begin, end) on ranges of problems, each on one thread; a thread gets at least about a tenth of a millisecond of
  /// work.
  template <class Body>
  void for_each_range(const Body& body) const {
    const int64_t cube = int64_t(size_) * size_ * size_ + 64;
    if (count() > 0) torch::stable::parallel_for(0, count(), std::max<int64_t>(1, 100000 / cube), body);
  }

 private:
  template <class T>
  void load_as(const T* data, int64_t index, double* matrix) const {
    data += offset(index);
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = 0; j < size_; ++j) matrix[i * size_ + j] = static_cast<double>(data[i * stride(1) + j * stride(0)]);
    }
  }

  int size_;
  bool is_float_;
  const void* data_;
};

void store(const Tensor& result, int64_t begin, const double* values, int64_t count) {
  if (result.scalar_type() == ScalarType::Float) {
    float* out = static_cast<float*>(result.mutable_data_ptr()) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(values[i]);
  } else {
    std::copy(values, values + count, static_cast<double*>(result.mutable_data_ptr()) + begin);
  }
}

// --- what a Gram tells ------------------------------------------------------------------------------------------------

template <class Function>
Tensor map_to_matrix(const Tensor& gram, const Function& function) {
  require_gram(gram);
  const Grams grams(gram);
  const int size = grams.size(), square = size * size;
  Tensor result = empty_of_problems(gram, {size, size});
  grams.for_each_range([&](int64_t begin, int64_t end) {
    std::vector<double> matrix(square), values(square), scratch(size);
    for (int64_t b = begin; b < end; ++b) {
      grams.load(b, matrix.data());
      function(matrix.data(), size, values.data(), scratch.data());
      store(result, b * square, values.data(), square);
    }
  });
  return result;
}

template <class Function>
Tensor map_to_scalar(const Tensor& gram, int64_t workspace, const Function& function) {
  require_gram(gram);
  const Grams grams(gram);
  Tensor result = empty_of_problems(gram, {});
  grams.for_each_range([&](int64_t begin, int64_t end) {
    std::vector<double> matrix(grams.size() * grams.size()), scratch(workspace);
    for (int64_t b = begin; b < end; ++b) {
      grams.load(b, matrix.data());
      const double value = function(matrix.data(), grams.size(), scratch.data());
      store(result, b, &value, 1);
    }
  });
  return result;
}

Tensor cosine_op(const Tensor& gram) {
  return map_to_matrix(gram, [](const double* matrix, int size, double* result, double* scratch) {
    cosine(Serial(), matrix, size, result, size, scratch);
  });
}

Tensor magnitude_similarity_op(const Tensor& gram) {
  return map_to_matrix(gram, [](const double* matrix, int size, double* result, double* scratch) {
    magnitude_similarity(Serial(), matrix, size, result, scratch);
  });
}

Tensor conflict_rate_op(const Tensor& gram) {
  return map_to_scalar(gram, 0, [](const double* matrix, int size, double*) { return conflict_rate(Serial(), matrix, size); });
}

Tensor condition_number_op(const Tensor& gram) {
  require_gram(gram);
  const double epsilon = gram.scalar_type() == ScalarType::Float ? FLT_EPSILON : DBL_EPSILON;
  return map_to_scalar(gram, condition_doubles(gram.size(-1)), [&](const double* matrix, int size, double* scratch) {
    return condition_number(Serial(), matrix, size, epsilon, scratch);
  });
}

// --- weightings over the active tasks ---------------------------------------------------------------------------------

template <Solver solver>
void solve_each(const Tensor& gram, const std::optional<Tensor>& active, double number, const std::optional<Tensor>& values,
                const Tensor& result) {
  const Grams grams(gram);
  const int size = grams.size();
  const Batch mask(active ? *active : gram, active ? 1 : 2);
  const std::vector<double> given =
      values ? read_matrix(*values, "the values of the tasks must be on the CPU") : std::vector<double>();
  grams.for_each_range([&](int64_t begin, int64_t end) {
    std::vector<double> matrix(size * size), workspace(solver_doubles(solver, size)), own(size), packed(size), weights(size);
    std::vector<int> integers(solver_integers(solver, size)), tasks(size);
    for (int64_t b = begin; b < end; ++b) {
      grams.load(b, matrix.data());
      int count = 0;
      for (int k = 0; k < size; ++k) {
        if (!active || static_cast<const bool*>(active->const_data_ptr())[mask.offset(b) + k * mask.stride(0)])
          tasks[count++] = k;
      }
      for (int i = 0; i < count; ++i) {  // rows and columns move towards the front, so none is read after it was written
        for (int j = 0; j < count; ++j) matrix[i * count + j] = matrix[tasks[i] * size + tasks[j]];
        if (values) own[i] = given[tasks[i]];
      }
      const SolverOptions options{number, values ? own.data() : nullptr};
      if (count > 0)
        find_weights<solver>(Serial(), matrix.data(), count, options, workspace.data(), integers.data(), packed.data());
      std::fill(weights.begin(), weights.end(), 0.0);
      for (int i = 0; i < count; ++i) weights[tasks[i]] = packed[i];
      store(result, b * size, weights.data(), size);
    }
  });
}

void solve(Solver solver, const Tensor& gram, const std::optional<Tensor>& active, double number,
           const std::optional<Tensor>& values, const Tensor& result) {
  with_solver(solver, [&](auto constant) { solve_each<constant()>(gram, active, number, values, result); });
}

// --- projections ------------------------------------------------------------------------------------------------------

/// Orders [..., K, S] of task indices for the rows of each problem.
class Orders : public Batch {
 public:
  Orders(const Tensor& order, int size)
      : Batch(order, 2), steps_(order.size(-1)), data_(static_cast<const int64_t*>(order.const_data_ptr())) {
    for (int64_t b = 0; b < count(); ++b) {
      for (int64_t i = 0; i < size * steps_; ++i) {
        const int64_t task = data_[offset(b) + i / steps_ * stride(1) + i % steps_ * stride(0)];
        require(task >= 0 && task < size, "order must hold task indices from 0 to K - 1");
      }
    }
  }

  int64_t steps() const { return steps_; }

  void load(int64_t index, int row, int64_t* order) const {
    const int64_t* data = data_ + offset(index) + row * stride(1);
    for (int64_t step = 0; step < steps_; ++step) order[step] = data[step * stride(0)];
  }

 private:
  int64_t steps_;
  const int64_t* data_;
};

Tensor projection_coefficients_op(const Tensor& gram, const Tensor& order, bool conflict_only) {
  require_exact_gram(gram);
  require_order(order, gram);
  const Grams grams(gram);
  const int size = grams.size();
  const Orders orders(order, size);
  Tensor result = empty_of_problems(gram, {size, size});
  grams.for_each_range([&](int64_t begin, int64_t end) {
    std::vector<double> matrix(size * size), row(size), inner(size);
    std::vector<int64_t> steps(orders.steps());
    for (int64_t b = begin; b < end; ++b) {
      grams.load(b, matrix.data());
      for (int i = 0; i < size; ++i) {
        orders.load(b, i, steps.data());
        projection_row(Serial(), matrix.data(), size, i, steps.data(), orders.steps(), conflict_only, row.data(), inner.data());
        store(result, (b * size + i) * size, row.data(), size);
      }
    }
  });
  return result;
}

Tensor pcgrad_weights_op(const Tensor& gram, const Tensor& seed) {
  require_exact_gram(gram);
  require_seed(seed);
  const Grams grams(gram);
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const int size = grams.size();
  Tensor result = empty_of_problems(gram, {size});
  grams.for_each_range([&](int64_t begin, int64_t end) {
    std::vector<double> matrix(size * size), row(size), inner(size), weights(size);
    std::vector<uint32_t> keys(size);
    std::vector<int64_t> order(size);
    for (int64_t b = begin; b < end; ++b) {
      grams.load(b, matrix.data());
      std::fill(weights.begin(), weights.end(), 0.0);
      for (int i = 0; i < size; ++i) {
        random_order(Serial(), key, b, i, size, keys.data(), order.data());
        projection_row(Serial(), matrix.data(), size, i, order.data(), size, true, row.data(), inner.data());
        for (int k = 0; k < size; ++k) weights[k] += row[k];
      }
      store(result, b * size, weights.data(), size);
    }
  });
  return result;
}

std::tuple<Tensor, Tensor> gradvac_weights_op(const Tensor& gram, const Tensor& phi, const std::optional<Tensor>& order,
                                              const std::optional<Tensor>& seed, double beta, double epsilon) {
  require_gradvac(gram, phi, order, seed);
  const Grams grams(gram), targets(phi);
  const int size = grams.size(), square = size * size;
  std::optional<Orders> orders;
  if (order) orders.emplace(*order, size);
  const uint64_t key = seed ? static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())) : 0;
  Tensor result = empty_of_problems(gram, {size}), new_phi = empty_of_problems(gram, {size, size});
  grams.for_each_range([&](int64_t begin, int64_t end) {
    std::vector<double> matrix(square), target(square), row(size), inner(size), weights(size);
    std::vector<uint32_t> keys(size);
    std::vector<int64_t> steps(orders ? orders->steps() : size);
    for (int64_t b = begin; b < end; ++b) {
      grams.load(b, matrix.data());
      targets.load(b, target.data());
      const bool finite = all_finite(Serial(), matrix.data(), square);
      std::fill(weights.begin(), weights.end(), finite ? 0.0 : NAN);
      for (int i = 0; finite && i < size; ++i) {
        if (orders) {
          orders->load(b, i, steps.data());
        } else {
          random_order(Serial(), key, b, i, size, keys.data(), steps.data());
        }
        vaccine_row(Serial(), matrix.data(), size, i, steps.data(), int64_t(steps.size()), beta, epsilon,
                    target.data() + i * size, row.data(), inner.data());
        for (int k = 0; k < size; ++k) weights[k] += row[k];
      }
      store(result, b * size, weights.data(), size);
      store(new_phi, b * square, target.data(), square);
    }
  });
  return {result, new_phi};
}

}  // namespace
}  // namespace mtlkernels

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("cosine", TORCH_BOX(&mtlkernels::cosine_op));
  m.impl("magnitude_similarity", TORCH_BOX(&mtlkernels::magnitude_similarity_op));
  m.impl("conflict_rate", TORCH_BOX(&mtlkernels::conflict_rate_op));
  m.impl("condition_number", TORCH_BOX(&mtlkernels::condition_number_op));
  mtlkernels::WeightOps<mtlkernels::solve>::add_to(m);
  m.impl("projection_coefficients", TORCH_BOX(&mtlkernels::projection_coefficients_op));
  m.impl("pcgrad_weights", TORCH_BOX(&mtlkernels::pcgrad_weights_op));
  m.impl("gradvac_weights", TORCH_BOX(&mtlkernels::gradvac_weights_op));
}
