// Names on a benchmark's command line: a figure that is left out in silence would pass for measured.
#pragma once
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "dispatch.h"

// Whether all `names` are among `known`; else says which is not, and which are.
inline bool are_known(const char* what, const std::vector<std::string>& names, const std::vector<std::string>& known) {
  bool all = true;
  for (const std::string& name : names) {
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    all = false;
    std::string list;
    for (const std::string& one : known) list += " " + one;
    std::fprintf(stderr, "no %s is called '%s' here; there are:%s\n", what, name.c_str(), list.c_str());
  }
  return all;
}

// The same of levels that this machine can run.
inline bool are_known_levels(const std::vector<std::string>& names) {
  std::vector<std::string> levels;
  for (int i = 0; inhouse::available_kernels(i) != nullptr; ++i) levels.push_back(inhouse::available_kernels(i)->isa);
  return are_known("level", names, levels);
}
