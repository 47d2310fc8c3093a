// What a machine can do: reading memory, and multiplying and adding in registers. Benchmarks build it for the machine they run
// on. Never installed.

#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

typedef uint64_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

}  // namespace

/// Reads `bytes[i]` bytes from each of `count` pointers, once; the result depends on all of them.
EXPORT uint64_t read_memory(const char* const* pointers, const int64_t* bytes, int64_t count) {
  Words sums[4] = {};
  uint64_t rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const char* from = pointers[i];
    int64_t at = 0;
    for (; at + 256 <= bytes[i]; at += 256) {
      __builtin_prefetch(from + at + 2048);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        Words words;
        std::memcpy(&words, from + at + 64 * u, 64);
        sums[u] += words;
      }
    }
    for (; at < bytes[i]; ++at) rest += uint8_t(from[at]);
  }
  const Words total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int lane = 0; lane < 8; ++lane) rest += total[lane];
  return rest;
}

/// `steps` times 12 x 16 independent float32 multiply-adds.
EXPORT float multiply_add(int64_t steps) {
  Floats sums[12], factor = Floats{} + 0.999f, term = Floats{} + 1e-3f;
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sums[i] = Floats{} + float(i);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = sums[i] * factor + term;
  }
  Floats whole = {};  // every loop unrolled: the sums stay in registers
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) whole += sums[i];
  float total = 0;
  for (int lane = 0; lane < 16; ++lane) total += whole[lane];
  return total;
}
