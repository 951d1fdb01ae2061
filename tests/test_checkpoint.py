"""A run folder holds a whole checkpoint after any failure: I/O errors, kill -9, a full disk, damage, a second process."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from crash_worker import save, step_of

from fastsae import checkpoint
from fastsae.checkpoint import CheckpointError, checkpoints, newest, run_lock, verify, write_checkpoint
from fastsae.state_files import load_tree

KILLS = max(3, int(os.environ.get("FASTSAE_EXAMPLES", "25")) // 20)  # 3, 10, 100
WORKER = Path(__file__).with_name("crash_worker.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(WORKER.parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(tmp_path) -> Path:
    with run_lock(tmp_path / "run"):
        pass
    return tmp_path / "run"


@contextmanager
def nothing_to_complain() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints(run)]


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


# --- the ordinary


def test_keeps_the_newest_and_finds_it(run):
    assert newest(run) is None and newest(run / "missing") is None
    for step in (0, 7, 999_999, 1_000_000):
        assert write_checkpoint(run, step, save(step, 3), keep=3) == run / f"step-{step:06d}"
    assert steps(run) == [7, 999_999, 1_000_000]
    assert step_of(newest(run)) == 1_000_000
    write_checkpoint(run, 1_000_001, save(1_000_001, 3), keep=1)
    assert names(run) == {".lock", "step-1000001"}


def test_what_is_no_checkpoint_is_left_alone(run):
    for name in ("step-12", "step-000012.bak", "best", "step-notes"):
        (run / name).mkdir()
    write_checkpoint(run, 1, save(1, 3), keep=1)
    assert step_of(newest(run)) == 1 and len(names(run)) == 6


def test_a_whole_checkpoint_is_never_overwritten(run):
    write_checkpoint(run, 1, save(1, 3))
    with pytest.raises(CheckpointError, match="step-000001 exists"):
        write_checkpoint(run, 1, save(2, 3))
    assert step_of(newest(run)) == 1 and names(run) == {".lock", "step-000001"}


def test_later_checkpoints_are_not_pruned_nor_counted(run):
    """Damaged ones that a resumed run has passed over: their turn comes when it reaches their step."""
    for step in (1, 2, 9):
        write_checkpoint(run, step, save(step, 3))
    write_checkpoint(run, 3, save(3, 3), keep=2)
    assert steps(run) == [2, 3, 9]


@pytest.mark.parametrize("step, keep", [(-1, None), (1, 0)])
def test_refuses_what_could_not_be_found_again(run, step, keep):
    with pytest.raises(ValueError, match=f"step={step}, keep={keep}"):
        write_checkpoint(run, step, save(1, 3), keep=keep)


def test_an_error_of_the_writer_comes_through_and_leaves_nothing(run):
    write_checkpoint(run, 1, save(1, 3))

    class Stopped(BaseException):
        pass

    def fails(error: BaseException) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            save(2, 3)(folder)
            raise error

        return write

    for error in (TypeError("a numpy.float64"), Stopped()):
        with pytest.raises(type(error)):
            write_checkpoint(run, 2, fails(error))
    assert step_of(newest(run)) == 1 and names(run) == {".lock", "step-000001"}


@pytest.mark.parametrize("umask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_modes_honour_the_umask(run, umask, file_mode, folder_mode):
    before = os.umask(umask)
    try:
        folder = write_checkpoint(run, 1, save(1, 3))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {file_mode}
    assert {path.stat().st_mode & 0o777 for path in (folder, folder / "extra")} == {folder_mode}


def test_everything_is_flushed_before_the_rename_and_the_folder_after_it(run, monkeypatch):
    log: list[tuple[str, int]] = []  # inodes keep their number when they are renamed
    fsync, rename = os.fsync, os.rename

    def logged_fsync(fd: int) -> None:
        log.append(("flush", os.fstat(fd).st_ino))
        fsync(fd)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(("rename", source.stat().st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    folder = write_checkpoint(run, 1, save(1, 3))

    def when(path: Path) -> int:
        assert log.count(("flush", path.stat().st_ino)) == 1, path
        return log.index(("flush", path.stat().st_ino))

    inside = list(folder.rglob("*"))
    manifest = folder / "MANIFEST.json"
    assert {path.name for path in inside} >= {"optimizer.json", "sae_weights.safetensors", "extra", "counters.json"}
    for path in inside:
        if path.is_file() and path != manifest:
            assert when(path) < when(manifest)
        assert when(path) < when(path.parent)
    renamed = log.index(("rename", folder.stat().st_ino))
    assert when(folder) < renamed < when(run) == len(log) - 1


def test_a_new_run_folder_is_flushed_too(tmp_path, monkeypatch):
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
    with run_lock(tmp_path / "a" / "b" / "run"):
        assert flushed == [(tmp_path / "a" / "b").stat().st_ino, (tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


# --- every operation fails


class Faults:
    """Counts what this thread asks the file system to do, and makes the n-th of these fail.

    CPython announces every open, mkdir, rename, ... to audit hooks, and a hook that raises prevents it. fsync is not announced.
    """

    EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir", "fcntl.flock"}

    def __init__(self):
        self.thread: int | None = None
        self.n, self.count, self.happens = 0, 0, lambda: None
        sys.addaudithook(lambda event, arguments: self.pass_by(event) if event in self.EVENTS else None)

    def pass_by(self, event: str) -> None:
        if self.thread == threading.get_ident():
            self.count += 1
            if self.count == self.n:
                self.happens()

    @contextmanager
    def at(self, n: int, happens: Callable[[], None] = lambda: None) -> Iterator[None]:
        self.n, self.count, self.happens, self.thread = n, 0, happens, threading.get_ident()
        try:
            yield
        finally:
            self.thread = None


faults = Faults()


def fails() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def fails_from_now_on() -> None:
    faults.n += 1
    fails()


def dies() -> None:
    os._exit(9)


def one_before(run: Path) -> None:
    write_checkpoint(run, 1, save(1, 3))


def one_before_and_a_damaged_one_in_its_place(run: Path) -> None:
    one_before(run)
    write_checkpoint(run, 2, save(2, 3))
    (run / "step-000002" / "optimizer.json").write_text("{}")


@pytest.mark.parametrize("prepare", [one_before, one_before_and_a_damaged_one_in_its_place])
@pytest.mark.parametrize("happens", [fails, fails_from_now_on, dies])
def test_every_single_operation_may_fail(tmp_path, monkeypatch, happens, prepare):
    """The n-th operation of a save, for every n: afterwards the state before or after loads, and the next save works."""
    monkeypatch.setattr(os, "fsync", lambda fd: faults.pass_by("fsync"))

    def attempt(run: Path, n: int) -> bool:
        """Whether write_checkpoint returned."""
        try:
            with faults.at(n, happens):
                write_checkpoint(run, 2, save(2, 3), keep=1)
        except OSError:
            return False
        return True

    def fresh(name: str) -> Path:
        with run_lock(tmp_path / name):
            prepare(tmp_path / name)
        return tmp_path / name

    assert attempt(fresh("count"), 0)
    operations = faults.count
    assert operations > 40
    for n in range(1, operations + 1):
        run = fresh(str(n))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if happens is dies:
                child = os.fork()
                if child == 0:
                    attempt(run, n)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
                returned = False
            else:
                returned = attempt(run, n)
        assert faults.count >= n or happens is dies

        for folder in checkpoints(run):
            if prepare is one_before or folder.name != "step-000002":
                verify(folder)  # none is ever torn, whether it is the newest or being pruned
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the damaged one
            step = step_of(newest(run))
        assert step in (1, 2)
        if returned:
            assert step == 2
            assert all("could not be removed" in str(warning.message) for warning in caught)
        elif happens is fails:
            assert step == 1
            assert len(names(run)) <= 3  # nothing staged is left, .lock and a damaged one were there before
        with nothing_to_complain():
            write_checkpoint(run, 3, save(3, 3), keep=1)
            assert step_of(newest(run)) == 3
            with run_lock(run):
                assert {name for name in names(run) if name.startswith(".")} == {".lock"}
        shutil.rmtree(run)


def test_a_run_folder_can_be_made_at_the_second_try(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: faults.pass_by("fsync"))
    with faults.at(0), run_lock(tmp_path / "a" / "run"):
        pass
    for n in range(1, faults.count + 1):
        shutil.rmtree(tmp_path / "a")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flock fails: no locks here
            try:
                with faults.at(n, fails), run_lock(tmp_path / "a" / "run"):
                    pass
            except OSError:
                pass
        with nothing_to_complain(), run_lock(tmp_path / "a" / "run"):
            write_checkpoint(tmp_path / "a" / "run", 1, save(1, 3))


# --- kill -9 and full disks, in other processes


def test_kill_9_at_random_moments_never_tears_a_checkpoint(tmp_path):
    command = [sys.executable, WORKER, "kill", tmp_path / "run", str(KILLS), "0"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_is_missing(tmp_path):
    done = subprocess.run([sys.executable, WORKER, "full", tmp_path / "run"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 10  # at ten sizes of file and more


def test_no_space_left(run):
    def write(folder: Path) -> None:
        (folder / "half").write_bytes(bytes(2_000_000))
        Path("/dev/full").write_bytes(b"x")

    with pytest.raises(CheckpointError, match=r"step-000001 .* at least 2\.0 MB, and [\d.]+ MB were free.*No space left"):
        write_checkpoint(run, 1, write)
    assert names(run) == {".lock"}


@pytest.mark.parametrize("need", [None, 3_000_000])
def test_too_little_space_is_seen_before_anything_is_written(run, monkeypatch, need):
    write_checkpoint(run, 1, lambda folder: (folder / "large").write_bytes(bytes(2_000_000)) and None)
    usage = shutil.disk_usage(run)._replace(free=1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=rf"needs at least {3 if need else 2}\.0 MB, and 1\.5 MB were free"):
        write_checkpoint(run, 2, lambda folder: pytest.fail("began"), need=need)
    assert newest(run) == run / "step-000001"


# --- damage


def test_flipped_bits_and_truncations_are_all_found_and_named(run):
    folder = write_checkpoint(run, 1, save(1, 20))
    files = [path for path in folder.rglob("*") if path.is_file()]
    moments = np.random.default_rng(0)
    for i in range(200):
        path = files[i % len(files)]
        whole = path.read_bytes()
        position = moments.integers(len(whole))
        if i % 3:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(moments.integers(8))
            path.write_bytes(damaged)
        else:
            path.write_bytes(whole[:position])
        with pytest.raises(CheckpointError, match=f"^{path} "):
            verify(folder)
        path.write_bytes(whole)
    verify(folder)


def test_every_bit_of_the_manifest_matters(run):
    folder = write_checkpoint(run, 1, lambda folder: (folder / "a").touch())
    path = folder / "MANIFEST.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"^{path}"):
            verify(folder)


def swap(folder: Path) -> None:
    a, b = folder / "a", folder / "b"
    a.rename(folder / "c"), b.rename(a), (folder / "c").rename(b)


def manifest_of_another_step(folder: Path) -> None:
    shutil.copy(folder.parent / "step-000001" / "MANIFEST.json", folder)


def link_outwards(folder: Path) -> None:
    (folder / "a").rename(folder.parent / "a")
    (folder / "a").symlink_to(folder.parent / "a")


def pipe(folder: Path) -> None:
    (folder / "a").unlink()
    os.mkfifo(folder / "a")  # whoever opens it waits for ever


def manifest_is_a_pipe(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    os.mkfifo(folder / "MANIFEST.json")


def manifest_is_a_link(folder: Path) -> None:
    (folder / "MANIFEST.json").rename(folder.parent / "M")
    (folder / "MANIFEST.json").symlink_to(folder.parent / "M")


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (swap, "/a is damaged: expected .*'bytes': 2.*, got .*'bytes': 2"),
        (manifest_of_another_step, "MANIFEST.json does not .*belongs to step 1"),
        (link_outwards, "/a is outside"),
        (pipe, "/a is missing"),
        (manifest_is_a_pipe, "MANIFEST.json does not .*o such file"),
        (manifest_is_a_link, "MANIFEST.json does not .*o such file"),
        (lambda folder: (folder / "a").unlink(), "/a is missing"),
        (lambda folder: (folder / "a").write_bytes(b"2a!"), "/a is damaged: .*'bytes': 3"),
        (lambda folder: (folder / "MANIFEST.json").unlink(), "MANIFEST.json does not .*o such file"),
        (shutil.rmtree, "MANIFEST.json does not .*o such file"),
    ],
)
def test_damage_is_named_and_newest_falls_back(run, damage, complaint):
    def write(folder: Path) -> None:
        for name in "ab":
            (folder / name).write_text(next(texts))

    texts = iter("1a 1b 2a 2b".split())
    for step in (1, 2):
        write_checkpoint(run, step, write)
    damage(run / "step-000002")
    with pytest.raises(CheckpointError, match=complaint):
        verify(run / "step-000002")
    if (run / "step-000002").exists():
        with pytest.warns(UserWarning, match=f"{complaint}.*falling back") as caught:
            assert newest(run) == run / "step-000001"
        assert len(caught) == 1


def test_where_all_are_damaged_nothing_is_started_anew(run):
    for step in (1, 2):
        write_checkpoint(run, step, save(step, 3))
        (run / f"step-{step:06d}" / "optimizer.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        newest(run)


def forge(folder: Path, **changes: object) -> None:
    """A manifest whose own hash is right."""
    manifest = {"format": 1, "step": 1, "files": {}} | changes
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | {"sha256": digest}))


@pytest.mark.parametrize(
    "name", ["../secret", "a/../../secret", "/etc/hostname", "link/secret", "nul\0", "a" * 5000, ".", "", "no"]
)
@pytest.mark.parametrize("entry", ["true", None, 7, {"bytes": -1}])
def test_a_manifest_cannot_point_outwards(run, monkeypatch, name, entry):
    (run / "secret").write_text("s")
    folder = run / "step-000001"
    folder.mkdir()
    (folder / "link").symlink_to("..")
    forge(folder, files={name: checkpoint._fingerprint(run / "secret") if entry == "true" else entry})
    monkeypatch.setattr(checkpoint, "_fingerprint", lambda path: pytest.fail(f"read {path}"))
    with pytest.raises(CheckpointError):
        verify(folder)


@pytest.mark.parametrize("changes", [{"format": 2}, {"format": "1"}, {"step": 2}, {"files": ["a"]}, {"files": None}])
def test_a_manifest_that_this_version_does_not_write_is_refused(run, changes):
    folder = run / "step-000001"
    folder.mkdir()
    forge(folder)
    verify(folder)
    forge(folder, **changes)
    with pytest.raises(CheckpointError, match="^" + str(folder / "MANIFEST.json")):
        verify(folder)


def test_files_that_others_add_do_not_matter(run):
    folder = write_checkpoint(run, 1, save(1, 3))
    (folder / "notes.txt").write_text("mine")
    verify(folder)


def test_a_checkpoint_may_be_moved(run, tmp_path):
    folder = shutil.copytree(write_checkpoint(run, 1, save(1, 3)), tmp_path / "best")
    verify(folder)


def test_a_checkpoint_of_this_version_loads_for_ever():
    """tests/golden is never written again."""
    folder = Path(__file__).with_name("golden") / "step-000007"
    verify(folder)
    tree = load_tree(folder, "state")
    tensors = tree.pop("tensors")
    assert repr(tree) == repr(
        {
            "step": 7,
            "lr": 0.1,
            "flags": [True, None, -0.0],
            "betas": (0.9, 0.999),
            "worst": [math.nan, -math.inf],
            "$": {0: "ä"},
        }
    )
    assert list(tensors) == ["float32", "bfloat16", "int64", "uint8", "bool", "scalar", "empty"]
    for name, t in tensors.items():
        expected = {"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 3)}.get(name)
        expected = torch.tensor([[0, 1], [2, 3]]).to(getattr(torch, name)) if expected is None else expected
        assert t.dtype == expected.dtype and torch.equal(t, expected)


# --- the lock

HOLDER = """
import os, sys, time
from pathlib import Path
from fastsae.checkpoint import run_lock

