"""What must hold around every operator's results: threads, processes, memory, bad arguments."""

import gc
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from test_ops import CASES, assert_same_bits, differentiable_inputs, function_of, gradients
from test_ops import samples_of as all_samples_of

CSRC = Path(__file__).parent.parent / "csrc"
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def everything(case, sample):
    """Results and gradients."""
    results = dict(case.call(*sample.args, **sample.options))
    inputs = differentiable_inputs(sample)
    if any(y.is_floating_point() for y in results.values()):
        for i, gradient in enumerate(gradients(function_of(case, sample), inputs)):
            results[f"gradient {i}"] = gradient
    return results


def samples_of(case, tokens=None):
    """All, or such with work for several threads, in the dtype that the operator is used in."""
    samples = case.sized(tokens) if tokens else all_samples_of(case)
    return [sample.to(torch.float32) for sample in samples]


sized = [case for case in CASES if case.sized]


# ---- a token alone -------------------------------------------------------------------------------

TOKENS = 257


def selections():
    """Subsets, permutations and concatenations of the tokens."""
    for size in 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257:
        yield torch.arange(TOKENS)[-size:] if size % 2 else torch.arange(size)
    yield torch.arange(TOKENS).flip(0)
    shuffled = torch.randperm(TOKENS)
    yield shuffled
    yield shuffled[:100]
    yield torch.cat([shuffled, torch.arange(TOKENS), shuffled[:3]])


def per_token(x):
    return isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == TOKENS


def of_tokens(case, sample, rows, names):
    """The results of these names, and gradients, of these tokens of the sample."""

    def take(x):
        return x[rows] if per_token(x) else x

    inputs = {
        i: take(x).requires_grad_()
        for i, x in enumerate(sample.args)
        if per_token(x) and x.is_floating_point()
    }
    args = [inputs.get(i, take(x)) for i, x in enumerate(sample.args)]
    options = {name: take(x) for name, x in sample.options.items()}
    results = {n: y for n, y in case.call(*args, **options).items() if n in names}
    weighted = [
        (y * torch.arange(1, y[0].numel() + 1).view(y.shape[1:]).sin()).sum()
        for y in results.values()
        if y.is_floating_point()
    ]
    if weighted:
        gradients = torch.autograd.grad(sum(weighted), inputs.values())
        results |= {f"gradient {i}": gradient for i, gradient in zip(inputs, gradients)}
    return results


@pytest.mark.parametrize("case", [case for case in CASES if case.per_token], ids=str)
def test_a_token_does_not_depend_on_the_others(case):
    for i, sample in enumerate(case.sized(TOKENS)):
        for dtype in case.dtypes[: 1 if i else None]:
            rounded = sample.to(dtype)
            results = case.call(*rounded.args, **rounded.options)
            names = {name for name, y in results.items() if per_token(y)}
            assert names
            together = of_tokens(case, rounded, torch.arange(TOKENS), names)
            for rows in selections():
                alone = of_tokens(case, rounded, rows, names)
                assert_same_bits(alone, {name: y[rows] for name, y in together.items()})


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sized, ids=str)
def test_the_number_of_threads_changes_no_bit(case):
    if not case.same_bits_on_every_isa:
        pytest.skip("torch's products")
    before = torch.get_num_threads()
    try:
        for sample in samples_of(case, 5000):
            torch.set_num_threads(1)
            expected = everything(case, sample)
            for threads in 2, 3, 4, 8:
                torch.set_num_threads(threads)
                for _ in range(2):
                    assert_same_bits(everything(case, sample), expected)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def crowded():
    """Python threads are often inside operators together: only there are they without its lock."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)  # longer in each
    sys.setswitchinterval(1e-6)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


@EVERY_CASE
def test_python_threads_do_not_disturb_each_other(case, crowded):
    large = samples_of(case, 5000) if case.sized else []
    samples = samples_of(case)[:20] + large * (40 // max(1, len(large)))
    serial = [everything(case, sample) for sample in samples]

    def work(start):
        for i in range(7 * start, 7 * start + 100):
            assert_same_bits(everything(case, samples[i % len(samples)]), serial[i % len(samples)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# ---- processes -----------------------------------------------------------------------------------


def run(program, *arguments, timeout=100):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


FORK = """
import multiprocessing, os, signal, sys, torch
from test_reliability import sized, samples_of, differentiable_inputs, function_of

def results_of(function, inputs):
    return [y for y in function(*inputs) if y.requires_grad]

torch.set_num_threads(4)
# Of torch's own functions, which do not work on, a child calls none.
todo = []
for case in sized:
    for sample in samples_of(case, 5000) if case.same_bits_on_every_isa else []:
        function, inputs = function_of(case, sample), differentiable_inputs(sample)
        cotangents = [torch.ones_like(y) for y in results_of(function, inputs)]
        todo.append((function, inputs, cotangents))

def use_all():
    for function, inputs, cotangents in todo:
        results = results_of(function, inputs)
        if results:
            torch.autograd.grad(results, inputs, cotangents)

def limited():
    signal.alarm(10)
    use_all()

use_all()
if sys.argv[1] == "fork":
    child = os.fork()
    if not child:
        limited()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
else:
    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join()
    status = process.exitcode
