#pragma once

#include "troupe/drill/outcome.hpp"

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace troupe::drill {

/// The drill for programs. Times are milliseconds; those of events count from the drill's begin.
nlohmann::json to_json(const drill_outcome& outcome, const std::vector<finding>& findings);

/// Its figures for a terminal: a table (Markdown) of the faults, one line a check.
std::string to_text(const drill_outcome& outcome, const std::vector<finding>& findings);

/// One line for a page of benchmarks: how long, how many faults, what was lost.
std::string to_line(const drill_outcome& outcome);

/// One row of a table of many drills.
std::vector<std::string> to_row(const drill_outcome& outcome, const std::vector<finding>& findings);
extern const std::vector<std::string> row_heads;

/// A page without any other file: timelines of faults, recoveries and gaps as SVG, percentiles,
/// checks. One section a drill.
std::string to_html(const std::vector<drill_outcome>& outcomes,
                    const std::vector<std::vector<finding>>& findings);

/// A table in Markdown, aligned so that it reads well in a terminal. The first column is text.
std::string markdown_table(const std::vector<std::vector<std::string>>& rows);

/// "12 / 15 / 19": median, p95 and max; "-" for none.
std::string show(const std::vector<double>& figures);

} // namespace troupe::drill
