#include "troupe/model/safetensors.hpp"

#include "troupe/model/checkpoint.hpp"

#include "temporary_directory.hpp"
#include "tiny_checkpoint.hpp"

#include <catch2/catch.hpp>

using namespace troupe;
using namespace troupe::model;
using nlohmann::json;

namespace {

expected<tensor_directory> parse(const std::string& bytes) {
  return parse_safetensors({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()},
                           "dir/file.safetensors");
}

std::string with_header(const std::string& header, std::size_t data_bytes) {
  const std::uint64_t size = header.size();
  std::string result(8, '\0');
  std::memcpy(result.data(), &size, 8);
  return result + header + std::string(data_bytes, 'x');
}

std::string one_tensor(const json& entry, std::size_t data_bytes) {
  return with_header(json{{"the.tensor", entry}}.dump(), data_bytes);
}

std::string refused(const std::string& bytes) {
  auto result = parse(bytes);
  REQUIRE_FALSE(result);
  CHECK(result.error().code == error_code::invalid_model);
  CHECK_THAT(result.error().cause, Catch::Contains("dir/file.safetensors"));
  return result.error().cause;
}

} // namespace

TEST_CASE("tensors are found where the header says") {
  const auto bytes = test::to_safetensors({{"a", "F32", {2, 2}, std::string(16, 'a')},
                                           {"b", "BF16", {3}, std::string(6, 'b')},
                                           {"empty", "I64", {0, 5}, ""},
                                           {"scalar", "F8_E4M3", {}, "s"}});
  auto tensors = parse(bytes);
  REQUIRE(tensors);
  CHECK(tensors->size() == 4);
  const auto& b = tensors->at("b");
  CHECK(b.dtype == "BF16");
  CHECK(b.shape == std::vector<std::int64_t>{3});
  CHECK(bytes.substr(b.offset, b.num_bytes) == "bbbbbb");
  CHECK(tensors->at("empty").num_bytes == 0);
  CHECK(bytes[tensors->at("scalar").offset] == 's');
}

