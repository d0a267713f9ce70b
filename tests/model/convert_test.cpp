#include "troupe/model/convert.hpp"

#include "temporary_directory.hpp"
#include "tiny_checkpoint.hpp"

#include "troupe/model/checkpoint.hpp"
#include "troupe/model/half_float.hpp"
#include "troupe/model/model_comparison.hpp"
#include "troupe/model/stored_weight.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include <catch2/catch.hpp>
#include <fmt/format.h>

#include <sys/file.h>
#include <fcntl.h>

using namespace troupe;
using namespace troupe::model;
using test::blob;
using testing::temporary_directory;
namespace fs = std::filesystem;

namespace {

const std::string mini_model = TROUPE_SOURCE_DIR "/configs/models/troupe-mini";

/// A model of two layers, with experts in the second and an MTP layer behind them, whose widths
/// are multiples of 64.
nlohmann::json source_config() {
  auto config = test::tiny_config();
  config.update(nlohmann::json::parse(R"({"hidden_size": 64, "intermediate_size": 128,
    "moe_intermediate_size": 64, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24, "v_head_dim": 32, "num_nextn_predict_layers": 1, "vocab_size": 48,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}})"));
  return config;
}

/// The tensors of such a model: projections in `dtype`, all else in float32.
std::vector<blob> source_blobs(const model_config& config, const std::string& dtype) {
  auto parts = config;
  if (dtype != "F8_E4M3")
    parts.fp8.reset();
  auto blobs = test::tiny_blobs(parts);
  const auto add_mtp = [&] {
    auto layer = config;
    layer.num_layers = 3;
    layer.fp8 = parts.fp8;
    for (auto& one : test::tiny_blobs(layer, 2))
      if (one.name.starts_with("model.layers.2."))
        blobs.push_back(one);
    const std::vector<float> values(64 * 128, 0.25F);
    blobs.push_back({"model.layers.2.eh_proj.weight", "F32", {64, 128}, test::to_bytes(values)});
    for (const char* norm : {"enorm", "hnorm", "shared_head.norm"})
      blobs.push_back({fmt::format("model.layers.2.{}.weight", norm),
                       "F32",
                       {64},
                       test::to_bytes(std::vector<float>(64, 1.0F))});
  };
  add_mtp();
  if (dtype == "F32" || dtype == "F8_E4M3")
    return blobs;
  for (auto& one : blobs) {
    if (one.shape.size() != 2)
      continue;
    std::vector<float> values(one.bytes.size() / 4);
    std::memcpy(values.data(), one.bytes.data(), one.bytes.size());
    std::string halves;
    for (const float value : values) {
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const auto half = dtype == "F16" ? f16_bits(value) : static_cast<std::uint16_t>(bits >> 16);
      halves += static_cast<char>(half & 0xff);
      halves += static_cast<char>(half >> 8);
    }
    one.dtype = dtype;
    one.bytes = halves;
  }
  return blobs;
}

/// A source and a target in a directory of their own.
struct workshop {
  explicit workshop(const std::string& dtype = "BF16") {
    auto text = source_config();
    if (dtype != "F8_E4M3")
      text.erase("quantization_config");
    fs::create_directories(source());
    test::write_file(source() / "config.json", text.dump());
    test::write_file(source() / "tokenizer.json", "{}");
    test::write_file(source() / "generation_config.json", R"({"temperature": 0.5})");
    test::write_file(source() / "golden.json", "[]");
    auto parsed = parse_model_config(text.dump(), "config.json");
    REQUIRE(parsed);
    config = *parsed;
    write(source_blobs(config, dtype));
  }

  void write(const std::vector<blob>& made) {
    blobs = made;
    test::write_sharded(source(), made);
  }

  fs::path source() const { return directory.path() / "source"; }
  fs::path target() const { return directory.path() / "target"; }

