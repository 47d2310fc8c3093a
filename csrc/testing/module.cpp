// What tests see of the launch plan: the packed kernel arguments, byte for byte as the launchers pass them. Never installed.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>

#include "../common/gram_plan.h"
#include "../common/kxk_plan.h"
#include "../common/mix_plan.h"
#include "../common/priority.h"

namespace py = pybind11;

namespace {

using mtlkernels::TensorTable;

/// [(the packed table, blocks)] for tensors given by their pointers and sizes.
std::vector<std::pair<py::bytes, int>> plan(const std::vector<std::vector<uint64_t>>& pointers,
                                            const std::vector<int64_t>& sizes, int num_pointers, int chunk_size,
                                            int first_block) {
  std::vector<std::vector<void*>> rows;
  for (const auto& tensor : pointers) {
    std::vector<void*>& row = rows.emplace_back();
    for (uint64_t pointer : tensor) row.push_back(reinterpret_cast<void*>(pointer));
  }
  std::vector<mtlkernels::PlannedTensor> tensors;
  for (size_t n = 0; n < rows.size(); ++n) tensors.push_back({rows[n].data(), sizes[n]});
  std::vector<std::pair<py::bytes, int>> result;
  for (const mtlkernels::Launch& launch : mtlkernels::plan_launches(tensors, num_pointers, chunk_size, first_block))
    result.emplace_back(py::bytes(reinterpret_cast<const char*>(&launch.table), sizeof(TensorTable)), launch.num_blocks);
  return result;
}

/// (tensor, begin, end) of a block's chunk.
std::tuple<int, int64_t, int64_t> chunk_of_block(const std::string& table, int block) {
  TensorTable copy;
  std::memcpy(static_cast<void*>(&copy), table.data(), sizeof(TensorTable));
  const mtlkernels::Chunk chunk = mtlkernels::find_chunk(copy, block);
  return {chunk.tensor, chunk.begin, chunk.end};
}

using mtlkernels::GramFunction;
using mtlkernels::Solver;

const std::map<std::string, Solver> kSolvers{
    {"mgda", Solver::mgda},
    {"cagrad", Solver::cagrad},
    {"conicgrad", Solver::conicgrad},
    {"config", Solver::config},
    {"imtl_g", Solver::imtl_g},
    {"aligned_mtl_min", Solver::aligned_mtl_min},
    {"aligned_mtl_median", Solver::aligned_mtl_median},
    {"aligned_mtl_rmse", Solver::aligned_mtl_rmse},
    {"upgrad", Solver::upgrad},
    {"dualproj", Solver::dualproj},
    {"pcd", Solver::pcd},
    {"fairgrad", Solver::fairgrad},
};

const std::map<std::string, GramFunction> kGramFunctions{
    {"cosine", GramFunction::cosine},
    {"magnitude_similarity", GramFunction::magnitude_similarity},
    {"conflict_rate", GramFunction::conflict_rate},
    {"condition_number", GramFunction::condition_number},
};

/// (threads, bytes of dynamic shared memory) of a kernel of the K x K stage: a solver, a function of the Gram, or an op that
/// projects.
std::tuple<int, int64_t> kxk_launch(const std::string& kernel, int size) {
  const mtlkernels::KxkLaunch launch = kGramFunctions.count(kernel)
                                           ? mtlkernels::gram_function_launch(kGramFunctions.at(kernel), size)
                                       : kernel == "projection_coefficients" || kernel == "pcgrad_weights"
                                           ? mtlkernels::projection_launch(size, kernel == "pcgrad_weights")
                                           : mtlkernels::solver_launch(kSolvers.at(kernel), size);
  return {launch.threads, launch.shared_bytes};
}

}  // namespace

PYBIND11_MODULE(mtlkernels_testing, m) {
  m.def("plan", &plan, py::arg("pointers"), py::arg("sizes"), py::arg("num_pointers"),
        py::arg("chunk_size") = mtlkernels::kDeviceChunk, py::arg("first_block") = 0);
  m.def("gram_launch", [](int dtype, int num_rows) {
    const mtlkernels::GramLaunch launch = mtlkernels::gram_launch(mtlkernels::DType(dtype), num_rows);
    return std::make_tuple(launch.rows_class, launch.threads, launch.shared_bytes);
  });
  m.def("mix_launch", [](int dtype, int num_rows, int num_results) {
    const int bytes = mtlkernels::mix_shared_bytes(mtlkernels::DType(dtype), num_rows, num_results);
    return std::make_tuple(mtlkernels::mix_threads(num_rows), bytes);
  });
  m.def("priority_shape", [](int64_t channels, int64_t rest, int64_t element_bytes) {
    const mtlkernels::PriorityShape shape = mtlkernels::priority_shape(channels, rest, element_bytes);
    return std::make_tuple(shape.slices, shape.length, shape.run, shape.blocks);
  });
  m.def("kxk_launch", &kxk_launch);
  py::dict solvers;
  for (const auto& [name, solver] : kSolvers) solvers[py::str(name)] = int(solver);
  m.attr("SOLVERS") = solvers;
  m.def("chunk_of_block", [](const py::bytes& table, int block) { return chunk_of_block(table, block); });
  m.def("capacity", &TensorTable::capacity);
  m.attr("CHUNK") = mtlkernels::kDeviceChunk;
  m.attr("TABLE_BYTES") = sizeof(TensorTable);
}
