#include "troupe/model/shard_file.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace troupe::model {

namespace {

constexpr std::size_t kReadBytes = std::size_t{1} << 20;

/// Linux takes no more than 2 GiB at once.
constexpr std::size_t kMaxWrite = std::size_t{1} << 30;

std::string shown(XXH64_hash_t hash) {
  return fmt::format("{:016x}", hash);
}

} // namespace

struct file_writer::hash_state {
  XXH3_state_t state; // aligned, hence not a member
};

file_writer::file_writer(std::filesystem::path file)
  : file_(std::move(file)),
    temporary_(file_.parent_path() / fmt::format(".{}.partial", file_.filename().string())),
    hash_(std::make_unique<hash_state>()) {
  XXH3_64bits_reset(&hash_->state);
}

file_writer::file_writer(file_writer&&) noexcept = default;

file_writer::~file_writer() {
  if (descriptor_)
    ::unlink(temporary_.c_str());
}

tl::unexpected<error> file_writer::failed(const char* what, int reason) const {
  const bool is_full = reason == ENOSPC || reason == EDQUOT;
  return fail(error_code::io_failed,
              fmt::format("{} cannot be {}: {}", file_.string(), what, std::strerror(reason)),
              is_full
                ? "free some space and give the same command again: it goes on where it stopped"
                : "see to it that the directory can be written and give the same command again");
}

expected<file_writer> file_writer::create(const std::filesystem::path& file) {
  file_writer result(file);
  result.descriptor_ =
    unique_fd(::open(result.temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!result.descriptor_)
    return result.failed("created", errno);
  return result;
}

expected<void> file_writer::write(std::span<const std::byte> bytes) {
  XXH3_64bits_update(&hash_->state, bytes.data(), bytes.size());
  num_bytes_ += bytes.size();
  while (!bytes.empty()) {
    const auto count = ::write(descriptor_.get(), bytes.data(), std::min(bytes.size(), kMaxWrite));
    if (count < 0 && errno == EINTR)
      continue;
    if (count < 0)
      return failed("written", errno);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
  return {};
}

expected<file_seal> file_writer::finish() {
  if (::fsync(descriptor_.get()) != 0)
    return failed("written", errno);
  if (::rename(temporary_.c_str(), file_.c_str()) != 0)
    return failed("renamed", errno);
  descriptor_.reset();
  // Or the name could be lost with the power.
  const unique_fd directory(
    ::open(file_.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory || ::fsync(directory.get()) != 0)
    return failed("renamed", errno);
  return file_seal{num_bytes_, shown(XXH3_64bits_digest(&hash_->state))};
}

expected<file_seal> write_whole_file(const std::filesystem::path& file, std::string_view text) {
  auto writer = file_writer::create(file);
  if (!writer)
    return tl::unexpected(std::move(writer.error()));
  if (auto ok = writer->write(std::as_bytes(std::span(text))); !ok)
    return tl::unexpected(std::move(ok.error()));
  return writer->finish();
}

expected<file_seal> seal_of(const std::filesystem::path& file) {
  const auto failed = [&](int reason) {
    return fail(error_code::io_failed,
                fmt::format("{} cannot be read: {}", file.string(), std::strerror(reason)),
                "see to it that the file can be read and give the same command again");
  };
  const unique_fd descriptor(::open(file.c_str(), O_RDONLY | O_CLOEXEC));
  if (!descriptor)
    return failed(errno);
  const auto state = std::make_unique<XXH3_state_t>();
  XXH3_64bits_reset(state.get());
  std::vector<std::byte> buffer(kReadBytes);
  std::uint64_t num_bytes = 0;
  for (;;) {
    const auto count = ::read(descriptor.get(), buffer.data(), buffer.size());
    if (count < 0 && errno == EINTR)
      continue;
    if (count < 0)
      return failed(errno);
    if (count == 0)
      return file_seal{num_bytes, shown(XXH3_64bits_digest(state.get()))};
    XXH3_64bits_update(state.get(), buffer.data(), static_cast<std::size_t>(count));
    num_bytes += static_cast<std::uint64_t>(count);
  }
}

std::string checksum_of(std::span<const std::byte> bytes) {
  return shown(XXH3_64bits(bytes.data(), bytes.size()));
}

std::string safetensors_header(std::span<const stored_tensor> tensors) {
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  std::uint64_t offset = 0;
  for (const auto& one : tensors) {
    header[one.name] = {{"dtype", one.dtype},
                        {"shape", one.shape},
                        {"data_offsets", {offset, offset + one.num_bytes}}};
    offset += one.num_bytes;
  }
  auto text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::uint64_t size = text.size();
  std::string result;
  for (int i = 0; i < 8; ++i, size >>= 8)
    result.push_back(static_cast<char>(size & 0xffU));
  return result + text;
}

} // namespace troupe::model
