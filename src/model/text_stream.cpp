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
    undecided_(options.split_reasoning && !options.reasoning_open),
    min_tokens_(options.min_tokens) {
  for (std::string& stop : options.stop)
    if (!stop.empty())
      stops_.emplace_back(std::move(stop));
  const auto show = [&](std::string_view text) {
    if (const auto id = t.added_token(text))
      shown_ids_.push_back(*id);
  };
  if (options.split_reasoning) {
    show(open_tag);
    show(close_tag);
  }
  for (const std::string& text : options.shown)
    show(text);
  tag_.reserve(close_tag.size());
}

const text_delta& text_stream::push(std::int32_t token) {
  delta_.reasoning.clear();
  delta_.content.clear();
  if (delta_.stopped || finished_)
    return delta_;
  ++num_tokens_;
  if (skip_special_ && tokenizer_->is_special(token)
      && std::find(shown_ids_.begin(), shown_ids_.end(), token) == shown_ids_.end())
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
  if (undecided_)
    return decide(byte);
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

/// White space may stand before the tag and goes with it.
void text_stream::decide(char byte) {
  const std::size_t begun = tag_.find('<');
  if (begun == std::string::npos && (byte == ' ' || byte == '\t' || byte == '\r' || byte == '\n')) {
    tag_ += byte;
    return;
  }
  tag_ += byte;
  const auto tag = std::string_view(tag_).substr(std::min(begun, tag_.size() - 1));
  if (tag == open_tag) {
    tag_.clear();
    undecided_ = may_open_ = false;
  } else if (!open_tag.starts_with(tag)) {
    flush_tag();
  }
}

void text_stream::flush_tag() {
  if (undecided_) { // no reasoning at all
    undecided_ = in_reasoning_ = false;
    delta_.content += tag_;
    tag_.clear();
    return;
  }
  delta_.reasoning += tag_;
  tag_.clear();
}

reasoning_start reasoning_after(std::string_view prompt) {
  const auto text = prompt.substr(0, prompt.find_last_not_of(" \t\r\n") + 1);
  if (text.ends_with(open_tag))
    return reasoning_start::open;
  return text.ends_with(close_tag) ? reasoning_start::closed : reasoning_start::unsaid;
}

} // namespace troupe::model