  conversion_options options(integer_format format) const {
    conversion_options result;
    result.source = source();
    result.target = target();
    result.format = format;
    result.layout = {{1, 2}, 2, 20'000};
    result.num_threads = 2;
    return result;
  }

  temporary_directory directory;
  model_config config;
  std::vector<blob> blobs;
};

/// All files of a directory and what they hold.
std::map<std::string, std::string> contents(const fs::path& directory) {
  std::map<std::string, std::string> result;
  for (const auto& entry : fs::directory_iterator(directory))
    result[entry.path().filename().string()] = test::read_file(entry.path());
  return result;
}

conversion_result must_convert(const conversion_options& options,
                               const conversion_watcher& watch = {}) {
  auto result = convert(options, watch);
  if (!result)
    FAIL(result.error().cause);
  return std::move(*result);
}

std::string why_not(const conversion_options& options) {
  auto result = convert(options, {});
  REQUIRE_FALSE(result);
  CHECK_FALSE(result.error().cure.empty());
  return result.error().cause;
}

std::vector<float> values_of(checkpoint& source, const model_config& config,
                             const planned_tensor& tensor) {
  auto weight = find_weight(source, config, tensor.name, tensor.num_rows, tensor.num_cols,
                            weight_loading::load);
  if (!weight)
    FAIL(weight.error().cause);
  return dequantise(weight->view());
}

std::string checksum_of_text(const std::string& bytes) {
  return checksum_of(std::as_bytes(std::span(bytes.data(), bytes.size())));
}

bool is_named(const std::string& name, std::initializer_list<const char*> parts) {
  return std::any_of(parts.begin(), parts.end(),
                     [&](const char* part) { return name.find(part) != std::string::npos; });
}

} // namespace

TEST_CASE("a converted model is what its losses say, for every source and format") {
  const std::string dtype = GENERATE("BF16", "F16", "F32", "F8_E4M3");
  const auto format = GENERATE(integer_format{8, 0}, integer_format{8, 64}, integer_format{4, 64});
  INFO(dtype << ", " << describe(format));
  const workshop shop(dtype);
  const auto result = must_convert(shop.options(format));
  auto config = load_model_config(shop.target());
  if (!config)
    FAIL(config.error().cause);
  CHECK(config->weight_bits == format.bits);
  auto before = checkpoint::open(shop.source());
  auto after = checkpoint::open(shop.target());
  REQUIRE(before);
  REQUIRE(after);
  if (auto whole = check_weights(**after, *config, whole_model(*config, true)); !whole)
    FAIL(whole.error().cause);

  std::map<std::string, rounding_loss> losses;
  for (const auto& shard : result.manifest.shards)
    for (const auto& one : shard.losses)
      losses[one.tensor] = one.loss;
  std::set<std::string> seen;
  for (const auto& shard : result.plan.shards)
    for (const auto& tensor : shard.tensors) {
      INFO(tensor.name);
      seen.insert(tensor.name);
      if (tensor.treatment == tensor_treatment::copied) {
        auto was = (*before)->tensor(tensor.name);
        auto is = (*after)->tensor(tensor.name);
        REQUIRE(is);
        CHECK(is->dtype == was->dtype);
        CHECK(
          std::equal(is->data, is->data + is->num_bytes, was->data, was->data + was->num_bytes));
        continue;
      }
      const auto was = values_of(**before, shop.config, tensor);
      const auto is = values_of(**after, *config, tensor);
      REQUIRE(was.size() == is.size());
      double error = 0.0, sum = 0.0, worst = 0.0;
      for (std::size_t i = 0; i < was.size(); ++i) {
        error += std::pow(double{was[i]} - is[i], 2);
        sum += std::pow(double{was[i]}, 2);
        worst = std::max(worst, std::abs(double{was[i]} - is[i]));
      }
      const double relative = std::sqrt(error / sum);
      if (tensor.treatment == tensor_treatment::expanded) {
        CHECK(is_named(tensor.name, {"kv_b_proj"}));
        CHECK(relative < 1.0 / 256);
        continue;
      }
      CHECK(relative == Approx(losses.at(tensor.name).relative_rms()));
      CHECK(worst == Approx(losses.at(tensor.name).worst));
      CHECK(relative < (format.bits == 8 ? 0.01 : 0.12));
      CHECK(is_named(tensor.name, {"_proj"}));
      CHECK_FALSE(is_named(tensor.name, {"kv_b_proj", "eh_proj"}));
    }
  for (const auto& one : shop.blobs)
    if (one.name.find("_scale_inv") == std::string::npos)
      CHECK(seen.count(one.name) == 1);
  // 9 projections of attention in three layers, less kv_b and one of dense MLP or of 5 experts.
  CHECK(losses.size() == 3 * 4 + 3 + 2 * 5 * 3);
  CHECK(test::read_file(shop.target() / "tokenizer.json") == "{}");
  CHECK(config->default_temperature == 0.5F);
  CHECK_FALSE(fs::exists(shop.target() / "golden.json"));
}

