#include "troupe/model/checkpoint.hpp"

#include "troupe/model/weights.hpp"

#include "temporary_directory.hpp"
#include "tiny_checkpoint.hpp"

#include <cmath>
#include <limits>

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;

namespace {

constexpr auto mini = TROUPE_SOURCE_DIR "/configs/models/troupe-mini";

model_config tiny() {
  auto config = parse_model_config(test::tiny_config().dump(), "config.json");
  REQUIRE(config);
  return *config;
}

/// The error of checking the model in `directory`.
error refused(const std::filesystem::path& directory, const model_config& config) {
  auto source = checkpoint::open(directory);
  if (!source)
    return source.error();
  auto checked = check_weights(**source, config, whole_model(config));
  REQUIRE_FALSE(checked);
  CHECK(checked.error().code == error_code::invalid_model);
  return checked.error();
}

test::blob& named(std::vector<test::blob>& blobs, const std::string& name) {
  for (auto& one : blobs)
    if (one.name == name)
      return one;
  FAIL("no tensor " + name);
  return blobs.front();
}

} // namespace

TEST_CASE("whole checkpoints pass the check and their size is told") {
  const auto config = tiny();
  const auto blobs = test::tiny_blobs(config);
  const testing::temporary_directory directory;
  SECTION("sharded") {
    test::write_sharded(directory.path(), blobs);
  }
  SECTION("one file") {
    test::write_file(directory.path() / "model.safetensors", test::to_safetensors(blobs));
  }
  SECTION("unaligned data") {
    test::write_file(directory.path() / "model.safetensors", test::to_safetensors(blobs, 3));
  }
  auto source = checkpoint::open(directory.path());
  REQUIRE(source);
  auto size = check_weights(**source, config, whole_model(config));
  REQUIRE(size);
  CHECK(size->num_tensors == blobs.size());
  std::uint64_t num_bytes = 0;
  for (const auto& one : blobs)
    num_bytes += one.bytes.size();
  CHECK(size->num_bytes == num_bytes);
}

TEST_CASE("only shards that are used are opened") {
  auto config = load_model_config(mini);
  REQUIRE(config);
  auto source = checkpoint::open(mini);
  REQUIRE(source);
  CHECK((*source)->num_open_shards() == 0);
  REQUIRE(check_weights(**source, *config, {1, 2, true, 0, 16}));
  CHECK((*source)->num_open_shards() == 1);
  REQUIRE(check_weights(**source, *config, {4, 6, false, 3, 4}));
  CHECK((*source)->num_open_shards() == 2);
}

TEST_CASE("parts list what they need and nothing else") {
  const auto config = tiny();
  const auto count = [&](const model_part& part, const std::string& text) {
    const auto specs = list_tensors(config, part);
    return std::count_if(specs.begin(), specs.end(), [&](const tensor_spec& spec) {
      return spec.name.find(text) != std::string::npos;
    });
  };
  CHECK(count({0, 1, true, 0, 0}, "embed_tokens") == 1);
  CHECK(count({0, 1, true, 0, 0}, "lm_head") == 0);
  CHECK(count({1, 2, true, 0, 0}, "embed_tokens") == 0);
  CHECK(count({1, 2, true, 0, 0}, "lm_head") == 1);
  CHECK(count({1, 2, true, 0, 0}, "mlp.experts") == 0);
  CHECK(count({0, 2, false, 1, 3}, "") == 6);
  CHECK(count({0, 2, false, 1, 3}, "layers.1.mlp.experts.2.") == 3);
  CHECK(count({0, 2, true, 0, 4}, "layers.2") == 0);
}

TEST_CASE("missing files are named") {
  const auto config = tiny();
  const auto blobs = test::tiny_blobs(config);
  const testing::temporary_directory directory;
  CHECK_THAT(refused(directory.path() / "nowhere", config).cause, Catch::Contains("nowhere"));
  CHECK_THAT(refused(directory.path(), config).cause,
             Catch::Contains(directory.path().string()) && Catch::Contains("model.safetensors"));
  test::write_sharded(directory.path(), blobs);
  std::filesystem::remove(directory.path() / "model-00002-of-00002.safetensors");
  const auto error = refused(directory.path(), config);
  CHECK(error.code == error_code::invalid_model);
  CHECK_THAT(error.cause,
             Catch::Contains("model-00002-of-00002.safetensors") && Catch::Contains("index.json"));
  // What does not need the shard still works.
  auto source = checkpoint::open(directory.path());
  REQUIRE(source);
  CHECK(check_weights(**source, config, {0, 1, true, 0, 0}));
}

TEST_CASE("truncated and empty shards are named") {
  const auto config = tiny();
  const testing::temporary_directory directory;
  test::write_sharded(directory.path(), test::tiny_blobs(config));
  const auto shard = directory.path() / "model-00002-of-00002.safetensors";
  const auto size = std::filesystem::file_size(shard);
  for (const auto left : {size - 1, size / 2, std::uintmax_t{100}, std::uintmax_t{8},
                          std::uintmax_t{3}, std::uintmax_t{0}}) {
    std::filesystem::resize_file(shard, left);
    CHECK_THAT(refused(directory.path(), config).cause, Catch::Contains(shard.string()));
  }
  std::filesystem::remove(shard);
  std::filesystem::create_directory(shard);
  CHECK_THAT(refused(directory.path(), config).cause, Catch::Contains(shard.string()));
}

