#include "troupe/recovery/request_journal.hpp"

#include <spdlog/spdlog.h>

namespace troupe::recovery {

request_journal::request_journal(options o, std::int64_t now_ms)
  : options_(std::move(o)), log_(options_.limits) {
  if (options_.file.empty())
    return;
  if (options_.fresh) {
    std::error_code ignored;
    std::filesystem::remove(options_.file, ignored);
  }
  std::vector<std::string> records;
  auto file = journal::open(options_.file, records);
  if (!file) {
    take_failure(file.error(), now_ms);
    return;
  }
  file_ = std::move(*file);
  for (const auto& record : records) {
    if (log_.apply(record))
      continue;
    spdlog::error("{} holds a record that is none; what follows it is lost",
                  options_.file.string());
    behind_ = true;
    break;
  }
  log_.expire(now_ms);
}

void request_journal::flush(std::int64_t now_ms) {
  if (pending_.empty())
    return;
  if (file_ && !behind_)
    if (auto written = file_->append(pending_); !written)
      take_failure(written.error(), now_ms);
  pending_.clear();
}

void request_journal::take_failure(const error& why, std::int64_t now_ms) {
  ++num_errors_;
  if (!behind_)
    spdlog::error("requests go on without a journal until it can be written: {}", why.text());
  behind_ = true;
  retry_at_ = now_ms + options_.retry_ms;
}

void request_journal::tick(std::int64_t now_ms) {
  log_.expire(now_ms);
  if (options_.file.empty())
    return;
  const bool mostly_over =
    file_ && file_->size() > options_.compact_bytes && file_->size() / 2 > log_.bytes();
  if ((behind_ || mostly_over) && now_ms >= retry_at_)
    write_anew(now_ms);
}

void request_journal::write_anew(std::int64_t now_ms) {
  std::vector<std::string> records;
  if (!file_) {
    auto file = journal::open(options_.file, records);
    if (!file)
      return take_failure(file.error(), now_ms);
    file_ = std::move(*file);
  }
  log_.write_snapshot(records);
  if (auto written = file_->rewrite(records); !written) {
    if (behind_)
      return take_failure(written.error(), now_ms);
    ++num_errors_; // it can still be appended to
    retry_at_ = now_ms + options_.retry_ms;
    return;
  }
  pending_.clear(); // it is part of the snapshot
  if (behind_)
    spdlog::info("{} is complete again", options_.file.string());
  behind_ = false;
}

} // namespace troupe::recovery
