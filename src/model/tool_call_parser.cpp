#include "troupe/model/tool_call_parser.hpp"

#include <algorithm>
#include <array>

namespace troupe::model {

namespace {

using mark = json_scanner::mark;

constexpr std::string_view list_begin = "<｜tool▁calls▁begin｜>";
constexpr std::string_view list_end = "<｜tool▁calls▁end｜>";
constexpr std::string_view call_begin = "<｜tool▁call▁begin｜>";
constexpr std::string_view call_end = "<｜tool▁call▁end｜>";
constexpr std::string_view separator = "<｜tool▁sep｜>";
constexpr std::string_view fence_begin = "```json";
constexpr std::string_view fence_end = "```";
constexpr std::string_view hermes_begin = "<tool_call>";
constexpr std::string_view hermes_end = "</tool_call>";
constexpr std::string_view llama_begin = "<|python_tag|>"; // may be left out
constexpr std::size_t max_name_bytes = 256;

constexpr std::array deepseek_markers{list_begin, list_end, call_begin, call_end, separator};
constexpr std::array hermes_markers{hermes_begin, hermes_end};

bool is_space(char c) {
  return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && is_space(text.front()))
    text.remove_prefix(1);
  while (!text.empty() && is_space(text.back()))
    text.remove_suffix(1);
  return text;
}

bool names_arguments(std::string_view key) {
  return key == "arguments" || key == "parameters";
}

} // namespace

std::span<const std::string_view> tool_markers(tool_syntax syntax) {
  switch (syntax) {
  case tool_syntax::deepseek: return deepseek_markers;
  case tool_syntax::hermes: return hermes_markers;
  case tool_syntax::llama:
  case tool_syntax::none: break;
  }
  return {};
}

tool_call_parser::tool_call_parser(tool_syntax syntax, std::span<const std::string> names,
                                   std::uint32_t max_calls)
  : syntax_(syntax), names_(names), max_calls_(max_calls) {}

const tool_text& tool_call_parser::push(std::string_view text) {
  out_.content.clear();
  out_.calls.clear();
  if (syntax_ == tool_syntax::none) {
    out_.content = text;
    return out_;
  }
  input_.assign(text);
  taken_ = 0;
  drain();
  return out_;
}

const tool_text& tool_call_parser::finish() {
  out_.content.clear();
  out_.calls.clear();
  input_.clear();
  taken_ = 0;
  while (is_held()) {
    give_up();
    drain();
  }
  if (state_ == state::broken)
    add_arguments(held_);
  else if (state_ == state::text && !after_call_)
    out_.content += spaces_;
  held_.clear();
  spaces_.clear();
  return out_;
}

void tool_call_parser::drain() {
  while (taken_ < input_.size() && !ended())
    take(input_[taken_++]);
}

void tool_call_parser::take(char byte) {
  switch (state_) {
  case state::text: return take_text(byte);
  case state::opener: return take_opener(byte);
  case state::list: return take_list(byte);
  case state::header: return take_header(byte);
  case state::separated: return take_separated(byte);
  case state::name_line: return take_name_line(byte);
  case state::fence: return take_fence(byte);
  case state::object: return take_object(byte);
  case state::members: return take_member(byte);
  case state::arguments: return take_arguments(byte);
  case state::rest: return take_rest(byte);
  case state::tail: return take_tail(byte);
  case state::broken: return take_broken(byte);
  }
}

void tool_call_parser::take_text(char byte) {
  const bool is_llama = syntax_ == tool_syntax::llama;
  const bool may_open = !is_llama || at_start_ || after_call_;
  if (is_space(byte) || (is_llama && after_call_ && byte == ';')) {
    spaces_ += byte;
  } else if (may_open && byte == '<') {
    held_ = byte;
    part_ = 0;
    state_ = state::opener;
  } else if (may_open && is_llama && byte == '{') {
    held_.clear();
    take_object(byte);
  } else {
    add_text({&byte, 1});
  }
}

