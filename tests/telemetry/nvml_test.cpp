#include "troupe/telemetry/nvml.hpp"

#include "telemetry/fake_machine.hpp"

#include <catch2/catch.hpp>

#include <dlfcn.h>

using namespace troupe;
using telemetry::nvml;
using testing::fake_machine;

TEST_CASE("every reading of a GPU arrives, in the unit that its name says") {
  auto driver = nvml::open(FAKE_NVML_FULL);
  REQUIRE(driver);
  const auto gpus = driver->gpus();
  REQUIRE(gpus.size() == 3);
  CHECK(gpus[1].uuid == "GPU-ab220000-1111-2222-3333-444455556666");
  CHECK(gpus[1].name == "NVIDIA H100 80GB HBM3");
  const auto reading = driver->read(driver->at_index(1));
  CHECK(reading.ShortDebugString()
        == "name: \"NVIDIA H100 80GB HBM3\" uuid: \"GPU-ab220000-1111-2222-3333-444455556666\" "
           "utilization: 0.88 memory_utilization: 0.32 memory_used_bytes: 22548578304 "
           "memory_total_bytes: 85899345920 temperature_celsius: 55 sm_clock_hz: 1981000000 "
           "memory_clock_hz: 2620000000 power_watts: 412.501 ecc_corrected: 31 "
           "ecc_uncorrected: 41 nvlink_active_links: 4 nvlink_sent_bytes: 8796093023232 "
           "nvlink_received_bytes: 6144 nvlink_replay_errors: 46 nvlink_recovery_errors: 86 "
           "nvlink_crc_flit_errors: 126");
}

TEST_CASE("a field that the driver does not give leaves out that reading alone") {
  auto driver = nvml::open(FAKE_NVML_FULL);
  REQUIRE(driver);
  const auto reading = driver->read(driver->at_index(2));
  CHECK_FALSE(reading.has_nvlink_sent_bytes());
  CHECK(reading.nvlink_received_bytes() == 7 * 1024);
  CHECK_FALSE(reading.has_nvlink_crc_data_errors());
}

TEST_CASE("a GPU is found by the bus that it is on, however that is written") {
  auto driver = nvml::open(FAKE_NVML_FULL);
  REQUIRE(driver);
  CHECK(driver->at_bus_id("0000:43:00.0") == driver->at_index(1));
  CHECK(driver->at_bus_id("0000:1b:00.0") == driver->at_index(0));
  CHECK(driver->at_bus_id("00000000:52:00.0") == driver->at_index(2));
  CHECK(driver->at_bus_id("0000:00:00.0") == nullptr);
  CHECK(driver->at_index(3) == nullptr);
}

TEST_CASE("functions that an old library lacks leave out their readings, and nothing else") {
  auto driver = nvml::open(FAKE_NVML_LACKING);
  REQUIRE(driver);
  CHECK(driver->gpus().size() == 3);
  CHECK(driver->at_bus_id("0000:43:00.0") == nullptr);
  CHECK(driver->read(driver->at_index(0)).ShortDebugString()
        == "memory_used_bytes: 21474836480 memory_total_bytes: 85899345920");
}

TEST_CASE("readings that the GPU does not support are left out") {
  const fake_machine mute("mute");
  auto driver = nvml::open(FAKE_NVML_FULL);
  REQUIRE(driver);
  CHECK(driver->read(driver->at_index(0)).ShortDebugString()
        == "name: \"NVIDIA H100 80GB HBM3\" uuid: \"GPU-aa110000-1111-2222-3333-444455556666\"");
}

TEST_CASE("no library, a library without a driver, and something else: each is told in words") {
  const auto nowhere = nvml::open("libnothing-of-that-name.so.1");
  REQUIRE_FALSE(nowhere);
  CHECK(nowhere.error().code == error_code::unavailable);
  CHECK(nowhere.error().cause.find("libnothing-of-that-name.so.1") != std::string::npos);
  const auto other = nvml::open("libc.so.6");
  REQUIRE_FALSE(other);
  CHECK(other.error().cause == "libc.so.6 has no nvmlInit_v2");
  const fake_machine no_driver("no-driver");
  const auto driverless = nvml::open(FAKE_NVML_FULL);
  REQUIRE_FALSE(driverless);
  CHECK(driverless.error().code == error_code::unavailable);
  CHECK(driverless.error().cause.find("Driver Not Loaded") != std::string::npos);
}

TEST_CASE("the library is closed with the last object") {
  const auto is_open = [] {
    auto* library = ::dlopen(FAKE_NVML_LACKING, RTLD_NOW | RTLD_NOLOAD);
    if (library != nullptr)
      ::dlclose(library);
    return library != nullptr;
  };
  {
    auto driver = nvml::open(FAKE_NVML_LACKING);
    REQUIRE(driver);
    auto moved = std::move(*driver);
    CHECK(is_open());
    CHECK(moved.gpus().size() == 3);
  }
  CHECK_FALSE(is_open());
}

TEST_CASE("a field's number is read by its type, and what is no count is left out") {
  using namespace telemetry::nvml_api;
  field_value field{};
  const auto count = [&](int type) {
    field.type = type;
    return telemetry::count_of(field);
  };
  field.value.as_unsigned_long_long = 0x1'0001'0002'0003;
  CHECK(count(value_unsigned_long_long) == 0x1'0001'0002'0003U);
  CHECK(count(value_unsigned_long) == 0x1'0001'0002'0003U);
  CHECK(count(value_signed_long_long) == 0x1'0001'0002'0003U);
  CHECK(count(value_unsigned_int) == 0x2'0003U);
  CHECK(count(value_signed_int) == 0x2'0003U);
  CHECK(count(value_unsigned_short) == 3U);
  CHECK(count(7) == std::nullopt);
  field.value.as_double = 12.9;
  CHECK(count(value_double) == 12U);
  field.value.as_double = -1;
  CHECK(count(value_double) == std::nullopt);
  field.value.as_double = 1e30;
  CHECK(count(value_double) == std::nullopt);
  field.value.as_long_long = -1;
  CHECK(count(value_signed_long_long) == std::nullopt);
  CHECK(count(value_signed_int) == std::nullopt);
  CHECK(count(value_unsigned_long_long) == ~std::uint64_t{0});
  field.status = not_supported;
  CHECK(count(value_unsigned_long_long) == std::nullopt);
}

TEST_CASE("the driver's own library, where there is one", "[gpu]") {
  auto driver = nvml::open();
  if (!driver) {
    WARN("skipped: " << driver.error().cause);
    return;
  }
  const auto gpus = driver->gpus();
  REQUIRE_FALSE(gpus.empty());
  for (std::size_t i = 0; i < gpus.size(); ++i) {
    const auto reading = driver->read(driver->at_index(i));
    WARN(reading.ShortDebugString());
    CHECK(reading.uuid().starts_with("GPU-"));
    CHECK(reading.memory_total_bytes() > 0);
    CHECK(reading.memory_used_bytes() <= reading.memory_total_bytes());
    CHECK((reading.utilization() >= 0 && reading.utilization() <= 1));
    CHECK((reading.temperature_celsius() > 0 && reading.temperature_celsius() < 120));
    CHECK(reading.sm_clock_hz() < 10'000'000'000U);
    CHECK(reading.power_watts() < 3000);
  }
}
