# SPDX-License-Identifier: MIT
"""What the library does to the process that imports it: nothing. And Ctrl-C, threads, memory, and the end."""

import os
import subprocess
import sys
import textwrap

import pytest

from chainrule.checks import short
from conftest import FREED_IS_FREE, posix

linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity masks and /proc are Linux's")


def run_python(code, timeout=120, **environment):
    """Runs the code in a fresh interpreter and returns its output; a hang ends at the timeout."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not done.stderr, done.stderr
    return done.stdout


TRAINING = """
    import numpy as np
    import chainrule as cr

    X = np.random.default_rng(0).standard_normal((300, 64))
    y = X[:, 0] * X[:, 1]

    def train(epochs=3, **how):
        net = cr.mlp([64, 128, 64, 1], dropout=0.1, seed=0)
        net.fit(X, y, loss="mse", epochs=epochs, batch_size=100, verbose=0, **how)
        return net
"""


def test_import_and_training_leave_the_process_alone():
    """Flush-to-zero, signal handlers, global generators, locale, environment, NumPy's error state."""
    run_python("""
        import gc, locale, os, random, signal, sys, threading, warnings
        import numpy as np

        locale.setlocale(locale.LC_ALL, "")

        def state():
            tiny = float("5e-324")
            return {
                "subnormals": (tiny, tiny / 1.0, 1e-310 * 0.5, float(np.float64(1e-310) * np.float64(0.5)),
                               float(np.float32(1e-40) * np.float32(0.5))),
                "rounding": (0.1 + 0.2, 1 / 3, 1e16 + 1.0, -1 / 3),
                "signals": [signal.getsignal(s) for s in signal.valid_signals()],
                "locale": locale.setlocale(locale.LC_ALL),
                "random": random.getstate(),
                "numpy": [str(part) for part in np.random.get_state()],
                "environment": dict(os.environ),
                "directory": os.getcwd(),
                "warnings": list(warnings.filters),
                "errors": np.geterr(),
                "printing": np.get_printoptions(),
                "excepthooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
                "switch": sys.getswitchinterval(),
                "recursion": sys.getrecursionlimit(),
                "gc": (gc.isenabled(), gc.get_threshold()),
                "path": list(sys.path),
            }

        before = state()
        import chainrule as cr
        after_import = state()
        net = cr.mlp([64, 256, 1], seed=0)
        net.fit(np.ones((256, 64)), np.ones(256), loss="mse", epochs=2, batch_size=256, verbose=0)
        after_training = state()
        in_thread = []
        thread = threading.Thread(target=lambda: in_thread.append(state()))
        thread.start()
        thread.join()
        for when in (after_import, after_training, in_thread[0]):
            for key, value in before.items():
                assert when[key] == value, (key, value, when[key])
    """)


@posix
def test_import_is_quiet():
    """Threads started, files left open or words printed before anybody has asked for anything."""
    out = run_python("""
        import os, threading
        import numpy

        def count(what):
            folder = f"/proc/self/{what}"
            return len(os.listdir(folder)) if os.path.isdir(folder) else threading.active_count()

        before = count("task"), count("fd"), threading.active_count()
        import chainrule
        assert (count("task"), count("fd"), threading.active_count()) == before
    """)
    assert out == ""


def test_import_brings_in_numpy_alone():
    """An optional package that becomes a requirement: with none of them importable, training still works."""
    run_python(
        textwrap.dedent("""
        import sys
        for name in ("sklearn", "scipy", "pandas", "tqdm", "safetensors", "torch", "pyarrow", "matplotlib"):
            sys.modules[name] = None
    """)
        + textwrap.dedent(TRAINING)
        + "train()\n"
    )


