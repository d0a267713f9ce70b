#pragma once

#include "troupe/base/error.hpp"
#include "troupe/model/tool_call_parser.hpp"

#include <nlohmann/json.hpp>

#include <optional>
#include <string_view>

namespace troupe::model {

/// What turns with calls have to look like for a template to write them.
struct call_style {
  bool objects = false; ///< arguments as objects, which it prints as JSON; else as their text
  /// What there may be as the content of a turn that is calls alone.
  bool absent = true;
  bool null = true;
  bool empty = true;
};

/// Messages whose turns with calls are as the template wants them; nothing where they are so
/// already. What is no content is left out where that will do, as transformers does since
/// version 5; DeepSeek's templates ask whether it is none. Fails with invalid_request where
/// arguments are to be an object and are none. Pure.
expected<std::optional<nlohmann::ordered_json>>
with_fitting_calls(const nlohmann::ordered_json& messages, const call_style& style);

/// Conversations by which a template shows what it does with tools.
namespace tool_trial {

nlohmann::ordered_json tools();
nlohmann::ordered_json question();
/// A question and a call. `style` names one kind of content.
nlohmann::ordered_json call(const call_style& style);

bool shows_tool(std::string_view rendered);
/// Whether the call's arguments are in the text as JSON.
bool shows_arguments(std::string_view rendered);
tool_syntax syntax_of(std::string_view rendered);

} // namespace tool_trial
} // namespace troupe::model
