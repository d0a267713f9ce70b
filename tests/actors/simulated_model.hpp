#pragma once

#include "troupe/actors/stage.hpp"

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

/// A "model" whose next token depends on every token so far and on what every stage keeps: each
/// stage folds the hidden values into a running hash that lies in its KV pages, by page
/// and position, as real keys do. Whatever is lost, stale, mixed up or computed twice differently
/// shows as a wrong token.
namespace troupe::test {

inline constexpr std::int32_t vocabulary = 1000;
inline constexpr std::uint32_t page_tokens = 4;

inline std::uint64_t mix(std::uint64_t h, std::uint64_t x) {
  h = (h ^ x) * 0x9E3779B97F4A7C15U;
  return (h ^ (h >> 29U)) | 1U; // zero stands for what was never written
}

/// KV pages of one stage.
struct simulated_kv {
  explicit simulated_kv(std::uint32_t num_pages) : at(num_pages * page_tokens) {}
  std::vector<std::uint64_t> at; ///< [page][offset]; 0: never written
};

/// What a step has written.
struct simulated_writes {
  std::shared_ptr<simulated_kv> kv;
  std::vector<std::pair<std::size_t, std::uint64_t>> values; ///< by place

  void write() const {
    for (const auto& [at, value] : values)
      kv->at.at(at) = value;
  }
};

/// What a run without any fault would draw.
inline std::vector<std::int32_t> right_tokens(const std::vector<std::int32_t>& prompt,
                                              std::size_t count, std::uint32_t num_stages) {
  std::vector<std::uint64_t> state(num_stages, 1);
  std::uint64_t out = 0;
  auto feed = [&](std::int32_t token) {
    out = static_cast<std::uint64_t>(token);
    for (auto& s : state)
      out = s = mix(s, out);
  };
  for (auto t : prompt)
    feed(t);
  std::vector<std::int32_t> result;
  while (result.size() < count) {
    result.push_back(static_cast<std::int32_t>(out % vocabulary));
    feed(result.back());
  }
  return result;
}

/// Computes a stage's part. `wrong` is set where a position is read that nobody wrote.
inline actors::stage_result compute(const actors::stage_work& work, bool is_first, bool is_last,
                                    simulated_kv& kv, transport::buffer_pool& buffers,
                                    std::optional<std::string>& wrong,
                                    std::vector<std::pair<std::size_t, std::uint64_t>>& written) {
  const auto& batch = *work.batch;
  std::vector<std::uint64_t> hidden(batch.tokens().begin(), batch.tokens().end());
  auto bytes = hidden.size() * sizeof(std::uint64_t);
  if (!is_first) {
    if (work.input == nullptr || work.input->payload.size() != bytes) {
      wrong = fmt::format("step {} has no input of its size", batch.step());
      return {};
    }
    std::memcpy(hidden.data(), work.input->payload.data(), bytes);
  }
  std::size_t row = 0;
  int first_page = 0;
  for (int s = 0; s < batch.first_positions_size(); ++s) {
    auto slot = [&](std::uint32_t position) -> std::uint64_t& {
      auto page = batch.pages(first_page + static_cast<int>(position / page_tokens));
      return kv.at.at(static_cast<std::size_t>(page) * page_tokens + position % page_tokens);
    };
    for (std::uint32_t i = 0; i < batch.row_counts(s); ++i, ++row) {
      auto position = batch.first_positions(s) + i;
      auto before = position == 0 ? 1 : slot(position - 1);
      if (before == 0)
        wrong =
          fmt::format("step {} reads position {}, which nobody wrote", batch.step(), position - 1);
      hidden[row] = slot(position) = mix(before, hidden[row]);
      written.emplace_back(&slot(position) - kv.at.data(), hidden[row]);
    }
    first_page += static_cast<int>(batch.page_counts(s));
  }
  actors::stage_result result;
  result.step = batch.step();
  if (is_last) {
    result.done = std::make_shared<proto::MicroBatchDone>();
    result.done->set_replica(batch.replica());
    result.done->set_step(batch.step());
    for (const auto& o : batch.outputs()) {
      result.done->add_tokens(static_cast<std::int32_t>(hidden.at(o.row()) % vocabulary));
      result.done->add_logprobs(0);
      result.done->add_top_counts(0);
    }
  } else {
    result.output = std::make_shared<transport::buffer>(std::move(*buffers.take(bytes)));
    std::memcpy(result.output->data(), hidden.data(), bytes);
  }
  return result;
}

} // namespace troupe::test
