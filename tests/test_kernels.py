"""The CPU's kernel: random and hostile inputs, sanitizers, and where its builds are kept."""

import ctypes
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from importlib import resources
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deformable_detr import ms_deform_attn
from deformable_detr.ops import BackendError, cpu
from deformable_detr.ops.build import build, compiler, machine, native, sources
from deformable_detr.ops.cache import (
    cache_folder,
    refuse_unsafe,
    temporary_folder,
    unmapped_root,
)
from deformable_detr.ops.checks import WIDEST
from tests import fuzz
from tests.oracle import SHAPES, make_inputs

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
MACROS = {"VALUE": "float", "REAL": "float", "OFFSET": "int", "D": 1, "POINTS": 1}
QUICK = ("-O0",)


@st.composite
def cases(draw):
    specification = draw(st.sampled_from(fuzz.SPECIFICATIONS))
    dtype, _, L, _ = specification
    halves = (None, torch.float16, torch.bfloat16) if dtype == torch.float32 else (None,)
    side = st.integers(1, 9)
    return fuzz.Case(
        specification,
        B=draw(st.integers(0, 3)),
        Q=draw(st.integers(0, 30)),
        M=draw(st.integers(1, 4)),
        shapes=tuple(draw(st.lists(st.tuples(side, side), min_size=L, max_size=L))),
        seed=draw(st.integers(0, 2**31 - 1)),
        hostile=draw(st.sampled_from((0, 0.2, 1))),
        edges=draw(st.sampled_from((0, 0.3, 1))),
        strided=draw(st.booleans()),
        half=draw(st.sampled_from(halves)),
        threads=draw(st.integers(1, 3)),
    )


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_backends_agree(case):
    fuzz.check(case)


def test_fuzz_for_five_seconds():
    assert fuzz.fuzz(5, seed=0) > 0


def test_fuzz_finds_a_wrong_kernel(monkeypatch):
    """Locations moved by a tenth of a pixel do not go unseen."""
    forward = cpu.forward

    def wrong(value, shapes, locations, weights):
        return forward(value, shapes, locations + 0.1 / shapes[0][1], weights)

    monkeypatch.setattr(cpu, "forward", wrong)
    with pytest.raises(AssertionError, match=r"cpu, output: off by \d+ roundings: Case"):
        fuzz.fuzz(5, seed=0)


coordinate = st.floats(width=32) | st.sampled_from((*fuzz.NOWHERE, 0.0, -0.0, 1.0, 1e-45))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(coordinate, min_size=12, max_size=12))
def test_any_coordinates_give_finite_numbers_within_bounds(coordinates):
    """Bilinear weights are at most 1 together: no output exceeds the sum of attention."""
    value = torch.ones(1, 6 + 8 + 1, 1, 4).requires_grad_()
    locations = torch.tensor(coordinates).reshape(1, 1, 1, 3, 2, 2).requires_grad_()
    weights = torch.full((1, 1, 1, 3, 2), 1 / 6).requires_grad_()
    shapes = [(2, 3), (8, 1), (1, 1)]
    output = ms_deform_attn(value, shapes, locations, weights, backend="cpu")
    output.sum().backward()
    assert (output >= 0).all() and (output <= 1 + 1e-6).all()
    for x in (value, locations, weights):
        assert x.grad.isfinite().all()
    outside = ~(locations.detach() > -1).all(-1) | ~(locations.detach() < 2).all(-1)
    assert not weights.grad[outside].any() and not locations.grad[outside].any()


def test_offsets_of_64_bits_give_the_same_bits(monkeypatch):
    inputs = make_inputs(Q=40, D=4, dtype=torch.float32)
    shapes, load = list(SHAPES), cpu.load
    narrow = cpu.forward(inputs[0], shapes, *inputs[1:])
    grads = cpu.backward(inputs[0], shapes, *inputs[1:], narrow)
    asked = []

    def wide(dtype, D, points, huge):
        asked.append(huge)
        return load(dtype, D, points, True)

    monkeypatch.setattr(cpu, "load", wide)
    assert torch.equal(cpu.forward(inputs[0], shapes, *inputs[1:]), narrow)
    assert all(map(torch.equal, cpu.backward(inputs[0], shapes, *inputs[1:], narrow), grads))
    assert asked == [False, False]


