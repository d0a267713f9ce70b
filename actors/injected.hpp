#pragma once

#include "troupe/base/fault_point.hpp"
#include "troupe/kernels/ops.hpp"

#include <chrono>
#include <optional>
#include <string_view>
#include <utility>

#include <caf/all.hpp>

namespace troupe::actors {

/// Carries out what a drill wants to happen when `actor` begins to compute with `ops`.
inline void suffer_computing(kernels::ops& ops, std::string_view actor) {
  auto fault = faults::hit(faults::point::compute, actor);
  if (!fault) [[likely]]
    return;
  switch (fault->what) {
  case faults::kind::device_error: return ops.break_down(kernels::breakdown::illegal_access);
  case faults::kind::device_misaligned:
    return ops.break_down(kernels::breakdown::misaligned_access);
  case faults::kind::device_trap: return ops.break_down(kernels::breakdown::trap);
  case faults::kind::device_assert: return ops.break_down(kernels::breakdown::assertion);
  default: faults::carry_out(*fault);
  }
}

/// What a drill does to the control messages that an actor takes: drop, delay, duplicate,
/// reorder. One member of the actor for each point; belongs to the actor's thread.
///
///     if (faults_.take(*this, faults::point::message_receive, peer, message))
///       return; // dropped, or delivered later
///
/// A message that is delivered later or once more goes to the same actor from the same sender with
/// high priority, which is how it is told from a message that has not passed yet.
class injected_faults {
public:
  /// True when the current message is not to be handled now. `peer` is the process that it came
  /// from.
  template <class Message>
  bool take(caf::local_actor& self, faults::point where, std::string_view peer,
            const Message& message) {
    if (faults::is_cut_off(peer))
      return true;
    auto* element = self.current_mailbox_element();
    bool has_passed = element != nullptr && element->is_high_priority();
    if (held_ && !has_passed) {
      deliver(self, std::exchange(held_, std::nullopt), {});
    }
    auto hit = has_passed ? std::nullopt : faults::hit(where, peer);
    if (!hit)
      return false;
    held_message copy{self.current_sender(), caf::make_message(message)};
    switch (hit->what) {
    case faults::kind::drop: return true;
    case faults::kind::delay:
      deliver(self, std::move(copy), std::chrono::milliseconds(hit->delay_ms));
      return true;
    case faults::kind::duplicate: deliver(self, std::move(copy), {}); return false;
    case faults::kind::reorder: held_ = std::move(copy); return true;
    default: return false;
    }
  }

private:
  struct held_message {
    caf::strong_actor_ptr sender;
    caf::message content;
  };

  static void deliver(caf::local_actor& self, std::optional<held_message> held,
                      std::chrono::milliseconds delay) {
    auto element = caf::make_mailbox_element(std::move(held->sender),
                                             caf::make_message_id(caf::message_priority::high), {},
                                             std::move(held->content));
    auto to = caf::actor_cast<caf::strong_actor_ptr>(&self);
    if (delay.count() == 0)
      to->enqueue(std::move(element), nullptr);
    else
      self.clock().schedule_message(self.clock().now() + delay, std::move(to), std::move(element));
  }

  std::optional<held_message> held_; ///< until the next one has passed
};

} // namespace troupe::actors
