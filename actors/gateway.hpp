#pragma once

#include "troupe/actors/local_messages.hpp"
#include "troupe/actors/scheduler.hpp"
#include "troupe/http/openai_request.hpp"
#include "troupe/http/openai_response.hpp"
#include "troupe/http/server.hpp"
#include "troupe/messages/cluster_protocol.hpp"
#include "troupe/model/tokenizer.hpp"
#include "troupe/telemetry/metrics.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace troupe::actors {

/// An HTTP request on its way to the gateway.
struct http_call {
  http::request request;
  std::shared_ptr<http::response> response;
};
using http_call_ptr = std::shared_ptr<http_call>;

} // namespace troupe::actors

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::actors::http_call_ptr)

namespace troupe::actors {

/// What the gateway serves and how it finds the controller.
struct gateway_options {
  std::uint64_t incarnation = 1;
  std::string endpoint; ///< "http://127.0.0.1:8000"
  std::string controller_host;
  std::uint16_t controller_port = 0;
  http::serving_model served;
  std::shared_ptr<const model::tokenizer> tokenizer;
};

using gateway_actor =
  messages::frontend_actor::extend<caf::reacts_to<start_atom>, caf::reacts_to<http_call_ptr>,
                                   caf::reacts_to<progress_ptr>, caf::reacts_to<replica_report>,
                                   caf::reacts_to<messages::replay_report>,
                                   caf::reacts_to<cancel_atom, std::uint64_t>>;

/// The door for clients: OpenAI's API on one side, schedulers on the other. Root of the frontend
/// process; spawns one scheduler a replica when the controller has sent the plan. Parsing,
/// tokenizing and the shape of answers are src/http's; this class only carries.
class gateway : public gateway_actor::base {
public:
  gateway(caf::actor_config& config, gateway_options options);

  behavior_type make_behavior() override;

private:
  /// One completion being answered.
  struct open_call {
    std::shared_ptr<http::response> response;
    std::string route;
    http::response_builder builder;
    std::uint32_t replica = 0;
    bool stream = false;
    bool begun = false; ///< the stream's head is sent
    schedule::request_id first_id = 0;
    std::uint32_t num_requests = 0;
    schedule::time_point arrived;
    std::vector<schedule::time_point> last_token; ///< by choice
  };

  struct replica {
    scheduler_local scheduler;
    replica_report report;
  };

  void dial_controller();
  void serve(http_call& call);
  void serve_completion(http_call& call, bool chat);
  void serve_status(http_call& call);
  void serve_health(http_call& call);
  void serve_metrics(http_call& call);
  void answer(http_call& call, const char* route, int status, std::string body,
              const char* content_type = "application/json");
  void refuse(http_call& call, const char* route, const http::error_reply& reply);
  void on_progress(const progress& made);
  void on_event(std::uint64_t call_id, open_call& call, const schedule::token_event& event);
  void fail_call(std::uint64_t call_id, open_call& call, const error& why);
  void close_call(std::uint64_t call_id);
  void cancel_requests(const open_call& call);
  bool is_ready() const;
  replica* choose_replica();

  gateway_options options_;
  messages::cluster_supervisor_actor controller_;
  proto::ClusterPlan plan_;
  proto::ClusterView view_;
  proto::ClusterStatus last_status_;
  std::vector<replica> replicas_;
  bool was_ready_ = false;
  std::uint64_t next_call_ = 1;
  schedule::request_id next_request_ = 1;
  std::unordered_map<std::uint64_t, open_call> calls_;
  std::unordered_map<schedule::request_id, std::uint64_t> call_of_;
  telemetry::metrics metrics_;
  std::int64_t started_s_;
  std::uint64_t seed_state_;
  std::string out_; ///< scratch for frames
};

} // namespace troupe::actors
