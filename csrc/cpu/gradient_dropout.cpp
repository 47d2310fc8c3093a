// Gradient dropout on the CPU: a gradient times noise of mean 1, read from memory once, the result written once.
//
// In float32 (float64 for float64) without fused multiply-adds, as every backend does it: all give the same bits. A block's
// random words are drawn into the first-level cache and made into draws there, normal numbers or ones and zeros.

#include "blocks.h"
#include "random.h"
#include "vector.h"

namespace mtlkernels::cpu {
namespace {

static_assert(kBlock % 4 == 0);  // the words of a counter

/// Draws in the place of words, of whole vectors: whether each is kept.
inline void keep(uint32_t threshold, int64_t count, uint32_t* words) {
  for (int64_t e = 0; e < count; e += kLanes<float>) {
    const WordVector word = load<WordVector>(words + e);
    store(words + e, word < threshold ? FloatVector{} : FloatVector{} + 1.0f);
  }
}

inline const NoiseLevel<float>& level_of(const Noise& noise, float) { return noise.narrow; }
inline const NoiseLevel<double>& level_of(const Noise& noise, double) { return noise.wide; }

inline FloatVector load_draws(const uint32_t* draws, float) { return load<FloatVector>(draws); }
inline DoubleVector load_draws(const uint32_t* draws, double) {
  return __builtin_convertvector(load<HalfFloatVector>(draws), DoubleVector);
}

/// Computed as S, written as T.
template <typename S, typename T>
void drop_range(const Column& column, const Noise& noise, int64_t begin, int64_t end, const Output& out) {
  using V = Vector<S>;
  const NoiseLevel<S>& level = level_of(noise, S());
  Scratch scratch(2 * kBlock * sizeof(S)), bits((kBlock + kDraw) * sizeof(uint32_t));
  S *values = scratch.as<S>(), *results = values + kBlock;
  uint32_t* draws = bits.as<uint32_t>();
  const Words random(noise.seed, noise.place);
  const S* row;
  for_blocks<S, T>(
      column, begin, end, out, 1, &row, values, results,
      [&](int64_t at, int64_t count) {
        row = read_row<S>(column, 0, at, count, values);
        for (int64_t e = 0; e < count; e += kDraw) random.draw(at + e, draws + e);
        noise.gaussian ? normals(count, draws) : keep(level.threshold, count, draws);
      },
      [&](int64_t from, int64_t count, S* to, bool stream) {
        for (int64_t e = 0; e < count; e += kLanes<S>) {
          const V result = load<V>(row + e) * (load_draws(draws + from + e, S()) * level.scale + level.base);
          if (stream) {
            store_streaming(to + e, result);
          } else {
            store(to + e, result);
          }
        }
      });
}

}  // namespace

namespace MTL_ISA {

void gradient_dropout(const Column& column, const Noise& noise, int64_t begin, int64_t end, const Output& out) {
  switch (column.dtype) {
    case DType::float32: return drop_range<float, float>(column, noise, begin, end, out);
    case DType::bfloat16: return drop_range<float, BFloat16>(column, noise, begin, end, out);
    case DType::float16: return drop_range<float, Float16>(column, noise, begin, end, out);
    case DType::float64: return drop_range<double, double>(column, noise, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
