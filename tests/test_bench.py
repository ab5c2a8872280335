# SPDX-License-Identifier: MIT
"""bench/gpu.py where there is no GPU: late, dead and broken rivals cost nobody else a place."""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import posix

pytestmark = posix  # rivals run in process groups
BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def gpu():
    """The module. Its neighbours are imported by short names, which nobody else should find."""
    sys.path.insert(0, str(BENCH))
    before = set(sys.modules)
    import gpu as module

    yield module
    sys.path.remove(str(BENCH))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


class Stub:
    """A worker without a process; `slow` says how many seconds each thing that it is asked takes."""

    def __init__(self, errors, peer, variant, **slow):
        self.errors, self.peer, self.variant, self.threads, self.slow = errors, peer, variant, 1, slow
        self.hello, self.child = {"variants": [variant], "versions": {}}, SimpleNamespace(pid=0)
        self.reply_seconds, self.alive = 100.0, True

    def ask(self, do, **arguments):
        if not self.alive:
            raise self.errors("died")
        takes = self.slow.get(do, 0.0)
        time.sleep(max(0.0, min(takes, self.reply_seconds)))
        self.alive = takes <= self.reply_seconds
        if not self.alive:
            raise self.errors(f"no answer in {self.reply_seconds:.1f} s")
        if takes < 0:
            raise ValueError("not even an answer")
        took = arguments.get("epochs", 0) * (0.001 if self.peer.startswith("chainrule") else 0.004)
        return {
            "prepare": {"loss_difference": 0.0, "weight_difference": 0.0, "tolerance": (1, 1), "note": ""},
            "calibrate": {"epochs": 4},
            "sample": {"seconds": 0.5 + took, "cpu_seconds": 1.0},
        }.get(do, {})


@pytest.fixture
def judged(gpu, tmp_path, monkeypatch):
    """The race of some stubs, run to its end in a window of four seconds."""
    monkeypatch.setattr(gpu, "LEAST_WAIT", 0.1)
    monkeypatch.setattr(gpu, "LEAST_OWN_WAIT", 0.5)

    def run(*others):
        ours = Stub(gpu.PeerError, "chainrule_gpu", "chainrule fit")
        eager = Stub(gpu.PeerError, "torch_gpu", "torch eager")
        stubs = [ours, eager, *(Stub(gpu.PeerError, peer, name, **slow) for peer, name, slow in others)]
        goal = gpu.shrunk(gpu.GOALS["small"])
        race = gpu.Judged(
            goal,
            gpu.Workers(stubs, {}, tmp_path),
            gpu.Gpu("stub", {}, 0.0),
            gpu.Window(4.0),
            gpu.Problems([goal], tmp_path).path(goal),
        )
        race.run(SimpleNamespace(seconds=None, rounds=3))
        return (
            [one.variant for one in race.contestants],
            {k.split(",")[0]: v for k, v in race.excluded.items()},
            race,
        )

    return run


LATE = ("torch_compiled_gpu", "torch.compile")
JIT = ("jax_gpu", "jax.jit", {"prepare": 0.2})


@pytest.mark.parametrize(
    "slow, why",
    [
        ({"prepare": 60.0}, "no answer"),
        ({"prepare": -1.0}, "ValueError"),
        ({"calibrate": 60.0}, "no answer"),
    ],
)
def test_a_late_or_broken_rival_is_alone(judged, slow, why):
    names, excluded, race = judged((*LATE, slow), JIT)
    assert names == ["chainrule fit", "torch eager", "jax.jit"]
    assert list(excluded) == ["torch.compile"] and why in excluded["torch.compile"]
    assert all(len(one.seconds) == len(race.steady) >= 1 for one in race.contestants)
    assert race.verdict()["faster"] > 1


def test_a_window_that_is_spent_is_spent_for_rivals_only(judged, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "REFUSED", 0.0)
    names, excluded, _ = judged()
    assert names == ["chainrule fit"] and "time was spent" in excluded["torch eager"]


def test_the_steady_state_is_without_what_a_fit_begins_with(judged):
    _, _, race = judged()
    row = next(row for row in race.record()["rows"] if row["variant"] == "chainrule fit")
    assert row["steady_seconds_per_step"][0] == pytest.approx(0.001 / race.work.batches)
    assert row["median"] > 0.1 / race.work.batches


def test_the_table_says_against_whom(judged, gpu):
    _, _, race = judged()
    race.goal = race.goal._replace(against="torch")
    assert " than torch" in gpu.summary([race]) and race.record()["against"] == "torch"


# ------------------------------------------------------------ what comes before the timings


def test_one_line_of_json_among_others(gpu):
    import gpu_setup

    text = 'warning: {\n{"a": 1}\n[2]\n{"b"'
    assert gpu_setup.last_json(text, dict) == {"a": 1} and gpu_setup.last_json(text, list) == [2]
    with pytest.raises(ValueError, match="a line of JSON"):
        gpu_setup.last_json("nothing", dict)


@pytest.mark.parametrize("answer", [(0, "noise"), (0, '{"gpu": "x"}'), (None, ""), (1, "ImportError: torch")])
def test_peaks_that_are_not_measured_end_nothing(gpu, monkeypatch, answer, capsys):
    import gpu_setup

    monkeypatch.setattr(gpu_setup, "run", lambda *_: answer)
    assert gpu_setup.measured_gpu(1.0) == ("gpu", {}, 0.0)
    assert "were not measured" in capsys.readouterr().out


def test_why_no_gpu_is_usable(gpu, monkeypatch):
    import gpu_setup

    monkeypatch.delenv("CHAINRULE_CUDA_MODULE", raising=False)
    monkeypatch.setattr(gpu_setup, "run", lambda *_: (0, 'noise\n[0, "no GPU engine in this build"]'))
    assert gpu_setup.missing(1.0) == "no GPU engine in this build"
    monkeypatch.setattr(gpu_setup, "run", lambda *_: (1, "Traceback\nModuleNotFoundError: chainrule"))
    assert gpu_setup.missing(1.0) == "ModuleNotFoundError: chainrule"


def test_nvcc_beside_the_path(gpu, monkeypatch, tmp_path):
    import gpu_setup

    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("CUDACXX", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    assert str(nvcc) in gpu_setup.find_nvcc()
    assert gpu_setup.os.environ["CUDACXX"] == str(nvcc)


def test_what_is_over_its_time_ends_with_all_it_started(gpu, tmp_path):
    import gpu_setup

    later = tmp_path / "later"
    code, text = gpu_setup.run(["sh", "-c", f"echo first; (sleep 1; touch {later}) & sleep 1000"], 0.3)
    assert code is None and text == "first"
    time.sleep(1.5)
    assert not later.exists()


def test_a_problem_that_cannot_be_made_is_its_workloads_alone(gpu, tmp_path):
    small = gpu.shrunk(gpu.GOALS["small"])
    broken = small._replace(work=dataclasses.replace(small.work, name="broken", sizes=()))
    problems = gpu.Problems([broken, small], tmp_path)
    with pytest.raises(IndexError):
        problems.path(broken)
    assert problems.path(small).stat().st_size > 0


def test_results_are_whole_at_any_time(gpu, tmp_path):
    results = gpu.Results(tmp_path / "new" / "x.json")
    results.add(build="built here")
    results.workload("small", {"faster": 2.0})
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    assert written == {"build": "built here", "workloads": {"small": {"faster": 2.0}}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]
