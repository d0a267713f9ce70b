#include "troupe/actors/worker.hpp"

#include <catch2/catch.hpp>

#include <system_error>

using namespace troupe;
using actors::load_outcome;
using actors::outcome_of;

TEST_CASE("what is thrown while a worker loads is its failure, and no silence") {
  const auto thrown = outcome_of([](load_outcome& outcome) {
    outcome.is_ahead = true;
    throw std::system_error(EAGAIN, std::generic_category(), "a thread");
  });
  CHECK_FALSE(thrown.is_ahead);
  REQUIRE(thrown.failure);
  CHECK_FALSE(is_permanent(thrown.failure->code)); // another process may be luckier
  CHECK_THAT(thrown.failure->cause, Catch::StartsWith("cannot load: a thread"));
  const auto fine = outcome_of([](load_outcome& outcome) { outcome.is_ahead = true; });
  CHECK(fine.is_ahead);
  CHECK_FALSE(fine.failure);
}
