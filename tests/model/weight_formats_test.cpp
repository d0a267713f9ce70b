#include "troupe/model/stored_weight.hpp"

#include "stage_pipeline.hpp"
#include "temporary_directory.hpp"
#include "tiny_checkpoint.hpp"

#include "troupe/model/checkpoint.hpp"
#include "troupe/model/ordered_groups.hpp"

#include <cmath>
#include <functional>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;
using nlohmann::json;
using test::blob;

namespace {

/// One matrix as a checkpoint of some format has it, and what it stands for.
struct quantised {
  std::vector<blob> blobs;
  std::vector<float> values; ///< [rows, cols]
};

/// Makes random codes for a matrix. `stem` is "….up_proj.".
using format = std::function<quantised(const std::string& stem, int rows, int cols)>;

std::mt19937& random_bits() {
  static std::mt19937 engine(77);
  return engine;
}

int draw(int below) {
  return static_cast<int>(random_bits()() % static_cast<unsigned>(below));
}

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

/// Scales that half precision holds: 1.0 to 1.9 times 2^-7.
std::vector<float> draw_scales(std::size_t count) {
  std::vector<float> scales(count);
  for (auto& scale : scales)
    scale = (1.0F + 0.125F * static_cast<float>(draw(8))) / 128.0F;
  return scales;
}

/// F16 of a value that it holds exactly, by the definition of the format.
std::uint16_t to_f16(float value) {
  int exponent = 0;
  const float mantissa = std::frexp(value, &exponent); // 0.5 to 1
  return static_cast<std::uint16_t>((exponent + 14) << 10
                                    | (static_cast<int>(mantissa * 2048.0F) - 1024));
}

std::vector<std::uint16_t> to_f16(const std::vector<float>& values) {
  std::vector<std::uint16_t> result;
  for (const auto value : values)
    result.push_back(to_f16(value));
  return result;
}

std::uint16_t top_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}

/// Codes of `levels` levels with a scale and a zero point for each group of columns of a row.
struct codes {
  codes(int num_rows, int num_cols, int group, int levels, bool with_zeros,
        std::vector<std::int32_t> group_of_column = {})
    : rows(num_rows),
      cols(num_cols),
      groups((num_cols + group - 1) / group),
      order(std::move(group_of_column)),
      q(static_cast<std::size_t>(num_rows) * num_cols),
      scales(draw_scales(static_cast<std::size_t>(num_rows) * groups)),
      zeros(scales.size(), levels / 2),
      values(q.size()) {
    if (with_zeros)
      for (auto& zero : zeros)
        zero = draw(levels);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c) {
        const auto at = static_cast<std::size_t>(r) * cols + c;
        const auto g =
          static_cast<std::size_t>(r) * groups + (order.empty() ? c / group : order[c]);
        q[at] = draw(levels);
        values[at] = static_cast<float>(q[at] - zeros[g]) * scales[g];
        if (levels == 256)
          values[at] *= 1.0F / 16.0F; // or 8-bit weights would be larger than others
      }
    if (levels == 256)
      for (auto& scale : scales)
        scale /= 16.0F;
  }

  int code(int r, int c) const { return q[static_cast<std::size_t>(r) * cols + c]; }
  int zero(int r, int g) const { return zeros[static_cast<std::size_t>(r) * groups + g]; }
  float scale(int r, int g) const { return scales[static_cast<std::size_t>(r) * groups + g]; }

  int rows, cols, groups;
  std::vector<std::int32_t> order; ///< group of each column; empty: neighbours
  std::vector<int> q;
  std::vector<float> scales;
  std::vector<int> zeros;
  std::vector<float> values;
};

/// Words [outer, inner / per_word] where item(outer, inner) fills a word from the low bits on.
template <class Item>
std::string pack_words(int outer, int inner, int bits, Item&& item) {
  const int per_word = 32 / bits;
  std::vector<std::uint32_t> words(static_cast<std::size_t>(outer)
                                   * ((inner + per_word - 1) / per_word));
  const auto a_row = words.size() / outer;
  for (int o = 0; o < outer; ++o)
    for (int i = 0; i < inner; ++i)
      words[o * a_row + i / per_word] |= static_cast<std::uint32_t>(item(o, i))
                                         << (i % per_word * bits);
  return bytes_of(words);
}

