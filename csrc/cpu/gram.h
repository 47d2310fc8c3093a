#pragma once
// Inner products of task gradients, G[i][j] += sum_e a_i[e] * b_j[e], each row read from memory once.
//
// A block of every row is brought into a fast cache; tiles of pairs then run over it. Products and short sums are float32
// (float64 for float64 gradients), all else is float64. A block whose squares leave float32's range, because of huge, tiny or
// non-finite elements, is summed again in float64; bfloat16 rows that were multiplied as they are, which loses products below
// 2^-126, are widened to float32 first.

#include <type_traits>

#include "gram_tile.h"
#include "vector.h"

namespace mtlkernels::cpu {
namespace {

// Rows past which the processor's own prefetching loses count of them, and asking for what follows is faster. Fewer it follows
// best where all advance together: in one tile, or a few vectors at a time.
constexpr int kFollowedRows = 8;
constexpr int64_t kFollowedBytes = 4 << 10, kTileBytes = 32 << 10, kAskedBytes = 64 << 10;  // of a block of all rows
constexpr int64_t kLargestBlock = 4096;                                                     // elements

#if defined(__AVX512BF16__)
constexpr bool kMultipliesBFloat16 = true;
#else
constexpr bool kMultipliesBFloat16 = false;
#endif

constexpr double kLeastSquare = 0x1p-96;  // of a float32 sum of whose products nothing was lost

/// Whether a float32 sum of squares says nothing certain about its block: overflow, NaN, or so small that products underflowed.
inline bool out_of_range(double square, double least = kLeastSquare) { return !(square < 0x1p127) || square < least; }

inline bool all_zero(const float* row, int64_t count) {
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) any |= float_to_bits(row[i]) << 1;
  return any == 0;
}

inline bool all_zero(const BFloat16* row, int64_t count) {
  uint16_t any = 0;
  for (int64_t i = 0; i < count; ++i) any |= row[i].bits;
  return (any & 0x7fff) == 0;
}

class Gram {
 public:
  Gram(const Column& column, int num_left, PairForm form)
      : column_(column),
        form_(form),
        num_left_(num_left),
        num_right_(num_left == column.num_rows ? num_left : column.num_rows - num_left),
        symmetric_(num_left == column.num_rows),
        direct_(kMultipliesBFloat16 && column.dtype == DType::bfloat16 && column.layout.dim == 0 && form == PairForm::none),
        block_(block_size()),
        most_parts_(int64_t((num_left_ + kTile - 1) / kTile) * ((num_right_ + kTile - 1) / kTile)),
        // Products of one block, sums of all blocks, the blocks themselves in float64 at the widest, pointers to rows and to
        // what follows them, indices of rows, and tiles.
        scratch_(2 * size_t(most_parts_) * kSums * 8 + size_t(column.num_rows) * (block_ + 3) * 8 +
                 most_parts_ * sizeof(Part)) {
    products_ = scratch_.as<double>();
    totals_ = products_ + most_parts_ * kSums;
    values_ = totals_ + most_parts_ * kSums;
    rows_ = reinterpret_cast<const void**>(values_ + column.num_rows * block_);
    ahead_ = reinterpret_cast<const char**>(rows_ + column.num_rows);
    index_ = reinterpret_cast<int64_t*>(ahead_ + column.num_rows);
    parts_ = reinterpret_cast<Part*>(index_ + column.num_rows);
    for (int k = 0; k < column.num_rows; ++k) {
      if (!is_present(k)) continue;
      index_[present_++] = k;
      present_left_ += k < num_left;
    }
    const int left = present_left_, right = num_present_right(), height = symmetric_ && left <= kTriangle ? kTriangle : kTile;
    for (int i = 0; i < left; i += height) {
      for (int j = symmetric_ ? i : 0; j < right; j += height) {
        const int rows = left - i < height ? left - i : height, columns = right - j < height ? right - j : height;
        parts_[num_parts_++] = {i, j, rows, columns, symmetric_ && i == j};
      }
    }
    for (int64_t i = 0; i < 2 * most_parts_ * kSums; ++i) products_[i] = 0;
  }

  /// Takes in elements [begin, end). Calls after(rows, at, count) for each block of them when its products are final, with the
  /// elements of the rows that are present, in order, as BFloat16, float or double.
  template <typename After>
  void add(int64_t begin, int64_t end, const After& after) {
    if (num_parts_ == 0) return;
    for (int64_t at = begin; at < end; at += block_) {
      const int64_t count = end - at < block_ ? end - at : block_;
      if (block_as_it_is(at, count)) {
        after(reinterpret_cast<const BFloat16* const*>(rows_), at, count);
      } else if (column_.dtype != DType::float64 && block<float>(at, count)) {
        after(reinterpret_cast<const float* const*>(rows_), at, count);
      } else {
        block<double>(at, count);
        after(reinterpret_cast<const double* const*>(rows_), at, count);
      }
      for (int64_t i = 0; i < num_parts_ * kSums; i += kLanes<double>)
        store(totals_ + i, load<DoubleVector>(totals_ + i) + load<DoubleVector>(products_ + i));
    }
  }

  int num_present() const { return present_; }
  int64_t present(int i) const { return index_[i]; }

