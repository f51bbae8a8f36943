"""What a request to stop does at each moment: small commands in processes of their own, and real signals."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

# Says where it is; ends with 75 and a word where a request reached it as it should.
COMMAND = """
from distca.launch.process import stop
stop.listen()
import sys, time
def say(word): print(word, flush=True)
def wait_for(true):
    while not true(): time.sleep(0.01)
say("begun")
if sys.argv[1] == "import":
    time.sleep(1000)
try:
    with stop.listening():
        if sys.argv[1] == "start":
            say("start"); time.sleep(1000)
        if sys.argv[1] == "swallowed":
            say("swallowed")
            try: time.sleep(1000)
            except BaseException: pass
        if sys.argv[1] == "callback":
            import weakref
            class Thing: pass
            def spin(_):
                say("callback")
                while not stop.was_asked(): pass
            thing = Thing(); reference = weakref.ref(thing, spin); del thing
            time.sleep(1000)
        if sys.argv[1] == "held":
            with stop.held():
                say("held"); time.sleep(1)
                say("whole")
            time.sleep(1000)
        if sys.argv[1] == "hangs":
            stop.PATIENCE_S = 1.0
            with stop.held():
                say("hangs"); time.sleep(1000)
        asked = stop.finishing()
        say("finish")
        wait_for(asked.is_set)
        say("noted"); time.sleep(60 if sys.argv[1] == "slow" else 2.5)
        say("saved"); sys.exit(75)
except KeyboardInterrupt:
    say("interrupted before" if stop.was_asked() else "interrupted")
    sys.exit(75)
"""


class Command:
    def __init__(self, phase: str):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([sys.executable, "-c", COMMAND, phase], start_new_session=True, **pipes)
        self.wait_for({"import": "begun", "slow": "finish"}.get(phase, phase))

    def wait_for(self, word: str) -> None:
        while (line := self.process.stdout.readline()) != f"{word}\n":
            assert line, self.process.communicate()

    def end(self) -> tuple[int, list[str], str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.split("\n")[:-1], err


@pytest.fixture
def command():
    started = []

    def start(phase: str) -> Command:
        started.append(Command(phase))
        return started[-1]

    yield start
    for left in started:
        left.process.kill()
        left.process.communicate()


ASKING = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", ASKING)
def test_while_it_imports_a_command_ends_with_a_sentence(command, number):
    running = command("import")
    running.process.send_signal(number)
    code, out, err = running.end()
    assert (code, out) == (75, []) and err == "distca: stopped before anything began, as asked\n"


@pytest.mark.parametrize("phase", ["start", "swallowed", "callback"])
@pytest.mark.parametrize("number", ASKING)
def test_before_steps_a_request_interrupts_also_where_somebody_keeps_the_exception(command, phase, number):
    running = command(phase)
    running.process.send_signal(number)
    code, out, err = running.end()
    assert (code, out[-1], err) == (75, "interrupted before", "")


def test_what_is_held_is_whole_before_a_request_is_heard(command):
    running = command("held")
    running.process.terminate()
    assert running.end() == (75, ["whole", "interrupted before"], "")


def test_what_hangs_is_not_held_for_ever(command):
    running = command("hangs")
    running.process.terminate()
    assert running.end() == (75, ["interrupted before"], "")


@pytest.mark.parametrize("number", ASKING)
def test_a_step_is_finished_however_often_the_same_request_comes(command, number):
    """As from a scheduler that tells the process, its group and its cgroup, in no time."""
    running = command("finish")
    for _ in range(5):
        running.process.send_signal(number)
        os.killpg(running.process.pid, signal.SIGTERM)
        time.sleep(random.uniform(0, 0.02))
    assert running.end()[:2] == (75, ["noted", "saved"])


def test_another_ctrl_c_is_at_once_and_another_sigterm_is_not(command):
    running = command("finish")
    running.process.terminate()
    running.wait_for("noted")
    time.sleep(1.2)
    running.process.terminate()
    assert running.end()[1] == ["saved"]
    running = command("slow")
    running.process.send_signal(signal.SIGINT)
    running.wait_for("noted")
    time.sleep(1.2)
    running.process.send_signal(signal.SIGINT)
    assert running.end()[1] == ["interrupted"]


@pytest.mark.parametrize("phase", ["import", "start", "finish"])
def test_a_lost_terminal_ends_nothing(command, phase):
    running = command(phase)
    for _ in range(3):
        running.process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    assert running.process.poll() is None
    running.process.terminate()
    code, out, _ = running.end()
    assert code == 75 and (phase != "finish" or out[-1] == "saved")


ENDED = """
import os, signal, sys
from distca.launch.process import stop
with stop.listening():
    stop.ending()
    os.kill(os.getpid(), signal.SIGTERM)
    print("told", flush=True)
sys.exit(3)
"""


def test_what_is_asked_while_a_command_says_how_it_ended_changes_nothing():
    ended = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "told\n", "")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-"])
def test_a_command_born_without_output_does_its_work(closed):
    command = f"exec {sys.executable} -m distca.launch.entry settings {closed}"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0


def test_signs_that_a_locale_lacks_end_nothing():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = "import sys; from distca.launch import cli; sys.exit(cli.run(['settings']))"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "\\u2026" in ended.stdout, ended.stderr
