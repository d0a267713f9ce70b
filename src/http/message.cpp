#include "troupe/http/message.hpp"

#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace troupe::http {

namespace {

char lower(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c;
}

bool same_name(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](char x, char y) { return lower(x) == lower(y); });
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9')
    return c - '0';
  c = lower(c);
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

} // namespace

std::optional<std::string_view> find_header(const header_list& headers, std::string_view name) {
  for (const auto& field : headers)
    if (same_name(field.name, name))
      return std::string_view{field.value};
  return std::nullopt;
}

std::optional<std::string_view> request::header(std::string_view name) const {
  return find_header(headers, name);
}

std::optional<std::string> request::query_value(std::string_view name) const {
  std::string_view rest = query;
  while (!rest.empty()) {
    const auto pair = rest.substr(0, rest.find('&'));
    rest.remove_prefix(std::min(rest.size(), pair.size() + 1));
    const auto equals = pair.find('=');
    if (percent_decode(pair.substr(0, equals), true) == name)
      return equals == pair.npos ? std::string{} : percent_decode(pair.substr(equals + 1), true);
  }
  return std::nullopt;
}

std::string percent_decode(std::string_view text, bool plus_is_space) {
  std::string result;
  result.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size()) {
      const int high = hex_digit(text[i + 1]);
      const int low = hex_digit(text[i + 2]);
      if (high >= 0 && low >= 0) {
        result.push_back(static_cast<char>(high * 16 + low));
        i += 2;
        continue;
      }
    }
    result.push_back(plus_is_space && text[i] == '+' ? ' ' : text[i]);
  }
  return result;
}

std::string error_json(std::string_view message, std::string_view type, std::string_view code) {
  nlohmann::ordered_json error;
  error["message"] = message;
  error["type"] = type;
  error["param"] = nullptr;
  error["code"] = nullptr;
  if (!code.empty())
    error["code"] = code;
  return nlohmann::ordered_json{{"error", std::move(error)}}.dump(
    -1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::string host_port(std::string_view host, unsigned port) {
  if (host.find(':') != host.npos)
    return fmt::format("[{}]:{}", host, port);
  return fmt::format("{}:{}", host, port);
}

} // namespace troupe::http