def warnings_at_import(code, **environment):
    """What the code prints after an import of chainrule, and the warnings of that import, a line each."""
    begin, end = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import chainrule as cr
    """, """
        for warning in caught:
            print(warning.category.__name__, warning.filename, warning.message)
    """  # fmt: skip
    printed, *warned = run_python(
        "".join(map(textwrap.dedent, (begin, code, end))), **environment
    ).splitlines()
    return printed, warned


@pytest.mark.parametrize("name", ["avx512", "avx2", "neon", "baseline", "no such set"])
def test_the_environment_chooses_the_instruction_set(name):
    """A name that is not honoured, or one that this machine lacks and that is used all the same."""
    out, warned = warnings_at_import(textwrap.dedent(TRAINING) + textwrap.dedent("""
        from chainrule import _core
        train()
        print(_core.isa(), *_core.isas())
    """), CHAINRULE_ISA=name)  # fmt: skip
    active, *available = out.split()
    message = f"[import] CHAINRULE_ISA: expected one of {', '.join(available)} on this machine, got {name!r}"
    assert active == (name if name in available else available[0])
    assert warned == ([] if name in available else [f"RuntimeWarning <string> {message}; using {active}"])


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("3", 3),
        (" 3 ", 3),
        ("", 7),
        ("2.5", 2),
        ("many", 7),
        ("0", 7),
        ("-1", 7),
        ("1025", 1024),
        ("9" * 5000, 1024),
    ],
)
def test_a_number_of_threads_that_is_none_is_warned_of(asked, used):
    count, warned = warnings_at_import(
        "print(cr.get_num_threads())", CHAINRULE_NUM_THREADS=asked, OMP_NUM_THREADS="7"
    )
    message = f"expected a number of threads from 1 to 1024, got {short(asked)}; using {used}"
    assert int(count) == used
    assert warned == (
        []
        if asked.strip() in ("3", "")
        else [f"RuntimeWarning <string> [import] CHAINRULE_NUM_THREADS: {message}"]
    )


INTERRUPT = """
    import os, signal, threading

    def interrupt_soon():
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
"""


@posix
@pytest.mark.parametrize("how", [
    "{}", "{'callbacks': [lambda epoch, logs: None]}", "{'validation_split': 0.2}", "{'clip_norm': 1.0}",
])  # fmt: skip
def test_ctrl_c_ends_a_long_fit(how):
    """A native loop that never looks for signals, or a network left half updated by one."""
    run_python(
        textwrap.dedent(TRAINING + INTERRUPT)
        + textwrap.dedent(f"""
        net = cr.mlp([64, 128, 64, 1], seed=0)
        optimizer = cr.Adam()
        how = dict(loss="mse", optimizer=optimizer, batch_size=100, verbose=0, **{how})
        for attempt in range(2):
            interrupt_soon()
            try:
                net.fit(X, y, epochs=10**7, **how)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("fit ended by itself")
            assert np.isfinite(net.predict(X)).all()
            assert np.isfinite(net.fit(X, y, epochs=2, **how)["loss"]).all()
    """)
    )


@posix
@pytest.mark.parametrize("call", [
    "net.predict(X)", "net.evaluate(X, y, loss='mse')", "net.value_and_grad(X, y, loss='mse')",
    "cr.jvp(net, X, X)", "cr.vjp(net, X, y[:, None])", "cr.jacobian(net, X)", "cr.laplacian(net, X)",
    "cr.input_gradient(net, X, y, 'mse')", "cr.per_example_grad_norms(net, X, y, 'mse')",
    "cr.hvp(net, X, y, 'mse', net.state_dict())",
])  # fmt: skip
def test_ctrl_c_ends_a_long_call(call):
    """Work of minutes that no signal reaches: more than this test's patience. The network is as before."""
    run_python(
        textwrap.dedent(INTERRUPT)
        + textwrap.dedent(f"""
        import numpy as np
        import chainrule as cr

        net = cr.mlp([8, *[256] * 40, 1], seed=0)
        X, y = np.ones((3_000_000, 8), np.float32), np.ones(3_000_000, np.float32)
        before = net.predict(X[:5])
        interrupt_soon()
        try:
            {call}
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("it ended by itself")
        assert (net.predict(X[:5]) == before).all()
    """)
    )


@posix
def test_the_users_own_handler_is_called():
    """A handler that the library replaced: the user's sets a flag and returns, and training goes on."""
    run_python(
        textwrap.dedent(TRAINING + INTERRUPT)
        + textwrap.dedent("""
        import time
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        interrupt_soon()

        def stop(epoch, logs):
            return bool(seen)

        train(epochs=10**7, callbacks=[stop])
        assert seen == [1]
    """)
    )