def test_64_bits_are_used_where_sizes_need_them(monkeypatch):
    """An image's value of 2^31 elements, all of them one number in memory."""
    value = torch.zeros(1, 1, 1, 1).expand(1, 2**16, 2**13, 4)
    locations, weights = torch.zeros(1, 1, 2**13, 1, 1, 2), torch.zeros(1, 1, 2**13, 1, 1)
    load = Mock(side_effect=NotImplementedError)
    monkeypatch.setattr(cpu, "load", load)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x)
    with pytest.raises(NotImplementedError):
        cpu.forward(value, [(2**8, 2**8)], locations, weights)
    load.assert_called_once_with(torch.float32, 4, 1, True)


# Sanitizers: a program of cpu.cpp and this, whose arrays end where their memory ends.

DRIVER = """
#include "cpu.cpp"
#include <cstdio>
#include <limits>
#include <random>

int main(int argc, char** argv) {
    const int M = 3, images = 2, height[2] = {3, 5}, width[2] = {7, 2};
    const int tokens = 3 * 7 + 5 * 2 + (argc > 1 ? 4 : 0);  // an argument: more than there are
    const REAL infinity = std::numeric_limits<REAL>::infinity();
    const REAL hostile[] = {NAN, infinity, -infinity, 1e30, -1e30, 0, 1, (REAL)-0.1, (REAL)1.1,
                            std::numeric_limits<REAL>::max(), std::numeric_limits<REAL>::lowest()};
    std::mt19937 random(0);
    auto fill = [&](auto& x) {
        for (size_t i = 0; i < x.size(); i += VECTOR) {
            Vector numbers;
            for (int j = 0; j < VECTOR; j++) numbers[j] = random() / 2147483648. - 0.5;
            store(&x[i], numbers);
        }
    };
    Levels levels;
    for (int p = 0; p < POINTS; p++) {
        int level = p % 2;
        levels.height[p] = height[level], levels.width[p] = width[level];
        levels.start[p] = level * 3 * 7;
    }
    double sum = 0;
    for (int queries : {1, 4, 40})
        for (int threads : {1, 3}) {
            size_t items = (size_t)images * queries * M;
            std::vector<VALUE> value((size_t)images * (3 * 7 + 5 * 2) * M * D);
            std::vector<VALUE> gradient(value.size()), output(items * D);
            std::vector<REAL> locations(items * POINTS * 2), weights(items * POINTS);
            std::vector<REAL> place(locations.size()), weight(weights.size());
            fill(value);
            for (auto* array : {&locations, &weights})
                for (REAL& x : *array) x = random() / 2147483648. - 0.5;
            for (REAL& x : locations) if (random() % 4 == 0) x = hostile[random() % 11];
            forward(value.data(), &levels, locations.data(), weights.data(), output.data(), images,
                    tokens, queries, M, threads);
            backward(value.data(), &levels, locations.data(), weights.data(), output.data(),
                     gradient.data(), place.data(), weight.data(), images, tokens, queries, M,
                     threads);
            for (auto* array : {&place, &weight})
                for (REAL x : *array) sum += x;
            for (auto* array : {&output, &gradient})
                for (size_t i = 0; i < array->size(); i += VECTOR) {
                    Vector numbers = load(array->data() + i);
                    for (int j = 0; j < VECTOR; j++) sum += numbers[j];
                }
        }
    for (int begin = 1; begin < 9; begin++) {
        std::vector<REAL> row(40, 1);
        clear(row.data() + begin, row.data() + 39, true);
        for (int i = 0; i < 40; i++) if (row[i] != (i < begin || i == 39)) sum = NAN;
    }
    printf("%s", std::isfinite(sum) ? "finite" : "not finite");
}
"""


