// A string among the arguments of an operator.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace torch_routers {

// Instead of std::string, of which torch 2.13 leaks one at each call (pytorch/pytorch#191340).
struct Text : std::string {
  using std::string::string;
};

}  // namespace torch_routers

template <> struct torch::stable::detail::ToImpl<torch_routers::Text> {
  static torch_routers::Text call(StableIValue value, std::uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    std::size_t length = 0;
    const char* characters = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    torch_routers::Text text(characters, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
