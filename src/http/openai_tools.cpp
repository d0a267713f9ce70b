#include "troupe/http/openai_tools.hpp"

#include "troupe/model/chat_template.hpp"

#include <fmt/format.h>

namespace troupe::http {

namespace {

/// The object at `name` of `object`, or null and a refusal.
const json* find_object(field_reader& fields, const json& object, const char* name,
                        const std::string& where) {
  const auto found = object.find(name);
  if (found != object.end() && found->is_object())
    return &*found;
  fields.refuse_field(fmt::format("{}.{}", where, name), found == object.end()
                                                           ? "missing, an object is expected"
                                                           : show(*found) + " is not an object");
  return nullptr;
}

/// {"type": "function", "function": {...}}: the function, or null and a refusal.
const json* find_function(field_reader& fields, const json& entry, const std::string& where) {
  if (!entry.is_object()) {
    fields.refuse_field(where, show(entry) + " is not an object with type and function");
    return nullptr;
  }
  const auto type = entry.find("type");
  if (type != entry.end() && *type != "function") {
    fields.refuse_field(where + ".type", show(*type) + " is not supported (allowed: \"function\")");
    return nullptr;
  }
  return find_object(fields, entry, "function", where);
}

/// The name of a function, not empty; or a refusal.
std::string read_name(field_reader& fields, const json& function, const std::string& where) {
  const auto name = function.find("name");
  if (name != function.end() && name->is_string() && !name->get_ref<const std::string&>().empty())
    return name->get<std::string>();
  fields.refuse_field(where + ".function.name", name == function.end()
                                                  ? "missing, a string is expected"
                                                  : show(*name) + " is not the name of a function");
  return {};
}

/// Whether tools are to be shown; notes a choice that cannot be kept.
bool read_choice(field_reader& fields) {
  const json* choice = fields.find("tool_choice");
  if (!choice || *choice == "auto")
    return true;
  if (*choice == "none")
    return false;
  if (*choice == "required" || choice->is_object())
    fields.refuse_field("tool_choice",
                        show(*choice)
                          + " cannot be promised, since answers are not constrained (use \"auto\" "
                            "and say in a message that the tool is to be called)");
  else
    fields.refuse_field("tool_choice", show(*choice) + " is unknown (allowed: none, auto)");
  return false;
}

} // namespace

tool_request read_tools(field_reader& fields, const serving_model& served) {
  tool_request wanted;
  const bool shown = read_choice(fields);
  wanted.parallel = fields.boolean("parallel_tool_calls", true);
  const json* tools = fields.find("tools");
  if (!tools)
    return wanted;
  if (!tools->is_array()) {
    fields.refuse_field("tools", show(*tools) + " is not a list of functions");
    return wanted;
  }
  for (std::size_t i = 0; i < tools->size() && !fields.failed(); ++i) {
    const std::string where = fmt::format("tools[{}]", i);
    const json* function = find_function(fields, (*tools)[i], where);
    if (!function)
      break;
    wanted.names.push_back(read_name(fields, *function, where));
    for (const char* name : {"parameters", "description"}) {
      const auto value = function->find(name);
      const bool is_object = std::string_view(name) == "parameters";
      if (value != function->end() && !value->is_null()
          && !(is_object ? value->is_object() : value->is_string()))
        fields.refuse_field(
          fmt::format("{}.function.{}", where, name),
          fmt::format("{} is not {}", show(*value), is_object ? "an object" : "a string"));
    }
  }
  if (!shown || tools->empty()) {
    wanted.names.clear();
    return wanted;
  }
  if (served.chat && !served.chat->takes_tools())
    fields.refuse_field("tools", "the model's chat template shows no tools to the model (leave the "
                                 "field out, or give the model a chat_template.jinja that does)");
  wanted.shown = *tools;
  return wanted;
}

json read_calls(field_reader& fields, const json& calls, const std::string& where) {
  if (!calls.is_array()) {
    fields.refuse_field(where, show(calls) + " is not a list of calls");
    return calls;
  }
  for (std::size_t i = 0; i < calls.size() && !fields.failed(); ++i) {
    const std::string at = fmt::format("{}[{}]", where, i);
    const json* function = find_function(fields, calls[i], at);
    if (!function)
      break;
    read_name(fields, *function, at);
    const auto arguments = function->find("arguments");
    if (arguments == function->end() || !(arguments->is_string() || arguments->is_object()))
      fields.refuse_field(at + ".function.arguments", arguments == function->end()
                                                        ? "missing, a string is expected"
                                                        : show(*arguments) + " is not a string");
  }
  return calls;
}

} // namespace troupe::http
