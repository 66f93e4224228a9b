"""Every property of an operator, for every operator. A case is all that a new one adds."""

import itertools
import os
import subprocess
import sys
from functools import cache, partial

import pytest
import torch
from torch.testing import assert_close

import cases.ops
from torch_routers import env

CASES = cases.collect(cases.ops)
samples_of = cache(lambda case: list(case.samples()))


def all_samples(sample):
    return True


def smooth(sample):
    return sample.smooth


def finite_or_hidden(sample):
    """Neither NaN nor +inf among the scores, which by contract make NaN of their row."""
    return all((x < torch.inf).all() for x in differentiable_inputs(sample))


def finite(sample):
    return all(x.isfinite().all() for x in differentiable_inputs(sample))


def for_each(which=all_samples, *, cases=CASES, first=None, dtypes=False):
    """Parametrises a test by case and sample, and by the dtypes of the case where it has any."""
    names, values = "case, sample" + ", dtype" * dtypes, []
    for case in cases:
        for sample in itertools.islice(filter(which, samples_of(case)), first):
            of_sample = case.dtypes if differentiable_inputs(sample) else case.dtypes[:1]
            for dtype in of_sample if dtypes else [None]:
                id = f"{case}-{sample.name}" + (f"-{str(dtype).split('.')[1]}" if dtypes else "")
                values.append(pytest.param(case, sample, *[dtype] * dtypes, id=id))
    return pytest.mark.parametrize(names, values)


def differentiable_inputs(sample):
    return [
        x.clone().requires_grad_()
        for x in sample.args
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]


def function_of(case, sample, *, call=None):
    """The case as a function of its differentiable inputs to its differentiable results."""

    def function(*inputs):
        inputs = iter(inputs)
        args = [
            next(inputs) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in sample.args
        ]
        results = (call or case.call)(*args, **sample.options)
        return tuple(y for y in results.values() if y.is_floating_point())

    return function


def full_precision(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_sum(outputs):
    """A scalar in which every element of every result counts differently."""
    return sum((y * torch.arange(1, y.numel() + 1).view(y.shape).sin()).sum() for y in outputs)


def gradients(function, inputs):
    """Zero where the results do not depend on an input."""
    if not inputs:
        return ()
    total = weighted_sum(function(*inputs)) + sum(0 * x.nan_to_num(0, 0, 0).sum() for x in inputs)
    return torch.autograd.grad(total, inputs)


def bits(x):
    """All of them; every NaN has the same."""
    x = x.where(~x.isnan(), torch.nan) if x.is_floating_point() else x
    return x.contiguous().flatten().view(torch.uint8)


def assert_same_bits(actual, expected):
    for name in expected:
        x, y = actual[name], expected[name]
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert torch.equal(bits(x), bits(y)), name


# ---- values --------------------------------------------------------------------------------------


@for_each(dtypes=True)
def test_equals_the_reference(case, sample, dtype):
    rounded = sample.to(dtype)
    actual = case.call(*rounded.args, **rounded.options)
    exact = rounded.to(torch.float64)  # of the rounded inputs: an exact result to compare with
    expected = case.reference(*exact.args, **exact.options)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name]
        if not x.is_floating_point():
            assert torch.equal(x, y), name
            continue
        expected_dtype = full_precision(dtype) if case.results_in_full_precision else dtype
        assert x.dtype == expected_dtype and x.shape == y.shape, name
        size = max([torch.finfo(expected_dtype).tiny, *y[y.isfinite()].abs().flatten().tolist()])
        atol = case.tolerance(sample) * torch.finfo(expected_dtype).eps * size
        assert_close(
            x.double(), y, rtol=0, atol=atol, equal_nan=True, msg=partial("{}: {}".format, name)
        )


@for_each()
def test_results_do_not_depend_on_memory_layout(case, sample):
    def strided(x):
        """The same values, with gaps between them, in the opposite order of dimensions."""
        reversed_dims = tuple(range(x.dim()))[::-1]
        padded = torch.stack([x, torch.zeros_like(x)], -1).permute(-1, *reversed_dims)
        return padded.contiguous()[0].permute(reversed_dims)

    sample = sample.to(case.dtypes[0])
    expected = case.call(*sample.args, **sample.options)
    actual = case.call(*sample.map(strided).args, **sample.options)
    if case.same_bits_on_every_isa:
        assert_same_bits(actual, expected)
    else:
        assert_close(actual, expected)


