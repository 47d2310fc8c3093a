// Inner products of task gradients, G[i][j] += sum_e a_i[e] * b_j[e], each row read from memory once.
//
// A block of every row is brought into the first-level cache; tiles of pairs then run over it with one vector accumulator per
// pair. Products and a block's sum are float32 (float64 for float64 gradients), blocks are added in float64. A block whose
// squares leave float32's range, because of huge, tiny or non-finite elements, is summed again in float64.

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

// Pairs in flight: R * C accumulators and R + C operands have to fit in 32 (AVX-512) or 16 vector registers.
constexpr int kTile = kVectorBytes == 64 ? 4 : 3;

// Terms of one float32 sum. Where elements repeat, all its roundings have one sign: with 128 terms the Gram of a constant
// gradient is off by 1e-6, with 8 by 1e-7. Squares of bfloat16 values, whose low bits are few and uneven, suffer in the same
// way.
constexpr int64_t kTerms = 8;
constexpr int64_t kLongestBlock = kTerms * kLanes<float>;

/// Rows past which the processor does not fetch a block of each ahead by itself.
constexpr int kRowsFetched = 8;

/// out[r][c] = <a_r, b_c> over `count` elements. `Triangle` computes c >= r only, with a == b; `fetch` asks for the block of a
/// that follows meanwhile.
template <typename T, int R, int C, bool Triangle>
void tile(const T* const* a, const T* const* b, int64_t count, bool fetch, double* out, int64_t out_stride) {
  constexpr int unroll = R * C <= 4 ? 4 : 1;  // enough independent sums to hide the latency of an addition
  constexpr int step = kLanes<T> * unroll;
  Vector<T> sums[R][C][unroll] = {};
  int64_t e = 0;
  for (; e + step <= count; e += step) {
#pragma GCC unroll 4
    for (int u = 0; u < unroll; ++u) {
      Vector<T> left[R], right[C];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) left[r] = load<Vector<T>>(a[r] + e + u * kLanes<T>);
      if (Triangle && fetch)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) __builtin_prefetch(a[r] + e + u * kLanes<T> + count);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) right[c] = Triangle ? left[c < R ? c : 0] : load<Vector<T>>(b[c] + e + u * kLanes<T>);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = Triangle ? r : 0; c < C; ++c) sums[r][c][u] += left[r] * right[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = Triangle ? r : 0; c < C; ++c) {
      Vector<T> total = sums[r][c][0];
#pragma GCC unroll 4
      for (int u = 1; u < unroll; ++u) total += sums[r][c][u];
      out[r * out_stride + c] = sum_lanes(total);
    }
  }
  for (; e < count; ++e) {
    for (int r = 0; r < R; ++r)
      for (int c = Triangle ? r : 0; c < C; ++c) out[r * out_stride + c] += double(a[r][e]) * double(b[c][e]);
  }
}

template <typename T>
using Tile = void (*)(const T* const*, const T* const*, int64_t, bool, double*, int64_t);

template <typename T, int R>
Tile<T> rectangle(int columns) {
  if constexpr (kTile == 4) {
    if (columns == 4) return tile<T, R, kTile, false>;
  }
  return columns == 3 ? tile<T, R, 3, false> : columns == 2 ? tile<T, R, 2, false> : tile<T, R, 1, false>;
}

template <typename T>
Tile<T> pick_tile(int rows, int columns, bool triangle) {
  if (triangle) {
    if (rows == 4) return tile<T, 4, 4, true>;
    return rows == 3 ? tile<T, 3, 3, true> : rows == 2 ? tile<T, 2, 2, true> : tile<T, 1, 1, true>;
  }
  if constexpr (kTile == 4) {
    if (rows == 4) return rectangle<T, kTile>(columns);
  }
  return rows == 3 ? rectangle<T, 3>(columns) : rows == 2 ? rectangle<T, 2>(columns) : rectangle<T, 1>(columns);
}

/// products[i][j] of left rows i with right rows j; with `symmetric`, left and right are the same rows and j >= i.
template <typename T>
void block_products(const T* const* left, int num_left, const T* const* right, int num_right, bool symmetric, int64_t count,
                    double* products) {
  // Four rows fit a triangle of ten accumulators everywhere.
  const int height = symmetric && num_left <= 4 ? 4 : kTile;
  for (int i = 0; i < num_left; i += height) {
    const int rows = num_left - i < height ? num_left - i : height;
    for (int j = symmetric ? i : 0; j < num_right; j += height) {
      const int columns = num_right - j < height ? num_right - j : height;
      const Tile<T> run = pick_tile<T>(rows, columns, symmetric && i == j);
      run(left + i, right + j, count, num_left > kRowsFetched, products + i * num_right + j, num_right);
    }
  }
}

/// Whether a float32 sum of squares says nothing certain about its block: overflow, NaN, or so small that products underflowed.
inline bool out_of_range(double square) { return !(square < 0x1p127) || square < 0x1p-96; }

inline bool all_zero(const float* row, int64_t count) {
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) any |= float_to_bits(row[i]) << 1;
  return any == 0;
}

