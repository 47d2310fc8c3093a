#pragma once
// What the launcher and the binding of gram_combine_ share.

namespace mtlkernels {

constexpr int kGramCombineTasks = 8;  // whose products, results and weights fit one read on CUDA; more take gram and combine

}  // namespace mtlkernels
