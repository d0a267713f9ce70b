#pragma once

#include "troupe/model/json_scanner.hpp"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe::model {

/// How a family of models writes calls of tools:
///
/// deepseek (V3, R1, R1-0528; V3.1 without `function` and the fence), in one list or several:
///   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
///   ```json
///   {ARGUMENTS}
///   ```<｜tool▁call▁end｜> ... <｜tool▁calls▁end｜>
/// hermes (Qwen2.5 and others, after Hermes 2 Pro):
///   <tool_call>
///   {"name": "NAME", "arguments": {ARGUMENTS}}
///   </tool_call>
/// llama (3.1 to 3.3), at the start of the answer, several with or without ';' between them:
///   {"name": "NAME", "parameters": {ARGUMENTS}}
enum class tool_syntax : std::uint8_t { none, deepseek, hermes, llama };

/// The tokens that calls are written with. They have to reach the parser also where the tokenizer
/// calls them special.
std::span<const std::string_view> tool_markers(tool_syntax syntax);

/// Something new of a call.
struct tool_call_piece {
  std::uint32_t index = 0; ///< of the call in the answer
  std::string name;        ///< not empty: the call begins here
  std::string arguments;   ///< more of its arguments' text
};

/// What a piece of text added. Text is held back while it may be a call.
struct tool_text {
  std::string content;
  std::vector<tool_call_piece> calls;
};

/// Tells the calls of tools in an answer from its text. However the text is cut into pieces, what
/// they give, put together, is the same.
///
/// A call is one from where it has named a tool that exists and begun an object of arguments;
/// whatever looks like one before that and goes on otherwise is text, to the byte. From there on
/// its arguments come as the model writes them. They may be cut short or be no JSON, as with
/// OpenAI: then they reach up to the end of the call. White space around calls belongs to them.
///
/// Single-threaded; allocates for what it returns and holds back.
class tool_call_parser {
public:
  /// `names` are the tools that exist; they must outlive the parser. `max_calls` 0: any number.
  tool_call_parser(tool_syntax syntax, std::span<const std::string> names,
                   std::uint32_t max_calls = 0);

  /// Takes more of the answer. The result is valid until the next call.
  const tool_text& push(std::string_view text);

  /// The answer is over: releases what was held back.
  const tool_text& finish();

  std::uint32_t num_calls() const { return num_calls_; }
  /// True once `max_calls` are complete: what follows is left out.
  bool ended() const { return max_calls_ != 0 && num_complete_ == max_calls_; }

private:
  enum class state : std::uint8_t {
    text,
    opener,    ///< within what may be a marker
    list,      ///< deepseek: in a list, before a call
    header,    ///< deepseek: up to the separator
    separated, ///< deepseek: behind it, a name's line or arguments
    name_line,
    fence,     ///< deepseek: between name and arguments
    object,    ///< hermes, llama: before the object
    members,   ///< in it, not yet a call
    arguments, ///< of a call, which is one now
    rest,      ///< of the object
    tail,      ///< between the arguments and the end of the call
    broken,    ///< in arguments that are no JSON
  };

  enum class match : std::uint8_t { no, partly, whole };

  void drain();
  void take(char byte);
  void take_text(char byte);
  void take_opener(char byte);
  void take_list(char byte);
  void take_header(char byte);
  void take_separated(char byte);
  void take_name_line(char byte);
  void take_fence(char byte);
  void take_object(char byte);
  void take_member(char byte);
  void take_arguments(char byte);
  void take_rest(char byte);
  void take_tail(char byte);
  void take_broken(char byte);

  std::string_view part() const { return std::string_view(held_).substr(part_); }
  match match_part(std::string_view word) const;
  bool is_tool(std::string_view name) const;
  bool is_held() const; ///< what is held may still become a call
  void begin_call(std::string_view arguments);
  void add_arguments(std::string_view text);
  void complete_call();
  void add_text(std::string_view text);
  /// What is held is no call: its first byte is text, the others are taken again.
  void give_up();
  /// The call has ended before what is held, which is taken again.
  void complete_early();

  tool_syntax syntax_;
  std::span<const std::string> names_;
  std::uint32_t max_calls_;
  std::uint32_t num_calls_ = 0;
  std::uint32_t num_complete_ = 0;
  state state_ = state::text;
  bool at_start_ = true;    ///< nothing but white space has come
  bool after_call_ = false; ///< nothing but white space has come since a call
  bool fenced_ = false;     ///< deepseek: the arguments stand in a fence
  std::string spaces_;      ///< white space before what is held
  std::string held_;        ///< what may be a call
  std::size_t part_ = 0;    ///< where in held_ its last part begins
  std::string name_;
  std::string key_;           ///< of the member being read
  bool awaits_value_ = false; ///< its value is to come
  std::string arguments_;     ///< those that stand before the name; empty: none yet
  json_scanner scanner_;
  std::string input_;     ///< text to be taken
  std::size_t taken_ = 0; ///< of input_
  tool_text out_;
};

} // namespace troupe::model