TEST_CASE("shards are cut by stage, expert group and size, and the manifest names them") {
  const workshop shop;
  const auto result = must_convert(shop.options({8, 0}));
  const auto manifest =
    nlohmann::json::parse(test::read_file(shop.target() / conversion_manifest::file_name));
  CHECK(manifest["complete"] == true);
  CHECK(manifest["layout"]["stage_ends"] == nlohmann::json({1, 2}));
  const auto index =
    nlohmann::json::parse(test::read_file(shop.target() / "model.safetensors.index.json"));
  std::size_t num_tensors = 0;
  std::set<std::string> places;
  for (const auto& shard : manifest["shards"]) {
    const std::string file = shard["file"];
    INFO(file);
    const auto bytes = test::read_file(shop.target() / file);
    CHECK(shard["bytes"] == bytes.size());
    CHECK(shard["xxh3_64"] == checksum_of_text(bytes));
    auto opened = safetensors_file::open(shop.target() / file);
    REQUIRE(opened);
    CHECK((*opened)->tensors().size() == shard["tensors"].size());
    places.insert(fmt::format("{} {}", shard["stage"].dump(), shard["expert_group"].dump()));
    std::uint64_t data = 0;
    for (const std::string name : shard["tensors"]) {
      ++num_tensors;
      CHECK(index["weight_map"][name] == file);
      data += (*opened)->find(name)->num_bytes;
      const auto at = name.find(".experts.");
      if (at != std::string::npos && name.find("layers.1.") != std::string::npos)
        CHECK(shard["expert_group"] == std::stoi(name.substr(at + 9)) / 2);
      else if (at == std::string::npos)
        CHECK(shard["expert_group"].is_null());
      const bool is_first =
        name.find("layers.0.") != std::string::npos || name == "model.embed_tokens.weight";
      CHECK(shard["stage"] == (is_first ? 0 : 1));
    }
    CHECK((data <= 20'000 || shard["tensors"].size() <= 3));
  }
  CHECK(places == std::set<std::string>{"0 null", "1 null", "1 0", "1 1"});
  CHECK(manifest["shards"].size() > 4);
  CHECK(index["weight_map"].size() == num_tensors);
  CHECK(index["metadata"]["total_size"] == result.plan.num_bytes);
  for (const auto& file : manifest["files"])
    CHECK(file["xxh3_64"] == checksum_of_text(test::read_file(shop.target() / file["file"])));

  const auto text = nlohmann::json::parse(test::read_file(shop.target() / "config.json"));
  const auto& ignored = text["quantization_config"]["ignore"];
  for (const char* module : {"lm_head", "model.layers.1.mlp.gate",
                             "model.layers.0.self_attn.kv_b_proj", "model.layers.2.eh_proj"})
    CHECK(std::find(ignored.begin(), ignored.end(), module) != ignored.end());
  for (const std::string module : ignored)
    CHECK(index["weight_map"].contains(module + ".weight"));
}

TEST_CASE("the same bytes come from any number of threads, and after an interruption anywhere") {
  const auto format = GENERATE(integer_format{8, 0}, integer_format{4, 64});
  const workshop shop("F8_E4M3");
  auto options = shop.options(format);
  options.num_threads = 1;
  const auto first = must_convert(options);
  const auto want = contents(shop.target());
  fs::remove_all(shop.target());
  options.num_threads = 5;
  must_convert(options);
  CHECK(contents(shop.target()) == want);

  // Again from a finished state: nothing is written but the small files.
  auto again = must_convert(options);
  CHECK(again.num_reused == first.plan.shards.size());
  CHECK(contents(shop.target()) == want);

  // What a kill leaves: a manifest with some shards, one that is not in it, a partial file.
  for (std::size_t kept = 0; kept < first.plan.shards.size(); ++kept) {
    auto manifest = first.manifest;
    manifest.is_complete = false;
    manifest.files.clear();
    manifest.shards.resize(kept);
    fs::remove_all(shop.target());
    fs::create_directories(shop.target());
    test::write_file(shop.target() / conversion_manifest::file_name, manifest.to_text());
    for (std::size_t i = 0; i < kept + 1; ++i)
      test::write_file(shop.target() / first.plan.shards[i].file,
                       want.at(first.plan.shards[i].file));
    test::write_file(shop.target() / ("." + first.plan.shards[kept].file + ".partial"), "half");
    again = must_convert(options);
    CHECK(again.num_reused == kept);
    CHECK(again.done_again.empty());
    CHECK(contents(shop.target()) == want);
  }
}

TEST_CASE("damaged and missing shards are found and written again") {
  const workshop shop;
  const auto options = shop.options({4, 64});
  const auto first = must_convert(options);
  const auto want = contents(shop.target());
  const auto& shards = first.plan.shards;
  auto damaged = want.at(shards[1].file);
  damaged[damaged.size() - 7] ^= 1;
  test::write_file(shop.target() / shards[1].file, damaged);
  fs::remove(shop.target() / shards[2].file);
  fs::resize_file(shop.target() / shards[3].file, 100);
  std::set<std::string> written;
  const auto again = must_convert(options, [&](const conversion_progress& now) {
    if (now.is_shard_done)
      written.insert(now.file);
  });
  CHECK(again.done_again
        == std::vector<std::string>{shards[1].file, shards[2].file, shards[3].file});
  CHECK(written == std::set<std::string>{shards[1].file, shards[2].file, shards[3].file});
  CHECK(again.num_reused == shards.size() - 3);
  CHECK(contents(shop.target()) == want);
}

TEST_CASE("a target that holds something else is refused") {
  workshop shop;
  const auto options = shop.options({4, 64});
  must_convert(options);
  const auto before = contents(shop.target());
  CHECK_THAT(why_not(shop.options({8, 0})),
             Catch::Contains("its format is int4, groups of 64, not int8, by row"));
  auto other = options;
  other.layout.expert_groups = 0;
  CHECK_THAT(why_not(other), Catch::Contains("its layout is 2 stages, 2 expert groups"));
  auto& value = shop.blobs.front().bytes;
  value[5] ^= 1;
  shop.write(shop.blobs);
  CHECK_THAT(why_not(options),
             Catch::Contains("its source was") && Catch::Contains(shop.source().string()));
  CHECK(contents(shop.target()) == before);

  other = options;
  other.target = shop.directory.path() / "full";
  fs::create_directories(other.target);
  test::write_file(other.target / "thesis.tex", "...");
  CHECK_THAT(why_not(other), Catch::Contains("thesis.tex"));
  other.target = shop.source();
  CHECK_THAT(why_not(other), Catch::Contains("source and target at once"));
  test::write_file(shop.target() / conversion_manifest::file_name, "{\"troupe_manifest\": 1}");
  CHECK_THAT(why_not(options), Catch::Contains("is no manifest"));
  test::write_file(shop.target() / conversion_manifest::file_name, "{\"troupe_manifest\": 7}");
  CHECK_THAT(why_not(options), Catch::Contains("another version"));
}

TEST_CASE("two conversions into one directory: the second is refused") {
  const workshop shop;
  const auto options = shop.options({8, 0});
  fs::create_directories(shop.target());
  const int other = ::open(shop.target().c_str(), O_RDONLY | O_DIRECTORY);
  REQUIRE(::flock(other, LOCK_EX) == 0);
  CHECK_THAT(why_not(options), Catch::Contains("another process"));
  ::close(other);
  must_convert(options);
}

TEST_CASE("sources that cannot be converted are refused with file and tensor") {
  workshop shop;
  const auto options = shop.options({4, 64});
  const auto good = shop.blobs;
  const auto find = [&](const std::string& name) -> blob& {
    return *std::find_if(shop.blobs.begin(), shop.blobs.end(),
                         [&](const blob& one) { return one.name == name; });
  };
  const std::string bad = "model.layers.1.mlp.experts.2.up_proj.weight";
  find(bad).bytes[64 * 2 * 3 + 11] = 0x7f; // row 3, column 5: infinity or NaN in BF16
  find(bad).bytes[64 * 2 * 3 + 10] = '\x80';
  shop.write(shop.blobs);
  CHECK_THAT(why_not(options), Catch::Contains(bad) && Catch::Contains("row 3, column 5")
                                 && Catch::Contains("model-0000"));
  CHECK_FALSE(fs::exists(shop.target() / "config.json"));
  for (const auto& [file, bytes] : contents(shop.target()))
    CHECK_FALSE(file.ends_with(".partial"));

  fs::remove_all(shop.target());
  shop.write(good);
  fs::remove(shop.source() / "model-00002-of-00002.safetensors");
  CHECK_THAT(why_not(options), Catch::Contains("model-00002-of-00002.safetensors"));
  shop.write(good);
  fs::resize_file(shop.source() / "model-00002-of-00002.safetensors", 9000);
  CHECK_THAT(why_not(options), Catch::Contains("model-00002-of-00002.safetensors"));
  shop.write(good);
  shop.blobs.push_back(
    {"model.layers.0.self_attn.o_proj.qweight", "I32", {8, 8}, std::string(256, '\0')});
  shop.write(shop.blobs);
  CHECK_THAT(why_not(options), Catch::Contains("quantized to integers already"));
  shop.write(good);
  auto other = options;
  other.source = "random:" + (shop.source() / "config.json").string();
  CHECK_THAT(why_not(other), Catch::Contains("made-up"));
  other = options;
  other.format = {4, 0};
  CHECK_THAT(why_not(other), Catch::Contains("4 bits"));
  other = options;
  other.layout.expert_groups = 3;
  CHECK_THAT(why_not(other), Catch::Contains("3 groups"));
  other = options;
  other.layout.stage_ends = {2, 1};
  CHECK_THAT(why_not(other), Catch::Contains("2 stages"));
  other = options;
  other.target = shop.source() / "config.json" / "below";
  CHECK_THAT(why_not(other), Catch::Contains("below"));
}

TEST_CASE("matrices whose shape does not fit stay as they are, and the model still loads") {
  const workshop shop;
  const auto result = must_convert(shop.options({4, 128}));
  // Only what has 128 columns: down_proj of the dense layer.
  REQUIRE(result.manifest.shards.size() > 0);
  std::size_t num_quantized = 0;
  for (const auto& shard : result.manifest.shards)
    num_quantized += shard.losses.size();
  CHECK(num_quantized == 1);
  CHECK(result.plan.misfits.size() == 3 * 4 + 2 + 2 * 5 * 3);
  auto config = load_model_config(shop.target());
  auto source = checkpoint::open(shop.target());
  REQUIRE(config);
  REQUIRE(source);
  CHECK(check_weights(**source, *config, whole_model(*config, true)));
}

TEST_CASE("kinds of tensors") {
  CHECK(kind_of("model.layers.12.mlp.experts.7.up_proj.weight") == "mlp.experts.*.up_proj");
  CHECK(kind_of("model.layers.0.self_attn.o_proj.weight") == "self_attn.o_proj");
  CHECK(kind_of("lm_head.weight") == "lm_head");
}

TEST_CASE("troupe-mini in 8 and 4 bits: measured accuracy") {
  struct expected_accuracy {
    integer_format format;
    double max_rms;
    double min_agreement;
    double max_kl;
  };
  const auto want = GENERATE(expected_accuracy{{8, 0}, 0.008, 0.998, 2e-4},
                             expected_accuracy{{4, 64}, 0.095, 0.98, 1.5e-2});
  const temporary_directory directory;
  conversion_options options;
  options.source = mini_model;
  options.target = directory.path() / "converted";
  options.format = want.format;
  options.layout = {{3, 6}, 2, 1'000'000};
  options.num_threads = 2;
  const auto result = must_convert(options);
  rounding_loss all;
  for (const auto& shard : result.manifest.shards)
    for (const auto& one : shard.losses)
      all.add(one.loss);
  auto texts = read_conversations(mini_model + "/golden.json");
  REQUIRE(texts);
  texts->resize(16);
  auto source = expect_tokens(mini_model, *texts, 2);
  auto converted = expect_tokens(options.target, *texts, 2);
  if (!converted)
    FAIL(converted.error().cause);
  REQUIRE(source);
  const auto same = compare(*texts, *source, *source);
  CHECK(same.mean_kl == 0.0);
  CHECK(same.top1_agreement == 1.0);
  CHECK(same.num_same_answers == 16);
  const auto got = compare(*texts, *source, *converted);
  WARN(describe(want.format) << ": relative RMS error " << all.relative_rms() << ", mean KL "
                             << got.mean_kl << ", same top token " << got.top1_agreement
                             << ", answers " << got.num_same_answers << " of " << got.num_answers);
  CHECK(all.relative_rms() < want.max_rms);
  CHECK(got.top1_agreement > want.min_agreement);
  CHECK(got.mean_kl < want.max_kl);
}