@pytest.mark.parametrize(
    ("value", "real", "D", "offset"),
    [
        ("float", "float", 7, "int"),
        ("double", "double", 8, "long long"),
        ("Half", "float", 16, "int"),
        ("BFloat16", "float", 6, "int"),
    ],
)
def test_sanitizers_find_nothing(tmp_path, value, real, D, offset):
    source, program = tmp_path / "driver.cpp", tmp_path / "driver"
    source.write_text(DRIVER)
    macros = {"VALUE": value, "REAL": real, "OFFSET": offset, "D": D, "POINTS": 6}
    with resources.as_file(resources.files("deformable_detr.kernels")) as kernels:
        command = [*compiler(), "-std=c++17", "-O1", "-g", "-pthread", f"-I{kernels}"]
        command += [
            native(),
            "-fsanitize=address,undefined,float-cast-overflow",
            "-fno-sanitize-recover=all",
        ]
        command += [f"-D{name}={x}" for name, x in macros.items()]
        built = subprocess.run(
            [*command, str(source), "-o", str(program)], capture_output=True, text=True
        )
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    clean = subprocess.run([str(program)], capture_output=True, text=True)
    assert (clean.returncode, clean.stdout) == (0, "finite"), clean.stderr
    beyond = subprocess.run([str(program), "beyond"], capture_output=True, text=True)
    assert beyond.returncode and "heap-buffer-overflow" in beyond.stderr  # they do look


# Where builds are kept.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of its own for builds, not made yet; nothing remembered from other tests."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DEFORMABLE_DETR_CACHE", str(folder))
    remembered = cache_folder, temporary_folder, cpu.load, compiler, machine
    for function in remembered:
        function.cache_clear()
    yield folder
    if temporary_folder.results:
        shutil.rmtree(temporary_folder(), ignore_errors=True)
    for function in remembered:
        function.cache_clear()


def build_together(barrier, paths):
    barrier.wait(timeout=60)
    paths.put(str(build(MACROS, QUICK)))


def test_several_processes_build_at_once(cache):
    fork = multiprocessing.get_context("fork")
    barrier, paths = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=build_together, args=(barrier, paths)) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        for process in processes:
            process.start()
    found = {paths.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert [str(path) for path in cache.iterdir()] == list(found)  # one library, nothing left over
    tensors = (
        torch.tensor([3.0]),  # value
        cpu.levels(((1, 1),), 1),
        torch.tensor([0.5, 0.5]),  # the one pixel's centre
        torch.tensor([2.0]),
        torch.zeros(1),
    )
    ctypes.CDLL(*found).forward(*cpu.pointers(*tensors), *cpu.sizes(1, 1, 1, 1), 1)
    assert tensors[-1].item() == 6


def test_a_build_is_kept_and_read_again(cache, monkeypatch):
    first = build(MACROS, QUICK)
    made = first.stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("built again"))
    assert build(MACROS, QUICK) == first and first.stat().st_mtime_ns == made


