#pragma once

// Products with packed weights. A tile of up to six rows and four panels keeps its sums in
// registers; with more rows a part of the panels stays in the first caches while all rows
// pass by, and sums wait in the output, which changes no bit.

#include "troupe/kernels/cpu/fast_pack.hpp"

namespace troupe::kernels::cpu::fast {

inline constexpr std::int32_t kTileRows = 6;
inline constexpr std::int32_t kTilePanels = kBundlePanels;

/// Rows whose sums, whole and of a group, fit the registers.
inline constexpr std::int32_t kStreamedRows = 3;

/// Pairs of elements whose weights stay in the first cache while rows pass by.
inline constexpr std::int32_t kBlockPairs = 1024;

/// Bytes ahead of the reader that are asked for where weights are read once.
inline constexpr std::int64_t kAhead = 4096;

/// Where a tile reads and writes.
template <class Element>
struct tile_rows {
  const Element* x[kTileRows];
  float* out[kTileRows];
};

/// The weights of a tile: neighbouring panels of a bundle over some elements of the sum.
struct tile_weights {
  const unsigned char* data;
  std::int64_t stride;        ///< bytes from one register of a panel to its next
  const unsigned char* after; ///< what to ask for meanwhile, two lines a step
  __mmask16 last_mask;        ///< columns of the last panel that exist
};

/// Scales of a group for the panels of a tile.
struct tile_scales {
  const float* first = nullptr;
  std::int32_t width = 0;

  __m512 of(int panel) const {
    const float* at = first + panel * width;
    return width == 1 ? _mm512_set1_ps(*at) : _mm512_loadu_ps(at);
  }
};

inline __m512bh pair_of(const std::uint16_t* from) {
  std::int32_t pair;
  __builtin_memcpy(&pair, from, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

/// The columns of panel p of a tile that exist.
template <int Panels>
inline __mmask16 mask_of(const tile_weights& w, int p) {
  return p == Panels - 1 ? w.last_mask : __mmask16{0xFFFF};
}

/// out = scale * sum, plus what out holds unless this is the first group.
inline void add_scaled(__m512 scale, __m512 sum, bool first, __mmask16 mask, float* out) {
  const __m512 before = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, out);
  _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(scale, sum, before));
}

/// Products of bf16 over `pairs` pairs. Without scales sums go on from `out` unless this is the
/// first part; with scales they start at nothing and out += scale * sum.
template <int Rows, int Panels, bool Scaled>
[[gnu::noinline]] void multiply_tile(const tile_rows<std::uint16_t>& rows, const tile_weights& w,
                                     std::int32_t pairs, bool first, const tile_scales& scales) {
  __m512 sum[Rows][Panels];
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      sum[m][p] = Scaled || first
                    ? _mm512_setzero_ps()
                    : _mm512_maskz_loadu_ps(mask_of<Panels>(w, p), rows.out[m] + p * 16);
    }
  }
  const unsigned char* at = w.data;
  const unsigned char* after = w.after;
  for (std::int32_t k = 0; k < pairs; ++k) {
    __m512bh column[Panels];
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      column[p] = reinterpret_cast<__m512bh>(_mm512_load_si512(at + p * 64));
    }
    ask_for(after);
    ask_for(after + 64);
    TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
      const __m512bh pair = pair_of(rows.x[m] + 2 * k);
      TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
        sum[m][p] = _mm512_dpbf16_ps(sum[m][p], column[p], pair);
      }
    }
    at += w.stride;
    after += 128;
  }
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      float* out = rows.out[m] + p * 16;
      if constexpr (Scaled) {
        add_scaled(scales.of(p), sum[m][p], first, mask_of<Panels>(w, p), out);
      } else {
        _mm512_mask_storeu_ps(out, mask_of<Panels>(w, p), sum[m][p]);
      }
    }
  }
}

