#include "troupe/actors/gateway.hpp"

#include "troupe/actors/dial.hpp"
#include "troupe/base/fault_point.hpp"
#include "troupe/base/identity.hpp"
#include "troupe/http/answer_replay.hpp"
#include "troupe/http/openai_tokenize.hpp"
#include "troupe/telemetry/cluster_status.hpp"

#include <algorithm>
#include <chrono>
#include <random>

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

namespace troupe::actors {

using namespace messages;
using namespace std::chrono_literals;

namespace {

constexpr auto redial_interval = 200ms;
constexpr auto controller_timeout = 500ms;
constexpr auto heartbeat_start = 100ms;
constexpr const char* controller_name = "controller";

/// With work in flight, no completed step for longer than this is not healthy. Above the time that
/// a recovery takes.
constexpr auto progress_limit = 10s;

schedule::time_point current_time() {
  return std::chrono::steady_clock::now();
}

std::int64_t unix_milliseconds() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
           std::chrono::system_clock::now().time_since_epoch())
    .count();
}

constexpr const char* status_page = R"(<!doctype html><meta charset="utf-8"><title>troupe</title>
<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em}
pre{background:#f4f4f4;padding:1em;overflow:auto}.running,.up{color:#080}.lost,.failed{color:#b00}</style>
<h1>troupe</h1><div id="s">…</div>
<script>
const text = (s) => { const e = document.createElement('span'); e.textContent = s; return e.innerHTML; };
const gib = (b) => b === undefined ? '?' : (b / 2 ** 30).toFixed(1) + ' GiB';
async function show() {
  try {
    const c = await (await fetch('/v1/cluster')).json();
    let h = `<p>cluster <b>${text(c.cluster)}</b>: ${c.ready ? 'ready' : 'not ready'}, epoch ${c.epoch}</p>`;
    for (const n of c.nodes) {
      h += `<p><b>${text(n.name)}</b> on ${text(n.host)} <span class="${n.state}">${n.state}</span> pid ${n.pid}</p><ul>`;
      for (const w of n.workers)
        h += `<li>${text(w.name)} <span class="${w.state}">${w.state}</span> pid ${w.pid}, incarnation ${w.incarnation}, ` +
             `${text(w.device)}: ${w.actors.map(a => text(a.id)).join(', ')}</li>`;
      for (const k of n.keepers || [])
        h += `<li>${text(k.name)} ${k.pid ? 'pid ' + k.pid : 'has ended'}, ${text(k.device)}: keeps ${gib(k.kept_bytes)}</li>`;
      for (const g of n.gpus || [])
        h += `<li>${text(g.device)} ${text(g.name)}: ${gib(g.memory_used_bytes)} of ${gib(g.memory_total_bytes)} in use` +
             `${g.utilization === undefined ? '' : `, ${Math.round(g.utilization * 100)} % busy`}` +
             `${g.temperature_celsius === undefined ? '' : `, ${g.temperature_celsius} °C`}</li>`;
      h += '</ul>';
    }
    h += '<p>recoveries</p><pre>' + text(c.recoveries.slice(-10).map(r =>
      `#${r.id} epoch ${r.epoch} ${r.cause}: restored after ${r.restore_ms} ms, first token after ${r.first_token_ms} ms, ` +
      `${r.requests} requests`).join('\n') || 'none') + '</pre>';
    document.getElementById('s').innerHTML = h;
  } catch (e) { document.getElementById('s').textContent = 'cannot reach the frontend: ' + e; }
}
show(); setInterval(show, 1000);
</script>)";

} // namespace

gateway::gateway(caf::actor_config& config, gateway_options options)
  : gateway_actor::base(config),
    options_(std::move(options)),
    journal_(options_.journal, unix_milliseconds()),
    // Ids of two frontends' lives differ, so that no late answer is taken for one of ours.
    next_call_((options_.incarnation << http::call_bits) + 1),
    next_request_((options_.incarnation << http::call_bits) + 1),
    started_s_(unix_milliseconds() / 1000),
    seed_state_(std::random_device{}()) {
  set_down_handler([this](caf::down_msg& down) {
    if (controller_ && controller_.address() == down.source) {
      spdlog::warn("the connection to the controller broke; requests are served on");
      controller_ = nullptr;
      delayed_send(this, redial_interval, start_atom::value);
    }
  });
}

void gateway::dial_controller() {
  dial<cluster_supervisor_actor>(
    this, options_.controller_host, options_.controller_port, 2000ms,
    [this](cluster_supervisor_actor controller) {
      controller_ = std::move(controller);
      monitor(controller_);
      proto::FrontendHello hello;
      hello.mutable_frontend()->set_pid(static_cast<std::uint32_t>(::getpid()));
      hello.mutable_frontend()->set_incarnation(options_.incarnation);
      hello.mutable_frontend()->set_endpoint(options_.endpoint);
      *hello.mutable_view() = view_;
      send(controller_, frontend_hello{std::move(hello)});
    },
    [this](const error& e) {
      spdlog::debug("{}", e.text());
      delayed_send(this, redial_interval, start_atom::value);
    });
}

