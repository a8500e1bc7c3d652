"""Runs in processes of their own, to be killed: one Python imports everything, and forks for each.

The tests' side is ``Forks``; this file is what it starts.
"""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import support

TIMES = (*support.TIMES, "engine_sync_seconds", "engine_sync_bytes")  # a resumed run sends the weights again


class Forks:
    """Starts training runs, one at a time."""

    def __init__(self, folder):
        self._folder, self._count = folder, 0
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        self._python = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._python.stdout.readline() == "ready\n"

    def start(self, tree, ahead=False):
        """A run of the config ``tree``; ``ahead``: on an engine that can draw while the policy trains."""
        self._count += 1
        log = self._folder / f"log-{self._count}"
        log.touch()
        self._python.stdin.write(json.dumps({"tree": tree, "ahead": ahead, "log": str(log)}) + "\n")
        self._python.stdin.flush()
        return Fork(int(self._python.stdout.readline()), log, self._python.stdout)

    def run(self, tree, ahead=False):
        """To its end; its exit code and output."""
        fork = self.start(tree, ahead)
        return fork.wait(), fork.output

    def close(self):
        self._python.stdin.close()
        self._python.wait()


class Fork:
    """One run."""

    def __init__(self, pid, log, results):
        self.pid, self._log, self._results = pid, log, results

    @property
    def output(self):
        return self._log.read_text()

    def until(self, condition, seconds=60.0):
        """Wait until ``condition()``, or until the run has ended; whether it is still there."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not Path(f"/proc/{self.pid}/fd/1").exists():  # ended, perhaps not yet waited for
                return False
            assert time.monotonic() < deadline, self.output
            time.sleep(0.0005)
        return True

    def kill(self, number):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(self.pid, number)

    def wait(self):
        """Its exit code; that of a signal is negative."""
        return int(self._results.readline())


def kill_often(forks, tree, folder, kills, ahead=False):
    """Kill at moments of three kinds in turn; the exit codes of the runs that were to be killed.

    What is left of the run is shared out among the kills that are left, so that none comes after its end: each is due
    after its share of the steps at the latest, however quick the machine is.
    """
    draw, codes = random.Random(kills), []
    checkpoints = folder / "run" / "checkpoints"
    for number in range(kills):
        done = max((int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")), default=0)
        share = (tree["train"]["steps"] - done) // (kills - number)
        fork, start = forks.start(tree, ahead), time.monotonic()
        delay, count = draw.uniform(0, 1.0), draw.randint(1, 3)

        def steps(fork=fork):
            return fork.output.count("\nstep ")

        moments = [
            lambda end=start + delay: time.monotonic() > end,  # anywhere, often while it is loading
            lambda count=count, steps=steps: steps() >= count,  # within a step
            # while a checkpoint is written; what an earlier kill has left is gone when the model is loaded
            lambda fork=fork: "loading" in fork.output and any(checkpoints.glob(".unfinished-*")),
        ]
        due = moments[number % 3]
        if fork.until(lambda due=due, share=share, steps=steps: due() or steps() >= share):
            end = time.monotonic() + draw.uniform(0, (0, 0.1, 0.02)[number % 3])
            fork.until(lambda end=end, share=share, steps=steps: time.monotonic() > end or steps() >= share)
            fork.kill(signal.SIGKILL)
        codes.append(fork.wait())
    return codes


def left_behind(folder):
    """Everything that two equal runs have in common: weights, and records without times."""
    from aapo_fast.trainer.records import read_lines

    def lines(name):
        return [{k: v for k, v in r.items() if k not in TIMES} for r in read_lines(folder / "run" / name)]

    records = {name: lines(name) for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")}
    return (folder / "run" / "model" / "model.safetensors").read_bytes(), records


def main():
    from aapo_fast.trainer import state  # noqa: F401  (all that a run needs, before there is anything to wait for)

    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            train(order)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def train(order):
    from aapo_fast import config
    from aapo_fast.cli import commands
    from aapo_fast.trainer import checkpoint, setup
    from aapo_fast.types import UserError

    checkpoint._flush = on_a_slow_disk(checkpoint._flush)
    for number, name in ((0, os.devnull), (1, order["log"]), (2, order["log"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    code = 1
    try:
        if order["ahead"]:
            setup.make_engine = snapshot_engine
        code = commands.train(config.parse(order["tree"]), "CONFIG.toml")
    except UserError as error:
        print(error)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def on_a_slow_disk(flush):
    """So that a writing can be seen from outside, and be killed in the middle."""

    def slow(path):
        time.sleep(0.004)
        flush(path)

    return slow


def snapshot_engine(config, policy, folder, display):
    """An engine with weights of its own, as a server has them: it may draw while the policy trains."""
    from aapo_fast.rollout.hf import HFEngine

    class SnapshotEngine(HFEngine):
        def sync_weights(self, version):
            super().sync_weights(version)
            self.model.load_state_dict(policy.model.state_dict())

    return SnapshotEngine(copy.deepcopy(policy.model), policy.tokenizer, config.rollout.max_batch_size)


if __name__ == "__main__":
    main()
