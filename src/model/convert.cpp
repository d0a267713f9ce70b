#include "troupe/model/convert.hpp"

#include "troupe/model/checkpoint.hpp"
#include "troupe/model/config_reader.hpp"
#include "troupe/model/ordered_tasks.hpp"
#include "troupe/model/quantized_tensor.hpp"
#include "troupe/model/shard_file.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <string_view>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace troupe::model {

namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kMaxSmallFile = 256U << 20;
constexpr const char* kIndexName = "model.safetensors.index.json";

/// Files that go with any weights of the model, by how their names begin.
constexpr std::array<std::string_view, 9> kCopiedFiles{"tokenizer",
                                                       "special_tokens_map",
                                                       "added_tokens",
                                                       "vocab",
                                                       "merges",
                                                       "chat_template",
                                                       "generation_config",
                                                       "LICENSE",
                                                       "preprocessor_config"};

bool is_copied_file(const fs::path& file) {
  const auto name = file.filename().string();
  return file.extension() == ".py" // code that config.json's auto_map names
         || std::any_of(kCopiedFiles.begin(), kCopiedFiles.end(),
                        [&](std::string_view start) { return name.starts_with(start); });
}

tl::unexpected<error> cannot(const fs::path& what, const char* verb, const std::string& reason) {
  return fail(error_code::io_failed,
              fmt::format("{} cannot be {}: {}", what.string(), verb, reason),
              "see to it that the directory can be read and written");
}

/// One run of a conversion.
class conversion {
public:
  conversion(const conversion_options& options, const conversion_watcher& watch)
    : options_(options), watch_(watch) {}

  expected<conversion_result> run() {
    for (const auto step :
         {&conversion::read_source, &conversion::enter_target, &conversion::check_earlier_shards,
          &conversion::check_space, &conversion::write_shards, &conversion::write_other_files})
      if (auto ok = (this->*step)(); !ok)
        return tl::unexpected(std::move(ok.error()));
    return std::move(result_);
  }

private:
  conversion_plan& plan() { return result_.plan; }
  conversion_manifest& manifest() { return result_.manifest; }

  expected<void> read_source() {
    if (random_config_of(options_.source))
      return fail(
        error_code::invalid_config,
        fmt::format("{} names made-up weights, which have no files", options_.source.string()),
        "give a Hugging Face model directory");
    auto source = checkpoint::open(options_.source);
    if (!source)
      return tl::unexpected(std::move(source.error()));
    auto config = load_model_config(options_.source);
    if (!config)
      return tl::unexpected(std::move(config.error()));
    config_ = std::move(*config);
    auto made = plan_conversion(**source, config_, options_.format, options_.layout);
    if (!made)
      return tl::unexpected(std::move(made.error()));
    plan() = std::move(*made);
    auto fingerprint = fingerprint_of(options_.source);
    if (!fingerprint)
      return tl::unexpected(std::move(fingerprint.error()));
    std::error_code ignored;
    manifest().source = fs::weakly_canonical(options_.source, ignored).string();
    manifest().fingerprint = std::move(*fingerprint);
    manifest().format = options_.format;
    manifest().layout = options_.layout;
    return {};
  }

