#include "troupe/model/checkpoint.hpp"

#include "troupe/model/config_reader.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace troupe::model {

namespace {

constexpr std::uint64_t kMaxIndexBytes = 256U << 20;

/// A shard must be a plain name, or an index could make us map files elsewhere.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos
         && name.find('\0') == std::string::npos;
}

} // namespace

checkpoint::checkpoint(std::filesystem::path directory) : directory_(std::move(directory)) {}

expected<std::shared_ptr<checkpoint>> checkpoint::open(const std::filesystem::path& directory) {
  std::shared_ptr<checkpoint> result(new checkpoint(directory));
  const auto index = directory / "model.safetensors.index.json";
  const auto single = directory / "model.safetensors";
  std::error_code ignored;
  if (!std::filesystem::is_directory(directory, ignored))
    return fail(error_code::invalid_model, fmt::format("{} is not a directory", directory.string()),
                "give the path of a Hugging Face model directory");
  expected<void> ok;
  if (std::filesystem::exists(index, ignored))
    ok = result->read_index(index);
  else if (std::filesystem::exists(single, ignored))
    ok = result->read_single(single);
  else
    return fail(error_code::invalid_model,
                fmt::format("{} has neither model.safetensors.index.json nor model.safetensors",
                            directory.string()),
                "give a directory with the model's weights in safetensors format");
  if (!ok)
    return tl::unexpected(std::move(ok.error()));
  return result;
}

expected<void> checkpoint::read_index(const std::filesystem::path& file) {
  index_file_ = file.string();
  auto text = read_text_file(file, kMaxIndexBytes);
  if (!text)
    return tl::unexpected(std::move(text.error()));
  auto object = parse_json_object(*text, index_file_);
  if (!object)
    return tl::unexpected(std::move(object.error()));
  config_reader in(index_file_, *object);
  const auto& map = in.object("weight_map");
  if (auto ok = in.finish(); !ok)
    return ok;
  std::unordered_map<std::string, std::size_t> known;
  shard_of_.reserve(map.size());
  for (const auto& [tensor, value] : map.items()) {
    if (!value.is_string() || !is_plain_name(value.get_ref<const std::string&>()))
      return fail(error_code::invalid_model,
                  fmt::format("{}: weight_map names no file for tensor \"{}\"", index_file_,
                              tensor.substr(0, 200)),
                  "give the name of a file in the same directory");
    const auto& name = value.get_ref<const std::string&>();
    const auto [position, is_new] = known.emplace(name, shards_.size());
    if (is_new)
      shards_.push_back({name, nullptr});
    shard_of_.emplace(tensor, position->second);
  }
  return {};
}

expected<void> checkpoint::read_single(const std::filesystem::path& file) {
  index_file_ = file.string();
  auto opened = safetensors_file::open(file);
  if (!opened)
    return tl::unexpected(std::move(opened.error()));
  for (const auto& [tensor, entry] : (*opened)->tensors())
    shard_of_.emplace(tensor, 0);
  shards_.push_back({file.filename().string(), std::move(*opened)});
  return {};
}

bool checkpoint::contains(const std::string& tensor) const {
  return shard_of_.count(tensor) != 0;
}

std::vector<std::string> checkpoint::tensor_names() const {
  std::vector<std::string> names;
  names.reserve(shard_of_.size());
  for (const auto& [name, shard] : shard_of_)
    names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

std::string checkpoint::file_of(const std::string& tensor) const {
  const auto found = shard_of_.find(tensor);
  return found == shard_of_.end() ? directory_.string()
                                  : (directory_ / shards_[found->second].name).string();
}

std::size_t checkpoint::num_open_shards() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::size_t>(std::count_if(
    shards_.begin(), shards_.end(), [](const shard& one) { return one.file != nullptr; }));
}

expected<tensor_view> checkpoint::tensor(const std::string& name) {
  const auto found = shard_of_.find(name);
  if (found == shard_of_.end())
    return fail(error_code::invalid_model,
                fmt::format("{} has no tensor \"{}\"", index_file_, name),
                "the checkpoint is incomplete or belongs to another config.json");
  const std::lock_guard lock(mutex_);
  auto& shard = shards_[found->second];
  if (shard.file == nullptr) {
    auto opened = safetensors_file::open(directory_ / shard.name);
    if (!opened) {
      auto reason = std::move(opened.error());
      reason.cause += fmt::format("; {} says that it holds tensor \"{}\"", index_file_, name);
      return tl::unexpected(std::move(reason));
    }
    shard.file = std::move(*opened);
  }
  if (auto view = shard.file->find(name))
    return *view;
  return fail(error_code::invalid_model,
              fmt::format("{} has no tensor \"{}\", although {} says so", shard.file->name(), name,
                          index_file_),
              "index and shards belong to different checkpoints: copy both again");
}

} // namespace troupe::model
