#include "troupe/model/rope.hpp"

#include <catch2/catch.hpp>

using namespace troupe::model;

namespace {

/// The values of DeepSeek-R1's config.json.
model_config r1_config() {
  model_config config;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.rope_theta = 10000.0;
  config.yarn = yarn_config{40.0, 4096, 32.0, 1.0, 1.0, 1.0};
  return config;
}

} // namespace

TEST_CASE("YaRN of DeepSeek-R1 gives the known frequencies and scale") {
  const auto config = r1_config();
  const auto ramp = find_yarn_ramp(*config.yarn, config.rope_theta, config.qk_rope_head_dim);
  CHECK(ramp.low == 10);
  CHECK(ramp.high == 23);
  const auto constants = make_rope_constants(config);
  const std::vector<double> known{
    1,      .749894,    .562341,    .421697,    .316228,    .237137,    .177828,    .133352,
    .1,     .0749894,   .0562341,   .0390069,   .0268794,   .0183781,   .012448,    .00833451,
    .0055,  .003562,    .00224937,  .00137051,  7.90569e-4, 4.1499e-4,  1.77828e-4, 3.3338e-5,
    2.5e-5, 1.87474e-5, 1.40585e-5, 1.05424e-5, 7.90569e-6, 5.92843e-6, 4.4457e-6,  3.3338e-6};
  REQUIRE(constants.inv_freq.size() == known.size());
  for (std::size_t i = 0; i < known.size(); ++i)
    CHECK(constants.inv_freq[i] == Approx(known[i]).epsilon(5e-6));
  CHECK(constants.magnitude == 1.0F);
  CHECK(constants.softmax_scale == Approx(0.1352337788608801).epsilon(1e-7));
  CHECK(yarn_mscale(40.0, 1.0) == Approx(1.3688879454113936).epsilon(1e-14));
}

TEST_CASE("the softmax scale takes mscale_all_dim and the magnitude the quotient") {
  auto config = r1_config();
  config.yarn->mscale = config.yarn->mscale_all_dim = 0.707;
  CHECK(make_rope_constants(config).softmax_scale == Approx(0.1147213867929261).epsilon(1e-7));
  CHECK(make_rope_constants(config).magnitude == 1.0F);
  config.yarn->mscale = 1.0;
  config.yarn->mscale_all_dim = 0.0;
  CHECK(make_rope_constants(config).softmax_scale == Approx(1.0 / std::sqrt(192.0)).epsilon(1e-7));
  CHECK(make_rope_constants(config).magnitude == Approx(1.3688879454).epsilon(1e-7));
}

TEST_CASE("without YaRN frequencies are the plain powers") {
  auto config = r1_config();
  config.yarn.reset();
  const auto constants = make_rope_constants(config);
  for (std::size_t i = 0; i < constants.inv_freq.size(); ++i)
    CHECK(constants.inv_freq[i] == Approx(std::pow(10000.0, -2.0 * i / 64)).epsilon(1e-6));
  CHECK(constants.softmax_scale == Approx(1.0 / std::sqrt(192.0)).epsilon(1e-7));
}

TEST_CASE("a ramp of no width is a step") {
  auto config = r1_config();
  config.yarn->beta_fast = config.yarn->beta_slow = 1e6;
  const auto ramp = find_yarn_ramp(*config.yarn, config.rope_theta, 64);
  CHECK(ramp.low == ramp.high);
  const auto constants = make_rope_constants(config);
  CHECK(constants.inv_freq[0] == 1.0F);
  CHECK(constants.inv_freq[1] == Approx(std::pow(10000.0, -2.0 / 64) / 40.0).epsilon(1e-6));
}