bool gateway::is_ready() const {
  for (const auto& r : replicas_)
    if (r.report.serving)
      return true;
  return false;
}

gateway::replica* gateway::choose_replica() {
  // A replica that is recovering is still better than none: its requests pause and go on.
  replica* best = nullptr;
  auto load = [](const replica& r) {
    return std::pair{!r.report.serving,
                     r.report.counters.num_queued + r.report.counters.num_running};
  };
  for (auto& r : replicas_)
    if (best == nullptr || load(r) < load(*best))
      best = &r;
  return best;
}

void gateway::answer(http_call& call, const char* route, int status, std::string body,
                     const char* content_type) {
  metrics_.count_response(route, status);
  call.response->send(status, content_type, std::move(body));
}

void gateway::refuse(http_call& call, const char* route, const http::error_reply& reply) {
  metrics_.count_response(route, reply.status);
  http::header_list extra;
  if (reply.retry_after_s)
    extra.push_back({"Retry-After", std::to_string(*reply.retry_after_s)});
  call.response->send(reply.status, "application/json", reply.body, std::move(extra));
}

void gateway::serve(http_call& call) {
  const auto& path = call.request.path;
  const auto& method = call.request.method;
  bool is_get = method == "GET" || method == "HEAD";
  auto plain = [&](const char* route, http::answered<std::string> body) {
    if (body)
      answer(call, route, 200, std::move(*body));
    else
      refuse(call, route, http::error_response(body.error()));
  };
  if (path == "/v1/chat/completions" && method == "POST")
    return serve_completion(call, true);
  if (path == "/v1/completions" && method == "POST")
    return serve_completion(call, false);
  if (path.starts_with("/v1/responses/") && is_get)
    return serve_response(call);
  if (path == "/tokenize" && method == "POST")
    return plain("/tokenize", http::tokenize(call.request.body, options_.served));
  if (path == "/detokenize" && method == "POST")
    return plain("/detokenize", http::detokenize(call.request.body, options_.served));
  if (path == "/v1/models" && is_get)
    return answer(call, "/v1/models", 200, http::models_body(options_.served, started_s_));
  if (path.starts_with("/v1/models/") && is_get)
    return plain("/v1/models/{}", http::model_body(path.substr(11), options_.served, started_s_));
  if (path == "/v1/cluster" && is_get)
    return serve_status(call);
  if (path == "/health" && is_get)
    return serve_health(call);
  if (path == "/metrics" && is_get)
    return serve_metrics(call);
  if (path == "/version" && is_get)
    return answer(call, "/version", 200, fmt::format(R"({{"version":"{}"}})", TROUPE_VERSION));
  if (path == "/" && is_get)
    return answer(call, "/", 200, status_page, "text/html; charset=utf-8");
  for (const char* known : {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize",
                            "/v1/models", "/v1/cluster", "/health", "/metrics", "/version", "/"}) {
    if (path == known)
      return answer(call, "other", 405,
                    http::error_json(fmt::format("{} does not take {}", path, method),
                                     "invalid_request_error", "method_not_allowed"));
  }
  answer(call, "other", 404,
         http::error_json(fmt::format("there is nothing at {}", path), "invalid_request_error",
                          "not_found"));
}

void gateway::serve_metrics(http_call& call) {
  const auto& workers = plan_.workers();
  bool has_gpus = std::any_of(workers.begin(), workers.end(), [](const auto& worker) {
    return worker.device().starts_with("cuda:");
  });
  if (!has_gpus)
    return answer_metrics(call);
  // What is known of GPUs is the controller's.
  ask_controller([this, kept = call](const proto::ClusterStatus* status) mutable {
    std::vector<proto::DeviceReport> devices;
    if (status != nullptr)
      devices.assign(status->devices().begin(), status->devices().end());
    metrics_.set_devices(std::move(devices));
    answer_metrics(kept);
  });
}

void gateway::answer_metrics(http_call& call) {
  metrics_.set_epoch(view_.epoch());
  metrics_.set_open_requests(calls_.size());
  metrics_.set_journal_errors(journal_.num_errors());
  for (const auto& r : replicas_) {
    const auto& counters = r.report.counters;
    telemetry::replica_gauges gauges;
    gauges.queued = counters.num_queued;
    gauges.running = counters.num_running;
    gauges.free_pages = counters.num_free_pages;
    gauges.in_flight = counters.num_in_flight;
    gauges.preemptions = counters.num_preemptions;
    gauges.drafted_tokens = counters.num_drafted_tokens;
    gauges.accepted_tokens = counters.num_accepted_tokens;
    gauges.serving = r.report.serving;
    metrics_.set_replica(r.report.replica, gauges);
  }
  answer(call, "/metrics", 200, metrics_.text(), "text/plain; version=0.0.4");
}