TEST_CASE("a header that lies about its length is refused") {
  CHECK_THAT(refused(""), Catch::Contains("0 bytes"));
  CHECK_THAT(refused("1234567"), Catch::Contains("7 bytes"));
  CHECK_THAT(refused(std::string(8, '\xff')), Catch::Contains("header"));
  auto bytes = test::to_safetensors({{"a", "F32", {1}, "1234"}});
  bytes[0] = static_cast<char>(bytes[0] + 8);
  refused(bytes);
  refused(with_header("{", 0));
  refused(with_header("[]", 0));
  refused(with_header(std::string(200'000, '['), 0));
}

TEST_CASE("entries that cannot be are refused with the tensor's name") {
  const auto entry = [](json dtype, json shape, json offsets) {
    return json{{"dtype", dtype}, {"shape", shape}, {"data_offsets", offsets}};
  };
  const std::vector<std::pair<json, std::string>> wrong{
    {json(1), "lacks"},
    {json{{"dtype", "F32"}}, "lacks"},
    {entry("F33", {1}, {0, 4}), "unknown dtype"},
    {entry(32, {1}, {0, 4}), "unknown dtype"},
    {entry("F32", 1, {0, 4}), "shape"},
    {entry("F32", {-1}, {0, 4}), "dimension"},
    {entry("F32", {1.5}, {0, 4}), "dimension"},
    {entry("F32", {1}, {0}), "data_offsets"},
    {entry("F32", {1}, {-4, 0}), "data_offsets"},
    {entry("F32", {1}, {4, 0}), "before it begins"},
    {entry("F32", {2}, {0, 4}), "its shape and dtype make 8"},
    {entry("F32", {2}, {0, 8}), "truncated"},
    {entry("F32", {1ULL << 40, 1ULL << 40}, {0, 4}), "overflows"},
    {entry("F32", {1ULL << 62, 4}, {0, 4}), "overflows"},
    {entry("F32", {UINT64_MAX}, {0, 4}), "dimension"},
    {entry("F32", {1}, {UINT64_MAX - 3, UINT64_MAX}), "truncated"},
    {entry("F4", {1}, {0, 4}), "whole bytes"},
    {entry("F32", json::array({1, 1, 1, 1, 1, 1, 1, 1, 1}), {0, 4}), "shape"},
  };
  for (const auto& [value, reason] : wrong) {
    const auto cause = refused(one_tensor(value, 4));
    CHECK_THAT(cause, Catch::Contains("the.tensor"));
    CHECK_THAT(cause, Catch::Contains(reason));
  }
}

TEST_CASE("overlaps, holes and left-over bytes are refused") {
  const auto two = [](int a, int b, int c, int d, std::size_t bytes) {
    const json one{{"dtype", "U8"}, {"shape", {b - a}}, {"data_offsets", {a, b}}};
    const json other{{"dtype", "U8"}, {"shape", {d - c}}, {"data_offsets", {c, d}}};
    return with_header(json{{"one", one}, {"two", other}}.dump(), bytes);
  };
  CHECK(parse(two(0, 4, 4, 8, 8)));
  CHECK(parse(two(4, 8, 0, 4, 8)));
  CHECK_THAT(refused(two(0, 4, 3, 8, 8)), Catch::Contains("two") && Catch::Contains("overlaps"));
  CHECK_THAT(refused(two(0, 4, 5, 8, 8)), Catch::Contains("two") && Catch::Contains("hole"));
  CHECK_THAT(refused(two(0, 4, 4, 8, 9)), Catch::Contains("1 bytes follow"));
  CHECK_THAT(refused(two(0, 4, 4, 8, 7)), Catch::Contains("truncated"));
}

TEST_CASE("mutated headers and indexes never do more than return an error") {
  auto config = parse_model_config(test::tiny_config().dump(), "config.json");
  REQUIRE(config);
  const auto blobs = test::tiny_blobs(*config);
  const auto original = test::to_safetensors({blobs.begin(), blobs.begin() + 4});
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, original.data(), 8);
  std::mt19937 random(20240607);
  // Bytes that mean something to JSON hit more than random ones.
  const std::string alphabet = "{}[]\",:0123456789-.eE \\u\xff\x80n";
  const auto mutate = [&](std::string text, std::size_t limit) {
    for (auto edits = 1 + random() % 4; edits > 0; --edits) {
      const auto at = random() % std::min(limit, text.size());
      switch (random() % 4) {
      case 0: text[at] = static_cast<char>(random()); break;
      case 1: text[at] = alphabet[random() % alphabet.size()]; break;
      case 2: text.erase(at, 1 + random() % 16); break;
      default: text.insert(at, 1 + random() % 4, alphabet[random() % alphabet.size()]); break;
      }
      if (text.empty())
        text = "x";
    }
    return text;
  };
  int refused_headers = 0;
  for (int i = 0; i < 4000; ++i) {
    auto bytes = mutate(original, 8 + header_bytes);
    if (i % 2 == 0 && bytes.size() > 8) { // keep the length right, so that the JSON is reached
      const std::uint64_t size = header_bytes + bytes.size() - original.size();
      std::memcpy(bytes.data(), &size, 8);
    }
    auto result = parse(bytes);
    if (!result) {
      ++refused_headers;
      REQUIRE(result.error().code == error_code::invalid_model);
      continue;
    }
    for (const auto& [name, entry] : *result) {
      REQUIRE(entry.offset <= bytes.size());
      REQUIRE(entry.num_bytes <= bytes.size() - entry.offset);
    }
  }
  CHECK(refused_headers > 2000);

  const testing::temporary_directory directory;
  test::write_sharded(directory.path(), blobs);
  const auto index = test::read_file(directory.path() / "model.safetensors.index.json");
  int refused_indexes = 0;
  for (int i = 0; i < 500; ++i) {
    test::write_file(directory.path() / "model.safetensors.index.json",
                     mutate(index, index.size()));
    auto source = checkpoint::open(directory.path());
    if (!source || !check_weights(**source, *config, whole_model(*config)))
      ++refused_indexes;
  }
  CHECK(refused_indexes > 250);
}