@posix
def test_an_exception_in_a_callback_comes_out_unchanged():
    """The user's exceptions swallowed, wrapped, or leaving a lock behind; BaseException included."""
    run_python(
        textwrap.dedent(TRAINING)
        + textwrap.dedent("""
        class Stop(BaseException):
            pass

        def fail(*_):
            raise Stop("here")

        def loss(f, y):
            raise Stop("here")

        for how in ({"callbacks": [fail]}, {"loss": loss}):
            net = cr.mlp([64, 8, 1], seed=0)
            try:
                net.fit(X, y, **{"loss": "mse", "verbose": 0, **how})
            except Stop as stop:
                assert stop.args == ("here",)
            else:
                raise AssertionError("no exception")
            assert np.isfinite(net.fit(X, y, loss="mse", verbose=0)["loss"]).all()
    """)
    )


@pytest.mark.parametrize("threads", [1, 4])
def test_the_process_can_end_while_a_thread_trains(threads):
    """A crash, abort or hang at exit: the interpreter goes while a daemon thread is inside the engine."""
    out = run_python(
        textwrap.dedent(TRAINING)
        + textwrap.dedent(f"""
        import threading, time
        cr.set_num_threads({threads})
        threading.Thread(target=train, args=(10**7,), daemon=True).start()
        time.sleep(0.3)
        print("done", flush=True)
    """)
    )
    assert out == "done\n"


@pytest.mark.parametrize("where", ["loss", "layer", "prediction"])
def test_the_process_can_end_while_a_thread_is_in_code_of_the_users(where):
    """Python ends the thread where it asks for the lock, and C++ let go of arrays and lock on the way out."""
    out = run_python(
        textwrap.dedent(TRAINING)
        + textwrap.dedent(f"""
        import threading, time

        class Slow(cr.Layer):
            def forward(self, x):
                time.sleep(0)
                return np.tanh(x)

            def vjp(self, x, y, dy):
                return dy * (1 - y * y)

        def loss(f, y):
            time.sleep(0)
            return ((f - y) ** 2).sum(), 2 * (f - y)

        def work():
            layers = [] if {where == "loss"} else [Slow()]
            net = cr.Sequential(cr.Linear(64, 32), *layers, cr.Linear(32, 1), seed=0)
            while {where == "prediction"}:
                net.predict(X)
            net.fit(X, y[:, None], loss={"loss" if where == "loss" else "'mse'"}, epochs=10**7, verbose=0)

        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.3)
        print("done", flush=True)
    """)
    )
    assert out == "done\n"


def test_other_threads_run_during_a_fit():
    """The interpreter's lock held for a whole fit: no other thread would get to run."""
    run_python(
        textwrap.dedent(TRAINING)
        + textwrap.dedent("""
        import threading
        ticks = []

        def tick():
            while not finished.is_set():
                ticks.append(1)
                finished.wait(0.001)

        finished = threading.Event()
        thread = threading.Thread(target=tick)
        thread.start()
        while len(ticks) < 3:  # until it runs
            pass
        before = len(ticks)
        train(epochs=100)  # one engine call; many milliseconds
        after = len(ticks)
        finished.set()
        thread.join()
        assert after > before + 3, (before, after)
    """)
    )


# ---- processors --------------------------------------------------------------------------------------------

ONE_PROCESSOR = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""


@linux
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="ends itself where memory is short")
def test_memory_that_was_short_once_is_asked_for_again():
    """Matrices that could not be had were taken for there the next time: a segmentation fault."""
    run_python("""
        import resource
        import numpy as np
        import chainrule as cr

        net, X = cr.mlp([50, 3000, 3], activation="tanh"), np.ones((1024, 50), np.float32)
        c, y = np.ones((1024, 3), np.float32), np.zeros((1024, 3))
        calls = [
            lambda: cr.sensitivity(net, X, 0), lambda: cr.vjp(net, X, c), lambda: cr.jvp(net, X, X),
            lambda: cr.laplacian(net, X), lambda: cr.per_example_grad_norms(net, X, y, "mse"),
            lambda: net.value_and_grad(X, y, loss="mse"), lambda: net.trace(X).backward(c),
        ]
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        failed = 0
        for more in range(2, 60, 6):
            for call in calls:
                resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (more << 20), hard))
                for attempt in range(2):
                    try:
                        call()
                    except MemoryError:
                        failed += 1
                resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
                call()
            net = cr.mlp([50, 3000, 3], activation="tanh")
        assert failed > 10, failed
    """)


