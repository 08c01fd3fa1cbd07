// How failures travel inside the library: a Status by value; at the C interface its text stays with the thread.
#pragma once
#include <string>
#include <utility>

#include "inhouse.h"

namespace inhouse {

struct Status {
  ih_status code = IH_OK;
  std::string text;

  bool ok() const { return code == IH_OK; }
  static Status usage(std::string text) { return {IH_USAGE, std::move(text)}; }
  static Status unsupported(std::string text) { return {IH_UNSUPPORTED, std::move(text)}; }
  static Status capacity(std::string text) { return {IH_CAPACITY, std::move(text)}; }
  static Status failed(std::string text) { return {IH_FAILED, std::move(text)}; }
};

// Keeps the status's text for ih_error of this thread; gives its code.
ih_status report(const Status& status);
const std::string& last_error();

}  // namespace inhouse