  expected<void> enter_target() {
    const auto& target = options_.target;
    std::error_code problem;
    if (fs::equivalent(options_.source, target, problem))
      return fail(error_code::invalid_config,
                  fmt::format("{} is source and target at once", target.string()),
                  "give another directory for the converted model");
    fs::create_directories(target, problem);
    if (problem)
      return cannot(target, "created", problem.message());
    lock_ = unique_fd(::open(target.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!lock_)
      return cannot(target, "opened", std::strerror(errno));
    if (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0)
      return fail(error_code::io_failed,
                  fmt::format("another process is converting into {}", target.string()),
                  "wait for it to end, or give another directory");
    auto earlier = conversion_manifest::load(target);
    if (!earlier)
      return tl::unexpected(std::move(earlier.error()));
    if (*earlier)
      return take_over(**earlier);
    for (fs::directory_iterator at(target, problem), end; !problem && at != end;
         at.increment(problem))
      if (at->path().extension() != ".partial")
        return fail(error_code::invalid_config,
                    fmt::format("{} holds {} and no {}: it is not an unfinished conversion",
                                target.string(), at->path().filename().string(),
                                conversion_manifest::file_name),
                    "give an empty or new directory");
    if (problem)
      return cannot(target, "read", problem.message());
    return save_manifest();
  }

  /// Goes on with what an earlier run of the same conversion wrote.
  expected<void> take_over(conversion_manifest& earlier) {
    const auto refuse = [&](const std::string& what) {
      return fail(error_code::invalid_config,
                  fmt::format("{} holds another conversion: {}", options_.target.string(), what),
                  "repeat the command that began it, or give another directory");
    };
    if (earlier.fingerprint != manifest().fingerprint)
      return refuse(fmt::format("its source was {} with checksum {}, this one is {} with {}",
                                earlier.source, earlier.fingerprint, manifest().source,
                                manifest().fingerprint));
    if (earlier.format != options_.format)
      return refuse(fmt::format("its format is {}, not {}", describe(earlier.format),
                                describe(options_.format)));
    if (earlier.layout != options_.layout)
      return refuse(
        fmt::format("its layout is {} stages, {} expert groups and shards of {} bytes, not {}, {} "
                    "and {}",
                    earlier.layout.stage_ends.size(), earlier.layout.expert_groups,
                    earlier.layout.shard_bytes, options_.layout.stage_ends.size(),
                    options_.layout.expert_groups, options_.layout.shard_bytes));
    for (auto& shard : earlier.shards)
      finished_.emplace(shard.file, std::move(shard));
    return {};
  }

  void tell(std::size_t shard, std::uint64_t bytes, bool is_checking, bool is_shard_done) {
    if (watch_)
      watch_({plan().shards[shard].file, shard, plan().shards.size(), bytes, plan().num_bytes,
              is_checking, is_shard_done});
  }

  /// Whether a shard of an earlier run is what its manifest says.
  static expected<bool> holds(const fs::path& file, const file_seal& seal) {
    std::error_code problem;
    if (fs::file_size(file, problem) != seal.num_bytes || problem)
      return false;
    auto found = seal_of(file);
    if (!found)
      return tl::unexpected(std::move(found.error()));
    return *found == seal;
  }

  expected<void> check_earlier_shards() {
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < plan().shards.size(); ++i) {
      const auto found = finished_.find(plan().shards[i].file);
      if (found == finished_.end())
        continue;
      tell(i, bytes, true, false);
      const auto is_sound = holds(options_.target / found->first, found->second.seal);
      if (!is_sound)
        return tl::unexpected(is_sound.error());
      if (*is_sound) {
        bytes += plan().shards[i].num_bytes;
        ++result_.num_reused;
      } else {
        result_.done_again.push_back(found->first);
        finished_.erase(found);
      }
    }
    return {};
  }

  expected<void> check_space() {
    std::uint64_t needed = 0;
    for (const auto& shard : plan().shards)
      if (finished_.count(shard.file) == 0)
        needed += shard.num_bytes;
    std::error_code problem;
    const auto space = fs::space(options_.target, problem);
    if (problem || space.available >= needed)
      return {};
    constexpr double mb = 1e6;
    return fail(error_code::io_failed,
                fmt::format("{} has {:.1f} MB free, but {:.1f} MB are still to be written",
                            options_.target.string(), static_cast<double>(space.available) / mb,
                            static_cast<double>(needed) / mb),
                "free some space or give a directory on another disk");
  }

