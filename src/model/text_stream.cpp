#include "troupe/model/text_stream.hpp"

#include <algorithm>
#include <utility>

namespace troupe::model {

namespace {

constexpr std::string_view open_tag = "<think>";
constexpr std::string_view close_tag = "</think>";

} // namespace

text_stream::matcher::matcher(std::string stop) : text(std::move(stop)), fallback(text.size() + 1) {
  for (std::uint32_t i = 1, length = 0; i < text.size(); ++i) {
    while (length > 0 && text[i] != text[length])
      length = fallback[length];
    if (text[i] == text[length])
      ++length;
    fallback[i + 1] = length;
  }
}

void text_stream::matcher::push(char byte) {
  if (complete())
    matched = fallback[matched];
  while (matched > 0 && text[matched] != byte)
    matched = fallback[matched];
  if (text[matched] == byte)
    ++matched;
}

text_stream::text_stream(const tokenizer& t, text_stream_options options)
  : tokenizer_(&t),
    skip_special_(options.skip_special),
    include_stop_(options.include_stop),
    in_reasoning_(options.split_reasoning),
    may_open_(options.split_reasoning),
    min_tokens_(options.min_tokens) {
  for (std::string& stop : options.stop)
    if (!stop.empty())
      stops_.emplace_back(std::move(stop));
  if (options.split_reasoning) {
    tag_ids_[0] = t.added_token(open_tag).value_or(-1);
    tag_ids_[1] = t.added_token(close_tag).value_or(-1);
  }
  tag_.reserve(close_tag.size());
}

const text_delta& text_stream::push(std::int32_t token) {
  delta_.reasoning.clear();
  delta_.content.clear();
  if (delta_.stopped || finished_)
    return delta_;
  ++num_tokens_;
  const bool is_tag = token == tag_ids_[0] || token == tag_ids_[1];
  if (skip_special_ && tokenizer_->is_special(token) && !is_tag)
    return delta_;
  text_.clear();
  replacer_.push(tokenizer_->token_bytes(token), text_);
  take_text();
  return delta_;
}

const text_delta& text_stream::finish() {
  delta_.reasoning.clear();
  delta_.content.clear();
  if (delta_.stopped || finished_)
    return delta_;
  finished_ = true;
  text_.clear();
  replacer_.finish(text_);
  take_text();
  if (!delta_.stopped) {
    release(held_.size());
    flush_tag();
  }
  return delta_;
}

void text_stream::take_text() {
  if (stops_.empty()) {
    held_ += text_;
    release(held_.size());
    return;
  }
  for (const char byte : text_) {
    held_ += byte;
    const matcher* found = nullptr;
    for (matcher& stop : stops_) {
      stop.push(byte);
      if (stop.complete() && (found == nullptr || stop.text.size() > found->text.size()))
        found = &stop;
    }
    if (found != nullptr && num_tokens_ > min_tokens_) {
      matched_ = found->text;
      release(include_stop_ ? held_.size() : held_.size() - found->text.size());
      flush_tag();
      delta_.stopped = true;
      return;
    }
  }
  // A complete match that does not count can still be the start of a longer one.
  std::size_t kept = 0;
  for (const matcher& stop : stops_)
    kept =
      std::max<std::size_t>(kept, stop.complete() ? stop.fallback[stop.matched] : stop.matched);
  release(held_.size() - kept);
}

void text_stream::release(std::size_t size) {
  if (!in_reasoning_) {
    delta_.content.append(held_, 0, size);
  } else {
    for (std::size_t i = 0; i < size; ++i)
      split(held_[i]);
  }
  held_.erase(0, size);
}

void text_stream::split(char byte) {
  if (!in_reasoning_) {
    delta_.content += byte;
    return;
  }
  tag_ += byte;
  if (tag_ == close_tag) {
    tag_.clear();
    in_reasoning_ = false;
  } else if (may_open_ && tag_ == open_tag) {
    tag_.clear();
    may_open_ = false;
  } else if (!close_tag.starts_with(tag_) && !(may_open_ && open_tag.starts_with(tag_))) {
    // '<' only ever begins a tag, so nothing but this byte can be the start of another one.
    tag_.pop_back();
    flush_tag();
    if (byte == '<')
      tag_ += byte;
    else
      delta_.reasoning += byte;
  }
}

void text_stream::flush_tag() {
  delta_.reasoning += tag_;
  tag_.clear();
}

bool begins_in_reasoning(std::string_view prompt) {
  const std::size_t end = prompt.find_last_not_of(" \t\r\n");
  return end == std::string_view::npos || !prompt.substr(0, end + 1).ends_with(close_tag);
}

} // namespace troupe::model