void tool_call_parser::take_opener(char byte) {
  held_ += byte;
  bool partly = false;
  const auto found = [&](std::string_view word) {
    const match m = match_part(word);
    partly = partly || m == match::partly;
    return m == match::whole;
  };
  switch (syntax_) {
  case tool_syntax::deepseek:
    if (found(list_begin)) {
      state_ = state::list;
    } else if (found(call_begin)) {
      state_ = state::header;
    } else if (after_call_ && found(list_end)) {
      held_.clear();
      spaces_.clear();
      state_ = state::text;
    }
    break;
  case tool_syntax::hermes:
    if (found(hermes_begin))
      state_ = state::object;
    break;
  default:
    if (found(llama_begin))
      state_ = state::object;
  }
  if (state_ != state::opener)
    part_ = held_.size();
  else if (!partly)
    give_up();
}

void tool_call_parser::take_list(char byte) {
  held_ += byte;
  if (is_space(byte) && part().size() == 1) {
    part_ = held_.size();
    return;
  }
  const match m = match_part(call_begin);
  if (m == match::no)
    return give_up();
  if (m == match::whole) {
    part_ = held_.size();
    state_ = state::header;
  }
}

void tool_call_parser::take_header(char byte) {
  held_ += byte;
  const auto mark_at = part().find('<');
  if (mark_at == std::string_view::npos) {
    if (byte == '\n' || part().size() > max_name_bytes)
      give_up();
    return;
  }
  const auto found = part().substr(mark_at);
  if (found == separator) {
    name_ = trimmed(part().substr(0, mark_at));
    state_ = state::separated;
  } else if (!separator.starts_with(found)) {
    give_up();
  }
}

void tool_call_parser::take_separated(char byte) {
  fenced_ = false;
  if (byte == '{' && is_tool(name_))
    return begin_call({});
  part_ = held_.size();
  held_ += byte;
  if (byte == '{')
    give_up();
  else if (!is_space(byte))
    state_ = state::name_line;
}

void tool_call_parser::take_name_line(char byte) {
  held_ += byte;
  if (byte != '\n') {
    if (part().size() > max_name_bytes)
      give_up();
    return;
  }
  name_ = trimmed(part());
  part_ = held_.size();
  state_ = state::fence;
  if (!is_tool(name_))
    give_up();
}

void tool_call_parser::take_fence(char byte) {
  const auto word = part();
  const bool is_fence = word == fence_begin || word == fence_end;
  if (byte == '{' && (word.empty() || is_fence)) {
    fenced_ = fenced_ || is_fence;
    return begin_call({});
  }
  held_ += byte;
  if (is_space(byte) && (is_fence || part().size() == 1)) {
    fenced_ = fenced_ || is_fence;
    part_ = held_.size();
  } else if (fenced_ || !fence_begin.starts_with(part())) {
    give_up();
  }
}

void tool_call_parser::take_object(char byte) {
  held_ += byte;
  if (byte == '{') {
    scanner_ = json_scanner();
    scanner_.push(byte);
    name_.clear();
    key_.clear();
    arguments_.clear();
    awaits_value_ = false;
    state_ = state::members;
  } else if (!is_space(byte)) {
    give_up();
  }
}

void tool_call_parser::take_member(char byte) {
  held_ += byte;
  const mark m = scanner_.push(byte);
  const bool outside = scanner_.depth() == 1;
  const bool is_name = key_ == "name";
  if (m == mark::invalid || m == mark::complete) {
    give_up();
  } else if (m == mark::key_begin && outside) {
    part_ = held_.size();
  } else if (m == mark::key_end && outside) {
    key_ = part().substr(0, part().size() - 1);
    awaits_value_ = true;
    const bool known = key_ == "name"          ? name_.empty()
                       : names_arguments(key_) ? arguments_.empty()
                                               : key_ == "type" || key_ == "id";
    if (!known)
      give_up();
  } else if (m == mark::value_begin && awaits_value_) {
    awaits_value_ = false;
    part_ = held_.size() - 1;
    if ((is_name && byte != '"') || (names_arguments(key_) && byte != '{'))
      give_up();
    else if (names_arguments(key_) && !name_.empty())
      begin_call("{");
  } else if (m == mark::value_end && outside) {
    if (names_arguments(key_)) {
      arguments_ = part();
    } else if (is_name) {
      name_ = part().substr(1, part().size() - 2);
      if (!is_tool(name_))
        give_up();
      else if (!arguments_.empty())
        begin_call(arguments_);
    }
  }
}

