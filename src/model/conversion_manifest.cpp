#include "troupe/model/conversion_manifest.hpp"

#include "troupe/model/config_reader.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace troupe::model {

namespace {

using json = nlohmann::ordered_json;

constexpr int kVersion = 1;
constexpr std::uint64_t kMaxManifestBytes = std::uint64_t{1} << 30;

json to_json(const file_seal& seal) {
  return {{"bytes", seal.num_bytes}, {"xxh3_64", seal.checksum}};
}

json to_json(const tensor_loss& one) {
  return {{"tensor", one.tensor},
          {"relative_rms", one.loss.relative_rms()},
          {"squared_error", one.loss.squared_error},
          {"squared_sum", one.loss.squared_sum},
          {"elements", one.loss.num_elements},
          {"worst", one.loss.worst},
          {"worst_at", {one.loss.worst_row, one.loss.worst_col}}};
}

tensor_loss loss_from(const json& from) {
  tensor_loss result;
  result.tensor = from.at("tensor");
  result.loss.squared_error = from.at("squared_error");
  result.loss.squared_sum = from.at("squared_sum");
  result.loss.num_elements = from.at("elements");
  result.loss.worst = from.at("worst");
  result.loss.worst_row = from.at("worst_at").at(0);
  result.loss.worst_col = from.at("worst_at").at(1);
  return result;
}

file_seal seal_from(const json& from) {
  return {from.at("bytes"), from.at("xxh3_64")};
}

json to_json(const finished_shard& shard, const shard_layout& layout) {
  const auto stage = static_cast<std::size_t>(shard.stage);
  json result = {
    {"file", shard.file},
    {"stage", shard.stage},
    {"layers", {stage == 0 ? 0 : layout.stage_ends[stage - 1], layout.stage_ends[stage]}},
    {"expert_group", shard.expert_group < 0 ? json() : json(shard.expert_group)}};
  result.update(to_json(shard.seal));
  result["tensors"] = shard.tensors;
  auto& losses = result["losses"] = json::array();
  for (const auto& one : shard.losses)
    losses.push_back(to_json(one));
  return result;
}

/// Throws json's exceptions; parse turns them into errors.
conversion_manifest manifest_from(const json& from) {
  conversion_manifest result;
  result.source = from.at("source").at("directory");
  result.fingerprint = from.at("source").at("fingerprint");
  result.format.bits = from.at("format").at("bits");
  result.format.group_size = from.at("format").at("group_size");
  result.layout.stage_ends = from.at("layout").at("stage_ends").get<std::vector<std::int32_t>>();
  result.layout.expert_groups = from.at("layout").at("expert_groups");
  result.layout.shard_bytes = from.at("layout").at("shard_bytes");
  result.is_complete = from.at("complete");
  for (const auto& one : from.at("shards")) {
    finished_shard shard;
    shard.file = one.at("file");
    shard.stage = one.at("stage");
    shard.expert_group = one.at("expert_group").is_null() ? -1 : one.at("expert_group").get<int>();
    shard.seal = seal_from(one);
    shard.tensors = one.at("tensors").get<std::vector<std::string>>();
    for (const auto& loss : one.at("losses"))
      shard.losses.push_back(loss_from(loss));
    result.shards.push_back(std::move(shard));
  }
  for (const auto& one : from.at("files"))
    result.files.emplace_back(one.at("file"), seal_from(one));
  return result;
}

/// Reads parts of a file and mixes them into a text that is hashed in the end.
class sampler {
public:
  static expected<sampler> open(const std::filesystem::path& file) {
    sampler result(file);
    if (!result.descriptor_)
      return result.failed(errno);
    return result;
  }

  expected<void> add(std::uint64_t offset, std::size_t count, std::string& out) {
    std::string bytes(count, '\0');
    std::size_t done = 0;
    while (done < count) {
      const auto got = ::pread(descriptor_.get(), bytes.data() + done, count - done,
                               static_cast<off_t>(offset + done));
      if (got < 0 && errno == EINTR)
        continue;
      if (got < 0)
        return failed(errno);
      if (got == 0)
        break;
      done += static_cast<std::size_t>(got);
    }
    out.append(bytes, 0, done);
    return {};
  }

private:
  explicit sampler(const std::filesystem::path& file)
    : file_(file), descriptor_(::open(file.c_str(), O_RDONLY | O_CLOEXEC)) {}

  tl::unexpected<error> failed(int reason) const {
    return fail(reason == ENOENT ? error_code::invalid_model : error_code::io_failed,
                fmt::format("{} cannot be read: {}", file_.string(), std::strerror(reason)),
                reason == ENOENT ? "the model is incomplete: copy the missing file"
                                 : "see to it that the source can be read");
  }