/// QuantLinear.pack of AutoGPTQ (auto_gptq/nn_modules/qlinear/qlinear_cuda.py): the first format
/// stores zero points less one.
quantised make_gptq(const std::string& stem, int rows, int cols, int bits, int group, bool less_one,
                    bool with_order, const std::vector<std::int32_t>& by_activation = {}) {
  const int per_word = 32 / bits;
  const codes w(rows, cols, group, 1 << bits, bits == 4, by_activation);
  const int mask = (1 << bits) - 1;
  std::vector<std::uint32_t> weight(static_cast<std::size_t>(cols / per_word) * rows);
  for (int c = 0; c < cols; ++c)
    for (int r = 0; r < rows; ++r)
      weight[static_cast<std::size_t>(c / per_word) * rows + r] |=
        static_cast<std::uint32_t>(w.code(r, c)) << (c % per_word * bits);
  const auto zeros = pack_words(
    w.groups, rows, bits, [&](int g, int r) { return (w.zero(r, g) - (less_one ? 1 : 0)) & mask; });
  std::vector<float> scales;
  for (int g = 0; g < w.groups; ++g)
    for (int r = 0; r < rows; ++r)
      scales.push_back(w.scale(r, g));
  quantised result;
  result.values = w.values;
  result.blobs = {{stem + "qweight", "I32", {cols / per_word, rows}, bytes_of(weight)},
                  {stem + "qzeros", "I32", {w.groups, rows / per_word}, zeros},
                  {stem + "scales", "F16", {w.groups, rows}, bytes_of(to_f16(scales))}};
  if (with_order) {
    std::vector<std::int32_t> order;
    for (int c = 0; c < cols; ++c)
      order.push_back(by_activation.empty() ? c / group : by_activation[c]);
    result.blobs.push_back({stem + "g_idx", "I32", {cols}, bytes_of(order)});
  }
  return result;
}

/// Groups of columns that were sorted by their activations: g_idx of GPTQ with desc_act.
std::vector<std::int32_t> draw_order(int cols, int group) {
  std::vector<std::int32_t> order(cols);
  for (int c = 0; c < cols; ++c)
    order[c] = c / group;
  std::shuffle(order.begin(), order.end(), random_bits());
  return order;
}

/// WQLinear_GEMM.from_linear of AutoAWQ (awq/modules/linear/gemm.py).
quantised make_awq(const std::string& stem, int rows, int cols, int group) {
  static constexpr int order_map[] = {0, 2, 4, 6, 1, 3, 5, 7};
  const codes w(rows, cols, group, 16, true);
  const auto pack = [&](int outer, auto&& item) {
    return pack_words(outer, rows, 4,
                      [&](int o, int i) { return item(o, i / 8 * 8 + order_map[i % 8]); });
  };
  std::vector<float> scales;
  for (int g = 0; g < w.groups; ++g)
    for (int r = 0; r < rows; ++r)
      scales.push_back(w.scale(r, g));
  quantised result;
  result.values = w.values;
  result.blobs = {{stem + "qweight",
                   "I32",
                   {cols, rows / 8},
                   pack(cols, [&](int c, int r) { return w.code(r, c); })},
                  {stem + "qzeros",
                   "I32",
                   {w.groups, rows / 8},
                   pack(w.groups, [&](int g, int r) { return w.zero(r, g); })},
                  {stem + "scales", "F16", {w.groups, rows}, bytes_of(to_f16(scales))}};
  return result;
}

/// pack_to_int32 of compressed-tensors (compressors/pack_quantized/helpers.py).
quantised make_compressed(const std::string& stem, int rows, int cols, int bits, int group,
                          bool symmetric, const std::vector<std::int32_t>& by_activation = {}) {
  const codes w(rows, cols, group, 1 << bits, !symmetric, by_activation);
  quantised result;
  result.values = w.values;
  std::vector<std::uint16_t> scales;
  for (const auto scale : w.scales)
    scales.push_back(top_half(scale));
  result.blobs = {
    {stem + "weight_packed",
     "I32",
     {rows, (cols * bits + 31) / 32},
     pack_words(rows, cols, bits, [&](int r, int c) { return w.code(r, c); })},
    {stem + "weight_scale", "BF16", {rows, w.groups}, bytes_of(scales)},
    {stem + "weight_shape", "I64", {2}, bytes_of(std::vector<std::int64_t>{rows, cols})}};
  if (!by_activation.empty())
    result.blobs.push_back({stem + "weight_g_idx", "I32", {cols}, bytes_of(by_activation)});
  if (!symmetric) {
    std::vector<std::uint32_t> zeros(static_cast<std::size_t>((rows + 7) / 8) * w.groups);
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < w.groups; ++g)
        zeros[static_cast<std::size_t>(r / 8) * w.groups + g] |=
          static_cast<std::uint32_t>(w.zero(r, g)) << (r % 8 * 4);
    result.blobs.push_back(
      {stem + "weight_zero_point", "I32", {(rows + 7) / 8, w.groups}, bytes_of(zeros)});
  }
  return result;
}

