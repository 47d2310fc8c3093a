#pragma once
// What the ops of the K x K stage ask of their tensors, on every device.

#include <optional>

#include "../common/kxk_weights.h"
#include "columns.h"

namespace mtlkernels {

using torch::headeronly::ScalarType;

inline bool same_lead(const Tensor& a, int64_t a_inner, const Tensor& b, int64_t b_inner) {
  const auto first = a.sizes(), second = b.sizes();
  return std::vector<int64_t>(first.begin(), first.end() - a_inner) ==
         std::vector<int64_t>(second.begin(), second.end() - b_inner);
}

/// float64 or float32 [..., K, K].
inline void require_gram(const Tensor& gram) {
  require(gram.dim() >= 2 && gram.size(-1) == gram.size(-2), "gram must be [..., K, K]");
  require(gram.scalar_type() == ScalarType::Float || gram.scalar_type() == ScalarType::Double,
          "gram must be float64 or float32");
}

/// As what weights are found from.
inline void require_exact_gram(const Tensor& gram) {
  require_gram(gram);
  require(gram.scalar_type() == ScalarType::Double, "gram must be float64");
}

/// bool [..., K] of gram's leading dimensions, or absent.
inline void require_active(const std::optional<Tensor>& active, const Tensor& gram) {
  if (!active) return;
  require(active->scalar_type() == ScalarType::Bool, "active must be bool");
  require(active->dim() >= 1 && active->size(-1) == gram.size(-1) && same_lead(*active, 1, gram, 2),
          "active must have the shape [..., K] of gram");
}

/// float64 [K], or absent: what a method takes of each task.
inline void require_values(const std::optional<Tensor>& values, const Tensor& gram) {
  if (!values) return;
  require(values->scalar_type() == ScalarType::Double && values->dim() == 1 && values->size(0) == gram.size(-1),
          "the values of the tasks must be float64 [K]");
}

/// int64 [..., K, S] of gram's leading dimensions; what it holds is not looked at.
inline void require_order(const Tensor& order, const Tensor& gram) {
  require(order.dim() >= 2 && order.scalar_type() == ScalarType::Long, "order must be int64 [..., K, S]");
  require(order.size(-2) == gram.size(-1) && same_lead(order, 2, gram, 2),
          "order must have the shape [..., K, S] with the leading dimensions of gram");
}

inline void require_seed(const Tensor& seed) {
  require(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be one int64");
}

/// float64 of gram's shape, and one of an order and a seed.
inline void require_gradvac(const Tensor& gram, const Tensor& phi, const std::optional<Tensor>& order,
                            const std::optional<Tensor>& seed) {
  require_exact_gram(gram);
  require(phi.scalar_type() == ScalarType::Double && phi.dim() == gram.dim() && phi.size(-1) == gram.size(-1) &&
              phi.size(-2) == gram.size(-1) && same_lead(phi, 2, gram, 2),
          "phi must be float64 of gram's shape");
  require(order.has_value() != seed.has_value(), "pass either order or seed");
  if (order) require_order(*order, gram);
  if (seed) require_seed(*seed);
}

/// Uninitialised [..., inner] with gram's dtype, device and leading dimensions.
inline Tensor empty_of_problems(const Tensor& gram, std::initializer_list<int64_t> inner) {
  std::vector<int64_t> shape(gram.sizes().begin(), gram.sizes().end() - 2);
  shape.insert(shape.end(), inner);
  return torch::stable::new_empty(gram, shape);
}

/// Writes the weights [..., K] of a solver to `result`; its arguments fit each other.
using Solve = void (*)(Solver solver, const Tensor& gram, const std::optional<Tensor>& active, double number,
                       const std::optional<Tensor>& values, const Tensor& result);

/// The ops of the weightings that a solver serves, over the active tasks as if the others did not exist: they get weight 0.
template <Solve solve>
struct WeightOps {
  using Optional = std::optional<Tensor>;

  static Tensor run(Solver solver, const Tensor& gram, const Optional& active, double number, const Optional& values) {
    require_exact_gram(gram);
    require_active(active, gram);
    require_values(values, gram);
    Tensor result = empty_of_problems(gram, {gram.size(-1)});
    solve(solver, gram, active, number, values, result);
    return result;
  }

  static Tensor mgda(const Tensor& gram, const Optional& active) { return run(Solver::mgda, gram, active, 0.0, {}); }
  static Tensor cagrad(const Tensor& gram, const Optional& active, double c) {
    return run(Solver::cagrad, gram, active, c, {});
  }
  static Tensor conicgrad(const Tensor& gram, const Optional& active, double c) {
    return run(Solver::conicgrad, gram, active, c, {});
  }
  static Tensor upgrad(const Tensor& gram, const Optional& active, const Optional& preference) {
    return run(Solver::upgrad, gram, active, 0.0, preference);
  }
  static Tensor dualproj(const Tensor& gram, const Optional& active, const Optional& preference) {
    return run(Solver::dualproj, gram, active, 0.0, preference);
  }
  static Tensor pcd(const Tensor& gram, const Optional& active, const Tensor& tau) {
    return run(Solver::pcd, gram, active, 0.0, tau);
  }
  static Tensor config(const Tensor& gram, const Optional& active, const Optional& preference, double epsilon) {
    return run(Solver::config, gram, active, epsilon, preference);
  }
  static Tensor imtl_g(const Tensor& gram, const Optional& active, double epsilon) {
    return run(Solver::imtl_g, gram, active, epsilon, {});
  }
  static Tensor aligned_mtl(const Tensor& gram, const Optional& active, const Optional& preference, int64_t scale,
                            double epsilon) {
    require(scale >= 0 && scale <= 2, "scale must be 0 (min), 1 (median) or 2 (rmse)");
    constexpr Solver solvers[] = {Solver::aligned_mtl_min, Solver::aligned_mtl_median, Solver::aligned_mtl_rmse};
    return run(solvers[scale], gram, active, epsilon, preference);
  }
  static Tensor fairgrad(const Tensor& gram, const Optional& active, double alpha) {
    return run(Solver::fairgrad, gram, active, alpha, {});
  }

  template <class Library>
  static void add_to(Library& m) {
    m.impl("mgda_weights", TORCH_BOX(&mgda));
    m.impl("cagrad_weights", TORCH_BOX(&cagrad));
    m.impl("conicgrad_weights", TORCH_BOX(&conicgrad));
    m.impl("upgrad_weights", TORCH_BOX(&upgrad));
    m.impl("dualproj_weights", TORCH_BOX(&dualproj));
    m.impl("pcd_weights", TORCH_BOX(&pcd));
    m.impl("config_weights", TORCH_BOX(&config));
    m.impl("imtl_g_weights", TORCH_BOX(&imtl_g));
    m.impl("aligned_mtl_weights", TORCH_BOX(&aligned_mtl));
    m.impl("fairgrad_weights", TORCH_BOX(&fairgrad));
  }
};

}  // namespace mtlkernels
