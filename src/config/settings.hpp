#pragma once

#include <span>
#include <string>

#include "troupe/config/document.hpp"
#include "troupe/config/report.hpp"

namespace troupe::config {

/// `root` with each setting "a.b[0].c=VALUE" put in. A VALUE in [] or {} is read as
/// YAML, every other one is taken as it stands. Sections that are missing are made;
/// list items must exist. What cannot be put in is reported and left out.
value_ptr with_settings(value_ptr root, std::span<const std::string> settings, report& problems);

} // namespace troupe::config