@linux
@pytest.mark.parametrize("asked, expected", [("", 1), ("3", 3)])
def test_one_processor_in_the_mask_is_one_thread(asked, expected):
    """Two threads on the only processor that a batch system gave; or asked for, and not made.

    The other way to be given less than the machine has, a CPU quota: tests/kernels/processors.hpp.
    """
    run_python(
        ONE_PROCESSOR
        + textwrap.dedent(TRAINING)
        + textwrap.dedent(f"""
        assert cr.get_num_threads() == {expected}
        before = len(os.listdir("/proc/self/task"))
        train()
        assert len(os.listdir("/proc/self/task")) - before == {expected} - 1
    """),
        CHAINRULE_NUM_THREADS=asked,
        OMP_NUM_THREADS="",
    )


@pytest.fixture
def busy_processor():
    """Another process that computes until the test is over."""
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()  # it runs
            yield
            assert other.poll() is None
        finally:
            other.kill()


def test_a_busy_processor_changes_no_bit(busy_processor):
    """A part done twice, or not at all, when the thread that was to do it has lost its processor."""
    run_python(
        textwrap.dedent(TRAINING)
        + textwrap.dedent("""
        def bits(threads):
            cr.set_num_threads(threads)
            net = train(epochs=20)
            return [p.tobytes() for p in (*net.state_dict().values(), net.predict(X))]

        expected = bits(1)
        for threads in (2, 3, 4, 7, 2, 1):
            assert bits(threads) == expected, threads
    """)
    )


# ---- memory ------------------------------------------------------------------------------------------------


@linux
def test_memory_is_given_back():
    """Some bytes a step or an arena a fit that nobody frees: a process that trains for weeks dies of them.

    Pages are counted in the page table, exactly. 64 may come, because allocators and the garbage collector
    fill those they have begun: 20 000 steps that lose 16 bytes each take 78, as do 2000 fits that lose 160.
    Large arenas are mapped before they are touched, so they are looked for in the address space: 40 fits map
    more than 160 of at least 2 MiB, and 16 of those may stay.
    """
    code = """
        import ctypes, os, re
        import numpy as np
        import chainrule as cr

        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: no 2 MiB where a page is used

        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
        wide = rng.standard_normal((64, 512)).astype(np.float32)
        small, large, optimizer = cr.mlp([8, 16, 1], seed=0), cr.mlp([512, 1100, 512], seed=0), cr.Adam()

        def steps():
            for _ in range(20_000):
                small.train_step(X, y, loss="mse", optimizer=optimizer)
                small.predict(X)

        def fits():
            for _ in range(2000):
                small.fit(X, y, loss="mse", epochs=2, validation_split=0.25, verbose=0)

        def large_fits():
            for _ in range(40):
                large.fit(wide, wide, loss="mse", batch_size=64, verbose=0)

        def number(path, pattern):
            with open(f"/proc/self/{path}") as file:
                return int(re.search(pattern, file.read(), re.MULTILINE)[1])

        def pages():
            return number("smaps_rollup", "^Anonymous: +([0-9]+) kB") * 1024 // os.sysconf("SC_PAGESIZE")

        def mebibytes():
            return number("status", "^VmSize:[^0-9]+([0-9]+) kB") // 1024

        for work, measure, allowed in ((steps, pages, 64), (fits, pages, 64), (large_fits, mebibytes, 32)):
            work()
            before = measure()
            work()
            assert measure() - before <= allowed, (work.__name__, before, measure())
    """
    run_python(code, CHAINRULE_NUM_THREADS="2", **FREED_IS_FREE)
