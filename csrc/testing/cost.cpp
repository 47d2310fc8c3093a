// Runs CPU kernels under valgrind's callgrind, which counts their instructions: for each op, dtype and number of tasks one call
// on a tensor with a tail. Linked with the kernels of one instruction set. Never installed.

#include <valgrind/callgrind.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/scratch.h"

namespace mtlkernels::cpu::MTL_ISA {

void gram(const Column& column, int num_left, PairForm form, int64_t begin, int64_t end, int64_t segment, double* sums);
void combine(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out);

}  // namespace mtlkernels::cpu::MTL_ISA

using namespace mtlkernels;
using namespace mtlkernels::cpu;

/// Arguments: elements of the tensor, and how often each op runs in a count.
int main(int, char** arguments) {
  const int64_t numel = std::atoll(arguments[1]);
  const int repeats = std::atoi(arguments[2]);
  give_back(borrow(1));  // the memory that a thread keeps is made once
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    for (const int num_tasks : {2, 3, 8, 16, 40}) {
      std::vector<std::vector<uint32_t>> memory(num_tasks + 1, std::vector<uint32_t>(numel));
      std::vector<void*> rows;
      for (int k = 0; k < num_tasks; ++k) {  // numbers of size 1 to 2, of both signs
        for (int64_t i = 0; i < numel; ++i) {
          const uint32_t bits = uint32_t(i * 2654435761u + uint32_t(k) * 40503u);
          if (dtype == DType::float32) memory[k][i] = (bits & 0x80000000u) | 0x3f800000u | (bits & 0x7fffffu);
          if (dtype == DType::bfloat16)
            reinterpret_cast<uint16_t*>(memory[k].data())[i] = uint16_t((bits >> 16 & 0x8000u) | 0x3f80u | (bits & 0x7fu));
        }
        rows.push_back(memory[k].data());
      }
      void* result = memory[num_tasks].data();
      const Column column{rows.data(), nullptr, num_tasks, dtype, {numel, 0, nullptr}};
      const Output out{&result, nullptr, 1, false};
      std::vector<double> weights(num_tasks, 0.5), sums(num_tasks * num_tasks);
      for (const bool is_gram : {true, false}) {
        CALLGRIND_START_INSTRUMENTATION;
        CALLGRIND_ZERO_STATS;
        for (int repeat = 0; repeat < repeats; ++repeat) {
          if (is_gram) {
            MTL_ISA::gram(column, num_tasks, PairForm::none, 0, numel, numel, sums.data());
          } else {
            MTL_ISA::combine(column, weights.data(), 0, numel, out);
          }
        }
        const std::string label = std::string(is_gram ? "gram" : "combine") +
                                  (dtype == DType::float32 ? " float32 " : " bfloat16 ") + std::to_string(num_tasks);
        CALLGRIND_DUMP_STATS_AT(label.c_str());
        CALLGRIND_STOP_INSTRUMENTATION;
      }
    }
  }
  return 0;
}
