// Routed rows of a step: (token, expert) pairs ordered by expert, then by token. How many each expert has is known only
// when the step runs.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace inhouse {

// Of the last route op; made once for the largest step.
struct RoutedRows {
  std::vector<int32_t> begin;   // [experts + 1] first row of each expert
  std::vector<int32_t> token;   // [R] token of each row
  std::vector<int32_t> row;     // [T][top_k] rows of each token, ascending
  std::vector<float> weight;    // [T][top_k] theirs
  std::vector<int32_t> active;  // experts that have rows
  std::vector<int32_t> next;    // [experts] while rows are placed
  std::vector<int64_t> tasks;   // of an expert_linears: tasks up to and with each (matrix, active expert)

  int32_t rows_of(int32_t expert) const { return begin[expert + 1] - begin[expert]; }
  void reserve(int64_t tokens, const RoutedSizes& sizes) {
    const size_t pairs = static_cast<size_t>(tokens * sizes.top_k), experts = static_cast<size_t>(sizes.experts);
    for (std::vector<int32_t>* v : {&token, &row}) v->reserve(pairs);
    weight.reserve(pairs);
    begin.reserve(experts + 1);
    for (std::vector<int32_t>* v : {&active, &next}) v->reserve(experts);
    tasks.reserve(experts * static_cast<size_t>(sizes.outputs));
  }
};

// The shape of a route op over `experts` logits.
inline RouteShape route_shape(const Op& op, int64_t experts) {
  RouteShape s = {};
  s.experts = static_cast<int32_t>(experts);
  s.top_k = static_cast<int32_t>(op.integer(0));
  s.normalize = op.integer(1) != 0;
  s.scoring = static_cast<Scoring>(op.integer(2));
  s.scale = op.real(3);
  s.groups = static_cast<int32_t>(op.integer(4));
  s.top_groups = static_cast<int32_t>(op.integer(5));
  s.two_best = op.integer(6) != 0;
  s.jitter = op.real(7);
  return s;
}

}  // namespace inhouse
