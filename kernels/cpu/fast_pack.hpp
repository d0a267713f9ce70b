#pragma once

// Packing for the fast kernels: sixteen rows of a weight become one panel by transposing
// squares of 16 x 16 words of 32 bits.

#include <immintrin.h>

#include "troupe/kernels/cpu/fast_table.hpp"

/// Before loops over the registers of a tile: unrolled, their arrays become registers.
#define TROUPE_UNROLL _Pragma("GCC unroll 16")

namespace troupe::kernels::cpu::fast {

inline std::int32_t least(std::int32_t a, std::int32_t b) {
  return a < b ? a : b;
}

inline __mmask64 first_bytes(std::int64_t count) {
  return count >= 64 ? ~__mmask64{0} : count <= 0 ? 0 : (__mmask64{1} << count) - 1;
}

inline __mmask16 first_lanes(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

/// Brings a line of 64 bytes into the first cache, some time.
inline void ask_for(const unsigned char* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
}

/// Row r of the square becomes column r.
inline void transpose(__m512i (&square)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(square[i], square[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(square[i], square[i + 1]);
  }
  __m512i u[16];
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // u[4 q + c] holds, for each quarter L of 128 bits, word 4 L + c of the rows 4 q .. 4 q + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(u[c], u[c + 4], 0x44);
    const __m512i low2 = _mm512_shuffle_i32x4(u[c + 8], u[c + 12], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(u[c], u[c + 4], 0xEE);
    const __m512i high2 = _mm512_shuffle_i32x4(u[c + 8], u[c + 12], 0xEE);
    square[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    square[4 + c] = _mm512_shuffle_i32x4(low, low2, 0xDD);
    square[8 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
    square[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xDD);
  }
}

inline __m512i to_bf16(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

/// Up to 64 bytes of packed elements of one row, from element k on: zeros beyond `end`.
inline __m512i load_elements(const weight_matrix& w, std::int64_t row, std::int32_t k) {
  const auto* data = static_cast<const unsigned char*>(w.data);
  const std::int64_t at = row * w.num_cols + k;
  const std::int32_t left = w.num_cols - k;
  switch (w.type) {
  case element_type::f32: {
    const auto* from = data + at * 4;
    return to_bf16(_mm512_maskz_loadu_ps(first_lanes(left), from),
                   _mm512_maskz_loadu_ps(first_lanes(left - 16), from + 64));
  }
  case element_type::f16: {
    const __m512i raw = _mm512_maskz_loadu_epi8(first_bytes(std::int64_t{left} * 2), data + at * 2);
    return to_bf16(_mm512_cvtph_ps(_mm512_castsi512_si256(raw)),
                   _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1)));
  }
  case element_type::bf16:
    return _mm512_maskz_loadu_epi8(first_bytes(std::int64_t{left} * 2), data + at * 2);
  case element_type::f8_e4m3:
  case element_type::i8: return _mm512_maskz_loadu_epi8(first_bytes(left), data + at);
  case element_type::i4: break; // not packed
  }
  return _mm512_setzero_si512();
}

/// Checkpoints do not align their scales.
inline float scale_at(const weight_matrix& w, std::int32_t row, std::int32_t col) {
  if (w.scales == nullptr) {
    return 1.0F;
  }
  const std::int64_t columns = (w.num_cols + w.block_cols - 1) / w.block_cols;
  const std::int64_t index = row / w.block_rows * columns + col / w.block_cols;
  float scale;
  __builtin_memcpy(&scale, reinterpret_cast<const unsigned char*>(w.scales) + index * 4, 4);
  return scale;
}

inline void pack(const weight_matrix& w, const packed_weight& to, std::int32_t first,
                 std::int32_t last) {
  const std::int32_t words_per_panel = to.kind == packed_kind::bf16 ? to.depth / 2 : to.depth / 4;
  const std::int32_t elements = to.kind == packed_kind::bf16 ? 32 : 64; // of a row of the square
  // Bytes of a quarter: c0k0 c0k1 c0k2 c0k3 c1k0 ... become pairs 0 of all columns, then pairs 1.
  const __m512i pairs =
    _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (std::int32_t p = first; p < last; ++p) {
    unsigned char* out = to.panel_data(p);
    const std::int64_t stride = to.bundle_panels(p) * 64;
    const std::int32_t num_rows = least(kPackedColumns, w.num_rows - p * kPackedColumns);
    for (std::int32_t word = 0; word < words_per_panel; word += 16) {
      __m512i square[16];
      for (std::int32_t r = 0; r < 16; ++r) {
        square[r] = r < num_rows
                      ? load_elements(w, std::int64_t{p} * kPackedColumns + r, word / 16 * elements)
                      : _mm512_setzero_si512();
      }
      transpose(square);
      const std::int32_t count = least(16, words_per_panel - word);
      for (std::int32_t i = 0; i < count; ++i) {
        __m512i value = square[i];
        if (to.kind == packed_kind::f8) {
          value = _mm512_shuffle_epi8(value, pairs);
        } else if (to.kind == packed_kind::i8) {
          value = _mm512_xor_si512(value, flip);
        }
        _mm512_store_si512(out + (word + i) * stride, value);
      }
    }
    for (std::int32_t g = 0; g < to.num_groups; ++g) {
      for (std::int32_t c = 0; c < to.scale_width; ++c) {
        const std::int32_t row = least(p * kPackedColumns + c, w.num_rows - 1);
        to.scales[to.scale_index(p, g) + c] = scale_at(w, row, g * to.group);
      }
    }
  }
}

inline void round_row(const float* x, std::int32_t count, std::int32_t depth, std::uint16_t* out) {
  std::int32_t k = 0;
  for (; k + 32 <= count; k += 32) {
    _mm512_storeu_si512(out + k, to_bf16(_mm512_loadu_ps(x + k), _mm512_loadu_ps(x + k + 16)));
  }
  for (; k < depth; k += 32) {
    const __m512i last = to_bf16(_mm512_maskz_loadu_ps(first_lanes(count - k), x + k),
                                 _mm512_maskz_loadu_ps(first_lanes(count - k - 16), x + k + 16));
    _mm512_mask_storeu_epi8(out + k, first_bytes(std::int64_t{depth - k} * 2), last);
  }
}

inline void widen_row(const std::uint16_t* x, std::int32_t count, float* out) {
  for (std::int32_t k = 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x + k));
    _mm512_mask_storeu_ps(out + k, lanes, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  }
}

inline void quantise_row(const float* x, std::int32_t count, std::int32_t depth, std::int32_t group,
                         std::int8_t* out, float* scales, std::int32_t* offsets) {
  for (std::int32_t first = 0; first < depth; first += group) {
    const std::int32_t stop = least(depth, first + group);
    __m512 largest = _mm512_setzero_ps();
    for (std::int32_t k = first; k < stop; k += 16) {
      const __m512 value = _mm512_maskz_loadu_ps(first_lanes(least(stop, count) - k), x + k);
      largest = _mm512_max_ps(_mm512_abs_ps(value), largest);
    }
    // A NaN or an infinity makes the scale NaN, and with it every output of the row.
    const float size = _mm512_reduce_max_ps(largest);
    const float scale = size * (1.0F / 127.0F);
    const __m512 inverse = _mm512_set1_ps(size > 0.0F ? 127.0F / size : 0.0F);
    __m512i sum = _mm512_setzero_si512();
    float wrong = 0.0F;
    for (std::int32_t k = first; k < stop; k += 16) {
      const __m512 value = _mm512_maskz_loadu_ps(first_lanes(least(stop, count) - k), x + k);
      const __mmask16 odd = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      wrong = odd != 0 ? __builtin_nanf("") : wrong;
      // What is out of range (infinity, NaN) converts to the smallest integer; sums must not
      // overflow.
      const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)),
                                             _mm512_set1_epi32(-128));
      sum = _mm512_add_epi32(sum, whole);
      _mm_mask_storeu_epi8(out + k, first_lanes(stop - k), _mm512_cvtsepi32_epi8(whole));
    }
    scales[first / group] = scale < __builtin_inff() ? scale + wrong : __builtin_nanf("");
    offsets[first / group] = -128 * _mm512_reduce_add_epi32(sum);
  }
}

} // namespace troupe::kernels::cpu::fast
