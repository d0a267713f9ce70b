#include "troupe/model/random_weights.hpp"

#include "stage_pipeline.hpp"
#include "temporary_directory.hpp"
#include "tiny_checkpoint.hpp"

#include "troupe/model/model_tokenizer.hpp"

#include <cmath>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;

namespace {

float from_bf16(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

std::vector<float> values_of(tensor_source& source, const std::string& name) {
  auto view = source.tensor(name);
  REQUIRE(view);
  REQUIRE(view->type);
  std::size_t count = 1;
  for (const auto dim : view->shape)
    count *= static_cast<std::size_t>(dim);
  std::vector<float> values(count);
  to_float32(view->data, *view->type, values);
  return values;
}

} // namespace

TEST_CASE("made-up elements are the known function of name and index") {
  // Computed by tests/data/make_random_weights.py, which has the definition in Python's integers.
  std::vector<std::uint16_t> first(4);
  fill_random("model.embed_tokens.weight", 1.0, 0, first);
  CHECK(first == std::vector<std::uint16_t>{0xbee4, 0xbf20, 0x3d3d, 0xbf5f});
  fill_random("model.layers.3.mlp.experts.17.down_proj.weight", 0.7 / 16.0, 1000, first);
  CHECK(first == std::vector<std::uint16_t>{0x3d75, 0xbd7e, 0x3d8a, 0x3d2a});
  fill_random("model.layers.1.mlp.gate.e_score_correction_bias", 0.02, 5, first);
  CHECK(first == std::vector<std::uint16_t>{0x3d09, 0x3c88, 0xbc2e, 0xbce9});
}

TEST_CASE("elements do not depend on how a tensor is cut, and spread as they should") {
  std::vector<std::uint16_t> whole(100000), part(777);
  fill_random("x", 0.5, 0, whole);
  fill_random("x", 0.5, 4321, part);
  CHECK(std::equal(part.begin(), part.end(), whole.begin() + 4321));
  double sum = 0.0, squares = 0.0, largest = 0.0;
  for (const auto bits : whole) {
    const double value = from_bf16(bits);
    sum += value;
    squares += value * value;
    largest = std::max(largest, std::abs(value));
  }
  CHECK(std::abs(sum / 1e5) < 0.01);
  CHECK(std::sqrt(squares / 1e5) == Approx(0.5).epsilon(0.01));
  CHECK(largest <= 0.5 * std::sqrt(3.0) * 1.004);
}

TEST_CASE("a made-up model has every tensor that its config needs, and computes") {
  auto text = test::tiny_config();
  const bool in_fp8 = GENERATE(false, true);
  if (!in_fp8)
    text.erase("quantization_config");
  const testing::temporary_directory directory;
  const auto file = directory.path() / "tiny.json";
  test::write_file(file, text.dump());
  const auto name = "random:" + file.string();
  auto config = load_model_config(name);
  REQUIRE(config);
  auto source = open_weights(name);
  REQUIRE(source);
  REQUIRE(check_weights(**source, *config, whole_model(*config)));
  CHECK((*source)->contains("lm_head.weight"));
  CHECK_FALSE((*source)->contains("lm_tail.weight"));
  auto missing = (*source)->tensor("lm_tail.weight");
  REQUIRE_FALSE(missing);
  CHECK_THAT(missing.error().cause, Catch::Contains("lm_tail") && Catch::Contains("tiny.json"));
  for (const auto value : values_of(**source, "model.layers.1.input_layernorm.weight"))
    CHECK(value == 1.0F);
  const auto head = values_of(**source, "lm_head.weight");
  std::vector<std::uint16_t> known(head.size());
  fill_random("lm_head.weight", 0.7 / std::sqrt(12.0), 0, known);
  for (std::size_t i = 0; i < head.size(); ++i)
    CHECK(head[i] == from_bf16(known[i]));
  CHECK((*source)->tensor("model.layers.0.mlp.up_proj.weight")->dtype
        == (in_fp8 ? "F8_E4M3" : "BF16"));

  static const auto ops = kernels::make_cpu_ops(1);
  test::stage_pipeline pipeline(name, {{2}, 0}, 1, 64, *ops);
  const auto logits = pipeline.score({3, 1, 4, 1, 5}, 5);
  for (const auto value : logits)
    REQUIRE(std::isfinite(value));
  test::stage_pipeline again(name, {{1, 2}, 2}, 1, 64, *ops);
  CHECK(again.score({3, 1, 4, 1, 5}, 2) == logits);
}

TEST_CASE("made-up FP8 and INT8 weights are near the BF16 values they are made from") {
  auto text =
    nlohmann::json::parse(R"({"model_type": "llama", "vocab_size": 300, "hidden_size": 192,
    "intermediate_size": 200, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "eos_token_id": 1})");
  const std::string name = "model.layers.0.mlp.down_proj.weight"; // [192, 200]
  const auto read = [&](const nlohmann::json& quantization) {
    auto with = text;
    if (!quantization.is_null())
      with["quantization_config"] = quantization;
    auto config = parse_model_config(with.dump(), "r.json");
    REQUIRE(config);
    random_weights source(*config, "r.json");
    auto weight = find_weight(source, *config, name, 192, 200, weight_loading::load);
    REQUIRE(weight);
    return dequantise(weight->view());
  };
  const auto exact = read(nullptr);
  const auto fp8 = read({{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}});
  const auto weights8 = [](int group) {
    return nlohmann::json{
      {"quant_method", "compressed-tensors"},
      {"config_groups", {{"group_0", {{"weights", {{"num_bits", 8}, {"group_size", group}}}}}}}};
  };
  const auto by_group = read(weights8(40));
  const auto by_row = read(weights8(64)); // 64 does not divide 200
  float largest = 0.0F;
  for (const auto value : exact)
    largest = std::max(largest, std::abs(value));
  bool fp8_near = true, group_near = true, row_near = true, differs = false;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    // Half a step: 2^-4 of the value, or of the smallest normal one.
    fp8_near &= std::abs(fp8[i] - exact[i])
                <= std::max(std::abs(exact[i]) / 16.0F, largest / 448.0F / 1024.0F) * 1.001F;
    group_near &= std::abs(by_group[i] - exact[i]) <= largest / 254.0F * 1.001F;
    row_near &= std::abs(by_row[i] - exact[i]) <= largest / 254.0F * 1.001F;
    differs |= by_row[i] != by_group[i] && fp8[i] != exact[i];
  }
  CHECK(fp8_near);
  CHECK(group_near);
  CHECK(row_near);
  CHECK(differs);
}