/// The same without scales where all rows fit one tile and weights are read once.
template <int Rows, int Panels>
[[gnu::noinline]] void multiply_stream(const tile_rows<std::uint16_t>& rows, const tile_weights& w,
                                       std::int32_t pairs) {
  __m512 sum[Rows][Panels];
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      sum[m][p] = _mm512_setzero_ps();
    }
  }
  const unsigned char* at = w.data;
  for (std::int32_t k = 0; k < pairs; ++k) {
    __m512bh column[Panels];
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      column[p] = reinterpret_cast<__m512bh>(_mm512_load_si512(at + p * 64));
    }
    TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
      const __m512bh pair = pair_of(rows.x[m] + 2 * k);
      TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
        sum[m][p] = _mm512_dpbf16_ps(sum[m][p], column[p], pair);
      }
    }
    at += w.stride;
  }
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      _mm512_mask_storeu_ps(rows.out[m] + p * 16, mask_of<Panels>(w, p), sum[m][p]);
    }
  }
}

/// The two registers of bf16 behind 64 codes of e4m3, exactly; NaN for the codes of NaN.
struct e4m3_decoder {
  __m512i low[2];
  __m512i high[2];
  __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));

  e4m3_decoder() {
    alignas(64) unsigned char bytes[2][128];
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3;
      int fraction = code & 7;
      int bits = 0;
      if (code == 0x7F) {
        bits = 0x7FC0;
      } else if (exponent > 0) {
        bits = (exponent + 120) << 7 | fraction << 4;
      } else if (fraction > 0) { // fraction * 2^-9, to be normalised
        int power = 121;
        while (fraction < 8) {
          fraction *= 2;
          --power;
        }
        bits = power << 7 | (fraction & 7) << 4;
      }
      bytes[0][code] = static_cast<unsigned char>(bits & 0xFF);
      bytes[1][code] = static_cast<unsigned char>(bits >> 8);
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(bytes[0] + 64 * i);
      high[i] = _mm512_load_si512(bytes[1] + 64 * i);
    }
  }

  void decode(__m512i codes, __m512i& first, __m512i& second) const {
    const __m512i below = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    const __m512i above = _mm512_ternarylogic_epi64(
      _mm512_permutex2var_epi8(high[0], codes, high[1]), codes, sign, 0xF8);
    first = _mm512_unpacklo_epi8(below, above);
    second = _mm512_unpackhi_epi8(below, above);
  }
};

/// One group of e4m3 weights, expanded in registers: out += scale * sum.
template <int Rows, int Panels>
[[gnu::noinline]] void multiply_codes(const tile_rows<std::uint16_t>& rows, const tile_weights& w,
                                      std::int32_t quads, bool first, const tile_scales& scales,
                                      const e4m3_decoder& decoder) {
  __m512 sum[Rows][Panels];
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      sum[m][p] = _mm512_setzero_ps();
    }
  }
  const unsigned char* at = w.data;
  for (std::int32_t k = 0; k < quads; ++k) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      __m512i even;
      __m512i odd;
      decoder.decode(_mm512_load_si512(at + p * 64), even, odd);
      TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
        sum[m][p] =
          _mm512_dpbf16_ps(sum[m][p], reinterpret_cast<__m512bh>(even), pair_of(rows.x[m] + 4 * k));
        sum[m][p] = _mm512_dpbf16_ps(sum[m][p], reinterpret_cast<__m512bh>(odd),
                                     pair_of(rows.x[m] + 4 * k + 2));
      }
    }
    at += w.stride;
  }
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      add_scaled(scales.of(p), sum[m][p], first, mask_of<Panels>(w, p), rows.out[m] + p * 16);
    }
  }
}

/// Where the scales of 8 bit rows lie.
struct byte_scales {
  const float* scale[kTileRows];
  const std::int32_t* offset[kTileRows];
};