void gateway::serve_health(http_call& call) {
  for (const auto& r : replicas_) {
    auto silent = current_time() - r.report.last_progress;
    if (r.report.serving && silent > progress_limit)
      return answer(call, "/health", 503,
                    http::error_json(
                      fmt::format("replica-{} has made no progress for {} s", r.report.replica,
                                  std::chrono::duration_cast<std::chrono::seconds>(silent).count()),
                      "unavailable", "no_progress"));
  }
  if (!is_ready())
    return answer(
      call, "/health", 503,
      http::error_json(was_ready_ ? "the cluster is recovering" : "the cluster is starting",
                       "unavailable", "not_ready"));
  answer(call, "/health", 200, R"({"status":"ok"})");
}

void gateway::ask_controller(std::function<void(const proto::ClusterStatus*)> then) {
  if (!controller_)
    return then(nullptr);
  request(controller_, controller_timeout, status_atom::value)
    .then([then](const cluster_status& status) { then(&status.body); },
          [then](caf::error&) { then(nullptr); });
}

void gateway::serve_status(http_call& call) {
  ask_controller([this, response = call.response](const proto::ClusterStatus* status) {
    if (status != nullptr) {
      last_status_ = *status;
    } else {
      // Without the controller the last word on everything else is still the best there is, except
      // on what changes every second.
      last_status_.mutable_frontend()->set_endpoint(options_.endpoint);
      last_status_.mutable_frontend()->set_pid(static_cast<std::uint32_t>(::getpid()));
      *last_status_.mutable_view() = view_;
      last_status_.clear_devices();
    }
    metrics_.count_response("/v1/cluster", 200);
    bool all_serve = !replicas_.empty();
    for (const auto& r : replicas_)
      all_serve = all_serve && r.report.serving;
    response->send(200, "application/json", telemetry::status_json(last_status_, all_serve));
  });
}

gateway::behavior_type gateway::make_behavior() {
  delayed_send(this, heartbeat_start, tick_atom::value);
  take_up_calls();
  return {
    [this](const cluster_plan& plan) {
      if (!replicas_.empty())
        return;
      plan_ = plan.body;
      auto client = caf::actor_cast<scheduler_client>(caf::actor_cast<gateway_actor>(this));
      for (std::uint32_t i = 0; i < plan_.num_replicas(); ++i) {
        replica r;
        r.scheduler =
          spawn<scheduler>(i, options_.incarnation, plan, client, make_stage_connector());
        link_to(r.scheduler); // a frontend without a scheduler is restarted as a whole
        r.report.replica = i;
        r.report.last_progress = current_time();
        replicas_.push_back(std::move(r));
      }
      submit_taken_up();
    },
    [this](const cluster_view& view) {
      if (faults::is_cut_off(controller_name) || view->version() <= view_.version())
        return;
      view_ = view.body;
      for (auto& r : replicas_)
        send(r.scheduler, view);
    },
    [this](const frontend_heartbeat&) {},
    [this](start_atom) {
      if (!controller_)
        dial_controller();
    },
    [this](tick_atom) {
      auto interval = std::chrono::milliseconds(std::max(10U, plan_.heartbeat_ms()));
      delayed_send(this, interval, tick_atom::value);
      journal_.tick(unix_milliseconds());
      if (!controller_)
        return;
      proto::FrontendHeartbeat heartbeat;
      heartbeat.set_incarnation(options_.incarnation);
      heartbeat.set_view_version(view_.version());
      for (const auto& r : replicas_)
        if (r.replay.epoch() != 0)
          *heartbeat.add_replays() = r.replay;
      send(controller_, frontend_heartbeat{std::move(heartbeat)});
    },
    [this](knock_atom) {
      if (options_.pulse)
        options_.pulse->answered();
    },
    [this](const http_call_ptr& call) { serve(*call); },
    [this](const progress_ptr& made) { on_progress(*made); },
    [this](const replica_report& report) {
      replicas_.at(report.replica).report = report;
      was_ready_ = was_ready_ || report.serving;
    },
    [this](const replay_report& report) {
      replicas_.at(report->replica()).replay = report.body;
      if (controller_)
        send(controller_, report);
    },
    [this](cancel_atom, std::uint64_t listener_id) { remove_listener(listener_id); },
  };
}

} // namespace troupe::actors
