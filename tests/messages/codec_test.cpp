#include "troupe/messages/actor_config.hpp"
#include "troupe/messages/serving_protocol.hpp"

#include <catch2/catch.hpp>

#include <random>
#include <vector>

#include <caf/all.hpp>
#include <caf/binary_deserializer.hpp>
#include <caf/binary_serializer.hpp>

using namespace troupe;
using namespace troupe::messages;

namespace {

struct fixture {
  actor_config config{actor_config::deterministic_tag{}};
  caf::actor_system system{config};

  std::vector<char> bytes_of(caf::message message) {
    std::vector<char> buffer;
    caf::binary_serializer sink{system, buffer};
    REQUIRE_FALSE(sink(message));
    return buffer;
  }

  /// As it goes over the network: inside a message, found by the name of its type.
  template <class T>
  T round_trip(const T& value) {
    auto buffer = bytes_of(caf::make_message(value));
    caf::message arrived;
    caf::binary_deserializer source{system, buffer};
    REQUIRE_FALSE(source(arrived));
    REQUIRE(arrived.size() == 1); // an unregistered type would arrive as an empty message
    REQUIRE(arrived.match_element<T>(0));
    return arrived.get_as<T>(0);
  }

  template <class Proto>
  void check(const Proto& body) {
    CAPTURE(body.GetTypeName());
    CHECK(round_trip(wire<Proto>{body})->SerializeAsString() == body.SerializeAsString());
  }
};

proto::RunMicroBatch micro_batch() {
  proto::RunMicroBatch batch;
  batch.set_epoch(3);
  batch.set_step(1ULL << 41U);
  for (int i = 0; i < 40; ++i)
    batch.add_tokens(i * 1000);
  batch.add_outputs()->set_temperature(0.6F);
  return batch;
}

} // namespace

TEST_CASE_METHOD(fixture, "every message type arrives as it was sent") {
  proto::ClusterView view;
  view.set_epoch(7);
  view.add_workers()->set_transport_address(std::string("\0\xff binary", 9));
  check(view);
  proto::NodeHello hello;
  hello.set_name("node-0");
  check(hello);
  proto::NodeAssignment assignment;
  assignment.mutable_plan()->set_cluster("x");
  check(assignment);
  proto::WorkerChanged changed;
  changed.set_cause("killed by signal 9");
  check(changed);
  proto::WorkerHello worker;
  worker.set_incarnation(5);
  check(worker);
  proto::WorkerAssignment worker_assignment;
  worker_assignment.add_kv()->set_bytes(1ULL << 40U);
  check(worker_assignment);
  proto::WorkerReport report;
  report.mutable_worker()->set_state(proto::FAILED);
  check(report);
  proto::FrontendHello frontend;
  frontend.mutable_frontend()->set_endpoint("http://x");
  check(frontend);
  proto::ClusterPlan plan;
  plan.set_num_stages(4);
  check(plan);
  proto::ClusterStatus status;
  status.set_ready(true);
  check(status);
  proto::ReplayReport replay;
  replay.set_tokens_replayed(12);
  check(replay);
  check(micro_batch());
  proto::MicroBatchDone done;
  done.add_logprobs(-0.25F);
  check(done);
  proto::MicroBatchFailed failed;
  failed.mutable_error()->set_cause("a NaN");
  check(failed);
}

TEST_CASE_METHOD(fixture, "bytes that are no message of the type fail and harm nobody") {
  std::mt19937_64 random(11);
  auto good = bytes_of(caf::make_message(run_micro_batch{micro_batch()}));
  int refused = 0;
  for (int i = 0; i < 5000; ++i) {
    auto bad = good;
    if (i % 3 == 0)
      bad.resize(random() % bad.size());
    else
      for (int n = 0; n < 3; ++n)
        bad[random() % bad.size()] = static_cast<char>(random());
    caf::message arrived;
    caf::binary_deserializer source{system, bad};
    // CAF turns what it cannot read into an empty message, which no actor takes.
    bool failed = bool(source(arrived)) || arrived.empty();
    refused += failed ? 1 : 0;
    if (!failed)
      CHECK(arrived.match_element<run_micro_batch>(0)); // changed in its values only
    if (i % 3 == 0)
      CHECK(failed); // nothing that was cut short is taken for whole
  }
  CHECK(refused > 5000 / 3);
}
