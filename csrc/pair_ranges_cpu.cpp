// The ops `pair_ranges` and `pair_ranges_` on the CPU: arguments and registration; the loops are in pair_ranges_cpu.h.
#include "common.h"
#include "pair_arguments.h"
#include "pair_ranges_cpu.h"

namespace gradrep {
namespace {

// visit(arguments) with those of the loops.
template <typename Visit>
void visit_arguments(const std::string& op, Tensor& ends, int64_t* n, const Tensor& x,
                     const std::vector<Displacement>& pairs, const std::vector<int64_t>& padding, bool remove_near,
                     const Visit& visit) {
  visit_dtype(op, x, [&](auto stored) {
    using S = decltype(stored);
    visit(RangeArguments<S>{feature_map<S>(x), pairs, padding[0], padding[1], remove_near,
                            static_cast<Arithmetic<S>*>(ends.mutable_data_ptr()), n});
  });
}

void pair_ranges_add_cpu(Tensor ends, std::optional<Tensor> n, Tensor x, std::vector<int64_t> displacements,
                         std::vector<int64_t> padding, bool remove_near) {
  const auto pairs = check_pairs("pair_ranges_", x, displacements, padding);
  check_ends(x, pairs.size(), ends, n);
  visit_arguments("pair_ranges_", ends, numbers_of(n), x, pairs, padding, remove_near, [](const auto& arguments) {
    pair_ranges_add(arguments, torch::stable::get_num_threads(), parallel);
  });
}

std::tuple<Tensor, Tensor> pair_ranges_cpu(Tensor x, std::vector<int64_t> displacements, std::vector<int64_t> padding,
                                           bool remove_near) {
  const auto pairs = check_pairs("pair_ranges", x, displacements, padding);
  auto [ranges, n] = empty_ranges(x, pairs.size());
  visit_arguments("pair_ranges", ranges, numbers_of(n), x, pairs, padding, remove_near,
                  [](const auto& arguments) { pair_ranges(arguments, torch::stable::get_num_threads(), parallel); });
  return {ranges, n};
}

}  // namespace
}  // namespace gradrep

STABLE_TORCH_LIBRARY_IMPL(gradrep_kernels, CPU, m) {
  m.impl("pair_ranges", TORCH_BOX(&gradrep::pair_ranges_cpu));
  m.impl("pair_ranges_", TORCH_BOX(&gradrep::pair_ranges_add_cpu));
}