  /// Adds the products of what was taken in since the last call to sums[num_left][num_right].
  void move_to(double* sums) {
    for (int p = 0; p < num_parts_; ++p) {
      const Part& part = parts_[p];
      double* from = totals_ + p * kSums;
      for (int r = 0; r < part.rows; ++r) {
        for (int c = part.triangle ? r : 0; c < part.columns; ++c, ++from) {
          const int64_t i = index_[part.left + r], j = index_[(symmetric_ ? 0 : present_left_) + part.right + c];
          sums[i * num_right_ + j - (symmetric_ ? 0 : num_left_)] += *from;
          *from = 0;
        }
      }
    }
  }

 private:
  /// A tile: rows from `left` on with rows from `right` on, of those that are present.
  struct Part {
    int left, right, rows, columns;
    bool triangle;
  };

  int num_present_right() const { return symmetric_ ? present_left_ : present_ - present_left_; }

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
    const int rows = column_.num_rows;
    const int64_t bytes = rows <= kTriangle ? kTileBytes : rows <= kFollowedRows ? kFollowedBytes : kAskedBytes;
    const int64_t width = direct_ ? 2 : 4, least = 512 / width;  // a vector of elements for every step of a sum
    const int64_t fits = bytes / width / rows / least * least;
    return fits < least ? least : fits > kLargestBlock ? kLargestBlock : fits;
  }

  bool block_as_it_is(int64_t at, int64_t count) {
    if constexpr (kMultipliesBFloat16) return direct_ && block<BFloat16>(at, count);
    return false;
  }

  template <typename T>
  void point_to(int64_t at, int64_t count) {
    const T** rows = reinterpret_cast<const T**>(rows_);
    T* values = reinterpret_cast<T*>(values_);
    for (int i = 0; i < present_; ++i) {
      const int k = int(index_[i]);
      T* own = values + i * block_;
      if constexpr (std::is_same_v<T, BFloat16>) {
        rows[i] = static_cast<const T*>(column_.rows[k]) + at;
      } else if (is_formed(k)) {  // the row before it, where there is one, is the one before it here
        rows[i] = form_row<T>(k, at, count, column_.rows[k - 1] ? rows[i - 1] : nullptr, own);
      } else {
        rows[i] = read_row<T>(column_, k, at, count, own);
      }
    }
  }

  /// products_ of one block; false when T cannot tell them.
  template <typename T>
  bool block(int64_t at, int64_t count) {
    point_to<T>(at, count);
    const T* const* rows = reinterpret_cast<const T* const*>(rows_);
    const T* const* right_rows = symmetric_ ? rows : rows + present_left_;
    // Rows that are read where they lie: what follows is asked for while tiles run, by each some of the rows.
    const bool in_place = column_.layout.dim == 0 && int64_t(sizeof(T)) == element_size(column_.dtype);
    const bool asks = in_place && present_ > kFollowedRows && at + block_ < column_.layout.numel;
    for (int i = 0; asks && i < present_; ++i) ahead_[i] = reinterpret_cast<const char*>(rows[i] + block_);
    for (int p = 0, asked = 0; p < num_parts_; ++p) {
      const Part& part = parts_[p];
      const int until = asks ? (p + 1) * present_ / num_parts_ : 0;
      const Tile<T> run = pick_tile<T>(part.rows, part.columns, part.triangle);
      run(rows + part.left, right_rows + part.right, count, {ahead_ + asked, until - asked}, products_ + p * kSums);
      asked = until;
    }
    if constexpr (sizeof(T) == 8) {
      return true;
    } else {
      return column_.dtype == DType::float16 || in_range(rows, count);  // float16's squares stay within float32's
    }
  }

  /// Whether the squares of all rows are such that nothing was lost. bfloat16 products below 2^-126 are dropped: of 4096, at
  /// most 2^-34 of the least square.
  template <typename T>
  bool in_range(const T* const* rows, int64_t count) const {
    const double least = sizeof(T) == 2 ? 0x1p-80 : kLeastSquare;
    for (int p = 0; p < num_parts_; ++p) {
      const Part& part = parts_[p];
      if (!part.triangle) continue;
      const double* square = products_ + p * kSums;
      for (int r = 0; r < part.rows; square += part.rows - r, ++r)
        if (out_of_range(*square, least) && !all_zero(rows[part.left + r], count)) return false;
    }
    for (int i = 0; !symmetric_ && i < present_; ++i) {
      alignas(kVectorBytes) double square[kSums];
      tile<T, 1, 1, true>(rows + i, rows + i, count, {nullptr, 0}, square);
      if (out_of_range(square[0], least) && !all_zero(rows[i], count)) return false;
    }
    return true;
  }

  const Column& column_;
  const PairForm form_;
  const int num_left_, num_right_;
  const bool symmetric_, direct_;  // bfloat16 rows are multiplied as they are
  const int64_t block_, most_parts_;
  Scratch scratch_;
  double *products_, *totals_, *values_;
  const void** rows_;
  const char** ahead_;
  int64_t* index_;
  Part* parts_;
  int num_parts_ = 0, present_ = 0, present_left_ = 0;
};

}  // namespace
}  // namespace mtlkernels::cpu
