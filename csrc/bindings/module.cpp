// torch_routers._C: how this library was built. No tensors pass here; the operators are in
// torch.ops.torch_routers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/isa.h"

PYBIND11_MODULE(_C, m) {
  using torch_routers::Isa;
  m.doc() = "How torch_routers was built, and what it runs on.";
  m.attr("compiler") = TORCH_ROUTERS_COMPILER;
  m.attr("build_type") = TORCH_ROUTERS_BUILD_TYPE;
  m.attr("built_with_torch") = TORCH_ROUTERS_TORCH_VERSION;
  m.attr("cuda_option") = TORCH_ROUTERS_CUDA_OPTION;
#ifdef TORCH_ROUTERS_WITH_CUDA
  m.attr("cuda_version") = TORCH_ROUTERS_CUDA_VERSION;
#else
  m.attr("cuda_version") = pybind11::none();
#endif
  m.def(
      "cpu_capability", [] { return torch_routers::name(torch_routers::isa()); },
      "The instruction set in use: default, avx2 or avx512.");
  m.def(
      "cpu_capabilities",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : {Isa::Default, Isa::Avx2, Isa::Avx512})
          if (isa <= torch_routers::isa()) names.emplace_back(torch_routers::name(isa));
        return names;
      },
      "Those that ATEN_CPU_CAPABILITY can ask for on this machine.");
}