/// Bytes with scales of blocks, under the name and dtype that are given.
quantised make_bytes(const std::string& stem, int rows, int cols, const std::string& dtype,
                     int block_rows, int block_cols, const std::string& scale_name,
                     const std::string& scale_dtype, const std::vector<std::int64_t>& scale_shape) {
  const int across = (cols + block_cols - 1) / block_cols;
  const int down = (rows + block_rows - 1) / block_rows;
  auto scales = draw_scales(static_cast<std::size_t>(across) * down);
  std::string stored;
  if (scale_dtype == "F8_E8M0") {
    for (auto& scale : scales) {
      const int exponent = draw(4) - 12;
      scale = std::ldexp(1.0F, exponent);
      stored += static_cast<char>(exponent + 127);
    }
  } else {
    for (auto& scale : scales)
      scale /= 16.0F;
    stored = bytes_of(scales);
  }
  quantised result;
  std::string data(static_cast<std::size_t>(rows) * cols, '\0');
  for (auto& byte : data) {
    byte = static_cast<char>(draw(256));
    if (dtype == "F8_E4M3" && (byte & 0x7f) == 0x7f)
      byte = 0;
  }
  result.values.resize(data.size());
  to_float32(reinterpret_cast<const std::byte*>(data.data()),
             dtype == "I8" ? kernels::element_type::i8 : kernels::element_type::f8_e4m3,
             result.values);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c)
      result.values[static_cast<std::size_t>(r) * cols + c] *=
        scales[static_cast<std::size_t>(r / block_rows) * across + c / block_cols];
  result.blobs = {{stem + "weight", dtype, {rows, cols}, data},
                  {stem + scale_name, scale_dtype,
                   scale_shape.empty() ? std::vector<std::int64_t>{down, across} : scale_shape,
                   stored}};
  return result;
}

/// config.json of a small model whose sizes fill words and groups.
json small_config(const std::string& family) {
  auto text = json::parse(R"({"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "eos_token_id": 1})");
  text["model_type"] = family;
  if (family == "llama") {
    text["head_dim"] = 16;
    text["num_key_value_heads"] = 1;
    return text;
  }
  text.update(json::parse(R"({"moe_intermediate_size": 32, "n_routed_experts": 4,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "kv_lora_rank": 32,
    "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16})"));
  return text;
}

std::vector<float> score(const json& config, const std::vector<blob>& blobs) {
  static const auto ops = kernels::make_cpu_ops(2);
  const testing::temporary_directory directory;
  test::write_file(directory.path() / "config.json", config.dump());
  test::write_file(directory.path() / "model.safetensors", test::to_safetensors(blobs));
  auto parsed = load_model_config(directory.path());
  auto source = checkpoint::open(directory.path());
  REQUIRE(parsed);
  REQUIRE(source);
  auto size = check_weights(**source, *parsed, whole_model(*parsed));
  if (!size)
    FAIL(size.error().cause);
  CHECK(size->num_tensors <= blobs.size());
  test::stage_pipeline pipeline(directory.path().string(), {{1, 2}, 0}, 1, 64, *ops);
  return pipeline.score({3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5}, 4);
}

/// A quantized model against the float32 model of what its weights stand for.
void check_format(const json& quantization, const format& make, const std::string& family) {
  auto config = small_config(family);
  auto parsed = parse_model_config(config.dump(), "config.json");
  REQUIRE(parsed);
  std::vector<blob> plain = test::tiny_blobs(*parsed);
  std::vector<blob> stored;
  for (auto& one : plain) {
    if (one.name.find("_proj") == std::string::npos) {
      stored.push_back(one);
      continue;
    }
    auto made = make(one.name.substr(0, one.name.size() - 6), static_cast<int>(one.shape[0]),
                     static_cast<int>(one.shape[1]));
    one.bytes = test::to_bytes(made.values);
    stored.insert(stored.end(), made.blobs.begin(), made.blobs.end());
  }
  const auto want = score(config, plain);
  config["quantization_config"] = quantization;
  const auto got = score(config, stored);
  REQUIRE(got.size() == want.size());
  double worst = 0.0;
  for (std::size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::abs(double{got[i]} - want[i]));
  CHECK(worst < 1e-5);
  CHECK(*std::max_element(want.begin(), want.end()) > 0.1F);
}