/// sum += products of four unsigned bytes of a with four signed ones of b, in each lane. Of the
/// intrinsic, GCC 12 makes copies of the sum that do not fit the registers.
inline void add_products(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

/// One group of 8 bit weights times 8 bit rows. Sums of bytes start at -128 times the sum of the
/// row's, which undoes the 128 that packing added to the weights.
template <int Rows, int Panels>
[[gnu::noinline]] void multiply_bytes(const tile_rows<std::int8_t>& rows,
                                      const byte_scales& row_scales, std::int32_t group,
                                      const tile_weights& w, std::int32_t quads,
                                      const tile_scales& scales) {
  __m512i sum[Rows][Panels];
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      sum[m][p] = _mm512_set1_epi32(row_scales.offset[m][group]);
    }
  }
  const unsigned char* at = w.data;
  const unsigned char* after = w.after;
  for (std::int32_t k = 0; k < quads; ++k) {
    __m512i column[Panels];
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      column[p] = _mm512_load_si512(at + p * 64);
    }
    TROUPE_UNROLL for (int i = 0; i < 4; ++i) {
      ask_for(after + i * 64);
    }
    TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
      std::int32_t quad;
      __builtin_memcpy(&quad, rows.x[m] + 4 * k, 4);
      const __m512i four = _mm512_set1_epi32(quad);
      TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
        add_products(sum[m][p], column[p], four);
      }
    }
    at += w.stride;
    after += 256;
  }
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    const __m512 row_scale = _mm512_set1_ps(row_scales.scale[m][group]);
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      add_scaled(_mm512_mul_ps(scales.of(p), row_scale), _mm512_cvtepi32_ps(sum[m][p]), group == 0,
                 mask_of<Panels>(w, p), rows.out[m] + p * 16);
    }
  }
}

/// Panels n .. n + panels - 1, all of one bundle.
struct tile_columns {
  std::int32_t n;
  std::int32_t panels;
  tile_weights weights; ///< from the first element of the sum on

  /// From register `step` on. What comes next, at `after`, is fetched by the first tiles of rows.
  tile_weights from(std::int32_t step, const unsigned char* after) const {
    tile_weights result = weights;
    result.data += step * weights.stride;
    result.after = after;
    return result;
  }
};

inline tile_scales scales_of(const packed_weight& w, std::int32_t panel, std::int32_t group) {
  return {w.scales + w.scale_index(panel, group), w.scale_width};
}

/// All groups of a few rows, where weights are read once: sums stay in registers. The same bits.
template <int Rows, int Panels>
[[gnu::noinline]] void stream_bytes(const tile_rows<std::int8_t>& rows,
                                    const byte_scales& row_scales, const tile_columns& c,
                                    const packed_weight& w) {
  __m512 total[Rows][Panels];
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      total[m][p] = _mm512_setzero_ps();
    }
  }
  const unsigned char* at = c.weights.data;
  for (std::int32_t g = 0; g < w.num_groups; ++g) {
    const std::int32_t begin = g * w.group;
    const std::int32_t end = least(w.depth, begin + w.group);
    __m512i sum[Rows][Panels];
    TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
      TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
        sum[m][p] = _mm512_set1_epi32(row_scales.offset[m][g]);
      }
    }
    for (std::int32_t k = begin; k < end; k += 4) {
      __m512i column[Panels];
      TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
        column[p] = _mm512_load_si512(at + p * 64);
      }
      TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
        std::int32_t quad;
        __builtin_memcpy(&quad, rows.x[m] + k, 4);
        const __m512i four = _mm512_set1_epi32(quad);
        TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
          add_products(sum[m][p], column[p], four);
        }
      }
      at += c.weights.stride;
    }
    const tile_scales scales = scales_of(w, c.n, g);
    TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
      const __m512 row_scale = _mm512_set1_ps(row_scales.scale[m][g]);
      TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
        total[m][p] = _mm512_fmadd_ps(_mm512_mul_ps(scales.of(p), row_scale),
                                      _mm512_cvtepi32_ps(sum[m][p]), total[m][p]);
      }
    }
  }
  TROUPE_UNROLL for (int m = 0; m < Rows; ++m) {
    TROUPE_UNROLL for (int p = 0; p < Panels; ++p) {
      _mm512_mask_storeu_ps(rows.out[m] + p * 16, mask_of<Panels>(c.weights, p), total[m][p]);
    }
  }
}

