// Stands in for the CUDA runtime library and executes the PTX that nvcc made, on the CPU. A program
// links its nvcc objects, unchanged, with this instead of cudart; PTXRUN_PTX=a.ptx:b.ptx names the
// PTX of the same sources. PTXRUN_COUNTS=1 prints what each kernel executed and moved.
//
// A warp executes the lowest program counter any of its lanes is at, so that lanes meet again after
// a branch; a warp runs until it waits at a barrier. Errors: an access outside an allocation or
// misaligned; shared memory read before it is written, or raced for; a collective without all lanes
// of its mask; a barrier at which threads of the block meet in different places, or never meet.
// An instruction it does not know stops the launch with its line: add it to lanewise().
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace ptxrun {
namespace {

using std::string;
using std::uint32_t;
using std::uint64_t;

// ---- values ------------------------------------------------------------------------------------

struct Type {
  char kind = 'b';  // b, u, s, f as in PTX; h: bfloat16; p: predicate
  int bytes = 4;
};

template <class T> uint64_t bits(T value) {
  uint64_t result = 0;
  std::memcpy(&result, &value, sizeof value);
  return result;
}
template <class T> T from(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Calls f with a zero of the C++ type that is meant.
template <class F> auto with_type(Type type, F f) {
  if (type.kind == 'f') return type.bytes == 8 ? f(double{}) : f(float{});
  const bool is_signed = type.kind == 's';
  switch (type.bytes) {
    case 1: return is_signed ? f(std::int8_t{}) : f(std::uint8_t{});
    case 2: return is_signed ? f(std::int16_t{}) : f(std::uint16_t{});
    case 4: return is_signed ? f(std::int32_t{}) : f(uint32_t{});
    default: return is_signed ? f(std::int64_t{}) : f(uint64_t{});
  }
}

// ---- instructions ------------------------------------------------------------------------------

// In the order of Execution::special().
const std::vector<string> kSpecials{
    "%tid.x",   "%tid.y",   "%tid.z",       "%ntid.x",      "%ntid.y",      "%ntid.z",
    "%ctaid.x", "%ctaid.y", "%ctaid.z",     "%nctaid.x",    "%nctaid.y",    "%nctaid.z",
    "%laneid",  "%warpid",  "%lanemask_lt", "%lanemask_le", "%lanemask_ge", "%lanemask_gt"};

struct Operand {
  enum Kind { kNone, kRegister, kImmediate, kSpecial, kSymbol, kMemory, kVector } kind = kNone;
  int reg = -1, second = -1;  // of "a|b", b
  uint64_t immediate = 0;     // or the offset of an address, or the place in kSpecials
  bool negated = false;
  string name;
  std::vector<Operand> parts;
};

using Words = const uint64_t*;  // the sources of one lane
using Lanewise = std::function<uint64_t(Words)>;

// What the opcodes do that do not work on each lane alone.
enum class Action {
  kUnknown,
  kMove,
  kMemory,
  kAtomic,
  kConvertAddress,
  kBranch,
  kReturn,
  kBarrier,
  kShuffle,
  kCollective,
  kActiveMask,
  kNothing
};
const std::map<string, Action> kActions{{"mov", Action::kMove},
                                        {"ld", Action::kMemory},
                                        {"st", Action::kMemory},
                                        {"ldu", Action::kMemory},
                                        {"atom", Action::kAtomic},
                                        {"red", Action::kAtomic},
                                        {"cvta", Action::kConvertAddress},
                                        {"bra", Action::kBranch},
                                        {"ret", Action::kReturn},
                                        {"exit", Action::kReturn},
                                        {"bar", Action::kBarrier},
                                        {"barrier", Action::kBarrier},
                                        {"shfl", Action::kShuffle},
                                        {"vote", Action::kCollective},
                                        {"match", Action::kCollective},
                                        {"redux", Action::kCollective},
                                        {"activemask", Action::kActiveMask},
                                        {"membar", Action::kNothing},
                                        {"fence", Action::kNothing},
                                        {"prefetch", Action::kNothing}};

struct Instruction {
  string text, opcode;
  Action action = Action::kUnknown;
  bool weak = true;  // no volatile, relaxed, acquire or release access to memory
  std::vector<string> modifiers;
  std::vector<Type> types;
  int line = 0, guard = -1, target = -1;
  bool guard_negated = false;
  std::vector<Operand> operands;
  Lanewise lanewise;
  int vector = 1;
  string space;

  bool has(const char* modifier) const {
    return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
  }
  Type type(std::size_t i = 0) const { return i < types.size() ? types[i] : types.back(); }
};

// An arithmetic operator on values of one type. Integers wrap around.
template <class Op> Lanewise arithmetic(Type type, Op op) {
  return with_type(type, [op](auto zero) {
    using T = decltype(zero);
    return Lanewise(
        [op](Words w) { return bits(T(op(from<T>(w[0]), from<T>(w[1]), from<T>(w[2])))); });
  });
}
template <class Op> Lanewise floating(Type type, Op op) {
  if (type.bytes == 8) return [op](Words w) { return bits(double(op(from<double>(w[0])))); };
  return [op](Words w) { return bits(float(op(double(from<float>(w[0]))))); };
}

Lanewise rounded(const Instruction& in, Lanewise operation) {
  const int mode = in.has("rm") ? FE_DOWNWARD : in.has("rp") ? FE_UPWARD : FE_TOWARDZERO;
  if (!in.has("rm") && !in.has("rp") && !in.has("rz")) return operation;
  return [=](Words w) {
    std::fesetround(mode);
    const uint64_t result = operation(w);
    std::fesetround(FE_TONEAREST);
    return result;
  };
}

Lanewise product(const Instruction& in) {  // mul and mad of integers
  const bool is_signed = in.type().kind == 's', add = in.opcode == "mad";
  const int bytes = in.type().bytes, shift = in.has("hi") ? 8 * bytes : 0;
  const int result_bytes = in.has("wide") ? 2 * bytes : bytes;
  return [=](Words w) {
    const auto wide = [&](uint64_t word) -> __int128 {
      return with_type({is_signed ? 's' : 'u', bytes},
                       [&](auto zero) { return __int128(from<decltype(zero)>(word)); });
    };
    uint64_t result = uint64_t(wide(w[0]) * wide(w[1]) >> shift) + (add ? w[2] : 0);
    return result_bytes == 8 ? result : result & ((uint64_t{1} << 8 * result_bytes) - 1);
  };
}

Lanewise comparison(const Instruction& in) {
  static const std::map<string, string> kUnsigned{
      {"lo", "lt"}, {"ls", "le"}, {"hi", "gt"}, {"hs", "ge"}};
  string how = in.modifiers[0];
  if (auto same = kUnsigned.find(how); same != kUnsigned.end()) how = same->second;
  const bool is_float = in.type().kind == 'f';
  const bool or_nan = is_float && how.size() == 3 && how != "nan" && how != "num";
  if (or_nan) how.pop_back();
  const char combine = in.has("and") ? 'a' : in.has("or") ? 'o' : in.has("xor") ? 'x' : 0;
  return with_type(in.type(), [=](auto zero) {
    using T = decltype(zero);
    return Lanewise([=](Words w) -> uint64_t {
      const T a = from<T>(w[0]), b = from<T>(w[1]);
      const bool nan = a != a || b != b;
      const bool holds = how == "nan"   ? nan
                         : how == "num" ? !nan
                         : nan          ? or_nan
                         : how == "eq"  ? a == b
                         : how == "ne"  ? a != b
                         : how == "lt"  ? a < b
                         : how == "le"  ? a <= b
                         : how == "gt"  ? a > b
                                        : a >= b;
      const bool other = w[2] & 1;
      return combine == 'a'   ? holds && other
             : combine == 'o' ? holds || other
             : combine == 'x' ? holds != other
                              : holds;
    });
  });
}

Lanewise conversion(const Instruction& in) {
  const Type to = in.type(0), source = in.type(1);
  const bool saturate = in.has("sat");
  if (to.kind == 'h')  // round to nearest even
    return [](Words w) -> uint64_t {
      const auto word = uint32_t(w[0]);
      if (std::isnan(from<float>(word))) return 0x7fff;
      return (word + 0x7fff + (word >> 16 & 1)) >> 16;
    };
  if (source.kind == 'h') return [](Words w) -> uint64_t { return w[0] << 16 & 0xffffffff; };
  const int integral = in.has("rni")   ? 1
                       : in.has("rmi") ? 2
                       : in.has("rpi") ? 3
                       : in.has("rzi") ? 4
                                       : 0;
  return with_type(source, [=](auto source_zero) {
    return with_type(to, [=](auto to_zero) {
      using S = decltype(source_zero);
      using D = decltype(to_zero);
      return Lanewise([=](Words w) {
        S value = from<S>(w[0]);
        if constexpr (std::is_floating_point_v<S>) {
          value = integral == 1   ? std::nearbyint(value)
                  : integral == 2 ? std::floor(value)
                  : integral == 3 ? std::ceil(value)
                  : integral == 4 ? std::trunc(value)
                                  : value;
          if constexpr (std::is_integral_v<D>) {  // out of range: the nearest; NaN: 0
            if (value != value) return uint64_t{0};
            const auto low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
            if (value <= S(low)) return bits(low);
            if (value >= S(high)) return bits(high);
          } else if (saturate) {
            value = value > 0 ? value < 1 ? value : S(1) : S(0);
          }
        }
        return bits(D(value));
      });
    });
  });
}

// The operators that work on each lane alone; empty for all others.
Lanewise lanewise(const Instruction& in) {
  const string& op = in.opcode;
  const Type type = in.types.empty() ? Type{} : in.type();
  const bool is_float = type.kind == 'f';
  const int width = 8 * type.bytes;
  // Wrap-around is defined for unsigned integers only.
  const Type wrapping = is_float ? type : Type{'u', type.bytes};

  if (op == "add")
    return rounded(in, arithmetic(wrapping, [](auto a, auto b, auto) { return a + b; }));
  if (op == "sub")
    return rounded(in, arithmetic(wrapping, [](auto a, auto b, auto) { return a - b; }));
  if ((op == "mul" || op == "mad") && !is_float) return product(in);
  if (op == "mul") return rounded(in, arithmetic(type, [](auto a, auto b, auto) { return a * b; }));
  if (op == "fma" || op == "mad")
    return rounded(in, arithmetic(type, [](auto a, auto b, auto c) {
                     if constexpr (std::is_floating_point_v<decltype(a)>) return std::fma(a, b, c);
                     return a;
                   }));
  if (op == "div" || op == "rem")
    return arithmetic(type, [remainder = op == "rem"](auto a, auto b, auto) -> decltype(a) {
      if constexpr (std::is_floating_point_v<decltype(a)>)
        return a / b;
      else if (b == 0)
        return decltype(a)(-1);
      else if (b == decltype(b)(-1) && std::is_signed_v<decltype(b)>)
        return remainder ? 0 : decltype(a)(0 - uint64_t(a));
      else
        return decltype(a)(remainder ? a % b : a / b);
    });
  if (op == "min" || op == "max")
    return arithmetic(
        type, [max = op == "max", propagate = in.has("NaN")](auto a, auto b, auto) -> decltype(a) {
          if (a != a || b != b) return (a != a) == propagate ? a : b;
          return (a < b) == max ? b : a;
        });
  if (op == "neg") return arithmetic(wrapping, [](auto a, auto, auto) { return decltype(a)(-a); });
  if (op == "abs")
    return arithmetic(type, [](auto a, auto, auto) {
      return decltype(a)(a < 0 ? -a : a == 0 ? 0 : a);
    });
  if (op == "and") return [](Words w) { return w[0] & w[1]; };
  if (op == "or") return [](Words w) { return w[0] | w[1]; };
  if (op == "xor") return [](Words w) { return w[0] ^ w[1]; };
  if (op == "not" && type.kind == 'p') return [](Words w) { return ~w[0] & 1; };
  if (op == "not")
    return arithmetic(type, [](auto a, auto, auto) { return decltype(a)(~uint64_t(a)); });
  if (op == "shl" || op == "shr")
    return with_type(type, [=, left = op == "shl"](auto zero) {
      using T = decltype(zero);
      return Lanewise([=](Words w) {
        const T value = from<T>(w[0]);
        const auto by = uint32_t(w[1]);
        if (left) return bits(T(by < uint32_t(width) ? uint64_t(value) << by : 0));
        if (by >= uint32_t(width)) return bits(T(value < T{} ? -1 : 0));
        if constexpr (std::is_integral_v<T>) return bits(T(value >> by));
        return uint64_t{0};
      });
    });
  if (op == "setp") return comparison(in);
  if (op == "selp") return [](Words w) { return w[2] & 1 ? w[0] : w[1]; };
  if (op == "cvt") return conversion(in);
  if (op == "ex2") return floating(type, [](double x) { return std::exp2(x); });
  if (op == "lg2") return floating(type, [](double x) { return std::log2(x); });
  if (op == "rcp") return floating(type, [](double x) { return 1 / x; });
  if (op == "sqrt") return floating(type, [](double x) { return std::sqrt(x); });
  if (op == "rsqrt") return floating(type, [](double x) { return 1 / std::sqrt(x); });
  if (op == "tanh") return floating(type, [](double x) { return std::tanh(x); });
  if (op == "popc") return [](Words w) { return uint64_t(__builtin_popcountll(w[0])); };
  if (op == "clz")
    return
        [width](Words w) { return uint64_t(w[0] ? __builtin_clzll(w[0]) - (64 - width) : width); };
  if (op == "bfind" &&
      type.kind == 'u')  // the highest bit that is set; with shiftamt, from the top
    return [width, from_top = in.has("shiftamt")](Words w) -> uint64_t {
      if (!w[0]) return 0xffffffff;
      const int zeros = __builtin_clzll(w[0]) - (64 - width);
      return from_top ? zeros : width - 1 - zeros;
    };
  if (op == "brev")
    return [width](Words w) {
      uint64_t result = 0;
      for (int i = 0; i < width; ++i) result |= (w[0] >> i & 1) << (width - 1 - i);
      return result;
    };
  if (op == "bfi")  // w[0] into w[1] at w[2], w[3] bits long
    return [width](Words w) {
      const unsigned at = w[2] & 255, length = w[3] & 255;
      if (at >= unsigned(width)) return w[1];
      const uint64_t mask = (length >= 64 ? ~0ull : (1ull << length) - 1) << at;
      const uint64_t result = (w[1] & ~mask) | (w[0] << at & mask);
      return width == 64 ? result : result & 0xffffffff;
    };
  if (op == "bfe" && type.kind == 'u')
    return [](Words w) {
      const unsigned at = w[1] & 255, length = w[2] & 255;
      return at >= 64 ? 0 : w[0] >> at & (length >= 64 ? ~0ull : (1ull << length) - 1);
    };
  if (op == "shf")
    return [left = in.has("l"), wrap = in.has("wrap")](Words w) -> uint64_t {
      const uint64_t value = w[1] << 32 | uint32_t(w[0]);
      const unsigned by = wrap ? w[2] & 31 : std::min<uint64_t>(uint32_t(w[2]), 32);
      return uint32_t(left ? value << by >> 32 : value >> by);
    };
  if (op == "prmt")
    return [](Words w) {
      const uint64_t value = w[1] << 32 | uint32_t(w[0]);
      uint64_t result = 0;
      for (int i = 0; i < 4; ++i) {
        const unsigned select = w[2] >> 4 * i & 15;
        uint64_t byte = value >> 8 * (select & 7) & 255;
        if (select & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
      }
      return result;
    };
  if (op == "lop3")
    return [](Words w) {
      uint64_t result = 0;
      for (int i = 0; i < 32; ++i)
        result |= (w[3] >> ((w[0] >> i & 1) * 4 + (w[1] >> i & 1) * 2 + (w[2] >> i & 1)) & 1) << i;
      return result;
    };
  return {};
}

// ---- modules -----------------------------------------------------------------------------------

struct Symbol {
  char space;  // 's'hared, 'p'aram, 'l'ocal: offset; 'd'ynamic shared; 'g'lobal: address
  uint64_t at;
};

struct Counts {
  uint64_t launches = 0, warp_instructions = 0, sectors = 0, ideal_sectors = 0;
};

struct Kernel {
  string name;
  std::vector<Instruction> code;
  std::map<string, Symbol> symbols;
  std::vector<std::pair<std::size_t, std::size_t>> parameters;  // offset, size
  std::size_t parameter_bytes = 0, shared_bytes = 0, local_bytes = 0;
  int registers = 0;
  Counts counts;
};

std::map<string, Kernel> kernels;
int target = 0;  // the architecture of the PTX
std::map<string, Symbol> globals;
std::map<uint64_t, uint64_t> allocations;  // address, size

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, std::max<std::size_t>(bytes, 1))) std::abort();
  std::memset(memory, 0xff, bytes);
  allocations[bits(memory)] = bytes;
  return memory;
}

string strip(const string& text) {
  const auto first = text.find_first_not_of(" \t\n\r"), last = text.find_last_not_of(" \t\n\r");
  return first == string::npos ? "" : text.substr(first, last - first + 1);
}

std::vector<string> split(const string& text, char separator = ',') {  // outside of brackets
  std::vector<string> parts;
  string part;
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == separator && depth == 0) {
      parts.push_back(strip(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!strip(part).empty()) parts.push_back(strip(part));
  return parts;
}

// nvcc names an anonymous namespace anew in each compilation,
// <length>_GLOBAL__N__<hash>_<file>_<hash>_<number>: leaves only the file.
string lasting_name(string name) {
  static const string kAnonymous = "_GLOBAL__N__";
  for (std::size_t at = 0; (at = name.find(kAnonymous, at)) != string::npos;) {
    std::size_t digits = at;
    while (std::isdigit(name[digits - 1])) --digits;
    string id = name.substr(at, std::atoi(name.c_str() + digits));
    const std::size_t id_length = id.size();
    for (int part = 0; part < 2; ++part) id.resize(id.rfind('_'));
    id.erase(0, id.find('_', kAnonymous.size()));
    name.replace(digits, at - digits + id_length, id);
    at = digits + id.size();
  }
  return name;
}

bool parse_type(const string& text, Type& type) {
  if (text == "pred") return type = {'p', 1}, true;
  if (text == "bf16") return type = {'h', 2}, true;
  const int width = text.size() > 1 ? std::atoi(text.c_str() + 1) : 0;
  if (!std::strchr("busf", text[0]) || text != text[0] + std::to_string(width)) return false;
  return type = {text[0], width / 8}, true;
}

class Parser {
 public:
  void file(const string& path) {
    std::ifstream in(path);
    if (!in) throw std::runtime_error("cannot read " + path);
    for (string line; std::getline(in, line);) {
      std::sscanf(line.c_str(), ".target sm_%d", &target);
      const bool directive = line.rfind(".version", 0) == 0 || line.rfind(".target", 0) == 0 ||
                             line.rfind(".address_size", 0) == 0 || line.rfind("\t.pragma", 0) == 0;
      text_ += (directive ? "" : line.substr(0, line.find("//"))) + '\n';
    }
    while (at_ < text_.size()) top_level();
  }

 private:
  string until(const char* ends, char& end) {
    string result;
    while (at_ < text_.size() && !std::strchr(ends, text_[at_])) take(result);
    end = at_ < text_.size() ? text_[at_] : 0;
    if (end) take(skipped_);
    return result;
  }
  void take(string& to) {
    line_ += text_[at_] == '\n';
    to += text_[at_++];
  }

  void top_level() {
    char end;
    string head = until(";({=", end);
    const auto entry = head.find(".entry");
    if (entry == string::npos) {
      string values;
      if (end == '=') values = until(";", end);
      if (head.find(".global") != string::npos || head.find(".const") != string::npos ||
          head.find(".shared") != string::npos)
        variable(head, values);
      return;
    }
    const string name = lasting_name(strip(head.substr(entry + 6)));
    Kernel& k = kernels[name];
    kernel_ = &k;
    k.name = name;
    for (const string& parameter : split(until(")", end))) {
      string name;
      std::size_t align, bytes;
      declaration(parameter, name, align, bytes);
      k.parameter_bytes = (k.parameter_bytes + align - 1) / align * align;
      k.symbols[name] = {'p', k.parameter_bytes};
      k.parameters.emplace_back(k.parameter_bytes, bytes);
      k.parameter_bytes += bytes;
    }
    for (const auto& [name, module_shared] : module_shared_)
      place(k.shared_bytes, 's', name, module_shared);
    until("{", end);
    body();
    for (Instruction& in : k.code)
      if (in.opcode == "bra") in.target = labels_.at(in.operands[0].name);
    kernel_ = nullptr;
  }

  static void declaration(const string& text, string& name, std::size_t& align,
                          std::size_t& bytes) {
    std::istringstream words(text);
    Type type;
    align = 0;
    for (string word; words >> word;) {
      if (word == ".align")
        words >> align;
      else if (word[0] == '.')
        parse_type(word.substr(1), type);
      else
        name += word;
    }
    const auto bracket = name.find('[');
    bytes = type.bytes;
    if (bracket != string::npos) bytes *= std::atoll(name.c_str() + bracket + 1);
    align = std::max<std::size_t>(align, type.bytes);
    name = name.substr(0, bracket);
  }

  void place(std::size_t& total, char space, const string& name,
             std::pair<std::size_t, std::size_t> size) {
    total = (total + size.first - 1) / size.first * size.first;
    kernel_->symbols[name] = {space, total};
    total += size.second;
  }

  void variable(const string& text, const string& values = "") {
    string name;
    std::size_t align, bytes;
    declaration(text, name, align, bytes);
    if (text.find(".extern") != string::npos) {
      globals[name] = {'d', 0};
    } else if (text.find(".local") != string::npos) {
      place(kernel_->local_bytes, 'l', name, {align, bytes});
    } else if (text.find(".shared") != string::npos) {
      if (kernel_)
        place(kernel_->shared_bytes, 's', name, {align, bytes});
      else
        module_shared_[name] = {align, bytes};
    } else {
      auto* memory = static_cast<unsigned char*>(allocate(bytes));
      std::memset(memory, 0, bytes);
      if (!values.empty() && text.find(".b8 ") == string::npos)
        throw std::runtime_error("only .b8 variables may have values: " + text);
      for (const string& value : split(strip(values).substr(values.empty() ? 0 : 1)))
        *memory++ = static_cast<unsigned char>(std::atoi(value.c_str()));
      globals[name] = {'g', bits(memory)};
    }
  }

  void body() {
    labels_.clear();
    scopes_.assign(1, {});
    for (char end; !scopes_.empty();) {
      string text = until(";{}:", end);
      const bool vector_operand = end == '{' && !strip(text).empty();
      if (vector_operand) {
        text += '{';
        int depth = 1;
        for (; depth || text_[at_] != ';'; take(text))
          depth += (text_[at_] == '{') - (text_[at_] == '}');
        take(skipped_);
        end = ';';
      }
      if (end == '{') scopes_.emplace_back();
      if (end == ':') labels_[strip(text)] = static_cast<int>(kernel_->code.size());
      if (end == ';' || end == '}') statement(strip(text));
      if (end == '}') scopes_.pop_back();
      if (end == 0) break;
    }
  }

  int find_register(const string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope)
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    return -1;
  }

  void statement(string text) {
    if (text.empty()) return;
    if (text.rfind(".reg", 0) == 0) {  // .reg .b32 %r<7>, x;
      for (const string& name : split(text.substr(text.find_first_of(" \t", text.find('.', 4))))) {
        const auto bracket = name.find('<');
        if (bracket == string::npos)
          scopes_.back()[name] = kernel_->registers++;
        else
          for (int i = 0; i < std::atoi(name.c_str() + bracket + 1); ++i)
            scopes_.back()[name.substr(0, bracket) + std::to_string(i)] = kernel_->registers++;
      }
      return;
    }
    if (text[0] == '.') {
      if (text.rfind(".shared", 0) == 0 || text.rfind(".local", 0) == 0) variable(text);
      return;
    }
    Instruction in;
    in.text = text;
    in.line = line_;
    if (text[0] == '@') {
      in.guard_negated = text[1] == '!';
      const auto space = text.find_first_of(" \t");
      in.guard = find_register(text.substr(1 + in.guard_negated, space - 1 - in.guard_negated));
      text = strip(text.substr(space));
    }
    const auto space = text.find_first_of(" \t");
    for (const string& word : split(text.substr(0, space), '.')) {
      Type type;
      if (in.opcode.empty())
        in.opcode = word;
      else if (parse_type(word, type))
        in.types.push_back(type);
      else if (word == "global" || word == "shared" || word == "param" || word == "local" ||
               word == "const")
        in.space = word;
      else if (word == "v2" || word == "v4" || word == "v8")
        in.vector = word[1] - '0';
      in.modifiers.push_back(word);
    }
    in.modifiers.erase(in.modifiers.begin());
    if (space != string::npos)
      for (const string& part : split(text.substr(space))) in.operands.push_back(operand(part));
    in.lanewise = lanewise(in);
    if (const auto found = kActions.find(in.opcode); found != kActions.end())
      in.action = found->second;
    for (const char* order : {"volatile", "relaxed", "acquire", "release"})
      if (in.has(order)) in.weak = false;
    kernel_->code.push_back(in);
  }

  Operand operand(const string& text) {
    Operand o;
    o.name = text;
    if (text[0] == '{') {
      o.kind = Operand::kVector;
      for (const string& part : split(text.substr(1, text.size() - 2)))
        o.parts.push_back(operand(part));
    } else if (text[0] == '[') {
      const string inside = strip(text.substr(1, text.size() - 2));
      const auto plus = inside.find('+');
      o.name = strip(inside.substr(0, plus));
      o.kind = Operand::kMemory;
      o.reg = find_register(o.name);
      if (plus != string::npos) o.immediate = std::strtoll(inside.c_str() + plus + 1, nullptr, 0);
    } else if (const auto bar = text.find('|'); bar != string::npos) {
      o = operand(strip(text.substr(0, bar)));
      o.second = find_register(strip(text.substr(bar + 1)));
    } else if (text[0] == '!') {
      o = operand(text.substr(1));
      o.negated = true;
    } else if (find_register(text) >= 0) {
      o.kind = Operand::kRegister;
      o.reg = find_register(text);
    } else if (text[0] == '%') {
      o.kind = Operand::kSpecial;
      o.immediate = std::find(kSpecials.begin(), kSpecials.end(), text) - kSpecials.begin();
    } else if (text[0] == '0' && std::strchr("fFdD", text.size() > 1 ? text[1] : ' ')) {
      o.kind = Operand::kImmediate;
      o.immediate = std::strtoull(text.c_str() + 2, nullptr, 16);
    } else if (std::isdigit(text[0]) || text[0] == '-') {
      o.kind = Operand::kImmediate;
      o.immediate = text[0] == '-' ? std::strtoll(text.c_str(), nullptr, 0)
                                   : std::strtoull(text.c_str(), nullptr, 0);
    } else if (text != "_") {
      o.kind = Operand::kSymbol;
    }
    return o;
  }

  string text_, skipped_;
  std::size_t at_ = 0;
  int line_ = 1;
  Kernel* kernel_ = nullptr;
  std::map<string, std::pair<std::size_t, std::size_t>> module_shared_;
  std::map<string, int> labels_;
  std::vector<std::map<string, int>> scopes_;
};

// ---- execution ---------------------------------------------------------------------------------

struct Access {  // the last one to a byte of shared memory
  int thread = -1;
  uint32_t barriers = 0, warp_syncs = 0;
};

class Execution {
 public:
  Execution(Kernel& kernel, dim3 grid, dim3 block, std::size_t dynamic, void** arguments)
      : kernel_(kernel),
        grid_(grid),
        block_(block),
        threads_(block.x * block.y * block.z),
        registers_(std::size_t(kernel.registers) * threads_),
        parameters_(kernel.parameter_bytes),
        dynamic_at_((kernel.shared_bytes + 127) / 128 * 128),
        shared_(dynamic ? dynamic_at_ + dynamic : kernel.shared_bytes),
        local_(kernel.local_bytes * threads_) {
    for (std::size_t i = 0; i < kernel.parameters.size(); ++i)
      std::memcpy(&parameters_[kernel.parameters[i].first], arguments[i],
                  kernel.parameters[i].second);
  }

  void run() {
    ++kernel_.counts.launches;
    for (index_.z = 0; index_.z < grid_.z; ++index_.z)
      for (index_.y = 0; index_.y < grid_.y; ++index_.y)
        for (index_.x = 0; index_.x < grid_.x; ++index_.x) run_block();
  }

 private:
  enum State : char { kRuns, kWaits, kReturned };

  void run_block() {
    pc_.assign(threads_, 0);
    state_.assign(threads_, kRuns);
    votes_.assign(threads_, 0);
    writes_.assign(shared_.size(), {});
    reads_.assign(shared_.size(), {});
    warp_syncs_.assign((threads_ + 31) / 32, 0);
    std::fill(shared_.begin(), shared_.end(), char(0xff));
    for (barriers_ = 0;; ++barriers_) {
      for (unsigned first = 0; first < threads_; first += 32) run_warp(first);
      std::vector<unsigned> waiting;
      for (unsigned t = 0; t < threads_; ++t)
        if (state_[t] == kWaits) waiting.push_back(t);
      if (waiting.empty()) return;
      release_barrier(waiting);
    }
  }

  void run_warp(unsigned first) {
    const unsigned last = std::min(first + 32, threads_);
    for (;;) {
      int pc = std::numeric_limits<int>::max();
      for (unsigned t = first; t < last; ++t)
        if (state_[t] == kRuns) pc = std::min(pc, pc_[t]);
      if (pc == std::numeric_limits<int>::max()) return;
      here_.clear();
      for (unsigned t = first; t < last; ++t)
        if (state_[t] == kRuns && pc_[t] == pc) here_.push_back(t);
      in_ = &kernel_.code.at(pc);
      ++kernel_.counts.warp_instructions;
      active_.clear();
      for (const unsigned t : here_) {
        ++pc_[t];
        if (in_->guard < 0 || (reg(in_->guard, t) & 1) != in_->guard_negated) active_.push_back(t);
      }
      if (!active_.empty()) execute();
    }
  }

  void release_barrier(const std::vector<unsigned>& waiting) {
    in_ = &kernel_.code[pc_[waiting[0]] - 1];
    uint64_t votes = 0;
    for (const unsigned t : waiting) {
      votes += votes_[t];
      if (pc_[t] != pc_[waiting[0]])
        error(t, "divergent barrier: others of the block wait at line " +
                     std::to_string(kernel_.code[pc_[waiting[0]] - 1].line));
    }
    for (const unsigned t : waiting) {
      if (in_->has("red"))
        set(in_->operands[0], t,
            in_->has("or")    ? votes > 0
            : in_->has("and") ? votes == waiting.size()
                              : votes);
      state_[t] = kRuns;
    }
  }

  void execute() {
    const Instruction& in = *in_;
    const auto& o = in.operands;
    if (in.lanewise) {
      for (const unsigned t : active_) {
        uint64_t words[4] = {};
        for (std::size_t i = 1; i < o.size(); ++i) words[i - 1] = get(o[i], t);
        const uint64_t result = in.lanewise(words);
        set(o[0], t, result);
        if (o[0].second >= 0) reg(o[0].second, t) = !result;
      }
      return;
    }
    switch (in.action) {
      case Action::kMove:
        for (const unsigned t : active_) move(in, t);
        break;
      case Action::kMemory:
        count_sectors();
        for (const unsigned t : active_) load_or_store(in, t, in.opcode == "st");
        break;
      case Action::kAtomic:
        for (const unsigned t : active_) atomic(in, t);
        break;
      case Action::kConvertAddress:  // generic addresses are those of the host
        for (const unsigned t : active_) {
          const uint64_t base = in.has("shared")  ? bits(shared_.data())
                                : in.has("local") ? bits(local(t))
                                                  : 0;
          set(o[0], t, in.has("to") ? get(o[1], t) - base : get(o[1], t) + base);
        }
        break;
      case Action::kBranch:
        for (const unsigned t : active_) pc_[t] = in.target;
        break;
      case Action::kReturn:
        for (const unsigned t : active_) state_[t] = kReturned;
        break;
      case Action::kBarrier:
        if (in.has("warp")) {
          check_members(0);
          ++warp_syncs_[active_[0] / 32];
          break;
        }
        for (const unsigned t : active_) {
          state_[t] = kWaits;
          votes_[t] = in.has("red") && get(o.back(), t) != 0;
        }
        break;
      case Action::kShuffle: shuffle(in); break;
      case Action::kCollective: collective(in); break;
      case Action::kActiveMask:
        for (const unsigned t : active_) set(o[0], t, lanes());
        break;
      case Action::kNothing: break;
      case Action::kUnknown: error(active_[0], "this instruction is not implemented");
    }
  }

  void move(const Instruction& in, unsigned t) {
    const Operand &to = in.operands[0], &source = in.operands[1];
    if (to.kind == Operand::kVector) {
      const int width = 8 * in.type().bytes / int(to.parts.size());
      for (std::size_t i = 0; i < to.parts.size(); ++i)
        set(to.parts[i], t, get(source, t) >> width * i & ((uint64_t{1} << width) - 1));
    } else if (source.kind == Operand::kVector) {
      const int width = 8 * in.type().bytes / int(source.parts.size());
      uint64_t value = 0;
      for (std::size_t i = 0; i < source.parts.size(); ++i)
        value |= get(source.parts[i], t) << width * i;
      set(to, t, value);
    } else {
      set(to, t, get(source, t));
    }
  }

  void load_or_store(const Instruction& in, unsigned t, bool store) {
    const Operand& value = in.operands[store];
    const int bytes = in.type().bytes;
    char* at = address(in, in.operands[!store], t, bytes * in.vector, store, !store, in.weak);
    for (int i = 0; i < in.vector; ++i, at += bytes) {
      const Operand& part = in.vector == 1 ? value : value.parts[i];
      uint64_t word = 0;
      if (store) {
        word = get(part, t);
        std::memcpy(at, &word, bytes);
      } else {
        std::memcpy(&word, at, bytes);
        if (in.type().kind == 's')
          word = with_type(in.type(), [&](auto zero) {
            return uint64_t(std::int64_t(from<decltype(zero)>(word)));
          });
        set(part, t, word);
      }
    }
  }

  void atomic(const Instruction& in, unsigned t) {
    const bool returns = in.opcode == "atom";
    const auto& o = in.operands;
    const int bytes = in.type().bytes;
    char* at = address(in, o[returns], t, bytes, true, true, false);
    uint64_t words[4] = {};
    std::memcpy(&words[0], at, bytes);
    words[1] = get(o[returns + 1], t);
    Instruction operation = in;
    for (const char* name : {"add", "min", "max", "and", "or", "xor"})
      if (in.has(name)) operation.opcode = name;
    uint64_t result = words[1];  // exch
    if (in.has("cas"))
      result = words[0] == words[1] ? get(o[3], t) : words[0];
    else if (const Lanewise compute = lanewise(operation))
      result = compute(words);
    else if (!in.has("exch"))
      error(t, "this instruction is not implemented");
    std::memcpy(at, &result, bytes);
    if (returns) set(o[0], t, words[0]);
  }

  // ---- collectives

  uint32_t lanes() const {
    uint32_t mask = 0;
    for (const unsigned t : active_) mask |= 1u << t % 32;
    return mask;
  }

  // Whether all lanes that the operand names as the mask are here.
  void check_members(std::size_t mask_operand) {
    const unsigned left = threads_ - active_[0] / 32 * 32;  // in this warp and the next ones
    const uint32_t here = lanes(), exist = left < 32 ? (1u << left) - 1 : ~0u;
    for (const unsigned t : active_) {
      const auto mask = uint32_t(get(in_->operands[mask_operand], t));
      if (!(mask >> t % 32 & 1)) error(t, "the calling lane is not in the mask");
      if (const uint32_t missing = mask & ~here & exist)
        error(t, "lane " + std::to_string(__builtin_ctz(missing)) + " of the mask takes no part");
    }
  }

  void shuffle(const Instruction& in) {
    const auto& o = in.operands;
    check_members(4);
    std::array<uint64_t, 32> values{};
    for (const unsigned t : active_) values[t % 32] = get(o[1], t);
    const uint32_t here = lanes();
    const bool up = in.has("up"), down = in.has("down"), butterfly = in.has("bfly");
    for (const unsigned t : active_) {
      const int lane = t % 32, by = get(o[2], t) & 31;
      const int clamp = get(o[3], t) & 31, segment = get(o[3], t) >> 8 & 31;
      const int low = lane & segment, high = low | (clamp & ~segment);
      const int source = up          ? lane - by
                         : down      ? lane + by
                         : butterfly ? lane ^ by
                                     : low | (by & ~segment);
      const bool inside = up ? source >= (lane & segment) : source <= high;
      const int read = inside ? source : lane;
      if (!(here >> read & 1))
        error(t, "reads lane " + std::to_string(read) + ", which takes no part");
      set(o[0], t, values[read]);
      if (o[0].second >= 0) reg(o[0].second, t) = inside;
    }
  }

  void collective(const Instruction& in) {
    const auto& o = in.operands;
    check_members(2);
    std::map<unsigned, uint64_t> values;
    uint32_t ballot = 0;
    for (const unsigned t : active_) {
      values[t] = get(o[1], t);
      ballot |= uint32_t(values[t] & 1) << t % 32;
    }
    Instruction step = in;  // of a reduction
    step.opcode = in.modifiers.size() > 1 ? in.modifiers[1] : "";
    const Lanewise combine = in.opcode == "redux" ? lanewise(step) : Lanewise{};
    uint64_t words[4] = {values[active_[0]]};
    for (std::size_t i = 1; combine && i < active_.size(); ++i) {
      words[1] = values[active_[i]];
      words[0] = combine(words);
    }
    for (const unsigned t : active_) {
      uint64_t result = words[0];
      if (in.opcode == "vote")
        result = in.has("ballot") ? ballot : in.has("any") ? ballot != 0 : ballot == lanes();
      if (in.opcode == "match") {
        result = 0;
        for (const auto& [other, value] : values)
          if (value == values[t]) result |= 1u << other % 32;
      }
      set(o[0], t, result);
    }
  }

  // ---- operands and memory

  uint64_t& reg(int r, unsigned t) { return registers_[std::size_t(r) * threads_ + t]; }

  uint64_t get(const Operand& o, unsigned t) {
    switch (o.kind) {
      case Operand::kRegister: return o.negated ? ~reg(o.reg, t) & 1 : reg(o.reg, t);
      case Operand::kImmediate: return o.immediate;
      case Operand::kSpecial: return special(o, t);
      case Operand::kSymbol: return symbol(o.name, t);
      default: return 0;
    }
  }
  void set(const Operand& o, unsigned t, uint64_t value) {
    if (o.kind == Operand::kRegister) reg(o.reg, t) = value;
  }

  uint64_t special(const Operand& o, unsigned t) const {
    const unsigned lane = t % 32;
    const uint64_t values[] = {t % block_.x,
                               t / block_.x % block_.y,
                               t / (block_.x * block_.y),
                               block_.x,
                               block_.y,
                               block_.z,
                               index_.x,
                               index_.y,
                               index_.z,
                               grid_.x,
                               grid_.y,
                               grid_.z,
                               lane,
                               t / 32,
                               (1u << lane) - 1,
                               (2u << lane) - 1,
                               ~((1u << lane) - 1),
                               ~((2u << lane) - 1)};
    if (o.immediate >= kSpecials.size()) error(t, "unknown special register " + o.name);
    return values[o.immediate];
  }

  uint64_t symbol(const string& name, unsigned t) {
    if (const auto found = kernel_.symbols.find(name); found != kernel_.symbols.end())
      return found->second.at;
    const auto found = globals.find(name);
    if (found == globals.end()) error(t, "unknown symbol " + name);
    return found->second.space == 'd' ? dynamic_at_ : found->second.at;
  }

  char* local(unsigned t) { return local_.data() + kernel_.local_bytes * t; }

  uint64_t where(const Operand& o, unsigned t) {
    return (o.reg >= 0 ? reg(o.reg, t) : symbol(o.name, t)) + o.immediate;
  }

  char* address(const Instruction& in, const Operand& o, unsigned t, std::size_t bytes, bool writes,
                bool reads, bool raced_for) {
    uint64_t at = where(o, t);
    if (at % bytes) error(t, "misaligned access");
    const auto within = [&](std::vector<char>& memory, uint64_t offset, std::size_t size) {
      if (offset + bytes > size)
        error(t, in.space + " memory: access at " + std::to_string(offset) + " of " +
                     std::to_string(size) + " bytes");
      return memory.data() + offset;
    };
    if (in.space == "param") return within(parameters_, at, parameters_.size());
    if (in.space == "local")
      return within(local_, at, kernel_.local_bytes) + (local(t) - local_.data());
    const uint64_t shared = bits(shared_.data());
    if (in.space == "shared" || (in.space.empty() && at - shared < shared_.size())) {
      const uint64_t offset = in.space == "shared" ? uint32_t(at) : at - shared;
      char* memory = within(shared_, offset, shared_.size());
      for (uint64_t byte = offset; byte < offset + bytes; ++byte)
        shared_access(t, byte, writes, reads, raced_for);
      return memory;
    }
    if (in.space.empty() && at - bits(local_.data()) < local_.size()) return from<char*>(at);
    auto next = allocations.upper_bound(at);
    if (next == allocations.begin()) error(t, "access outside of every allocation");
    const auto [start, size] = *--next;
    if (at + bytes > start + size)
      error(t, "access " + std::to_string(at - start) + " bytes into an allocation of " +
                   std::to_string(size));
    return from<char*>(at);
  }

  void shared_access(unsigned t, uint64_t byte, bool writes, bool reads, bool raced_for) {
    const Access now{int(t), barriers_, warp_syncs_[t / 32]};
    const auto unordered = [&](const Access& other) {
      return raced_for && other.thread >= 0 && other.thread != now.thread &&
             other.barriers == now.barriers &&
             (other.thread / 32 != now.thread / 32 || other.warp_syncs == now.warp_syncs);
    };
    Access &write = writes_[byte], &read = reads_[byte];
    if (reads && write.thread < 0) error(t, "reads shared memory that was never written");
    if (unordered(write))
      error(t, "race for shared memory with a write of thread " + std::to_string(write.thread));
    if (writes && unordered(read))
      error(t, "race for shared memory with a read of thread " + std::to_string(read.thread));
    if (writes) write = now;
    if (reads) read = now;
  }

  void count_sectors() {
    if (in_->space != "global") return;
    const std::size_t bytes = in_->type().bytes * in_->vector;
    std::vector<uint64_t> sectors;
    for (const unsigned t : active_) {
      const uint64_t at = where(in_->operands[in_->opcode != "st"], t);
      for (uint64_t sector = at / 32; sector <= (at + bytes - 1) / 32; ++sector)
        sectors.push_back(sector);
    }
    std::sort(sectors.begin(), sectors.end());
    kernel_.counts.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
    kernel_.counts.ideal_sectors += (active_.size() * bytes + 31) / 32;
  }

  [[noreturn]] void error(unsigned t, const string& message) const {
    std::ostringstream out;
    out << kernel_.name << ", line " << in_->line << ": " << in_->text << ": block (" << index_.x
        << ',' << index_.y << ',' << index_.z << ") thread " << t << ": " << message;
    throw std::runtime_error(out.str());
  }

  Kernel& kernel_;
  dim3 grid_, block_, index_{0, 0, 0};
  unsigned threads_;
  std::vector<uint64_t> registers_;
  std::vector<char> parameters_;
  std::size_t dynamic_at_;
  std::vector<char> shared_, local_;
  std::vector<int> pc_;
  std::vector<char> state_, votes_;
  std::vector<unsigned> here_, active_;
  const Instruction* in_ = nullptr;
  uint32_t barriers_ = 0;
  std::vector<uint32_t> warp_syncs_;
  std::vector<Access> writes_, reads_;
};

// Of a host stub, the kernel. Filled while other globals may still be uninitialised.
std::map<const void*, string>& functions() {
  static std::map<const void*, string> names;
  return names;
}
string last_error;

void load_modules() {
  static bool loaded = false;
  if (std::exchange(loaded, true)) return;
  const char* files = std::getenv("PTXRUN_PTX");
  for (const string& file : split(files ? files : "", ':')) Parser().file(file);
  if (std::getenv("PTXRUN_COUNTS"))
    std::atexit([] {
      for (const auto& [name, kernel] : kernels)
        if (const Counts& c = kernel.counts; c.launches)
          std::fprintf(stderr,
                       "%8lu launches %10lu warp-instructions %8lu sectors (at least %lu)  %s\n",
                       c.launches, c.warp_instructions, c.sectors, c.ideal_sectors, name.c_str());
    });
}

int architecture() {
  load_modules();
  return target;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments,
                   std::size_t shared) {
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  last_error = "invalid configuration";
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  try {
    load_modules();
    const auto kernel = kernels.find(functions().at(function));
    if (kernel == kernels.end())
      throw std::runtime_error("no PTX of " + functions().at(function) + " in PTXRUN_PTX");
    Execution(kernel->second, grid, block, shared, arguments).run();
    return cudaSuccess;
  } catch (const std::exception& error) {
    last_error = error.what();
    std::fprintf(stderr, "ptxrun: %s\n", error.what());
    return cudaErrorLaunchFailure;
  }
}

}  // namespace
}  // namespace ptxrun

// ---- the part of the runtime library that nvcc's host code and the tests call ------------------

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  ptxrun::functions()[host] = ptxrun::lasting_name(device);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
static std::tuple<dim3, dim3, size_t, cudaStream_t> configuration;  // between <<< and >>>
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  std::tie(*grid, *block, *shared, *static_cast<cudaStream_t*>(stream)) = configuration;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  return ptxrun::launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function,
                                void** arguments) {
  return ptxrun::launch(function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes);
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = ptxrun::allocate(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  ptxrun::allocations.erase(ptxrun::bits(memory));
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// CUB's device-wide algorithms ask for the architecture and for the size of the machine.
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? ptxrun::architecture() / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? ptxrun::architecture() % 10
           : attribute == cudaDevAttrMultiProcessorCount    ? 4
           : attribute == cudaDevAttrMaxGridDimX            ? 0x7fffffff
                                                            : 49152;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = ptxrun::architecture();
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ptxrun::last_error.c_str(); }
}
