// Inner products of task gradients; gram.h says how.

#include "gram.h"

#include "vector.h"

namespace mtlkernels::cpu {
namespace MTL_ISA {

void gram(const Column& column, int num_left, PairForm form, int64_t begin, int64_t end, int64_t segment, double* sums) {
  if (begin >= end) return;
  Gram products(column, num_left, form);
  const int64_t matrix = int64_t(num_left) * (num_left == column.num_rows ? num_left : column.num_rows - num_left);
  for (int64_t at = begin; at < end; at += segment, sums += matrix) {
    products.add(at, end - at < segment ? end : at + segment, [](auto, int64_t, int64_t) {});
    products.move_to(sums);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
