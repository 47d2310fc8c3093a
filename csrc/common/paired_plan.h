#pragma once
// What a pair of rows makes. Plain C++ for host and device.

namespace mtlkernels {

/// Of the rows (a, b) of a pair: none, both are as they are; difference, a and b - a; product, a and a b.
enum class PairForm : int { none, difference, product };

}  // namespace mtlkernels