  std::filesystem::path file_;
  unique_fd descriptor_;
};

expected<void> add_file(const std::filesystem::path& file, std::string& out) {
  constexpr std::uint64_t num_samples = 16;
  constexpr std::size_t sample_bytes = 4096;
  auto in = sampler::open(file);
  if (!in)
    return tl::unexpected(std::move(in.error()));
  std::error_code problem;
  const auto size = std::filesystem::file_size(file, problem);
  out += fmt::format("{} {}\n", file.filename().string(), size);
  std::string length;
  if (auto ok = in->add(0, 8, length); !ok)
    return ok;
  std::uint64_t header_bytes = 0;
  for (auto at = length.size(); at-- > 0;)
    header_bytes = header_bytes << 8 | static_cast<unsigned char>(length[at]);
  header_bytes = std::min<std::uint64_t>(header_bytes, std::min<std::uint64_t>(size, 100'000'000));
  if (auto ok = in->add(8, header_bytes, out); !ok)
    return ok;
  const auto begin = std::min<std::uint64_t>(size, 8 + header_bytes);
  for (std::uint64_t i = 0; i < num_samples; ++i)
    if (auto ok = in->add(begin + (size - begin) / num_samples * i, sample_bytes, out); !ok)
      return ok;
  return {};
}

} // namespace

std::string conversion_manifest::to_text() const {
  json result = {{"troupe_manifest", kVersion},
                 {"source", {{"directory", source}, {"fingerprint", fingerprint}}},
                 {"format", {{"bits", format.bits}, {"group_size", format.group_size}}},
                 {"layout",
                  {{"stage_ends", layout.stage_ends},
                   {"expert_groups", layout.expert_groups},
                   {"shard_bytes", layout.shard_bytes}}},
                 {"complete", is_complete}};
  auto& list = result["shards"] = json::array();
  for (const auto& one : shards)
    list.push_back(to_json(one, layout));
  auto& others = result["files"] = json::array();
  for (const auto& [file, seal] : files) {
    json one = {{"file", file}};
    one.update(to_json(seal));
    others.push_back(std::move(one));
  }
  return result.dump(1) + "\n";
}

expected<conversion_manifest> conversion_manifest::parse(std::string_view text,
                                                         const std::string& file) {
  const auto refuse = [&](const std::string& what) {
    return fail(error_code::invalid_model, fmt::format("{} {}", file, what),
                "remove the directory that it is in, or give another one");
  };
  try {
    const auto value = json::parse(text);
    if (value.at("troupe_manifest") != kVersion)
      return refuse("is of another version of troupe");
    auto result = manifest_from(value);
    const auto stages = static_cast<std::int32_t>(result.layout.stage_ends.size());
    for (const auto& shard : result.shards)
      if (shard.stage < 0 || shard.stage >= stages || shard.file.find('/') != std::string::npos)
        return refuse("names an impossible shard");
    return result;
  } catch (const nlohmann::json::exception& reason) {
    return refuse(fmt::format("is no manifest: {}", reason.what()));
  }
}

expected<std::optional<conversion_manifest>>
conversion_manifest::load(const std::filesystem::path& directory) {
  const auto file = directory / file_name;
  std::error_code ignored;
  if (!std::filesystem::exists(file, ignored))
    return std::nullopt;
  auto text = read_text_file(file, kMaxManifestBytes);
  if (!text)
    return tl::unexpected(std::move(text.error()));
  auto result = parse(*text, file.string());
  if (!result)
    return tl::unexpected(std::move(result.error()));
  return std::optional(std::move(*result));
}

expected<std::string> fingerprint_of(const std::filesystem::path& source) {
  std::vector<std::filesystem::path> shards;
  std::error_code problem;
  for (std::filesystem::directory_iterator at(source, problem), end; !problem && at != end;
       at.increment(problem))
    if (at->path().extension() == ".safetensors")
      shards.push_back(at->path());
  if (problem)
    return fail(error_code::io_failed,
                fmt::format("{} cannot be read: {}", source.string(), problem.message()),
                "give the path of a Hugging Face model directory");
  std::sort(shards.begin(), shards.end());
  std::string all;
  for (const char* name : {"config.json", "model.safetensors.index.json"}) {
    if (!std::filesystem::exists(source / name, problem))
      continue;
    auto text = read_text_file(source / name, kMaxManifestBytes);
    if (!text)
      return tl::unexpected(std::move(text.error()));
    all += *text;
  }
  for (const auto& shard : shards)
    if (auto ok = add_file(shard, all); !ok)
      return tl::unexpected(std::move(ok.error()));
  return checksum_of(std::as_bytes(std::span(std::string_view(all))));
}

std::string describe(const integer_format& format) {
  return format.group_size > 0 ? fmt::format("int{}, groups of {}", format.bits, format.group_size)
                               : fmt::format("int{}, by row", format.bits);
}

} // namespace troupe::model
