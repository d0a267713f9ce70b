#pragma once

#include "troupe/base/error.hpp"

#include <string>
#include <string_view>

namespace troupe::model {

/// Rewrites a pre-tokenizer's regular expression, written for Oniguruma, so that PCRE2 with
/// UTF and UCP splits alike. Two things differ:
/// - Categories. Hugging Face's tokenizers know Unicode 16, Debian's PCRE2 10.42 knows
///   Unicode 14: `\p{L}`, `\p{M}`, `\p{N}`, `\p{P}` and `\p{S}` get what was assigned since.
///   (A negated category inside a bracket keeps PCRE2's own table.)
/// - `\s` of PCRE2 takes in U+180E, which has not been white space since Unicode 6.3.
/// Fails with invalid_model on what Oniguruma reads differently and PCRE2 cannot express:
/// nested or intersected brackets and `\h`.
expected<std::string> translate_pattern(std::string_view pattern);

} // namespace troupe::model