json method(const std::string& name, json more = json::object()) {
  more["quant_method"] = name;
  return more;
}

} // namespace

TEST_CASE("every weight format computes what its float32 values compute") {
  const auto family = GENERATE(std::string("deepseek_v3"), std::string("llama"));
  INFO(family);
  const auto compressed = method("compressed-tensors", {{"format", "pack-quantized"}});
  SECTION("FP8 in blocks with E8M0 scales") {
    check_format(
      method("fp8", {{"weight_block_size", {16, 32}}, {"scale_fmt", "ue8m0"}}),
      [](const auto& stem, int rows, int cols) {
        return make_bytes(stem, rows, cols, "F8_E4M3", 16, 32, "weight_scale_inv", "F8_E8M0", {});
      },
      family);
  }
  SECTION("FP8 by tensor and by channel") {
    check_format(
      method("compressed-tensors", {{"format", "float-quantized"}}),
      [](const auto& stem, int rows, int cols) {
        const bool whole = stem.find("down_proj") != std::string::npos;
        return make_bytes(
          stem, rows, cols, "F8_E4M3", whole ? rows : 1, cols, "weight_scale", "F32",
          whole ? std::vector<std::int64_t>{1} : std::vector<std::int64_t>{rows, 1});
      },
      family);
  }
  SECTION("INT8 by channel") {
    check_format(
      method("compressed-tensors", {{"format", "int-quantized"}}),
      [](const auto& stem, int rows, int cols) {
        return make_bytes(stem, rows, cols, "I8", 1, cols, "weight_scale", "F32", {});
      },
      family);
  }
  SECTION("INT8 by group") {
    check_format(
      method("w8a8_int8"),
      [](const auto& stem, int rows, int cols) {
        return make_bytes(stem, rows, cols, "I8", 1, 8, "weight_scale", "F32", {});
      },
      family);
  }
  SECTION("INT8 in blocks") {
    check_format(
      method("blockwise_int8", {{"weight_block_size", {16, 32}}}),
      [](const auto& stem, int rows, int cols) {
        return make_bytes(stem, rows, cols, "I8", 16, 32, "weight_scale_inv", "F32", {});
      },
      family);
  }
  SECTION("AWQ") {
    check_format(
      method("awq", {{"bits", 4}, {"group_size", 32}}),
      [](const auto& stem, int rows, int cols) { return make_awq(stem, rows, cols, 32); }, family);
  }
  SECTION("GPTQ, first format") {
    check_format(
      method("gptq", {{"bits", 4}, {"group_size", 32}}),
      [](const auto& stem, int rows, int cols) {
        return make_gptq(stem, rows, cols, 4, 32, true, true);
      },
      family);
  }
  SECTION("GPTQ, second format, rows as groups") {
    check_format(
      method("gptq", {{"bits", 4}, {"group_size", -1}, {"checkpoint_format", "gptq_v2"}}),
      [](const auto& stem, int rows, int cols) {
        return make_gptq(stem, rows, cols, 4, cols, false, false);
      },
      family);
  }
  SECTION("GPTQ, columns in the order of activations") {
    check_format(
      method("gptq", {{"bits", 4}, {"group_size", 16}, {"desc_act", true}}),
      [](const auto& stem, int rows, int cols) {
        return make_gptq(stem, rows, cols, 4, 16, true, true, draw_order(cols, 16));
      },
      family);
  }
  SECTION("compressed-tensors, columns in the order of activations") {
    check_format(
      compressed,
      [](const auto& stem, int rows, int cols) {
        return make_compressed(stem, rows, cols, 4, 16, true, draw_order(cols, 16));
      },
      family);
  }
  SECTION("GPTQ, 8 bits") {
    check_format(
      method("gptq", {{"bits", 8}, {"group_size", 32}}),
      [](const auto& stem, int rows, int cols) {
        return make_gptq(stem, rows, cols, 8, 32, true, true);
      },
      family);
  }
  SECTION("compressed-tensors, 4 bits with zero points") {
    check_format(
      compressed,
      [](const auto& stem, int rows, int cols) {
        return make_compressed(stem, rows, cols, 4, 32, false);
      },
      family);
  }
  SECTION("compressed-tensors, 4 and 8 bits without") {
    check_format(
      compressed,
      [](const auto& stem, int rows, int cols) {
        const bool is_wide = stem.find("up_proj") != std::string::npos;
        return make_compressed(stem, rows, cols, is_wide ? 8 : 4, 16, true);
      },
      family);
  }
}

