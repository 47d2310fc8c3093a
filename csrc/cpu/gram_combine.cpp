// The Gram matrix of task gradients and their weighted sum in one read: a block of rows is multiplied, then combined while it
// is in a fast cache. Its products are final before its result is written, so that this may lie where a row does.
//
// Unlike combine's, sums are float32 for float32 and 16-bit gradients: here the arithmetic is what takes time. They are float64
// where a weight, or a block's squares, leave float32's range.

#include "combine.h"
#include "gram.h"
#include "vector.h"

namespace mtlkernels::cpu {
namespace {

/// The weights of the rows that are present, and sums of rows of T in A.
template <typename T, typename A>
class Sums {
 public:
  Sums(const Gram& gram, const double* weights)
      : block_(gram.num_present()), scratch_(size_t(gram.num_present()) * sizeof(A) + kBlock * sizeof(T)) {
    results_ = scratch_.as<T>();
    weights_ = reinterpret_cast<A*>(results_ + kBlock);
    for (int i = 0; i < gram.num_present(); ++i) weights_[i] = A(weights[gram.present(i)]);
  }

  /// Writes the result of a block whose present rows are `rows` where elements [at, at + count) of `out` belong.
  template <typename S>
  void run(const T* const* rows, const Layout& layout, const Output& out, int64_t at, int64_t count) {
    for (int64_t from = 0; from < count; from += kBlock)
      run<S>(rows, from, layout, out, at + from, count - from < kBlock ? count - from : kBlock);
  }

 private:
  template <typename S>
  void run(const T* const* rows, int64_t from, const Layout& layout, const Output& out, int64_t at, int64_t count) {
    S* to = static_cast<S*>(out.rows[0]);
    if constexpr (std::is_same_v<T, BFloat16>) {  // as they lie in memory
      block_.run(rows, weights_, count, to + at, streams(out, to + at), from);
    } else {
      run_wide<S>(rows, from, layout, out, at, count);
    }
  }

  template <typename S>
  void run_wide(const T* const* rows, int64_t from, const Layout& layout, const Output& out, int64_t at, int64_t count) {
    S* to = static_cast<S*>(out.rows[0]);
    if constexpr (std::is_same_v<S, T>) {
      if (layout.dim == 0) return block_.run(rows, weights_, count, to + at, streams(out, to + at), from);
    }
    block_.run(rows, weights_, count, results_, false, from);
    if (layout.dim != 0) return scatter(results_, layout, out.strides[0], at, count, to);
    round_to(count, streams(out, to + at), to + at);
  }

  template <typename S>
  static bool streams(const Output& out, S* to) {
    return out.stream && reinterpret_cast<uintptr_t>(to) % 64 == 0;
  }

  template <typename S>
  void round_to(int64_t count, bool stream, S* to) const {
    int64_t e = 0;
    for (; e + kLanes<double> <= count; e += kLanes<double>) {
      const DoubleVector value = load_as_double(results_ + e);
      stream ? store_streaming(to + e, value) : store_cached(to + e, value);
    }
    for (; e < count; ++e) from_float(Rounded<S>(results_[e]), to + e);
  }

  Block<T, A> block_;
  Scratch scratch_;
  T* results_;
  A* weights_;
};

/// Elements [begin, end), their sums in A.
template <typename S, typename A>
void gram_combine_range(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out,
                        double* sums) {
  Gram gram(column, column.num_rows, PairForm::none);
  Sums<Rounded<S>, A> plain(gram, weights);
  Sums<double, double> wide(gram, weights);
  Sums<std::conditional_t<std::is_same_v<S, BFloat16> && kMultipliesBFloat16, S, Rounded<S>>, A> direct(gram, weights);
  gram.add(begin, end, [&](auto rows, int64_t at, int64_t count) {
    if constexpr (std::is_same_v<decltype(rows), const Rounded<S>* const*>) {
      plain.template run<S>(rows, column.layout, out, at, count);
    } else if constexpr (std::is_same_v<decltype(rows), const double* const*>) {
      wide.template run<S>(rows, column.layout, out, at, count);
    } else if constexpr (std::is_same_v<S, BFloat16> && std::is_same_v<decltype(rows), const S* const*> &&
                         kMultipliesBFloat16) {
      direct.template run<S>(rows, column.layout, out, at, count);
    }  // rows of float64 gradients are never float, others no BFloat16
  });
  gram.move_to(sums);
  if (out.stream) fence_streaming();
}

template <typename S>
void gram_combine_range(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out,
                        double* sums) {
  return fit_float(weights, column.num_rows) ? gram_combine_range<S, Rounded<S>>(column, weights, begin, end, out, sums)
                                             : gram_combine_range<S, double>(column, weights, begin, end, out, sums);
}

}  // namespace

namespace MTL_ISA {

void gram_combine(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out, double* sums) {
  if (begin >= end) return;
  switch (column.dtype) {
    case DType::float32: return gram_combine_range<float>(column, weights, begin, end, out, sums);
    case DType::bfloat16: return gram_combine_range<BFloat16>(column, weights, begin, end, out, sums);
    case DType::float16: return gram_combine_range<Float16>(column, weights, begin, end, out, sums);
    case DType::float64: return gram_combine_range<double>(column, weights, begin, end, out, sums);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