/// Calls work.template operator()<rows, panels>() for numbers that are known at run time only.
template <class Work>
inline void with_tile(std::int32_t rows, std::int32_t panels, const Work& work) {
  const auto choose = [&]<int Panels>() {
    switch (rows) {
    case 1: return work.template operator()<1, Panels>();
    case 2: return work.template operator()<2, Panels>();
    case 3: return work.template operator()<3, Panels>();
    case 4: return work.template operator()<4, Panels>();
    case 5: return work.template operator()<5, Panels>();
    default: return work.template operator()<6, Panels>();
    }
  };
  switch (panels) {
  case 1: return choose.template operator()<1>();
  case 2: return choose.template operator()<2>();
  case 3: return choose.template operator()<3>();
  default: return choose.template operator()<4>();
  }
}

/// Cuts num_rows into tiles of nearly the same size and calls work(tile, first, count).
template <class Work>
inline void for_tiles(std::int32_t num_rows, const Work& work) {
  const std::int32_t tiles = (num_rows + kTileRows - 1) / kTileRows;
  for (std::int32_t t = 0; t < tiles; ++t) {
    const std::int32_t first = num_rows * t / tiles;
    work(t, first, num_rows * (t + 1) / tiles - first);
  }
}

inline std::int64_t row_index(const fast_args& args, std::int32_t m) {
  return args.rows == nullptr ? m : args.rows[m];
}

template <class Element>
inline tile_rows<Element> find_rows(const fast_args& args, std::int32_t first, std::int32_t count,
                                    std::int32_t k, std::int64_t column) {
  tile_rows<Element> rows;
  for (std::int32_t m = 0; m < count; ++m) {
    rows.x[m] =
      static_cast<const Element*>(args.x.data) + row_index(args, first + m) * args.x.stride + k;
    rows.out[m] = args.out + (first + m) * args.out_stride + (column - args.first_column);
  }
  return rows;
}

inline void multiply_bf16(const fast_args& args, const tile_columns& c) {
  const std::int32_t pairs = args.w->depth / 2;
  if (args.num_rows <= kTileRows) {
    const auto rows = find_rows<std::uint16_t>(args, 0, args.num_rows, 0, c.n * 16);
    return with_tile(args.num_rows, c.panels, [&]<int Rows, int Panels>() {
      multiply_stream<Rows, Panels>(rows, c.weights, pairs);
    });
  }
  for (std::int32_t k = 0; k < pairs; k += kBlockPairs) {
    const std::int32_t count = least(kBlockPairs, pairs - k);
    const unsigned char* next = c.weights.data + (k + count) * c.weights.stride;
    for_tiles(args.num_rows, [&](std::int32_t tile, std::int32_t first, std::int32_t num_rows) {
      const auto rows = find_rows<std::uint16_t>(args, first, num_rows, 2 * k, c.n * 16);
      const tile_weights w = c.from(k, next + least(tile, 2) * (count * 128));
      with_tile(num_rows, c.panels, [&]<int Rows, int Panels>() {
        multiply_tile<Rows, Panels, false>(rows, w, count, k == 0, {});
      });
    });
  }
}

