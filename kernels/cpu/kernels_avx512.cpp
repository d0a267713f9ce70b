#include "troupe/kernels/cpu/kernel_table.hpp"

#define TROUPE_ISA avx512
#include "troupe/kernels/cpu/make_table.hpp"

namespace troupe::kernels::cpu {

const kernel_table& avx512_kernels() {
  static constexpr kernel_table table = TROUPE_ISA::make_table("avx512");
  return table;
}

} // namespace troupe::kernels::cpu
