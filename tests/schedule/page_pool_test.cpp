#include "troupe/schedule/page_pool.hpp"

#include <catch2/catch.hpp>

#include <csignal>
#include <set>

#include <sys/wait.h>
#include <unistd.h>

using troupe::schedule::page_pool;

TEST_CASE("a page pool hands out every page once and takes them back") {
  page_pool pool{5};
  REQUIRE(pool.num_free() == 5);
  std::vector<std::int32_t> pages;
  for (int i = 0; i < 5; ++i)
    pages.push_back(pool.take());
  CHECK(pool.num_free() == 0);
  const std::set<std::int32_t> all(pages.begin(), pages.end());
  CHECK(all == std::set<std::int32_t>{0, 1, 2, 3, 4});

  std::vector<std::int32_t> some{pages[1], pages[3]};
  pool.release(some);
  CHECK(some.empty());
  CHECK(pool.num_free() == 2);
  const std::set<std::int32_t> again{pool.take(), pool.take()};
  CHECK(again == std::set<std::int32_t>{pages[1], pages[3]});
}

TEST_CASE("exposed pages that are given back rest, others are free at once") {
  page_pool pool{4};
  std::vector<std::int32_t> first{pool.take(), pool.take()};
  pool.expose(first[0]);
  CHECK(pool.num_freed_by(first) == 1);
  const auto exposed = first[0];
  const auto other = first[1];
  pool.release(first);
  CHECK(pool.num_free() == 3);
  CHECK(pool.num_resting() == 1);
  CHECK(pool.take() == other);
  for (int i = 0; i < 2; ++i)
    CHECK(pool.take() != exposed);
  CHECK(pool.num_free() == 0);
  pool.end_rest();
  CHECK(pool.num_resting() == 0);
  CHECK(pool.take() == exposed);
  std::vector<std::int32_t> again{exposed};
  pool.release(again); // the rest is over
  CHECK(pool.num_free() == 1);
}

TEST_CASE("when all free pages are exposed, none is left to hand out") {
  page_pool pool{3};
  std::vector<std::int32_t> taken{pool.take()};
  pool.expose_free();
  CHECK(pool.num_free() == 0);
  CHECK(pool.num_resting() == 2);
  pool.release(taken);
  pool.expose_free();
  CHECK(pool.num_resting() == 3);
  pool.end_rest();
  CHECK(pool.num_free() == 3);
}

#ifndef NDEBUG
TEST_CASE("giving a page back twice stops the process") {
  const auto pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    std::signal(SIGABRT, SIG_DFL); // Catch2's handler would report a failed test
    page_pool pool{3};
    std::vector<std::int32_t> page{pool.take()};
    auto same = page;
    pool.release(page);
    close(STDERR_FILENO);
    pool.release(same);
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(pid, &status, 0) == pid);
  REQUIRE(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGABRT);
}
#endif