  expected<void> write_shards() {
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < plan().shards.size(); ++i) {
      const auto& shard = plan().shards[i];
      if (finished_.count(shard.file) == 0) {
        if (auto ok = write_shard(i, bytes); !ok)
          return ok;
        if (auto ok = save_manifest(); !ok)
          return ok;
        tell(i, bytes + shard.num_bytes, false, true);
      }
      bytes += shard.num_bytes;
    }
    return {};
  }

  expected<void> write_shard(std::size_t index, std::uint64_t bytes) {
    const auto& shard = plan().shards[index];
    // Opened for each shard, so that what was read for others need not stay mapped.
    auto source = checkpoint::open(options_.source);
    if (!source)
      return tl::unexpected(std::move(source.error()));
    auto file = file_writer::create(options_.target / shard.file);
    if (!file)
      return tl::unexpected(std::move(file.error()));
    const auto header = safetensors_header(shard.outputs());
    if (auto ok = file->write(std::as_bytes(std::span(header))); !ok)
      return ok;
    finished_shard done{shard.file, shard.stage, shard.expert_group, {}, {}, {}};
    tell(index, bytes, false, false);
    ordered_tasks<expected<converted_tensor>> tasks(
      shard.tensors.size(), options_.num_threads, [&](std::size_t task) {
        return convert_tensor(**source, config_, options_.format, shard.tensors[task]);
      });
    for (const auto& tensor : shard.tensors) {
      auto made = tasks.take();
      if (!made)
        return tl::unexpected(std::move(made.error()));
      if (auto ok = write_tensor(**source, tensor, *made, *file); !ok)
        return ok;
      for (const auto& output : tensor.outputs) {
        done.tensors.push_back(output.name);
        bytes += output.num_bytes;
      }
      if (tensor.treatment == tensor_treatment::quantized)
        done.losses.push_back({tensor.name, made->loss});
      tell(index, bytes, false, false);
    }
    auto seal = file->finish();
    if (!seal)
      return tl::unexpected(std::move(seal.error()));
    done.seal = std::move(*seal);
    finished_.emplace(shard.file, std::move(done));
    return {};
  }

  static expected<void> write_tensor(checkpoint& source, const planned_tensor& tensor,
                                     const converted_tensor& made, file_writer& file) {
    if (tensor.treatment == tensor_treatment::copied) {
      auto view = source.tensor(tensor.name);
      if (!view)
        return tl::unexpected(std::move(view.error()));
      return file.write({view->data, view->num_bytes});
    }
    for (const auto& bytes : made.outputs)
      if (auto ok = file.write(bytes); !ok)
        return ok;
    return {};
  }

  /// All that is done so far, in the plan's order.
  expected<void> save_manifest() {
    manifest().shards.clear();
    for (const auto& shard : plan().shards)
      if (const auto found = finished_.find(shard.file); found != finished_.end())
        manifest().shards.push_back(found->second);
    auto seal =
      write_whole_file(options_.target / conversion_manifest::file_name, manifest().to_text());
    if (!seal)
      return tl::unexpected(std::move(seal.error()));
    return {};
  }

  expected<void> write_other_files() {
    if (auto ok = write_small(kIndexName, index_text()); !ok)
      return ok;
    std::vector<fs::path> copied;
    std::error_code problem;
    for (fs::directory_iterator at(options_.source, problem), end; !problem && at != end;
         at.increment(problem))
      if (at->is_regular_file(problem) && is_copied_file(at->path()))
        copied.push_back(at->path());
    if (problem)
      return cannot(options_.source, "read", problem.message());
    std::sort(copied.begin(), copied.end());
    for (const auto& file : copied) {
      auto text = read_text_file(file, kMaxSmallFile);
      if (!text)
        return tl::unexpected(std::move(text.error()));
      if (auto ok = write_small(file.filename().string(), *text); !ok)
        return ok;
    }
    auto config = config_text();
    if (!config)
      return tl::unexpected(std::move(config.error()));
    if (auto ok = write_small("config.json", *config); !ok)
      return ok;
    manifest().is_complete = true;
    return save_manifest();
  }

  expected<void> write_small(const std::string& name, const std::string& text) {
    auto seal = write_whole_file(options_.target / name, text);
    if (!seal)
      return tl::unexpected(std::move(seal.error()));
    manifest().files.emplace_back(name, std::move(*seal));
    return {};
  }

  std::string index_text() {
    std::map<std::string, std::string> files;
    for (const auto& shard : plan().shards)
      for (const auto& output : shard.outputs())
        files.emplace(output.name, shard.file);
    nlohmann::ordered_json index;
    index["metadata"] = {{"total_size", plan().num_bytes}};
    index["weight_map"] = files;
    return index.dump(2) + "\n";
  }

  /// The source's config.json with another quantization_config.
  expected<std::string> config_text() {
    const auto file = options_.source / "config.json";
    auto text = read_text_file(file, kMaxSmallFile);
    if (!text)
      return text;
    auto config = nlohmann::ordered_json::parse(*text, nullptr, false);
    if (!config.is_object())
      return fail(error_code::invalid_model,
                  fmt::format("{} changed while the model was converted", file.string()),
                  "give the same command again");
    config["quantization_config"] = nlohmann::ordered_json::parse(quantization_config_of(plan()));
    return config.dump(2) + "\n";
  }

  const conversion_options& options_;
  const conversion_watcher& watch_;
  conversion_result result_;
  model_config config_;
  unique_fd lock_; ///< of the target, while it is open
  std::map<std::string, finished_shard> finished_;
};

} // namespace

expected<conversion_result> convert(const conversion_options& options,
                                    const conversion_watcher& watch) {
  return conversion(options, watch).run();
}

std::string kind_of(const std::string& tensor) {
  std::string result;
  bool after_list = false;
  std::size_t begin = 0;
  const auto name = tensor.substr(0, tensor.rfind('.'));
  while (begin <= name.size()) {
    const auto end = std::min(name.find('.', begin), name.size());
    const auto part = name.substr(begin, end - begin);
    const bool is_number = !part.empty() && part.find_first_not_of("0123456789") == part.npos;
    if (is_number)
      result += after_list ? "*." : "";
    else if (part != "model" && part != "layers")
      result += part + ".";
    after_list = part == "experts";
    begin = end + 1;
  }
  result.resize(result.empty() ? 0 : result.size() - 1);
  return result;
}

} // namespace troupe::model
