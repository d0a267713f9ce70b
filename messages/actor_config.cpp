#include "troupe/messages/actor_config.hpp"

#include "troupe/messages/serving_protocol.hpp"

#include <chrono>

#include <caf/all.hpp>
#include <caf/io/all.hpp>

namespace troupe::messages {

actor_config::actor_config(std::uint32_t num_threads, std::uint32_t heartbeat_ms,
                           std::uint32_t timeout_ms) {
  add_types();
  load<caf::io::middleman>();
  // The default policy lets idle threads sleep 10 ms between polls; "sharing" wakes them.
  set("scheduler.policy", caf::atom("sharing"));
  set("scheduler.max-threads", std::size_t{num_threads});
  // Deserialise in the network thread: one wake-up less a message.
  set("middleman.workers", std::size_t{0});
  // Both are off by default, and then a stopped peer is never noticed.
  set("middleman.heartbeat-interval", caf::timespan(std::chrono::milliseconds(heartbeat_ms)));
  set("middleman.connection-timeout", caf::timespan(std::chrono::milliseconds(timeout_ms)));
}

actor_config::actor_config(deterministic_tag) {
  add_types();
  set("scheduler.policy", caf::atom("testing"));
}

void actor_config::add_types() {
  add_message_type<node_hello>("node_hello");
  add_message_type<node_assignment>("node_assignment");
  add_message_type<worker_changed>("worker_changed");
  add_message_type<worker_hello>("worker_hello");
  add_message_type<worker_assignment>("worker_assignment");
  add_message_type<worker_report>("worker_report");
  add_message_type<frontend_hello>("frontend_hello");
  add_message_type<cluster_view>("cluster_view");
  add_message_type<cluster_plan>("cluster_plan");
  add_message_type<cluster_status>("cluster_status");
  add_message_type<replay_report>("replay_report");
  add_message_type<node_heartbeat>("node_heartbeat");
  add_message_type<frontend_heartbeat>("frontend_heartbeat");
  add_message_type<run_micro_batch>("run_micro_batch");
  add_message_type<micro_batch_done>("micro_batch_done");
  add_message_type<micro_batch_failed>("micro_batch_failed");
  add_message_type<stage_actor>("stage_actor");
}

} // namespace troupe::messages