TEST_CASE("recipes of made-up matrices say what their tensors hold") {
  auto text = test::tiny_config();
  const bool in_fp8 = GENERATE(false, true);
  if (!in_fp8)
    text.erase("quantization_config");
  auto config = parse_model_config(text.dump(), "tiny.json");
  REQUIRE(config);
  random_weights source(*config, "tiny.json");
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  const auto made = source.recipe(name);
  REQUIRE(made);
  const auto rows = made->recipe.num_rows;
  const auto cols = made->recipe.num_cols;
  auto view = source.tensor(name);
  REQUIRE(view);
  CHECK(std::vector<std::int64_t>(view->shape.begin(), view->shape.end())
        == std::vector<std::int64_t>{rows, cols});
  CHECK(view->type == made->type);
  CHECK(made->num_tensors == (in_fp8 ? 2 : 1));
  bool same = true;
  for (std::int32_t row = 0; row < rows; ++row)
    for (std::int32_t col = 0; col < cols; ++col) {
      const auto value = kernels::made_value(made->recipe, row, col);
      const auto* at = view->data + static_cast<std::size_t>(row * cols + col) * (in_fp8 ? 1 : 2);
      if (in_fp8) {
        auto scales = source.tensor(name + "_scale_inv");
        REQUIRE(scales);
        const auto across = (cols + made->recipe.block_cols - 1) / made->recipe.block_cols;
        float scale = 0.0F;
        std::memcpy(
          &scale,
          scales->data
            + 4 * (row / made->recipe.block_rows * across + col / made->recipe.block_cols),
          4);
        same &= std::to_integer<std::uint8_t>(*at) == kernels::made_code(made->type, value, scale);
      } else {
        std::uint16_t bits = 0;
        std::memcpy(&bits, at, 2);
        same &= from_bf16(bits) == value;
      }
    }
  CHECK(same);
  CHECK_FALSE(source.recipe("model.norm.weight"));
  CHECK_FALSE(source.recipe(name + "_scale_inv"));
  CHECK_FALSE(source.recipe("lm_tail.weight"));

  auto weight = find_weight(source, *config, name, rows, cols, weight_loading::recipe);
  REQUIRE(weight);
  CHECK(weight->view().recipe == &*weight->recipe);
  CHECK(weight->view().data == nullptr);
  CHECK_FALSE(find_weight(source, *config, name, rows, cols + 1, weight_loading::recipe));
  weight = find_weight(source, *config, name, rows, cols, weight_loading::load);
  REQUIRE(weight);
  CHECK(weight->view().recipe == nullptr);
}

TEST_CASE("codes are the nearest ones, ties to even") {
  using kernels::nearest;
  using kernels::nearest_e4m3;
  for (float value = -20.0F; value <= 20.0F; value += 0.125F)
    CHECK(nearest(value) == static_cast<std::int32_t>(std::nearbyint(value)));
  std::vector<float> exact(127);
  for (std::uint8_t code = 0; code < 127; ++code) {
    const auto byte = std::byte{code};
    to_float32(&byte, kernels::element_type::f8_e4m3, {&exact[code], 1});
    CHECK(nearest_e4m3(exact[code]) == code);
    CHECK(nearest_e4m3(-exact[code]) == (code | 0x80));
  }
  for (std::uint8_t code = 0; code < 126; ++code) {
    const float middle = (exact[code] + exact[code + 1]) / 2.0F;
    CHECK(nearest_e4m3(middle) == code + code % 2);
    CHECK(nearest_e4m3(std::nextafter(middle, 0.0F)) == code);
    CHECK(nearest_e4m3(std::nextafter(middle, 500.0F)) == code + 1);
  }
  CHECK(nearest_e4m3(1e9F) == 126);
}

TEST_CASE("the tokenizer of a made-up model: bytes, and ids that no text becomes") {
  auto tokenizer = make_id_tokenizer(300);
  REQUIRE(tokenizer);
  CHECK(tokenizer->vocab_size() == 300);
  auto ids = tokenizer->encode("a \xc3\xa9\n<299>");
  REQUIRE(ids);
  CHECK(*ids == std::vector<std::int32_t>{'a', ' ', 0xc3, 0xa9, '\n', '<', '2', '9', '9', '>'});
  CHECK(*tokenizer->decode(*ids, false) == "a \xc3\xa9\n<299>");
  CHECK(*tokenizer->decode(std::vector<std::int32_t>{299, 'x', 256}, true) == "<299>x<256>");
}
