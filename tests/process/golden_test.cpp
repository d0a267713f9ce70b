#include "streams.hpp"

#include <catch2/catch.hpp>

#include <initializer_list>

using namespace troupe::process_tests;

namespace {

void check_config(const char* config) {
  for (int chunk : {1, 7, 512}) {
    INFO(config << " with prefill chunks of " << chunk << " tokens");
    cluster c(config, {"serving.prefill_chunk_tokens=" + std::to_string(chunk)});
    auto crowd = run_golden_crowd(c.endpoint());
    INFO("in a crowd:\n" << lines(crowd));
    CHECK(crowd.empty());
    if (chunk == 7) {
      std::vector<std::string> alone;
      for (std::size_t i = 0; i < golden().size(); i += 4) {
        auto got = stream_completion(c.endpoint(), golden_request(golden()[i]));
        if (auto difference = got.difference(golden()[i]); !difference.empty())
          alone.push_back(difference);
      }
      INFO("alone:\n" << lines(alone));
      CHECK(alone.empty());
    }
    CHECK(c.status().at("recoveries").empty());
    c.end();
  }
}

void check_setting(const char* setting, std::initializer_list<const char*> configs) {
  for (const char* config : configs) {
    cluster c(config, {setting});
    auto crowd = run_golden_crowd(c.endpoint());
    INFO(config << " with " << setting << ":\n" << lines(crowd));
    CHECK(crowd.empty());
    c.end();
  }
}

} // namespace

TEST_CASE("single.yaml gives the golden tokens") {
  check_config("single.yaml");
}

TEST_CASE("local.yaml gives the golden tokens") {
  check_config("local.yaml");
}

TEST_CASE("tensor.yaml gives the golden tokens") {
  check_config("tensor.yaml");
}

TEST_CASE("two-nodes.yaml gives the golden tokens") {
  check_config("two-nodes.yaml");
}

TEST_CASE("fast numerics give the golden tokens") {
  check_setting("model.numerics=fast", {"single.yaml", "local.yaml"});
}

TEST_CASE("a head in 8 bit gives the golden tokens") {
  check_setting("model.head=int8", {"local.yaml", "tensor.yaml"});
}

TEST_CASE("drafted tokens leave the golden tokens as they are") {
  for (const char* config : {"single.yaml", "local.yaml", "one-pipeline-two-nodes.yaml"}) {
    cluster c(config, {"serving.draft_tokens=2", "serving.prefill_chunk_tokens=40"});
    auto crowd = run_golden_crowd(c.endpoint());
    INFO(config << ":\n" << lines(crowd));
    CHECK(crowd.empty());
    auto drafted = c.metric("troupe_drafted_tokens");
    auto accepted = c.metric("troupe_accepted_tokens");
    INFO(accepted << " of " << drafted << " accepted");
    CHECK(drafted > 1000);
    CHECK(accepted > 0.6 * drafted);
    c.end();
  }
}