with run_lock(Path(sys.argv[1])):
    if sys.argv[2] == "alone" or os.fork() == 0:  # where there is a worker, it speaks
        print("held", flush=True)
    time.sleep(60)
    os._exit(1)
"""


@pytest.fixture
def holder(run):
    """Starts a process that holds the lock and has perhaps forked a worker."""
    started: list[subprocess.Popen[str]] = []

    def start(worker: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, run, worker]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the worker too
        process.wait()


def test_a_second_process_is_refused_at_once_and_told_who_holds_the_folder(run, holder):
    process = holder("alone")
    took = []
    for _ in range(10):
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"{run} is in use by process {process.pid} on "), run_lock(run):
            pass
        took.append(time.monotonic() - begin)
    assert min(took) < 1  # the others may have met a machine that stood still
    process.kill()
    process.wait()
    assert (run / ".lock").exists()
    with run_lock(run):  # stale, and taken over
        assert f"process {os.getpid()} " in (run / ".lock").read_text()


def test_a_worker_that_outlives_the_killed_process_does_not_hold_the_lock(run, holder):
    process = holder("with a worker")
    process.kill()
    process.wait()
    with nothing_to_complain(), run_lock(run):
        pass


def test_the_lock_excludes_within_a_process_and_is_given_back(run):
    with run_lock(run):
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} "), run_lock(run):
            pass
        with pytest.raises(CheckpointError), run_lock(run):  # the refused one has not released it
            pass
    with run_lock(run):
        pass


def test_the_holder_clears_what_dead_processes_left(run):
    (run / ".tmp-4711" / "extra").mkdir(parents=True)
    (run / ".tmp-4711" / "extra" / "a").write_text("half")
    with run_lock(run):
        assert names(run) == {".lock"}


def test_a_file_system_without_locks_is_said(run, monkeypatch):
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=f"nothing keeps a second run out of {run}"), run_lock(run):
        pass
