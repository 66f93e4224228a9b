#include "bytes.h"
#include "grouped_linear/grouped_linear_kernel.h"

namespace torch_routers::fuzz {
namespace {

using std::int64_t;

template <class T> struct Inputs {
  int64_t groups, rows, outputs, inputs, x_stride, y_stride;
  int64_t weight_group, weight_output, weight_input;
  Array<int64_t> offsets;
  Array<T> x, y, weight;
  std::optional<Array<T>> bias;

  explicit Inputs(Bytes& bytes)
      : groups(bytes.size(1, 9)),
        rows(bytes.size(0, 40)),
        outputs(bytes.size(0, 140)),
        inputs(bytes.size(0, 140)),
        offsets(0),
        x(0),
        y(0),
        weight(0) {
    // More terms than one running sum takes, seldom.
    if (bytes.integer(0, 31) == 31) {
      (bytes.flag() ? inputs : rows) = bytes.integer(500, 1100);
      outputs = std::min<int64_t>(outputs, 20);
      (inputs < 500 ? inputs : rows) = bytes.size(0, 20);
    }
    offsets = bytes.offsets(groups, rows);
    x_stride = std::max<int64_t>(1, inputs + gap(bytes));
    y_stride = std::max<int64_t>(1, outputs + gap(bytes));
    // Either feature may be the dense one; torch's expand() gives strides of 0.
    const bool transposed = bytes.flag();
    const int64_t dense = transposed ? outputs : inputs, other = transposed ? inputs : outputs;
    const int64_t stride = bytes.integer(0, 7) ? std::max<int64_t>(1, dense + gap(bytes)) : 0;
    weight_output = transposed ? 1 : stride;
    weight_input = transposed ? stride : 1;
    weight_group = bytes.integer(0, 7) ? std::max<int64_t>(1, other) * stride : 0;

    const int64_t kind = bytes.kind(), weight_kind = bytes.kind();
    const int64_t last =
        std::max<int64_t>(rows, 1) - 1;  // a row of no group, where no group has any
    x = bytes.numbers<T>(inputs ? last * x_stride + inputs : 0, kind);
    y = bytes.numbers<T>(outputs ? last * y_stride + outputs : 0, weight_kind);
    weight = bytes.numbers<T>(
        outputs && inputs ? weight_at(groups - 1, outputs - 1, inputs - 1) + 1 : 0, weight_kind);
    if (bytes.flag()) bias = bytes.numbers<T>(groups * outputs, kind);
  }
  static int64_t gap(Bytes& bytes) { return bytes.flag() ? bytes.integer(0, 5) : 0; }
  int64_t weight_at(int64_t group, int64_t output, int64_t input) const {
    return group * weight_group + output * weight_output + input * weight_input;
  }
};

template <class T> struct Results {
  Array<T> y, result;

  Results(const Inputs<T>& in, Isa isa, double cut, unsigned char fill)
      : y(in.rows * in.outputs, fill), result(in.groups * in.outputs * in.inputs, fill) {
    const GroupedLinear<T> linear{in.outputs,       in.inputs,        in.offsets.data(),
                                  in.x.data(),      in.weight.data(), data(in.bias),
                                  y.data(),         in.x_stride,      in.weight_group,
                                  in.weight_output, in.weight_input};
    const GroupedOuter<T> outer{in.outputs,  in.inputs,     in.offsets.data(), in.y.data(),
                                in.x.data(), result.data(), in.y_stride,       in.x_stride};
    for (int64_t g = in.groups - 1; g >= 0; --g)
      in_parts(cut, in.outputs, [&](int64_t begin, int64_t end) {
        if (in.offsets[g] < in.offsets[g + 1])
          TORCH_ROUTERS_PICK_ISA(isa, grouped(linear, g, begin, end));
        TORCH_ROUTERS_PICK_ISA(isa, grouped(outer, g, begin, end));
      });
  }

  bool operator==(const Results&) const = default;
};

// The sum of term(i) in the order of each of the two loops.
template <class C, class Term> C dot(int64_t size, const Term& term) {
  constexpr int kSums = 64 / sizeof(C);
  C sums[kSums] = {};
  for (int64_t i = 0; i < size; ++i) sums[i % kSums] += term(i);
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}
template <class C, class Term> C broadcast(int64_t size, const Term& term) {
  C total = 0;
  for (int64_t begin = 0; begin < size; begin += 512) {
    C sum = 0;
    for (int64_t i = begin; i < std::min(begin + 512, size); ++i) sum += term(i);
    total += sum;
  }
  return total;
}

template <class T> void check_results(const Inputs<T>& in, const Results<T>& out) {
  using C = Compute<T>;
  const Array<T> y(in.rows * in.outputs), result(in.groups * in.outputs * in.inputs);
  for (int64_t g = 0; g < in.groups; ++g) {
    const int64_t first = in.offsets[g], past = in.offsets[g + 1];
    for (int64_t o = 0; o < in.outputs; ++o) {
      for (int64_t n = first; n < past; ++n) {
        const auto term = [&](int64_t i) {
          return load(in.x[n * in.x_stride + i]) * load(in.weight[in.weight_at(g, o, i)]);
        };
        const C sum =
            in.weight_input == 1 ? dot<C>(in.inputs, term) : broadcast<C>(in.inputs, term);
        store(&y[n * in.outputs + o],
              sum + (in.bias ? load((*in.bias)[g * in.outputs + o]) : C{0}));
      }
      for (int64_t i = 0; i < in.inputs; ++i)
        store(&result[(g * in.outputs + o) * in.inputs + i],
              broadcast<C>(past - first, [&](int64_t k) {
                return load(in.y[(first + k) * in.y_stride + o]) *
                       load(in.x[(first + k) * in.x_stride + i]);
              }));
    }
  }
  expect(out.y == y, "the products of a row and its group's weight, plus the bias");
  expect(out.result == result, "of each group the sum of its rows' outer products");
}

}  // namespace
}  // namespace torch_routers::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_routers::fuzz;
  Bytes bytes(data, size);
  bytes.pick_type([&]<class T>() {
    run_twice<Inputs<T>, Results<T>>(
        bytes, [](const auto& in, const auto& out) { check_results(in, out); });
  });
  return 0;
}
