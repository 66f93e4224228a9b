// Instruction sets that the CPU kernels are built for.
//
// Every *_cpu.cpp is compiled once per instruction set, each time into the namespace
// torch_routers::TORCH_ROUTERS_ISA; the caller picks one of the copies at run time.
#pragma once

#ifndef TORCH_ROUTERS_ISA
#define TORCH_ROUTERS_ISA Default
#endif

namespace torch_routers {

enum class Isa { Default, Avx2, Avx512 };

// The best instruction set of this machine, or a lower one asked for by ATEN_CPU_CAPABILITY
// (default, avx2, avx512): the variable that PyTorch's own kernels obey.
Isa isa();

const char* name(Isa isa);

}  // namespace torch_routers

// Declares a kernel in the namespace of every instruction set, and calls the copy of one of them.
#if defined(__x86_64__)
#define TORCH_ROUTERS_FOR_EACH_ISA(...) \
  namespace Default { __VA_ARGS__ }     \
  namespace Avx2 { __VA_ARGS__ }        \
  namespace Avx512 { __VA_ARGS__ }
#define TORCH_ROUTERS_PICK_ISA(isa, ...)                         \
  ((isa) == ::torch_routers::Isa::Avx512 ? Avx512::__VA_ARGS__   \
   : (isa) == ::torch_routers::Isa::Avx2 ? Avx2::__VA_ARGS__     \
                                         : Default::__VA_ARGS__)
#else
#define TORCH_ROUTERS_FOR_EACH_ISA(...) \
  namespace Default { __VA_ARGS__ }
#define TORCH_ROUTERS_PICK_ISA(isa, ...) (static_cast<void>(isa), Default::__VA_ARGS__)
#endif
