#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

/// How checkpoints pack integers into 32-bit words, and the same values as kernels read them:
/// rows of `i4` (two a byte, the even column in the low half) or of `i8`; zero points [num_rows,
/// groups], one a byte. Words may lie at any address.
namespace troupe::model {

/// Rows of 4 or 8 bits, in ascending order from the low bits of a word, with 8 or 128 added
/// (compressed-tensors). [num_rows, ceil(num_cols * bits / 32)].
std::vector<std::byte> unpack_rows(const std::byte* words, int bits, std::int32_t num_rows,
                                   std::int32_t num_cols);

/// Zero points of 4 bits with 8 added, packed along rows: [ceil(num_rows / 8), groups].
std::vector<std::uint8_t> unpack_zeros_by_rows(const std::byte* words, std::int32_t num_rows,
                                               std::int32_t groups);

/// GPTQ (QuantLinear.pack of AutoGPTQ): weights [num_cols / per word, num_rows] packed along
/// columns, zero points [groups, num_rows / per word], stored less one in its first format.
/// Eight bits come out with 128 subtracted.
std::vector<std::byte> unpack_gptq(const std::byte* words, int bits, std::int32_t num_rows,
                                   std::int32_t num_cols);
std::vector<std::uint8_t> unpack_gptq_zeros(const std::byte* words, int bits, bool less_one,
                                            std::int32_t num_rows, std::int32_t groups);

/// AWQ (WQLinear_GEMM.from_linear of AutoAWQ): weights [num_cols, num_rows / 8], zero points
/// [groups, num_rows / 8]; the rows of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7.
std::vector<std::byte> unpack_awq(const std::byte* words, std::int32_t num_rows,
                                  std::int32_t num_cols);
std::vector<std::uint8_t> unpack_awq_zeros(const std::byte* words, std::int32_t num_rows,
                                           std::int32_t groups);

/// AWQ's words of codes [num_rows, num_cols], a byte each, 0 to 15: what unpack_awq takes. num_rows
/// must be a multiple of 8.
std::vector<std::byte> pack_awq(std::span<const std::uint8_t> codes, std::int32_t num_rows,
                                std::int32_t num_cols);

} // namespace troupe::model
