#pragma once

#include "troupe/actors/local_messages.hpp"
#include "troupe/actors/scheduler.hpp"
#include "troupe/http/openai_request.hpp"
#include "troupe/http/openai_response.hpp"
#include "troupe/http/server.hpp"
#include "troupe/memory/pulse_page.hpp"
#include "troupe/messages/cluster_protocol.hpp"
#include "troupe/model/tokenizer.hpp"
#include "troupe/recovery/request_journal.hpp"
#include "troupe/telemetry/metrics.hpp"

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
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
  std::shared_ptr<memory::pulse> pulse; ///< of this process; null: nobody watches
  http::serving_model served;
  std::shared_ptr<const model::tokenizer> tokenizer;
  recovery::request_journal::options journal;
};

using gateway_actor = messages::frontend_actor::extend<
  caf::reacts_to<start_atom>, caf::reacts_to<knock_atom>, caf::reacts_to<tick_atom>,
  caf::reacts_to<http_call_ptr>, caf::reacts_to<progress_ptr>, caf::reacts_to<replica_report>,
  caf::reacts_to<messages::replay_report>, caf::reacts_to<cancel_atom, std::uint64_t>>;

/// The door for clients: OpenAI's API on one side, schedulers on the other. Root of the frontend
/// process; spawns one scheduler a replica when the controller has sent the plan. Parsing,
/// tokenizing and the shape of answers are src/http's; this class only carries.
///
/// A call is in the journal before it is submitted, and its tokens before a client sees them. So
/// the next frontend goes on with it, and a client that asks again, by its Idempotency-Key or by
/// the answer's id, gets all of it, any number of clients at the same time.
class gateway : public gateway_actor::base {
public:
  gateway(caf::actor_config& config, gateway_options options);

  behavior_type make_behavior() override;

private:
  /// A client that is told a call's answer as it comes; or nobody, so that the text goes on
  /// being made (it may end the call).
  struct listener {
    std::uint64_t id = 0;
    std::shared_ptr<http::response> response; ///< null: nobody
    http::response_builder builder;
    bool stream = false;
    bool begun = false; ///< the stream's head is sent
  };

  /// One completion being answered. Its tokens are in the journal, whoever listens.
  struct open_call {
    const char* route;
    std::vector<listener> listeners; ///< at least one
    bool goes_on = false;   ///< without clients: it has a key, or was there before this process
    bool submitted = false; ///< to its replica
    std::uint32_t replica = 0;
    schedule::request_id first_id = 0;
    std::uint32_t num_requests = 0;
    schedule::time_point arrived;
    std::vector<schedule::time_point> last_token; ///< by choice
  };

  struct replica {
    scheduler_local scheduler;
    replica_report report;
    proto::ReplayReport replay; ///< the last one, repeated with every heartbeat
  };

  void dial_controller();
  void serve(http_call& call);
  void serve_completion(http_call& call, bool chat);
  void serve_response(http_call& call);
  void serve_status(http_call& call);
  void serve_health(http_call& call);
  void serve_metrics(http_call& call);
  void answer_metrics(http_call& call);
  /// Calls `then` with the controller's word on the cluster, or with null where it has none.
  void ask_controller(std::function<void(const proto::ClusterStatus*)> then);
  void answer(http_call& call, const char* route, int status, std::string body,
              const char* content_type = "application/json");
  void refuse(http_call& call, const char* route, const http::error_reply& reply);
  /// Takes up the calls that an earlier frontend has left; they are submitted with the plan.
  void take_up_calls();
  void submit_taken_up();
  /// Gives a client what a call has brought and, if that is not all, what comes.
  void attach(http_call& call, const char* route, const schedule::logged_call& known,
              std::optional<bool> stream);
  void add_listener(std::uint64_t call_id, open_call& call, listener l);
  void remove_listener(std::uint64_t listener_id);
  void submit(open_call& call, std::vector<schedule::request> requests);
  void on_progress(const progress& made);
  void on_event(std::uint64_t call_id, open_call& call, const schedule::token_event& event);
  void fail_call(std::uint64_t call_id, open_call& call, const error& why);
  void close_call(std::uint64_t call_id);
  void cancel_requests(const open_call& call);
  void measure(open_call& call, const schedule::token_event& event);
  void begin_stream(const open_call& call, listener& l);
  bool is_ready() const;
  replica* choose_replica();

  gateway_options options_;
  messages::cluster_supervisor_actor controller_;
  proto::ClusterPlan plan_;
  proto::ClusterView view_;
  proto::ClusterStatus last_status_;
  std::vector<replica> replicas_;
  bool was_ready_ = false;
  recovery::request_journal journal_;
  std::uint64_t next_call_;
  schedule::request_id next_request_;
  std::uint64_t next_listener_ = 1;
  std::map<std::uint64_t, open_call> calls_;                   ///< in the order of acceptance
  std::unordered_map<std::uint64_t, std::uint64_t> listeners_; ///< with a client: of which call
  std::unordered_map<schedule::request_id, std::uint64_t> call_of_;
  telemetry::metrics metrics_;
  std::int64_t started_s_;
  std::uint64_t seed_state_;
  std::string out_; ///< scratch for frames
};

} // namespace troupe::actors