inline void multiply_f8(const fast_args& args, const tile_columns& c, const e4m3_decoder& decoder,
                        unsigned char* scratch) {
  const packed_weight& w = *args.w;
  for (std::int32_t g = 0; g < w.num_groups; ++g) {
    const std::int32_t k = g * w.group;
    const std::int32_t quads = (least(w.depth, k + w.group) - k) / 4;
    const tile_weights codes = c.from(k / 4, nullptr);
    const tile_scales scales = scales_of(w, c.n, g);
    if (args.num_rows <= kStreamedRows) {
      const auto rows = find_rows<std::uint16_t>(args, 0, args.num_rows, k, c.n * 16);
      with_tile(args.num_rows, c.panels, [&]<int Rows, int Panels>() {
        if constexpr (Rows <= kStreamedRows) {
          multiply_codes<Rows, Panels>(rows, codes, quads, g == 0, scales, decoder);
        }
      });
      continue;
    }
    tile_weights expanded = c.weights;
    expanded.data = scratch;
    expanded.stride = c.panels * 64;
    for (std::int32_t q = 0; q < quads; ++q) {
      for (std::int32_t p = 0; p < c.panels; ++p) {
        __m512i even;
        __m512i odd;
        decoder.decode(_mm512_load_si512(codes.data + q * codes.stride + p * 64), even, odd);
        unsigned char* to = scratch + 2 * q * expanded.stride + p * 64;
        _mm512_store_si512(to, even);
        _mm512_store_si512(to + expanded.stride, odd);
      }
    }
    const unsigned char* next = codes.data + quads * codes.stride;
    for_tiles(args.num_rows, [&](std::int32_t tile, std::int32_t first, std::int32_t count) {
      const auto rows = find_rows<std::uint16_t>(args, first, count, k, c.n * 16);
      expanded.after = next + least(tile, 2) * quads * 256;
      with_tile(count, c.panels, [&]<int Rows, int Panels>() {
        multiply_tile<Rows, Panels, true>(rows, expanded, 2 * quads, g == 0, scales);
      });
    });
  }
}

inline byte_scales find_scales(const fast_args& args, std::int32_t first, std::int32_t count) {
  byte_scales scales;
  for (std::int32_t m = 0; m < count; ++m) {
    const std::int64_t at = row_index(args, first + m) * args.w->num_groups;
    scales.scale[m] = args.x.scales + at;
    scales.offset[m] = args.x.offsets + at;
  }
  return scales;
}

inline void multiply_i8(const fast_args& args, const tile_columns& c) {
  const packed_weight& w = *args.w;
  if (args.num_rows <= kStreamedRows) {
    const auto rows = find_rows<std::int8_t>(args, 0, args.num_rows, 0, c.n * 16);
    const byte_scales row_scales = find_scales(args, 0, args.num_rows);
    return with_tile(args.num_rows, c.panels, [&]<int Rows, int Panels>() {
      if constexpr (Rows <= kStreamedRows) {
        stream_bytes<Rows, Panels>(rows, row_scales, c, w);
      }
    });
  }
  for (std::int32_t g = 0; g < w.num_groups; ++g) {
    const std::int32_t k = g * w.group;
    const std::int32_t quads = (least(w.depth, k + w.group) - k) / 4;
    const tile_scales scales = scales_of(w, c.n, g);
    const unsigned char* here = c.weights.data + k / 4 * c.weights.stride;
    for_tiles(args.num_rows, [&](std::int32_t tile, std::int32_t first, std::int32_t count) {
      const auto rows = find_rows<std::int8_t>(args, first, count, k, c.n * 16);
      const byte_scales row_scales = find_scales(args, first, count);
      const std::int64_t ahead = args.num_rows <= kTileRows ? kAhead : quads * c.weights.stride;
      const tile_weights part = c.from(k / 4, here + ahead + least(tile, 1) * quads * 256);
      with_tile(count, c.panels, [&]<int Rows, int Panels>() {
        multiply_bytes<Rows, Panels>(rows, row_scales, g, part, quads, scales);
      });
    });
  }
}

inline void multiply(const fast_args& args, std::int32_t first, std::int32_t last,
                     unsigned char* scratch) {
  const packed_weight& w = *args.w;
  static const e4m3_decoder decoder;
  for (std::int32_t n = first; n < last;) {
    tile_columns c;
    c.n = n;
    c.panels = least(kTilePanels - n % kTilePanels, last - n);
    c.weights.data = w.panel_data(n);
    c.weights.stride = w.bundle_panels(n) * 64;
    c.weights.after = nullptr;
    c.weights.last_mask = first_lanes(w.num_rows - (n + c.panels - 1) * std::int64_t{16});
    switch (w.kind) {
    case packed_kind::bf16: multiply_bf16(args, c); break;
    case packed_kind::f8: multiply_f8(args, c, decoder, scratch); break;
    case packed_kind::i8: multiply_i8(args, c); break;
    }
    n += c.panels;
  }
}

} // namespace troupe::kernels::cpu::fast