void tool_call_parser::take_arguments(char byte) {
  const mark m = scanner_.push(byte);
  if (m == mark::invalid) {
    state_ = state::broken;
    return take_broken(byte);
  }
  add_arguments({&byte, 1});
  if (m == mark::complete)
    state_ = state::tail;
  else if (syntax_ != tool_syntax::deepseek && m == mark::value_end && scanner_.depth() == 1)
    state_ = state::rest;
}

void tool_call_parser::take_rest(char byte) {
  held_ += byte;
  const mark m = scanner_.push(byte);
  if (m == mark::invalid)
    return complete_early();
  if (m != mark::complete)
    return;
  held_.clear();
  part_ = 0;
  if (syntax_ == tool_syntax::llama)
    complete_call();
  else
    state_ = state::tail;
}

void tool_call_parser::take_tail(char byte) {
  held_ += byte;
  if (is_space(byte) && part().size() == 1) {
    part_ = held_.size();
    return;
  }
  if (fenced_ && fence_end.starts_with(part())) {
    if (part() == fence_end) {
      fenced_ = false;
      part_ = held_.size();
    }
    return;
  }
  const match m = match_part(syntax_ == tool_syntax::deepseek ? call_end : hermes_end);
  if (m == match::no)
    complete_early();
  else if (m == match::whole)
    complete_call();
}

void tool_call_parser::take_broken(char byte) {
  if (syntax_ == tool_syntax::llama)
    return add_arguments({&byte, 1});
  held_ += byte;
  const bool in_marker = part().size() > 1 || byte == '<';
  if (in_marker) {
    const match m = match_part(syntax_ == tool_syntax::deepseek ? call_end : hermes_end);
    if (m == match::whole)
      return complete_call();
    if (m == match::partly)
      return;
    held_.pop_back();
    add_arguments(held_);
    held_.clear();
    part_ = 0;
    return take_broken(byte);
  }
  // What may stand between the arguments and the end of the call is not part of them.
  if (!is_space(byte) && !(fenced_ && byte == '`')) {
    add_arguments(held_);
    held_.clear();
  }
  part_ = held_.size();
}

tool_call_parser::match tool_call_parser::match_part(std::string_view word) const {
  if (!word.starts_with(part()))
    return match::no;
  return part().size() == word.size() ? match::whole : match::partly;
}

bool tool_call_parser::is_tool(std::string_view name) const {
  return std::find(names_.begin(), names_.end(), name) != names_.end();
}

bool tool_call_parser::is_held() const {
  switch (state_) {
  case state::text:
  case state::arguments:
  case state::rest:
  case state::tail:
  case state::broken: return false;
  default: return true;
  }
}

void tool_call_parser::begin_call(std::string_view arguments) {
  out_.calls.push_back({num_calls_++, name_, std::string(arguments)});
  held_.clear();
  spaces_.clear();
  part_ = 0;
  state_ = arguments.size() > 1 ? state::rest : state::arguments;
  if (arguments.empty()) {
    scanner_ = json_scanner();
    take_arguments('{');
  }
}

void tool_call_parser::add_arguments(std::string_view text) {
  if (text.empty())
    return;
  const std::uint32_t index = num_calls_ - 1;
  if (out_.calls.empty() || out_.calls.back().index != index)
    out_.calls.push_back({index, {}, {}});
  out_.calls.back().arguments += text;
}

void tool_call_parser::complete_call() {
  held_.clear();
  ++num_complete_;
  at_start_ = false;
  after_call_ = true;
  state_ = state::text;
}

void tool_call_parser::complete_early() {
  input_.replace(0, taken_, held_);
  taken_ = 0;
  complete_call();
}

void tool_call_parser::add_text(std::string_view text) {
  out_.content += spaces_;
  out_.content += text;
  spaces_.clear();
  at_start_ = false;
  after_call_ = false;
}

void tool_call_parser::give_up() {
  input_.replace(0, taken_, held_, 1);
  taken_ = 0;
  state_ = state::text;
  add_text({held_.data(), 1});
  held_.clear();
}

} // namespace troupe::model