sys.exit(f"the child ended with {status}" if status else 0)
"""


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
def test_a_forked_child_works_on(how):
    result = run(FORK, how)
    assert result.returncode == 0, result.stderr


LEAKS = """
import ctypes, sys
from test_reliability import CASES, everything, samples_of

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

def memory():
    # What a leak of a few bytes takes may have been resident before: what is allocated tells.
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * 4096
    info = mallinfo()
    return resident, info.uordblks + info.hblkhd

case = next(case for case in CASES if case.name == sys.argv[1])
samples = samples_of(case)[:10]

def use(calls):
    for i in range(calls):
        everything(case, samples[i % len(samples)])

use(2000)
before = memory()
use(10000)
print(*(after - before for after, before in zip(memory(), before)))
"""


@pytest.mark.slow
@EVERY_CASE
def test_memory_does_not_grow(case):
    result = run(LEAKS, case.name, timeout=500)
    assert result.returncode == 0, result.stderr
    resident, allocated = map(int, result.stdout.split())
    assert resident < 2**20 and allocated < 2**16


@EVERY_CASE
def test_no_tensor_outlives_its_use(case):
    def live():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    samples = samples_of(case)
    some = samples[:: -(-len(samples) // 16)]  # of all kinds: they stand in order
    everything(case, samples[0])
    before = live()
    for sample in some:
        everything(case, sample)
    assert live() <= before  # fewer, where something of earlier tests went


# ---- bad arguments -------------------------------------------------------------------------------

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip


def spoiled(x):
    """A tensor that is not quite the one asked for, in many ways."""
    yield from (x.to(dtype) for dtype in DTYPES if dtype != x.dtype)
    yield x[None]
    yield x.flatten()
    for dim in range(x.dim()):
        yield x.select(dim, 0) if x.shape[dim] else x.sum(dim, dtype=x.dtype)
        yield x.narrow(dim, 0, 0)
        yield x.narrow(dim, 0, max(0, x.shape[dim] - 1))
        yield torch.cat([x, x], dim)
    if x.dtype == torch.int64:
        yield from (x - 1, x + 1, x.flip(0), -x, x + 2**40, torch.full_like(x, -(2**63)))
        for place in range(min(x.numel(), 4)):
            for value in -2, -1, 0, 10**6:
                changed = x.clone().flatten()
                changed[place] = value
                yield changed.view(x.shape)


def spoiled_arguments(args):
    """The arguments with one of them changed."""
    for i, x in enumerate(args):
        if isinstance(x, torch.Tensor):
            changes = (*spoiled(x.detach()), None)
        elif isinstance(x, list) and isinstance(x[0], torch.Tensor):
            changes = ([], x[:-1], *([first, *x[1:]] for first in spoiled(x[0].detach())))
        elif isinstance(x, list):
            changes = ([], x[:-1])
        elif isinstance(x, str):
            changes = ("no such", None)
        elif isinstance(x, int) and not isinstance(x, bool):
            changes = (-(2**62), -1, 0, 1, x + 1, 10**6)
        elif isinstance(x, float):
            changes = (float("nan"), -1.0, None)
        else:
            continue
        for change in changes:
            yield (*args[:i], change, *args[i + 1 :])


def complaints(case):
    """What the operators in C++ say of spoiled arguments; that they say it as they should."""
    for sample in all_samples_of(case):
        for overload, args in case.overloads(sample.to(case.dtypes[0])):
            args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            for wrong in spoiled_arguments(args):
                try:
                    with torch.no_grad():
                        overload(*wrong)
                except ValueError as error:
                    message = str(error).splitlines()[0]
                    name = overload._schema.name.removeprefix("torch_routers::")
                    assert re.match(rf"{name}: expected .+, got .+", message), message
                    yield message
                except (RuntimeError, AttributeError):  # None for what is not optional
                    assert any(x is None for x in wrong)


#: What helpers say of the argument that they are given the name of; of a shape, then its words.
SAID = {
    "check_dtype": (" in ",),
    "check_same_dtype": (" in the dtype of ",),
    "check_shape": (" of shape ",),
    **dict.fromkeys(("check_tensor", "check_integers", "check_gradient"), (" in ", " of shape ")),
    "check_offset_values": (" from 0 to ", " in ascending order"),
}


def checks():
    """The fixed parts of each message in the sources, by place."""
    sources = [CSRC.glob(f"*/*_{suffix}") for suffix in ("op.cpp", "check.h", "engine.h", "plan.h")]
    for path in sorted(itertools.chain(*sources)):
        text = path.read_text()
        for match in re.finditer(rf"\b(check|{'|'.join(SAID)})\(", text):
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            literals = re.findall(r'"((?:[^"\\]|\\.)*)"', text[match.end() : end])
            place = f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}"
            if match[1] == "check":
                yield place, [x for x in literals if " " in x]  # else one of several words
                continue
            named = re.match(r'((plan\.)?op,\s*)?"', text[match.end() :])
            name, words = (literals[0], literals[1:]) if named else ("", literals)
            for said in SAID[match[1]]:
                yield place, [f"expected {name}", said, *(words if said == " of shape " else ())]


def test_every_check_is_reached():
    said = {message for case in CASES for message in complaints(case)}
    missed = [
        f"{place} {' … '.join(literals)}"
        for place, literals in checks()
        if not any(re.search(".*".join(map(re.escape, literals)), message) for message in said)
    ]
    assert not missed
