#include "troupe/kernels/cpu/fast_attention.hpp"
#include "troupe/kernels/cpu/fast_linear.hpp"
#include "troupe/kernels/cpu/fast_pack.hpp"
#include "troupe/kernels/cpu/fast_peak.hpp"

namespace troupe::kernels::cpu {

const fast_table& fast_avx512_kernels() {
  static constexpr fast_table table{.pack = fast::pack,
                                    .round_row = fast::round_row,
                                    .widen_row = fast::widen_row,
                                    .quantise_row = fast::quantise_row,
                                    .multiply = fast::multiply,
                                    .pack_queries = fast::pack_queries,
                                    .attend_block = fast::attend_block,
                                    .score_positions = fast::score_positions,
                                    .attend_panels = fast::attend_panels,
                                    .finish_part = fast::finish_part,
                                    .peak_bf16 = fast::peak_bf16,
                                    .peak_i8 = fast::peak_i8};
  return table;
}

} // namespace troupe::kernels::cpu