@for_each()
def test_inputs_are_not_modified(case, sample):
    before = sample.map(torch.clone)
    sample_inputs = [x for x in sample.args if isinstance(x, torch.Tensor)]
    case.call(*sample.args, **sample.options)
    copies = [x for x in before.args if isinstance(x, torch.Tensor)]
    assert all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(sample_inputs, copies))
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(sample_inputs, copies))


# ---- derivatives ---------------------------------------------------------------------------------


@for_each(smooth)
def test_derivatives(case, sample):
    inputs, function = differentiable_inputs(sample), function_of(case, sample)
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=False
    )
    # Along one direction: test_transforms compares every second derivative of the first input.
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@for_each(finite)
def test_gradients_equal_those_of_the_reference(case, sample):
    inputs = differentiable_inputs(sample)
    actual = gradients(function_of(case, sample), inputs)
    expected = gradients(function_of(case, sample, call=case.reference), inputs)
    for x, y in zip(actual, expected):
        scale = max(1.0, float(y.abs().max())) if y.numel() else 1.0
        assert_close(x, y, rtol=0, atol=1e-12 * scale)


@for_each(finite_or_hidden)
def test_gradients_are_finite(case, sample):
    inputs = differentiable_inputs(sample.to(case.dtypes[0]))
    function = function_of(case, sample.to(case.dtypes[0]))
    outputs = [y.where(y.isfinite(), 0) for y in function(*inputs)]
    for gradient in gradients(lambda *_: outputs, inputs):
        assert gradient.isfinite().all()


TRANSFORMS = {
    "vmap": lambda f, xs: torch.func.vmap(f)(*(torch.stack([x, 2 * x, x / 2]) for x in xs)),
    "vmap last dimension": lambda f, xs: torch.func.vmap(f, in_dims=-1)(
        *(torch.stack([x, 2 * x], -1) for x in xs)
    ),
    "grad": lambda f, xs: torch.func.grad(lambda x: weighted_sum(f(x, *xs[1:])))(xs[0]),
    "vmap of grad": lambda f, xs: torch.func.vmap(
        torch.func.grad(lambda x: weighted_sum(f(x, *xs[1:])))
    )(torch.stack([xs[0], 2 * xs[0]])),
    "jacrev": lambda f, xs: torch.func.jacrev(f)(*xs),
    "jacfwd": lambda f, xs: torch.func.jacfwd(f)(*xs),
    "jvp": lambda f, xs: torch.func.jvp(f, tuple(xs), tuple(x.cos() for x in xs))[1],
    "hessian": lambda f, xs: torch.func.hessian(lambda x: weighted_sum(f(x, *xs[1:])).sin())(xs[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@for_each(smooth)
def test_transforms(case, sample, transform):
    inputs = [x.detach() for x in differentiable_inputs(sample)]
    actual = transform(function_of(case, sample), inputs)
    if "vmap" in transform.__code__.co_names:
        # The loops of a reference cannot be mapped over; the calls one by one are the reference.
        expected = one_by_one(transform, case, sample, inputs)
    else:
        expected = transform(function_of(case, sample, call=case.reference), inputs)
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@for_each(smooth, first=1)
def test_forward_mode_over_itself_is_refused(case, sample):
    """Torch drops mixed second derivatives of any ``autograd.Function`` there."""
    inputs = [x.detach() for x in differentiable_inputs(sample)]
    function = function_of(case, sample)
    with pytest.raises(NotImplementedError, match="at most one level of forward mode, got 2"):
        torch.func.jacfwd(torch.func.jacfwd(lambda x: weighted_sum(function(x, *inputs[1:]))))(
            inputs[0]
        )


def one_by_one(transform, case, sample, inputs):
    """``transform`` with torch.func.vmap replaced by a loop, on the reference."""
    vmap = torch.func.vmap

    def loop(f, in_dims=0):
        def mapped(*xs):
            results = [f(*(x.select(in_dims, i) for x in xs)) for i in range(xs[0].shape[in_dims])]
            if isinstance(results[0], tuple):
                return tuple(torch.stack(parts) for parts in zip(*results))
            return torch.stack(results)

        return mapped

    try:
        torch.func.vmap = loop
        return transform(function_of(case, sample, call=case.reference), inputs)
    finally:
        torch.func.vmap = vmap


# ---- registration, compilation, export -----------------------------------------------------------


def opcheck(case, sample, *utilities):
    sample = sample.to(torch.float32)
    for overload, args in case.overloads(sample):
        args = tuple(
            x.clone().requires_grad_()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for x in args
        )
        torch.library.opcheck(overload, args, test_utils=utilities)


@for_each()
def test_opcheck(case, sample):
    opcheck(case, sample, "test_schema", "test_autograd_registration", "test_faketensor")


@for_each(smooth, first=2)
def test_opcheck_of_compilation(case, sample):
    opcheck(case, sample, "test_aot_dispatch_dynamic")


def test_every_operator_is_checked():
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("torch_routers::")
    }
    checked = {
        overload._schema.name
        for case in CASES
        for sample in samples_of(case)
        for overload, _ in case.overloads(sample)
    }
    # Those in Python, which are tested where they are used.
    elsewhere = {f"torch_routers::{name}" for name in ("_read_after", "_add_after", "_count")}
    assert registered - checked == elsewhere


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@for_each(smooth, first=4)
def test_compiles(case, sample, dynamic):
    inputs, function = differentiable_inputs(sample), function_of(case, sample)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x, y in zip(compiled(*inputs), function(*inputs)):
        assert torch.equal(x, y)
    for x, y in zip(gradients(compiled, inputs), gradients(function, inputs)):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs)[0], function(*inputs)[0])


