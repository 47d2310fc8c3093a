// Which instruction set the kernels use. Compiled once, for the baseline of the architecture.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mtlkernels::cpu {

#define MTL_DECLARE_KERNELS(isa)                                                                                               \
  namespace isa {                                                                                                              \
  void gram(const Column& column, int num_left, PairForm form, int64_t begin, int64_t end, int64_t segment, double* sums);     \
  void combine(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out);                    \
  void gram_combine(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out, double* sums); \
  void combine_sgd(const Column& column, const double* weights, const SgdOptions& options, double lr, int64_t begin,           \
                   int64_t end, const Output& moved);                                                                          \
  void combine_adam(const Column& column, const double* weights, const AdamOptions& options, double lr, double step,           \
                    int64_t begin, int64_t end, const Output& moved);                                                          \
  void perturb(const Column& column, double radius, bool adaptive, int64_t begin, int64_t end, const Output& out);             \
  void memory_combine(const Column& column, const double* factors, bool squares, int64_t begin, int64_t end,                   \
                      const Output& out);                                                                                      \
  double excess_risk(const Column& column, double factor, double epsilon, int64_t begin, int64_t end);                         \
  void priority_inner(const Column& column, const Channels& channels, int64_t begin, int64_t end, double* inner);              \
  void priority_combine(const Column& column, const Channels& channels, const double* alpha, int64_t begin, int64_t end,       \
                        const Output& out);                                                                                    \
  void graddrop(const Column& column, const Drop& drop, int64_t begin, int64_t end, const Output& out);                        \
  void trimmed_mean(const Column& column, const Trim& trim, int64_t begin, int64_t end, const Output& out);                    \
  void gradient_dropout(const Column& column, const Noise& noise, int64_t begin, int64_t end, const Output& out);              \
  }

MTL_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
MTL_DECLARE_KERNELS(avx2)
MTL_DECLARE_KERNELS(avx512)
MTL_DECLARE_KERNELS(avx512_bf16)
#endif

namespace {

#define MTL_KERNELS(isa)  \
  {#isa,                  \
   isa::gram,             \
   isa::combine,          \
   isa::gram_combine,     \
   isa::combine_sgd,      \
   isa::combine_adam,     \
   isa::perturb,          \
   isa::memory_combine,   \
   isa::excess_risk,      \
   isa::priority_inner,   \
   isa::priority_combine, \
   isa::graddrop,         \
   isa::trimmed_mean,     \
   isa::gradient_dropout}

const Kernels kBaseline = MTL_KERNELS(baseline);
#if defined(__x86_64__)
const Kernels kAvx2 = MTL_KERNELS(avx2);
const Kernels kAvx512 = MTL_KERNELS(avx512);
const Kernels kAvx512BFloat16 = MTL_KERNELS(avx512_bf16);
#endif

const Kernels& choose() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("MTLKERNELS_CPU_CAPABILITY");
  if (asked && !std::strcmp(asked, "baseline")) return kBaseline;
  if (has_avx2 && (!has_avx512 || (asked && !std::strcmp(asked, "avx2")))) return kAvx2;
  const bool has_bfloat16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_avx512 && (!has_bfloat16 || (asked && !std::strcmp(asked, "avx512")))) return kAvx512;
  if (has_bfloat16) return kAvx512BFloat16;
#endif
  return kBaseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mtlkernels::cpu

/// Name of the instruction set in use, for reports and tests.
extern "C" __attribute__((visibility("default"))) const char* mtlkernels_cpu_capability() {
  return mtlkernels::cpu::kernels().name;
}
