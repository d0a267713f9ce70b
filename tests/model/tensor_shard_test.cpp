#include "troupe/model/tensor_shard.hpp"

#include <cstring>
#include <random>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;
using kernels::element_type;

namespace {

/// A weight of any contents, with scales of blocks of `block_rows` x `block_cols`; 0: none.
stored_weight make_weight(element_type type, std::int32_t rows, std::int32_t cols,
                          std::int32_t block_rows, std::int32_t block_cols) {
  std::mt19937 random(static_cast<unsigned>(rows * 31 + cols * 7 + block_cols));
  stored_weight result;
  result.type = type;
  result.num_rows = rows;
  result.num_cols = cols;
  result.repacked.resize(rows * kernels::row_bytes(type, cols));
  for (auto& byte : result.repacked)
    byte = static_cast<std::byte>(random() % 0x70); // no NaN of any type
  if (block_rows == 0)
    return result;
  result.block_rows = block_rows;
  result.block_cols = block_cols;
  const auto count = (rows + block_rows - 1) / block_rows * ((cols + block_cols - 1) / block_cols);
  for (std::int32_t i = 0; i < count; ++i)
    result.scales.push_back(static_cast<float>(random() % 1000) / 64.0F);
  if (type == element_type::i4)
    for (std::int32_t i = 0; i < count; ++i)
      result.zeros.push_back(static_cast<std::uint8_t>(random() % 16));
  return result;
}

/// The part [first_row, +rows) x [first_col, +cols) of the whole's values.
std::vector<float> part_of(const stored_weight& whole, std::int32_t first_row, std::int32_t rows,
                           std::int32_t first_col, std::int32_t cols) {
  const auto values = dequantise(whole.view());
  std::vector<float> result;
  for (auto r = first_row; r < first_row + rows; ++r)
    for (auto c = first_col; c < first_col + cols; ++c)
      result.push_back(values[static_cast<std::size_t>(r) * whole.num_cols + c]);
  return result;
}

} // namespace

TEST_CASE("a part of a weight has the values of the whole, whatever its format and blocks") {
  struct format {
    element_type type;
    std::int32_t block_rows, block_cols;
  };
  const format formats[] = {{element_type::bf16, 0, 0},        {element_type::f32, 0, 0},
                            {element_type::f8_e4m3, 128, 128}, {element_type::f8_e4m3, 1, 384},
                            {element_type::i8, 1, 384},        {element_type::i8, 1, 128},
                            {element_type::i4, 1, 64},         {element_type::i4, 1, 128}};
  for (const auto& f : formats)
    for (const std::int32_t parts : {2, 3, 4, 6}) {
      INFO(static_cast<int>(f.type)
           << " blocks " << f.block_rows << "x" << f.block_cols << ", " << parts << " parts");
      const auto whole = make_weight(f.type, 384, 384, f.block_rows, f.block_cols);
      const auto size = 384 / parts;
      for (std::int32_t part = 0; part < parts; ++part) {
        const auto rows = cut_rows(whole, part * size, size);
        CHECK(dequantise(rows.view()) == part_of(whole, part * size, size, 0, 384));
        const auto cols = cut_cols(whole, part * size, size);
        CHECK(dequantise(cols.view()) == part_of(whole, 0, 384, part * size, size));
        const auto shape = cut_cols(whole, part * size, size, false);
        CHECK(shape.scales == cols.scales);
        CHECK(shape.repacked.empty());
      }
    }
}

TEST_CASE("rows of a mapped weight stay where they are mapped") {
  const auto owner = make_weight(element_type::bf16, 8, 16, 0, 0);
  stored_weight mapped = owner;
  mapped.repacked.clear();
  mapped.data = owner.repacked.data();
  const auto part = cut_rows(mapped, 2, 4);
  CHECK(part.data == owner.repacked.data() + 2 * 16 * 2);
  CHECK(part.repacked.empty());
}

TEST_CASE("heads and inner columns are cut, all else is whole") {
  const std::string layer = "model.layers.3.";
  for (const auto* name :
       {"self_attn.q_proj.weight", "self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight",
        "self_attn.k_proj.bias", "mlp.gate_proj.weight", "mlp.experts.7.up_proj.weight",
        "mlp.shared_experts.gate_proj.weight"})
    CHECK(cut_of(layer + name) == weight_cut::rows);
  for (const auto* name :
       {"self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.experts.7.down_proj.weight"})
    CHECK(cut_of(layer + name) == weight_cut::cols);
  for (const auto* name :
       {"self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias", "input_layernorm.weight", "eh_proj.weight"})
    CHECK(cut_of(layer + name) == weight_cut::whole);
  CHECK(cut_of("lm_head.weight") == weight_cut::whole);
  CHECK(cut_of("model.embed_tokens.weight") == weight_cut::whole);
}

TEST_CASE("a model whose heads or widths cannot be cut evenly is refused") {
  model_config config;
  config.num_heads = 6;
  config.intermediate_size = 96;
  config.moe_intermediate_size = 32;
  const auto half = rank_config(config, 1, 2);
  REQUIRE(half);
  CHECK(half->num_heads == 3);
  CHECK(half->intermediate_size == 48);
  CHECK(half->moe_intermediate_size == 16);
  CHECK(half->part.rank == 1);
  const auto by_heads = rank_config(config, 0, 4);
  REQUIRE_FALSE(by_heads);
  CHECK(by_heads.error().cause == "6 attention heads cannot be cut into 4 parts");
  config.attention = attention_kind::grouped;
  config.num_kv_heads = 3;
  CHECK_FALSE(rank_config(config, 0, 2));
}

TEST_CASE("a part of a recipe is the recipe of the part") {
  stored_weight whole;
  whole.type = element_type::f8_e4m3;
  whole.num_rows = 200;
  whole.num_cols = 384;
  whole.block_rows = 128;
  whole.block_cols = 128;
  whole.recipe.emplace();
  whole.recipe->num_rows = 200;
  whole.recipe->num_cols = 384;
  whole.recipe->block_rows = 128;
  whole.recipe->block_cols = 128;
  auto part = cut_cols(cut_rows(whole, 100, 100), 128, 256);
  REQUIRE(part.recipe);
  CHECK(part.view().data == nullptr);
  CHECK(part.view().recipe == &*part.recipe);
  CHECK(part.num_rows == 100);
  CHECK(part.num_cols == 256);
  CHECK(part.view().block_rows == 4); // of rows 100 to 199, the first 28 have another scale
  CHECK(part.view().block_cols == 128);
  CHECK(part.recipe->first_row == 100);
  CHECK(part.recipe->first_col == 128);
  CHECK(part.recipe->num_rows == 200);
  CHECK(part.recipe->block_rows == 128);
}