class Gram {
 public:
  Gram(const Column& column, int num_left, PairForm form)
      : column_(column),
        form_(form),
        num_left_(num_left),
        num_right_(num_left == column.num_rows ? num_left : column.num_rows - num_left),
        symmetric_(num_left == column.num_rows),
        element_bytes_(column.dtype == DType::float64 ? 8 : 4),
        block_(block_size()),
        // Row pointers and indices, products of one block, sums of all blocks, and the blocks themselves in float64 at the
        // widest.
        scratch_(2 * size_t(column.num_rows) * 8 + 2 * size_t(num_left_) * num_right_ * 8 +
                 size_t(column.num_rows) * block_ * 8) {
    products_ = scratch_.as<double>();
    totals_ = products_ + num_left_ * num_right_;
    index_ = reinterpret_cast<int64_t*>(totals_ + num_left_ * num_right_);
    rows_ = reinterpret_cast<const void**>(index_ + column.num_rows);
    values_ = reinterpret_cast<double*>(rows_ + column.num_rows);
    for (int k = 0; k < column.num_rows; ++k) {
      if (!is_present(k)) continue;
      index_[present_++] = k;
      present_left_ += k < num_left;
    }
  }

  void add_to(int64_t begin, int64_t end, double* sums) {
    const int left = present_left_, right = symmetric_ ? left : present_ - left;
    if (left == 0 || right == 0) return;
    for (int i = 0; i < left * right; ++i) totals_[i] = 0;
    for (int64_t at = begin; at < end; at += block_) {
      const int64_t count = end - at < block_ ? end - at : block_;
      if (element_bytes_ == 8 || !block<float>(at, count)) block<double>(at, count);
      for (int i = 0; i < left; ++i)
        for (int j = symmetric_ ? i : 0; j < right; ++j) totals_[i * right + j] += products_[i * right + j];
    }
    for (int i = 0; i < left; ++i)
      for (int j = symmetric_ ? i : 0; j < right; ++j)
        sums[index_[i] * num_right_ + index_[symmetric_ ? j : left + j] - (symmetric_ ? 0 : num_left_)] +=
            totals_[i * right + j];
  }

 private:
  bool is_formed(int k) const { return form_ != PairForm::none && k % 2; }

  bool is_present(int k) const {
    const bool own = column_.rows[k];
    if (!is_formed(k)) return own;
    const bool before = column_.rows[k - 1];
    return form_ == PairForm::product ? before && own : before || own;
  }

  /// Elements [at, at + count) of an odd row, formed in `values`; `before` are those of the row before, null where it is
  /// absent.
  template <typename T>
  const T* form_row(int k, int64_t at, int64_t count, const T* before, T* values) const {
    if (!column_.rows[k]) {  // a difference from nothing
      return form_each(count, before, before, values, [](auto a, auto) { return -a; });
    }
    const T* own = read_row<T>(column_, k, at, count, values);
    if (!before) return own;
    if (form_ == PairForm::product) return form_each(count, before, own, values, [](auto a, auto b) { return a * b; });
    return form_each(count, before, own, values, [](auto a, auto b) { return b - a; });
  }

  /// values[e] = form(a[e], b[e]); `values` may be `b`.
  template <typename T, typename Form>
  static const T* form_each(int64_t count, const T* a, const T* b, T* values, const Form& form) {
    int64_t e = 0;
    for (; e + kLanes<T> <= count; e += kLanes<T>) store(values + e, form(load<Vector<T>>(a + e), load<Vector<T>>(b + e)));
    for (; e < count; ++e) values[e] = form(a[e], b[e]);
    return values;
  }

  int64_t block_size() const {
    return kLongestBlock * (column_.num_rows <= 2 ? 4 : 1);  // tiles of up to four pairs keep four sums of each
  }

  /// products_ of one block; false when float32 cannot hold them.
  template <typename T>
  bool block(int64_t at, int64_t count) {
    const T** rows = reinterpret_cast<const T**>(rows_);
    T* values = reinterpret_cast<T*>(values_);
    for (int i = 0; i < present_; ++i) {
      const int k = int(index_[i]);
      T* own = values + i * block_;
      if (is_formed(k)) {  // the row before it, where there is one, is the one before it here
        rows[i] = form_row<T>(k, at, count, column_.rows[k - 1] ? rows[i - 1] : nullptr, own);
      } else {
        rows[i] = read_row<T>(column_, k, at, count, own);
      }
    }
    const int left = present_left_, right = symmetric_ ? left : present_ - left;
    const T* const* right_rows = symmetric_ ? rows : rows + left;
    block_products<T>(rows, left, right_rows, right, symmetric_, count, products_);
    if constexpr (sizeof(T) == 4) {
      if (column_.dtype == DType::float16) return true;  // its squares stay within float32's range
      for (int i = 0; i < present_; ++i) {
        double square;
        if (symmetric_) {
          square = products_[i * right + i];
        } else {
          tile<T, 1, 1, true>(rows + i, rows + i, count, false, &square, 1);
        }
        if (out_of_range(square) && !all_zero(rows[i], count)) return false;
      }
    }
    return true;
  }

  const Column& column_;
  const PairForm form_;
  const int num_left_, num_right_;
  const bool symmetric_;
  const int64_t element_bytes_, block_;
  Scratch scratch_;
  double *products_, *totals_, *values_;
  int64_t* index_;
  const void** rows_;
  int present_ = 0, present_left_ = 0;
};

}  // namespace

namespace MTL_ISA {

void gram(const Column& column, int num_left, PairForm form, int64_t begin, int64_t end, int64_t segment, double* sums) {
  if (begin >= end) return;
  Gram products(column, num_left, form);
  const int64_t matrix = int64_t(num_left) * (num_left == column.num_rows ? num_left : column.num_rows - num_left);
  for (int64_t at = begin; at < end; at += segment, sums += matrix)
    products.add_to(at, end - at < segment ? end : at + segment, sums);
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
