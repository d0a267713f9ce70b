#include "troupe/kernels/cpu/kernel_table.hpp"

#define TROUPE_ISA portable
#include "troupe/kernels/cpu/make_table.hpp"

namespace troupe::kernels::cpu {

const kernel_table& portable_kernels() {
  static constexpr kernel_table table = TROUPE_ISA::make_table("portable");
  return table;
}

} // namespace troupe::kernels::cpu
