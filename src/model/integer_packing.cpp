#include "troupe/model/integer_packing.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace troupe::model {

namespace {

/// Columns transposed at a time, so that what is read and what is written stay in the cache.
constexpr std::int32_t kTileCols = 64;

constexpr std::array<int, 8> kInOrder{0, 1, 2, 3, 4, 5, 6, 7};
constexpr std::array<int, 8> kAwqOrder{0, 2, 4, 6, 1, 3, 5, 7};

std::uint32_t word_at(const std::byte* words, std::size_t index) {
  std::uint32_t word;
  std::memcpy(&word, words + index * sizeof word, sizeof word);
  return word;
}

/// The elements of one weight in the layout of kernels, written one by one.
class element_rows {
public:
  element_rows(int bits, std::int32_t num_rows, std::int32_t num_cols)
    : is_8_bit_(bits == 8),
      row_bytes_(is_8_bit_ ? num_cols : (num_cols + 1) / 2),
      bytes_(static_cast<std::size_t>(num_rows) * row_bytes_) {}

  void set(std::int32_t row, std::int32_t col, std::uint32_t value) {
    auto* at = bytes_.data() + static_cast<std::size_t>(row) * row_bytes_;
    if (is_8_bit_)
      at[col] = static_cast<std::byte>(value - 128U);
    else
      at[col / 2] |= static_cast<std::byte>(value << (col % 2 * 4));
  }

  std::vector<std::byte> take() { return std::move(bytes_); }

private:
  bool is_8_bit_;
  std::int32_t row_bytes_;
  std::vector<std::byte> bytes_;
};

std::vector<std::uint8_t> unpack_zeros(const std::byte* words, int bits, std::uint32_t added,
                                       const std::array<int, 8>& order, std::int32_t num_rows,
                                       std::int32_t groups) {
  const auto per_word = 32 / bits;
  const std::uint32_t mask = (1U << bits) - 1;
  const auto words_a_group = num_rows / per_word;
  std::vector<std::uint8_t> result(static_cast<std::size_t>(num_rows) * groups);
  for (std::int32_t group = 0; group < groups; ++group)
    for (std::int32_t at = 0; at < words_a_group; ++at) {
      const auto word = word_at(words, static_cast<std::size_t>(group) * words_a_group + at);
      for (int i = 0; i < per_word; ++i) {
        const auto row = static_cast<std::size_t>(at) * per_word + order[i];
        result[row * groups + group] =
          static_cast<std::uint8_t>(((word >> (i * bits) & mask) + added) & mask);
      }
    }
  return result;
}

} // namespace

std::vector<std::byte> unpack_rows(const std::byte* words, int bits, std::int32_t num_rows,
                                   std::int32_t num_cols) {
  const auto per_word = 32 / bits;
  const auto words_a_row = (num_cols + per_word - 1) / per_word;
  element_rows result(bits, num_rows, num_cols);
  for (std::int32_t row = 0; row < num_rows; ++row)
    for (std::int32_t col = 0; col < num_cols; ++col) {
      const auto word =
        word_at(words, static_cast<std::size_t>(row) * words_a_row + col / per_word);
      result.set(row, col, word >> (col % per_word * bits) & ((1U << bits) - 1));
    }
  return result.take();
}

std::vector<std::uint8_t> unpack_zeros_by_rows(const std::byte* words, std::int32_t num_rows,
                                               std::int32_t groups) {
  std::vector<std::uint8_t> result(static_cast<std::size_t>(num_rows) * groups);
  for (std::int32_t row = 0; row < num_rows; ++row)
    for (std::int32_t group = 0; group < groups; ++group)
      result[static_cast<std::size_t>(row) * groups + group] = static_cast<std::uint8_t>(
        word_at(words, static_cast<std::size_t>(row / 8) * groups + group) >> (row % 8 * 4) & 15U);
  return result;
}

std::vector<std::byte> unpack_gptq(const std::byte* words, int bits, std::int32_t num_rows,
                                   std::int32_t num_cols) {
  const auto per_word = 32 / bits;
  element_rows result(bits, num_rows, num_cols);
  for (std::int32_t tile = 0; tile < num_cols; tile += kTileCols)
    for (std::int32_t row = 0; row < num_rows; ++row)
      for (auto col = tile; col < std::min(num_cols, tile + kTileCols); ++col) {
        const auto word = word_at(words, static_cast<std::size_t>(col / per_word) * num_rows + row);
        result.set(row, col, word >> (col % per_word * bits) & ((1U << bits) - 1));
      }
  return result.take();
}

std::vector<std::uint8_t> unpack_gptq_zeros(const std::byte* words, int bits, bool less_one,
                                            std::int32_t num_rows, std::int32_t groups) {
  return unpack_zeros(words, bits, less_one ? 1 : 0, kInOrder, num_rows, groups);
}

std::vector<std::byte> unpack_awq(const std::byte* words, std::int32_t num_rows,
                                  std::int32_t num_cols) {
  const auto words_a_col = num_rows / 8;
  element_rows result(4, num_rows, num_cols);
  for (std::int32_t tile = 0; tile < num_cols; tile += kTileCols)
    for (std::int32_t at = 0; at < words_a_col; ++at)
      for (auto col = tile; col < std::min(num_cols, tile + kTileCols); ++col) {
        const auto word = word_at(words, static_cast<std::size_t>(col) * words_a_col + at);
        for (int i = 0; i < 8; ++i)
          result.set(at * 8 + kAwqOrder[i], col, word >> (i * 4) & 15U);
      }
  return result.take();
}

std::vector<std::uint8_t> unpack_awq_zeros(const std::byte* words, std::int32_t num_rows,
                                           std::int32_t groups) {
  return unpack_zeros(words, 4, 0, kAwqOrder, num_rows, groups);
}

std::vector<std::byte> pack_awq(std::span<const std::uint8_t> codes, std::int32_t num_rows,
                                std::int32_t num_cols) {
  const auto words_a_col = num_rows / 8;
  std::vector<std::byte> words(codes.size() / 2);
  for (std::int32_t tile = 0; tile < num_cols; tile += kTileCols)
    for (std::int32_t at = 0; at < words_a_col; ++at)
      for (auto col = tile; col < std::min(num_cols, tile + kTileCols); ++col) {
        std::uint32_t word = 0;
        for (int i = 0; i < 8; ++i) {
          const auto row = static_cast<std::size_t>(at) * 8 + kAwqOrder[i];
          word |= static_cast<std::uint32_t>(codes[row * num_cols + col]) << (i * 4);
        }
        const auto index = static_cast<std::size_t>(col) * words_a_col + at;
        std::memcpy(words.data() + index * sizeof word, &word, sizeof word);
      }
  return words;
}

} // namespace troupe::model