namespace {

struct found_weight {
  std::shared_ptr<testing::temporary_directory> directory;
  std::shared_ptr<checkpoint> source;
  expected<stored_weight> weight;
};

found_weight find(const quantised& made, int rows, int cols, const json& quantization,
                  weight_loading how = weight_loading::load) {
  auto config = small_config("llama");
  config["quantization_config"] = quantization;
  auto parsed = parse_model_config(config.dump(), "config.json");
  REQUIRE(parsed);
  auto directory = std::make_shared<testing::temporary_directory>();
  test::write_file(directory->path() / "model.safetensors", test::to_safetensors(made.blobs));
  auto source = checkpoint::open(directory->path());
  REQUIRE(source);
  auto weight = find_weight(**source, *parsed, "p.weight", rows, cols, how);
  return {directory, *source, std::move(weight)};
}

} // namespace

TEST_CASE("groups of 64 and 128 columns are unpacked at the quantized size") {
  for (const int group : {64, 128}) {
    const int rows = 40, cols = 384;
    const std::vector<std::pair<quantised, json>> cases{
      {make_awq("p.", rows, cols, group), method("awq", {{"bits", 4}, {"group_size", group}})},
      {make_gptq("p.", rows, cols, 4, group, true, true),
       method("gptq", {{"bits", 4}, {"group_size", group}})},
      {make_compressed("p.", rows, cols, 4, group, false),
       method("compressed-tensors", {{"format", "pack-quantized"}})}};
    for (const auto& [made, quantization] : cases) {
      INFO(quantization << ", groups of " << group);
      const auto found = find(made, rows, cols, quantization);
      REQUIRE(found.weight);
      CHECK(found.weight->type == kernels::element_type::i4);
      CHECK(found.weight->repacked.size() == std::size_t{rows} * cols / 2);
      CHECK(found.weight->zeros.size() == std::size_t{rows} * cols / group);
      CHECK(dequantise(found.weight->view()) == made.values);
      std::uint64_t bytes = 0;
      for (const auto& one : made.blobs)
        bytes += one.name == "p.weight_shape" ? 0 : one.bytes.size();
      CHECK(found.weight->num_bytes == bytes);
      const auto checked = find(made, rows, cols, quantization, weight_loading::check);
      REQUIRE(checked.weight);
      CHECK(checked.weight->num_bytes == bytes);
      CHECK(checked.weight->repacked.empty());
    }
  }
}

TEST_CASE("columns in the order of activations are multiplied out into the type of the scales") {
  const int rows = 40, cols = 256, group = 64;
  for (const int bits : {4, 8}) {
    const auto made = make_gptq("p.", rows, cols, bits, group, true, true, draw_order(cols, group));
    const json quantization = method("gptq", {{"bits", bits}, {"group_size", group}});
    const auto found = find(made, rows, cols, quantization);
    REQUIRE(found.weight);
    CHECK(found.weight->type == kernels::element_type::f16);
    CHECK(found.weight->repacked.size() == std::size_t{rows} * cols * 2);
    CHECK(found.weight->view().scales == nullptr);
    auto want = made.values; // 4 bits fit half precision here, 8 bits are rounded to it
    for (auto& value : want) {
      const auto half = nearest_f16(value);
      to_float32(reinterpret_cast<const std::byte*>(&half), kernels::element_type::f16,
                 {&value, 1});
    }
    if (bits == 4)
      CHECK(want == made.values);
    CHECK(dequantise(found.weight->view()) == want);
    REQUIRE(find(made, rows, cols, quantization, weight_loading::check).weight);
  }
}

