#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include <caf/deserializer.hpp>
#include <caf/error.hpp>
#include <caf/meta/type_name.hpp>
#include <caf/sec.hpp>
#include <caf/serializer.hpp>

namespace troupe::messages {

/// Carries a Protobuf message through CAF: as itself between actors of one process, as its
/// wire format between processes. Bytes that do not parse fail the whole CAF message.
template <class Message>
struct wire {
  Message body;

  wire() = default;
  explicit wire(Message message) : body(std::move(message)) {}

  Message* operator->() { return &body; }
  const Message* operator->() const { return &body; }
};

template <class Inspector, class Message>
typename Inspector::result_type inspect(Inspector& f, wire<Message>& x) {
  if constexpr (std::is_convertible_v<Inspector*, caf::deserializer*>) {
    std::string bytes;
    if (auto problem = f(bytes))
      return problem;
    if (!x.body.ParseFromString(bytes))
      return caf::make_error(caf::sec::invalid_argument, "malformed protobuf message");
    return f();
  } else if constexpr (std::is_convertible_v<Inspector*, caf::serializer*>) {
    auto bytes = x.body.SerializeAsString();
    return f(bytes);
  } else {
    auto text = x.body.ShortDebugString();
    return f(caf::meta::type_name("wire"), text);
  }
}

} // namespace troupe::messages