@for_each(smooth, first=1)
def test_compiles_with_inductor(case, sample):
    inputs, function = differentiable_inputs(sample), function_of(case, sample)
    compiled = torch.compile(function, fullgraph=True)
    assert_close(compiled(*inputs), function(*inputs))
    assert_close(gradients(compiled, inputs), gradients(function, inputs))


@for_each(smooth)
def test_exports(case, sample):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return function_of(case, sample)(*inputs)

    inputs = tuple(x.detach() for x in differentiable_inputs(sample))
    program = torch.export.export(Module(), inputs)
    for x, y in zip(program.module()(*inputs), Module()(*inputs)):
        assert torch.equal(x, y)


# ---- transforms of operators that have no derivative --------------------------------------------

#: None of their samples is smooth, so that they are in none of the tests above that need one.
CONSTANT = [case for case in CASES if not any(map(smooth, samples_of(case)))]


def function_of_tensors(case, sample):
    """The case as a function of its tensors, and those."""

    def function(*tensors):
        tensors = iter(tensors)
        args = [next(tensors) if isinstance(x, torch.Tensor) else x for x in sample.args]
        return tuple(case.call(*args, **sample.options).values())

    return function, [x for x in sample.args if isinstance(x, torch.Tensor)]


@for_each(cases=CONSTANT)
def test_vmap_is_one_by_one(case, sample):
    function, tensors = function_of_tensors(case, sample)
    batch = [torch.stack([x, x.flip(0)]) for x in tensors]
    expected = [torch.stack(parts) for parts in zip(*(function(*xs) for xs in zip(*batch)))]
    assert_close(torch.func.vmap(function)(*batch), tuple(expected), rtol=0, atol=0)
    last = [x.movedim(0, -1) for x in batch]
    assert_close(torch.func.vmap(function, in_dims=-1)(*last), tuple(expected), rtol=0, atol=0)


@for_each(cases=CONSTANT)
def test_is_a_constant_to_derivatives(case, sample):
    function, tensors = function_of_tensors(case, sample)
    expected = function(*tensors)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
    assert not any(y.requires_grad for y in function(*inputs))

    def scaled(factor):
        results = function(*(x * factor if x.is_floating_point() else x for x in tensors))
        return factor, results

    one = torch.ones((), dtype=torch.float64)
    _, results = torch.func.grad(scaled, has_aux=True)(one)
    assert_close(results, expected, rtol=0, atol=0)
    (_, results), (_, tangents) = torch.func.jvp(scaled, (one,), (one,))
    assert_close(results, expected, rtol=0, atol=0)
    assert not any(x.any() for x in tangents)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@for_each(cases=CONSTANT, first=4)
def test_compiles_as_a_constant(case, sample, dynamic):
    function, tensors = function_of_tensors(case, sample)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_close(compiled(*tensors), function(*tensors), rtol=0, atol=0)