TEST_CASE("indexes that make no sense are refused by name") {
  const auto config = tiny();
  const testing::temporary_directory directory;
  test::write_sharded(directory.path(), test::tiny_blobs(config));
  const auto index = directory.path() / "model.safetensors.index.json";
  for (const auto* text : {"", "[]", "{}", R"({"weight_map": 1})", R"({"weight_map": {"a": 1}})",
                           R"({"weight_map": {"a": "../b.safetensors"}})",
                           R"({"weight_map": {"a": "/etc/passwd"}})"}) {
    test::write_file(index, text);
    auto source = checkpoint::open(directory.path());
    REQUIRE_FALSE(source);
    CHECK(source.error().code == error_code::invalid_model);
    CHECK_THAT(source.error().cause, Catch::Contains(index.string()));
  }
}

TEST_CASE("missing tensors are named") {
  const auto config = tiny();
  for (const std::string name : {"model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight",
                                 "model.layers.0.self_attn.o_proj.weight_scale_inv"}) {
    auto blobs = test::tiny_blobs(config);
    blobs.erase(std::find_if(blobs.begin(), blobs.end(),
                             [&](const test::blob& one) { return one.name == name; }));
    const testing::temporary_directory directory;
    test::write_sharded(directory.path(), blobs);
    CHECK_THAT(refused(directory.path(), config).cause, Catch::Contains('"' + name + '"'));
  }
  SECTION("also when the index promises them") {
    auto blobs = test::tiny_blobs(config);
    const testing::temporary_directory directory;
    test::write_sharded(directory.path(), blobs);
    blobs.pop_back();
    const std::vector<test::blob> rest(blobs.begin() + (blobs.size() + 1) / 2, blobs.end());
    test::write_file(directory.path() / "model-00002-of-00002.safetensors",
                     test::to_safetensors(rest));
    const auto cause = refused(directory.path(), config).cause;
    CHECK_THAT(cause, Catch::Contains("lm_head.weight"));
    CHECK_THAT(cause, Catch::Contains("model-00002-of-00002.safetensors"));
  }
}

TEST_CASE("a shape that differs from the config is told with both") {
  auto config = tiny();
  const testing::temporary_directory directory;
  test::write_sharded(directory.path(), test::tiny_blobs(config));
  config.v_head_dim = 7;
  const auto cause = refused(directory.path(), config).cause;
  CHECK_THAT(cause, Catch::Contains("kv_b_proj.weight") && Catch::Contains("[22, 8]")
                      && Catch::Contains("[26, 8]"));
}

TEST_CASE("dtypes that no weight may have are refused") {
  const auto config = tiny();
  auto blobs = test::tiny_blobs(config);
  named(blobs, "model.layers.0.mlp.up_proj.weight").dtype = "U8";
  const testing::temporary_directory directory;
  test::write_sharded(directory.path(), blobs);
  CHECK_THAT(refused(directory.path(), config).cause,
             Catch::Contains("model.layers.0.mlp.up_proj.weight") && Catch::Contains("U8"));
}

TEST_CASE("FP8 weights need a quantization_config") {
  auto config = tiny();
  const testing::temporary_directory directory;
  test::write_sharded(directory.path(), test::tiny_blobs(config));
  config.fp8.reset();
  const auto error = refused(directory.path(), config);
  CHECK_THAT(error.cause, Catch::Contains("quantization_config"));
}

TEST_CASE("values that are not finite are refused with tensor and element") {
  const auto config = tiny();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const std::string name :
       {"model.layers.1.mlp.experts.2.down_proj.weight_scale_inv",
        "model.layers.0.self_attn.kv_b_proj.weight_scale_inv", "model.norm.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias"})
    for (const float value : {nan, inf, -inf}) {
      auto blobs = test::tiny_blobs(config);
      std::memcpy(named(blobs, name).bytes.data() + 4, &value, 4);
      const testing::temporary_directory directory;
      test::write_sharded(directory.path(), blobs);
      CHECK_THAT(refused(directory.path(), config).cause,
                 Catch::Contains('"' + name + '"') && Catch::Contains("element 1"));
    }
}

TEST_CASE("stored values become the right float32") {
  using kernels::element_type;
  const auto convert = [](element_type type, std::vector<std::uint8_t> bytes) {
    std::vector<float> out(bytes.size() / kernels::size_of(type));
    to_float32(reinterpret_cast<const std::byte*>(bytes.data()), type, out);
    return out;
  };
  CHECK(convert(element_type::f8_e4m3, {0x00, 0x38, 0xb8, 0x7e, 0x01, 0x08, 0x07, 0xfe})
        == std::vector<float>{0.0F, 1.0F, -1.0F, 448.0F, 0.001953125F, 0.015625F, 0.013671875F,
                              -448.0F});
  CHECK(std::isnan(convert(element_type::f8_e4m3, {0x7f})[0]));
  CHECK(convert(element_type::bf16, {0x80, 0x3f, 0x49, 0xc0})
        == std::vector<float>{1.0F, -3.140625F});
  CHECK(convert(element_type::f16, {0x00, 0x3c, 0xff, 0x7b, 0x01, 0x00, 0x00, 0xc4})
        == std::vector<float>{1.0F, 65504.0F, 5.9604644775390625e-8F, -4.0F});
}
