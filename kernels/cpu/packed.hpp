#pragma once

#include <cstddef>
#include <cstdint>

#include "troupe/kernels/ops.hpp"

/// Weights in the order in which the fast kernels read them, so that memory is read in one stream.
/// Sixteen columns of the output make a panel, cut into registers of 64 bytes: each holds, for its
/// sixteen columns, neighbouring elements of the sum (two of bf16, four of 8 bit). Up to four
/// panels make a bundle: the first register of each of them, then the second of each, and so on.
namespace troupe::kernels::cpu {

enum class packed_kind : std::uint8_t {
  bf16, ///< [bundle][depth / 2][panel][16 columns][2]
  f8,   ///< e4m3, [bundle][depth / 4][panel][4 quarters][2 pairs][4 columns][2]
  i8    ///< plus 128 and so unsigned, [bundle][depth / 4][panel][16 columns][4]
};

/// Columns of a panel.
inline constexpr std::int32_t kPackedColumns = 16;

/// Panels of a bundle; the last one may have fewer.
inline constexpr std::int32_t kBundlePanels = 4;

/// Most elements of the sum under one scale; longer groups of a checkpoint repeat theirs.
inline constexpr std::int32_t kLargestGroup = 128;

struct packed_weight {
  packed_kind kind = packed_kind::bf16;
  std::int32_t num_rows = 0; ///< of the weight: columns of the output
  std::int32_t num_cols = 0; ///< of the weight: elements of the sum
  std::int32_t depth = 0;    ///< num_cols rounded up to 4
  std::int32_t group = 0;    ///< elements under one scale, 0 for bf16
  std::int32_t num_groups = 0;
  std::int32_t scale_width = 0; ///< 16: a scale a column; 1: a scale a panel
  unsigned char* data = nullptr;
  float* scales = nullptr; ///< [bundle][num_groups][panel][scale_width]

  std::int32_t num_panels() const { return (num_rows + kPackedColumns - 1) / kPackedColumns; }
  std::int64_t panel_bytes() const {
    return std::int64_t{depth} * kPackedColumns * (kind == packed_kind::bf16 ? 2 : 1);
  }
  /// Panels of the bundle that holds this one.
  std::int32_t bundle_panels(std::int32_t panel) const {
    const std::int32_t left = num_panels() - panel / kBundlePanels * kBundlePanels;
    return left < kBundlePanels ? left : kBundlePanels;
  }
  /// The first register of a panel; the others follow at distances of 64 * bundle_panels bytes.
  unsigned char* panel_data(std::int32_t panel) const {
    return data + panel / kBundlePanels * kBundlePanels * panel_bytes()
           + panel % kBundlePanels * 64;
  }
  /// Where the scales of a group begin for one panel; those of the bundle's next panel follow.
  std::int64_t scale_index(std::int32_t panel, std::int32_t group) const {
    const std::int64_t before = panel / kBundlePanels * kBundlePanels * std::int64_t{num_groups};
    return (before + std::int64_t{group} * bundle_panels(panel) + panel % kBundlePanels)
           * scale_width;
  }
  std::size_t data_bytes() const { return static_cast<std::size_t>(num_panels() * panel_bytes()); }
  std::size_t scale_bytes() const {
    return sizeof(float) * num_panels() * num_groups * scale_width;
  }
};

} // namespace troupe::kernels::cpu