@for_each(cases=CONSTANT, first=1)
def test_compiles_as_a_constant_with_inductor(case, sample):
    function, tensors = function_of_tensors(case, sample)
    compiled = torch.compile(function, fullgraph=True)
    assert_close(compiled(*tensors), function(*tensors), rtol=0, atol=0)
    opcheck(case, sample, "test_aot_dispatch_dynamic")


@for_each(cases=CONSTANT, first=4)
def test_exports_as_a_constant(case, sample):
    function, tensors = function_of_tensors(case, sample)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    program = torch.export.export(Module(), tuple(tensors))
    assert_close(program.module()(*tensors), function(*tensors), rtol=0, atol=0)


# ---- bits ----------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
from test_ops import bits_of, env
assert env.report()["instruction set"] == sys.argv[1]
results = {}
for threads in 1, 2, 3, 4, 8:
    torch.set_num_threads(threads)
    results[threads] = bits_of(torch.load(sys.argv[2], weights_only=False))
torch.save(results, sys.argv[3])
"""


def bits_of(todo):
    """Of all results and gradients of the operators of these names for these samples."""
    tensors = []
    for name, samples in todo:
        case = next(case for case in CASES if case.name == name)
        for sample in samples:
            tensors += case.call(*sample.args, **sample.options).values()
            tensors += gradients(function_of(case, sample), differentiable_inputs(sample))
    return torch.cat([bits(x) for x in tensors])


@pytest.mark.parametrize("capability", env.report()["instruction sets"])
def test_same_bits(capability, tmp_path):
    """On every instruction set and for every number of threads."""
    todo = [
        (case.name, [s.to(dtype) for dtype in case.dtypes for s in samples_of(case)])
        for case in CASES
        if case.same_bits_on_every_isa
    ]
    torch.save(todo, tmp_path / "samples")  # made once: torch's own functions differ
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ATEN_CPU_CAPABILITY": capability,
    }
    command = [sys.executable, "-c", PROGRAM, capability, tmp_path / "samples", tmp_path / "bits"]
    subprocess.run(command, env=environment, check=True, timeout=120)
    expected = bits_of(todo)
    for threads, actual in torch.load(tmp_path / "bits").items():
        assert torch.equal(actual, expected), threads


# ---- errors --------------------------------------------------------------------------------------

ERRORS = [
    pytest.param(case, error, device, id=f"{case}-{error.name}-{device}")
    for case in CASES
    for error in case.errors()
    for device in ["cpu", "meta"]
    if error.static or device == "cpu"  # some are known from the data alone
]


@pytest.mark.parametrize("case, error, device", ERRORS)
def test_says_what_is_wrong(case, error, device):

    def move(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    options = {name: move(value) for name, value in error.options.items()}
    with pytest.raises(ValueError) as info:
        case.call(*map(move, error.args), **options)
    assert str(info.value).splitlines()[0] == error.message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refuses_sparse_tensors(case):
    sample = samples_of(case)[0].to(torch.float32)
    with pytest.raises((NotImplementedError, RuntimeError)):
        case.call(sample.args[0].to_sparse(), *sample.args[1:], **sample.options)


# ---- CUDA ----------------------------------------------------------------------------------------

HAS_CUDA = torch.cuda.is_available() and env.report()["CUDA kernels"] is not None
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")


@needs_cuda
@for_each(dtypes=True, first=None if HAS_CUDA else 1)
def test_cuda_equals_cpu(case, sample, dtype):
    sample = sample.to(dtype)
    options = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in sample.options.items()}
    actual = case.call(*sample.map(torch.Tensor.cuda).args, **options)
    for name, y in case.call(*sample.args, **sample.options).items():
        if y.is_floating_point():
            rtol = case.tolerance(sample) * torch.finfo(dtype).eps
            assert_close(actual[name].cpu(), y, rtol=rtol, atol=rtol, equal_nan=True)
        else:
            assert torch.equal(actual[name].cpu(), y), name


@needs_cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_says_that_devices_differ(case):
    def has_more_tensors(s):
        return any(isinstance(x, torch.Tensor) for x in (s.args[-1], *s.options.values()))

    sample = next(filter(has_more_tensors, samples_of(case)))
    *args, last = sample.to(torch.float32).args
    last = last.cuda() if isinstance(last, torch.Tensor) else last
    options = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in sample.options.items()}
    with pytest.raises(ValueError, match="expected all tensors on cpu, got one on cuda:0"):
        case.call(*args, last, **options)