TEST_CASE("the nearest value of half precision") {
  const auto back = [](std::uint16_t half) {
    float value = 0.0F;
    to_float32(reinterpret_cast<const std::byte*>(&half), kernels::element_type::f16, {&value, 1});
    return value;
  };
  for (std::uint32_t half = 0; half < 0x7bff; ++half) {
    const float low = back(static_cast<std::uint16_t>(half));
    const float high = back(static_cast<std::uint16_t>(half + 1));
    const float middle = low + (high - low) / 2.0F; // exact: float32 has 13 bits more
    REQUIRE(nearest_f16(low) == half);
    REQUIRE(nearest_f16(-low) == (half | 0x8000U));
    REQUIRE(nearest_f16(middle) == half + half % 2);
    REQUIRE(nearest_f16(std::nextafter(middle, 0.0F)) == half);
    REQUIRE(nearest_f16(std::nextafter(middle, 1e9F)) == half + 1);
  }
  CHECK(nearest_f16(65519.0F) == 0x7bff);
  CHECK(nearest_f16(65520.0F) == 0x7c00);
  CHECK(nearest_f16(-1e30F) == 0xfc00);
}

TEST_CASE("packed weights that are not understood are refused with their name") {
  const json gptq = method("gptq", {{"bits", 4}, {"group_size", 32}});
  const auto good = make_gptq("p.", 16, 64, 4, 32, true, true);
  const auto cause = [&](const quantised& made, const json& quantization, int rows = 16) {
    const auto found = find(made, rows, 64, quantization, weight_loading::check);
    REQUIRE_FALSE(found.weight);
    CHECK(found.weight.error().code == error_code::invalid_model);
    return found.weight.error().cause + " / " + found.weight.error().cure;
  };
  REQUIRE(find(good, 16, 64, gptq).weight);

  for (const std::int32_t group : {2, -1}) {
    auto beyond = good;
    std::memcpy(beyond.blobs[3].bytes.data() + 5 * 4, &group, 4);
    CHECK_THAT(cause(beyond, gptq), Catch::Contains("p.g_idx") && Catch::Contains("column 5"));
  }
  CHECK_THAT(cause(good, method("gptq", {{"bits", 4}, {"group_size", 64}})),
             Catch::Contains("p.qzeros") && Catch::Contains("[2, 2]"));
  CHECK_THAT(cause(good, method("w8a8_int8")),
             Catch::Contains("p.qweight") && Catch::Contains("quantization_config"));
  CHECK_THAT(cause(good, gptq, 24), Catch::Contains("p.qweight"));
  CHECK_THAT(cause(good, gptq, 17), Catch::Contains("does not fill words"));

  auto asymmetric = make_gptq("p.", 16, 64, 8, 32, true, true);
  const json eight = method("gptq", {{"bits", 8}, {"group_size", 32}});
  REQUIRE(find(asymmetric, 16, 64, eight).weight);
  asymmetric.blobs[1].bytes[3] = 5;
  CHECK_THAT(cause(asymmetric, eight), Catch::Contains("p.qzeros") && Catch::Contains("symmetric"));

  auto damaged = good;
  damaged.blobs[2].bytes[1] = 0x7c; // infinity
  damaged.blobs[2].bytes[0] = 0;
  CHECK_THAT(cause(damaged, gptq), Catch::Contains("p.scales") && Catch::Contains("inf"));
  auto missing = good;
  missing.blobs.erase(missing.blobs.begin() + 2);
  CHECK_THAT(cause(missing, gptq), Catch::Contains("p.scales"));

  auto bytes = make_bytes("p.", 16, 64, "I8", 1, 64, "weight_scale", "F32", {});
  const json int8 = method("w8a8_int8");
  REQUIRE(find(bytes, 16, 64, int8).weight);
  bytes.blobs[1].shape = {4, 4};
  CHECK_THAT(cause(bytes, int8), Catch::Contains("p.weight_scale") && Catch::Contains("[4, 4]"));
  bytes.blobs[1].shape = {16, 1};
  bytes.blobs.push_back({"p.weight_zero_point", "I8", {16, 1}, std::string(16, '\0')});
  REQUIRE(find(bytes, 16, 64, int8).weight);
  bytes.blobs.back().bytes[7] = 1;
  CHECK_THAT(cause(bytes, int8), Catch::Contains("p.weight_zero_point"));
  bytes.blobs.resize(1);
  CHECK_THAT(cause(bytes, int8), Catch::Contains("p.weight"));
}