def test_umask_opens_nothing_to_the_group(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("DEFORMABLE_DETR_CACHE", str(tmp_path / "home" / "cache" / "kernels"))
    before = os.umask(0o002)
    try:
        library = build(MACROS, QUICK)
    finally:
        os.umask(before)
    for path in (library, *library.parents[:3]):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(BackendError, match=r"other users can write to .*; `chmod go-w`"):
        build(MACROS, QUICK)
    assert not list(cache.iterdir())


def test_a_folder_inside_one_that_others_can_write_to_is_refused(tmp_path, cache, monkeypatch):
    outer = tmp_path / "outer"
    (outer / "cache").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("DEFORMABLE_DETR_CACHE", str(outer / "cache"))
    outer.chmod(0o777)
    with pytest.raises(BackendError, match=f"can write to {outer};"):
        cache_folder()
    outer.chmod(0o1777)  # as /tmp: others cannot replace what is ours
    assert cache_folder() == (outer / "cache").resolve()


def test_another_users_folder_is_refused(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(cache, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BackendError, match=r"kernels are not loaded from .*: user \d+ owns"):
        build(MACROS, QUICK)


def test_a_library_that_others_can_write_to_is_not_loaded(cache):
    build(MACROS, QUICK).chmod(0o775)
    with pytest.raises(BackendError, match=r"can write to .*\.so;"):
        build(MACROS, QUICK)


@pytest.mark.parametrize("why", ["read-only", "a file", "no home"])
def test_without_a_place_to_write_builds_go_to_a_private_folder(tmp_path, cache, monkeypatch, why):
    monkeypatch.delenv("DEFORMABLE_DETR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if why == "read-only":  # root may write to what says it is
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    elif why == "a file":
        (tmp_path / ".cache").write_text("")
    else:
        monkeypatch.setattr(Path, "home", lambda: Path("~nobody-of-this-name").expanduser())
    library = build(MACROS, QUICK)
    assert tmp_path not in library.parents
    assert library.parent.stat().st_mode & 0o077 == 0
    assert build(MACROS, QUICK) == library
    ctypes.CDLL(str(library))


@pytest.fixture
def no_home(cache, tmp_path, monkeypatch):
    """Nowhere to keep builds but a temporary folder."""
    monkeypatch.delenv("DEFORMABLE_DETR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").write_text("")


def in_threads(function, count=4):
    """What `function` returns in threads that start it together."""
    barrier, found = threading.Barrier(count), []

    def ask():
        barrier.wait(timeout=60)
        found.append(function())

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    return found


def test_threads_share_one_temporary_folder(no_home, monkeypatch):
    make = tempfile.mkdtemp
    slow = lambda **options: time.sleep(0.05) or make(**options)  # noqa: E731
    monkeypatch.setattr(tempfile, "mkdtemp", slow)
    found = in_threads(cache_folder)
    assert len(set(found)) == 1 and found[0].is_dir()


def test_threads_share_one_build(cache, monkeypatch):
    built = []
    made = build(MACROS, QUICK)

    def slow_build(*_):
        built.append(time.sleep(0.05))
        return made

    monkeypatch.setattr(cpu, "build", slow_build)
    assert len({id(x) for x in in_threads(lambda: cpu.load(torch.float32, 1, 1, False))}) == 1
    assert len(built) == 1


def test_a_loaded_kernel_does_not_wait_for_another_build(cache, monkeypatch):
    loaded = cpu.load(torch.float32, 1, 1)
    begun, go_on = threading.Event(), threading.Event()

    def slow_build(*_):
        begun.set()
        assert go_on.wait(60)
        return made

    made = build(MACROS, QUICK)
    monkeypatch.setattr(cpu, "build", slow_build)
    other = threading.Thread(target=cpu.load, args=(torch.float32, 2, 1))
    other.start()
    assert begun.wait(60)
    assert cpu.load(torch.float32, 1, 1) is loaded  # would else wait until the test is stopped
    go_on.set()
    other.join()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads
def test_a_fork_during_a_build_can_load(cache, monkeypatch):
    begun = threading.Event()
    made = build(MACROS, QUICK)

    def slow_build(*_):
        begun.set()
        time.sleep(0.2)
        return made

    monkeypatch.setattr(cpu, "build", slow_build)
    other = threading.Thread(target=cpu.load, args=(torch.float32, 2, 1))
    other.start()
    assert begun.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(20)  # a child that waits for ever is ended, and counts as failed
        cpu.load(torch.float32, 3, 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    other.join()


def test_a_fork_leaves_the_temporary_folder_to_its_parent(tmp_path):
    program = """if True:
        import os, sys, warnings
        from deformable_detr.ops.cache import cache_folder
        warnings.simplefilter("ignore")
        folder = cache_folder()
        child = os.fork()
        if not child:
            sys.exit(0)
        os.waitpid(child, 0)
        print(folder, folder.is_dir())
    """
    (tmp_path / ".cache").write_text("")
    environment = {k: v for k, v in os.environ.items() if k != "DEFORMABLE_DETR_CACHE"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    folder, there = run.stdout.rsplit(maxsplit=1)
    assert there == "True", run.stderr
    assert not Path(folder).exists()  # gone with the parent


def test_a_folder_that_was_removed_is_made_again(cache):
    build(MACROS, QUICK)
    shutil.rmtree(cache)
    assert build(MACROS, QUICK).exists()


def test_a_folder_that_is_asked_for_must_be_usable(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEFORMABLE_DETR_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"DEFORMABLE_DETR_CACHE=.*file cannot hold kernels: "):
        cache_folder()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DEFORMABLE_DETR_CACHE", "~/kernels")
    assert cache_folder() == (tmp_path / "kernels").resolve()


def test_root_may_be_unknown_in_a_container(tmp_path, cache, monkeypatch):
    if os.geteuid():
        pytest.skip("only root can give folders away")
    outer = tmp_path / "outer"
    outer.mkdir(mode=0o755)
    monkeypatch.setenv("DEFORMABLE_DETR_CACHE", str(outer / "cache"))
    os.chown(outer, 65534, 65534)
    with pytest.raises(BackendError, match="user 65534 owns"):
        cache_folder()
    monkeypatch.setattr("deformable_detr.ops.cache.unmapped_root", lambda: {65534})
    assert cache_folder() == (outer / "cache").resolve()
    os.chown(outer / "cache", 65534, 65534)  # what holds the kernels must be the user's own
    with pytest.raises(BackendError, match="user 65534 owns"):
        refuse_unsafe(outer / "cache")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 0 4294967295", set()),  # no container
        ("1000 1000 1", {65534}),  # Apptainer
        ("0 1000 1\n1 100000 65536", set()),  # podman: 65534 is a user in there
        ("1000 0 1", set()),  # root, by another number
    ],
)
def test_who_root_is_in_a_container(monkeypatch, text, expected):
    texts = {"/proc/self/uid_map": text, "/proc/sys/kernel/overflowuid": "65534"}
    monkeypatch.setattr(Path, "read_text", lambda path: texts[str(path)])
    assert unmapped_root.__wrapped__() == expected


def test_a_folder_for_reading_serves_what_it_holds(cache, monkeypatch):
    library = build(MACROS, QUICK)
    cache_folder.cache_clear()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("built again"))
    assert build(MACROS, QUICK) == library


def test_kernels_are_found_in_a_source_tree_too(monkeypatch):
    installed = sources().joinpath("cpu.cpp").read_bytes()

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(resources, "files", missing)
    assert sources().joinpath("cpu.cpp").read_bytes() == installed


def test_without_memory_it_is_an_error_and_no_abort():
    program = """if True:
        import resource, torch
        from deformable_detr import ms_deform_attn
        shapes, mib = [(1000, 1000)], 1 << 20
        inputs = torch.zeros(1, 10**6, 1, 32), torch.zeros(1, 1 << 18, 1, 1, 16, 2)
        weights = torch.zeros(1, 1 << 18, 1, 1, 16)
        torch.set_num_threads(1)
        ms_deform_attn(inputs[0], shapes, inputs[1], weights, backend="cpu")
        held = next(int(x.split()[1]) for x in open("/proc/self/status") if x[:6] == "VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (held * 1024 + 64 * mib,) * 2)  # the output's 32
        try:
            ms_deform_attn(inputs[0], shapes, inputs[1], weights, backend="cpu")
        except RuntimeError as error:
            print(error)
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ms_deform_attn can't allocate memory" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("size", "given"),
    [
        ({"S": 2**31}, "S=2147483648, Q=1"),
        ({"S": 2**32 + 1}, "S=4294967297, Q=1"),  # cut to 32 bits: 1
        ({"Q": 2**31}, "Q=2147483648, M=1"),
        ({"Q": 2**32 + 1}, "Q=4294967297, M=1"),
        ({"M": 2**31}, "M=2147483648, D=1"),
        ({"M": 2**20, "D": 2**11}, "M=1048576, D=2048"),
        ({"D": 2**14 + 1}, "M=1, D=16385"),
        ({"K": 2**30}, "L=1, K=1073741824"),
    ],
    ids=str,
)
def test_sizes_that_the_kernel_cannot_count_are_refused(size, given):
    """Of tensors that are one number in memory, so that a copy of them would be noticed."""
    S, Q, M, D, K = ({"S": 1, "Q": 1, "M": 1, "D": 1, "K": 1} | size).values()
    value = torch.zeros(1, 1, 1, 1).expand(1, S, M, D)
    locations = torch.zeros(1, 1, 1, 1, 1, 2).expand(1, Q, M, 1, K, 2)
    weights = torch.zeros(1, 1, 1, 1, 1).expand(1, Q, M, 1, K)
    inputs = value, [(S, 1)], locations, weights
    with pytest.raises(ValueError, match=f"below 2.*31 and D up to 16384, got .*{given}"):
        ms_deform_attn(*inputs, backend="cpu")
    flat, output = [S, 1], torch.zeros(1, 1, 1).expand(1, Q, M * D)
    with pytest.raises(ValueError, match=given):
        torch.ops.deformable_detr.ms_deform_attn_backward(value, flat, locations, weights, output)


def test_the_widest_heads_fit_on_a_threads_stack(cache, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)  # in several threads, whose stacks are smaller
    inputs = make_inputs(Q=3, D=WIDEST, dtype=torch.float64)
    value, locations, weights = (x.requires_grad_() for x in inputs)
    grads = []
    for name in ("cpu", "reference"):
        output = ms_deform_attn(value, SHAPES, locations, weights, name)
        grads.append(torch.autograd.grad(output.sum(), (value, locations, weights)))
    torch.testing.assert_close(*grads)


def test_a_failing_compiler_is_one_clear_error(cache, tmp_path, monkeypatch):
    script = tmp_path / "broken-compiler"
    script.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    value, locations, weights = make_inputs(D=4)
    with pytest.raises(RuntimeError, match="broken-compiler could not build the kernel:\nout of"):
        ms_deform_attn(value, SHAPES, locations, weights, backend="cpu")
    assert not list(cache.iterdir())


def test_the_key_holds_what_a_build_depends_on(cache, monkeypatch):
    first = build(MACROS, QUICK)
    assert build(MACROS, ("-O0", "-g")) != first
    monkeypatch.setattr("deformable_detr.ops.build.machine", lambda: ("another processor",))
    assert build(MACROS, QUICK) != first


@pytest.mark.parametrize("Q", [400, 3], ids=["gathered", "not gathered"])
def test_threads_of_ones_own_give_the_same_bits_as_openmp(monkeypatch, Q):
    monkeypatch.setattr(cpu, "SMALL", 0)
    inputs = make_inputs(B=2, Q=Q, M=3, D=8, K=4)
    before, found = torch.get_num_threads(), []
    for flags in (cpu.openmp(), ()):
        monkeypatch.setattr(cpu, "openmp", lambda flags=flags: flags)
        cpu.load.cache_clear()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaves = [x.detach().requires_grad_() for x in inputs]
            output = ms_deform_attn(leaves[0], SHAPES, *leaves[1:], backend="cpu")
            found.append((output.detach(), *torch.autograd.grad(output.pow(2).sum(), leaves)))
    torch.set_num_threads(before)
    cpu.load.cache_clear()
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("side", [100, 700], ids=["through the caches", "past all but large ones"])
@pytest.mark.parametrize("dtype, D", [(torch.float32, 7), (torch.float64, 6)])
def test_gradients_may_hold_anything_before(monkeypatch, side, dtype, D):
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, math.nan))
    before, shapes = torch.get_num_threads(), [(side, side), (3, 4)]
    value, locations, weights = make_inputs(B=1, Q=5, M=1, D=D, K=3, shapes=shapes, dtype=dtype)
    grad_output = torch.ones(1, 5, D, dtype=dtype)
    found = []
    for threads in (1, 3):  # of odd sizes: not every part begins where a vector may
        torch.set_num_threads(threads)
        found.append(cpu.backward(value, shapes, locations, weights, grad_output))
    torch.set_num_threads(before)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    output = ms_deform_attn(leaves[0], shapes, *leaves[1:], backend="reference")
    for one, other, expected in zip(
        *found, torch.autograd.grad(output, leaves, grad_output), strict=True
    ):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)


def test_nan_in_value_stays_where_it_is_sampled():
    """A point beside a NaN has it; one elsewhere in the map does not."""
    value = torch.zeros(1, 20, 1, 4)
    value[0, 19] = math.nan
    locations = torch.tensor([[0.1, 0.1], [0.9, 0.875]]).reshape(1, 2, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(4, 5)], locations, torch.ones(1, 2, 1, 1, 1), backend="cpu")
    assert not output[0, 0].isnan().any() and output[0, 1].isnan().all()


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
WIDTHS = pytest.mark.parametrize("D", [1, 4, 8, 16])  # by arithmetic, by instructions for 8 and 16


def on_one_pixel(value, weights):
    """The operator's arguments where each image is a pixel, and one query samples its centre."""
    B, D = value.shape
    locations = torch.full((B, 1, 1, 1, 1, 2), 0.5)
    return value.view(B, 1, 1, D), [(1, 1)], locations, weights.view(B, 1, 1, 1, 1)


@HALVES
@WIDTHS
def test_every_number_of_16_bits_is_read_as_it_is(dtype, D):
    value = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, D)
    output = cpu.forward(*on_one_pixel(value, torch.ones(len(value)))).view(-1, D)
    finite = value.isfinite()
    assert torch.equal(output[finite], value[finite])
    assert not output[~finite].isfinite().any()


@HALVES
@WIDTHS
def test_float32_is_rounded_to_16_bits_as_torch_does(dtype, D):
    """Numbers at random, and beside those on which a number of 16 bits begins or ends."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32)
    sixteen = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float().view(torch.int32)
    half = 2 ** (11 if dtype == torch.float16 else 14)  # a part of the distance to the next
    beside = [sixteen + half * step + i for step in range(-2, 3) for i in (-1, 0, 1)]
    numbers = torch.cat([patterns, *beside]).view(torch.float32)
    numbers = numbers[numbers.isfinite()]
    ones = torch.ones(len(numbers), D, dtype=dtype)
    arguments = on_one_pixel(ones, numbers)
    expected = numbers[:, None].expand(-1, D).to(dtype)
    assert torch.equal(cpu.forward(*arguments).view(-1, D), expected)
    grad_value, *_ = cpu.backward(*arguments, ones.view(-1, 1, D))
    assert torch.equal(grad_value.view(-1, D), expected)


@HALVES
def test_gradients_in_16_bits_are_summed_in_float32(dtype):
    """Of 3000 queries that add 1 each to one pixel; sums of bfloat16 would end at 256."""
    weights = torch.ones(1, 3000, 1, 1, 1)
    locations = torch.full((1, 3000, 1, 1, 1, 2), 0.5)
    for side in (1, 200):  # tokens gathered, and not
        value = torch.ones(1, side * side, 1, 8, dtype=dtype)
        ones = torch.ones(1, 3000, 8, dtype=dtype)
        locations[:] = 0.5 / side
        grad_value, *_ = cpu.backward(value, [(side, side)], locations, weights, ones)
        assert torch.equal(grad_value[:, 0], torch.full((1, 1, 8), 3000).to(dtype))
        assert not grad_value[:, 1:].any()
