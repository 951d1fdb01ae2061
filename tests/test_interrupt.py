"""SIGTERM and SIGINT, sent to real processes: the first is noticed and saved for, the second ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fastsae import interrupt
from fastsae.checkpoint import newest, verify
from fastsae.interrupt import Interrupt, Interrupted, exit_code, poll

EXAMPLES = int(os.environ.get("FASTSAE_EXAMPLES", "25"))
SIGNALS = [signal.SIGTERM, signal.SIGINT]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

HEAD = """
import os, signal, sys, time
from pathlib import Path
from fastsae.checkpoint import run_lock, write_checkpoint
from fastsae.interrupt import Interrupt, Interrupted, exit_code, poll

def say(text):
    print(text, flush=True)

"""
POLLS = """
with Interrupt() as interrupt:
    say("ready")
    while interrupt.requested is None:
        time.sleep(0.01)
    time.sleep(0.3)
    say("saved")
    sys.exit(exit_code(interrupt.requested))
"""
RETRIES = """
def warm_up():
    while True:
        try:
            time.sleep(0.01)
            poll()
        except Exception:
            say("retry")

with Interrupt():
    say("ready")
    try:
        warm_up()
    except Interrupted as stop:
        say(stop)
        sys.exit(exit_code(stop.signum))
"""
NEVER_POLLS = """
with Interrupt() as interrupt:
    say("ready")
    while True:
        if interrupt.requested is not None:
            say("noticed")
            break
    while True:
        pass
"""
NEVER_RETURNS_TO_PYTHON = NEVER_POLLS.replace("    while True:\n        pass", "    sum(range(10**15))")
SAVES = """
def write(folder):
    for name in "abcdef":
        (folder / name).write_text(str(step) * 10_000)
        time.sleep(0.002)

run = Path(sys.argv[1])
with run_lock(run), Interrupt() as interrupt:
    say("ready")
    for step in range(10**6):
        write_checkpoint(run, step, write, keep=2)
        if interrupt.requested is not None:
            say(step)
            sys.exit(exit_code(interrupt.requested))
"""
FORKS = """
with Interrupt() as interrupt:
    worker = os.fork()
    if worker == 0:
        say("ready")
        time.sleep(60)
        os._exit(1)
    time.sleep(0.1)
    os.kill(worker, signal.SIGINT)
    time.sleep(0.1)
    say(os.waitpid(worker, os.WNOHANG)[0] == worker)
    os.kill(worker, signal.SIGTERM)
    say(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    say(interrupt.requested)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs a script until it is ready, in a process group of its own, which ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object, under: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = [*under, sys.executable, "-c", HEAD + script, *map(str, arguments)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_noticed_at_the_next_poll(start, signum, code):
    process = start(POLLS)
    process.send_signal(signum)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == code == exit_code(signum)


def test_poll_gets_out_of_a_loop_that_retries(start):
    process = start(RETRIES)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "stopped by SIGTERM\n"
    assert process.returncode == 143


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("script", [NEVER_POLLS, NEVER_RETURNS_TO_PYTHON])
def test_the_second_signal_ends_the_process_at_once(start, script, first, second):
    for _ in range(3):  # the machine itself may stand still for a second, but not each time
        process = start(script)
        process.send_signal(first)
        assert process.stdout is not None and process.stdout.readline() == "noticed\n"
        begin = time.monotonic()
        process.send_signal(second)
        assert process.wait(timeout=60) == -second
        if (took := time.monotonic() - begin) < 1:
            break
    assert took < 1


def test_the_echo_of_a_signal_is_not_a_second_one(start):
    process = start(POLLS)
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(interrupt.ECHO / 100)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 143


def test_the_timeout_command_leaves_time_to_save(start):
    process = start(POLLS, under=["timeout", "60"])
    process.send_signal(signal.SIGTERM)  # it passes that on, to its child and to its group
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 143


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_at_a_random_moment_waits_for_the_save(start, tmp_path, signum):
    moments = np.random.default_rng(int(signum))
    for i in range(max(2, EXAMPLES // 40)):  # with both signals: 4, 10, 100
        run = tmp_path / str(i)
        process = start(SAVES, run)
        time.sleep(moments.random() * 0.3)
        process.send_signal(signum)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == exit_code(signum)
        assert newest(run) == run / f"step-{int(out):06d}"
        assert sorted(path.name for path in run.iterdir())[0] == ".lock" and len(list(run.iterdir())) <= 3
        verify(run / f"step-{int(out):06d}")


def test_a_forked_worker_ends_when_told_and_leaves_ctrl_c_to_its_parent(start):
    process = start(FORKS)
    assert process.communicate(timeout=60)[0].split() == ["False", "-15", "None"]
    assert process.returncode == 0


def test_former_handlers_come_back_and_nothing_is_polled_outside():
    former = [signal.getsignal(signum) for signum in SIGNALS]
    with Interrupt() as outer:
        inside = [signal.getsignal(signum) for signum in SIGNALS]
        assert inside[0] == inside[1] != former[0]
        with Interrupt() as inner:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted, match="SIGINT") as caught:
                poll()
            assert caught.value.signum == inner.requested == signal.SIGINT
        assert [signal.getsignal(signum) for signum in SIGNALS] == inside and outer.requested is None
        poll()
    assert [signal.getsignal(signum) for signum in SIGNALS] == former
    poll()


def test_in_another_thread_it_changes_nothing_but_may_poll():
    seen: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Interrupt() as mine:
            seen.extend([signal.getsignal(signal.SIGTERM) == before, mine.requested])
        try:
            poll()
        except Interrupted as stop:
            seen.append(stop.signum)

    with Interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [True, None, signal.SIGTERM]
