#include "error.h"

namespace inhouse {

namespace {
thread_local std::string last_text;
}

ih_status report(const Status& status) {
  if (!status.ok()) last_text = status.text;
  return status.code;
}

const std::string& last_error() { return last_text; }

}  // namespace inhouse
