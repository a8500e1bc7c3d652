"""The commands of docs/scaling.md: options that exist, and the scripts for Slurm and Ray on this machine."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks_support
import support
from ranks_support import check_same, results
from resume_support import make_tree
from torch import distributed as dist
from torch.distributed.run import get_args_parser

from aapo_fast import cli, config
from aapo_fast.rollout.vllm.process import free_port
from aapo_fast.trainer.records import read_lines

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def block(language, containing):
    """The page's one block of code that holds a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (block,) = (text for text in found if containing in text)
    return block


def commands():
    """Those of the page's blocks, and in backquotes, without what is before them on the line."""
    text = "\n".join(re.findall(r"^```(?:bash)?\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    text += "\n" + "\n".join(re.findall(r"`([^`\n]+)`", PAGE))
    found = [
        match
        for match in re.findall(r"\b(?:torchrun|aapo-fast) [^#;\n]+", text)
        if "CONFIG" in match or "torchrun -" in match
    ]
    return [shlex.split(command.replace("...", " ")) for command in found]


def test_commands_have_options_that_exist(tmp_path, monkeypatch):
    """torchrun's parser, ours, and the settings behind it; numbers for the shell's variables."""
    path, seen = tmp_path / "CONFIG.toml", set()
    path.write_text("")

    def understood(arguments, overrides):
        config.load(path, overrides)
        seen.add(arguments.command)
        return 0

    monkeypatch.setattr(cli, "_run", understood)
    for words in commands():
        program, *words = [re.sub(r"\$\w+", "1", word).replace("CONFIG.toml", str(path)) for word in words]
        if program == "torchrun":
            launched = get_args_parser().parse_args(words if {"-m", "--no-python"} & {*words} else [*words, "alone"])
            assert launched.training_script in ("aapo_fast.cli", "aapo-fast", "alone")
            assert launched.no_python == (launched.training_script == "aapo-fast")
            seen.add(launched.training_script)
            words = launched.training_script_args
        assert not words or cli.main(words) == 0, words
    assert seen == {"train", "serve", "doctor", "aapo_fast.cli", "aapo-fast", "alone"}


# --- scripts --------------------------------------------------------------------------------------------------------


def launched(folder, tiny_model, tree):
    """Write CONFIG.toml for a run in the folder RUN; the environment of a command that is to find torchrun."""
    folder.mkdir()
    (folder / "CONFIG.toml").write_text(support.toml(tree | {"run": {"folder": str(folder / "RUN")}}))
    own = [folder / "bin", Path(sys.executable).parent]
    return os.environ | {
        "PATH": os.pathsep.join([*map(str, own), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def write_script(folder, script):
    assert "29500" in script
    (folder / "script").write_text(script.replace("29500", str(free_port())))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model):
    """The tree of a run that ends after six steps, and the folder where one rank has done it."""
    folder = tmp_path_factory.mktemp("alone")
    slow = {"rewards": [{"function": "reward_functions:late_letters_slowly"}], "reference__mode": "none"}
    tree = make_tree(folder, tiny_model, rollout__prompts_per_step=5, **slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AAPO_FAST_CACHE", str(folder / "cache"))
        results(1, ranks_support.train, tree)
    return tree, folder


KILLS_ITS_RANK_ONCE = """
import os, signal
from pathlib import Path
from reward_functions import late_letters
def f(completions, prompts, **columns):
    metrics = Path("RUN/metrics.jsonl")
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and metrics.exists():
        if metrics.read_text().count("\\n") >= 3:
            os.kill(os.getppid(), signal.SIGKILL)
    return late_letters(completions, prompts)
"""


@needs_gloo
@pytest.mark.timeout(120)
def test_ranks_that_are_started_again_go_on(tmp_path, tiny_model, alone):
    """By torchrun, with the variable that the page names."""
    tree, truth = alone
    environment = launched(tmp_path / "job", tiny_model, tree | {"rewards": [{"function": "kills_once:f"}]})
    (tmp_path / "job" / "kills_once.py").write_text(KILLS_ITS_RANK_ONCE)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path / "job")
    (variable,) = re.findall(r"`(\w+)=1 torchrun --max-restarts", PAGE)
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["-m", "aapo_fast.cli", "train", "CONFIG.toml", "--resume"]
    where = {"cwd": tmp_path / "job", "env": environment | {variable: "1"}}
    done = subprocess.run(command, capture_output=True, text=True, **where)
    assert done.returncode == 0 and "resuming after step 2 of 6" in done.stdout, done.stdout + done.stderr
    (tmp_path / "job" / "run").symlink_to("RUN")
    check_same(truth, tmp_path / "job", tiny_model)


SRUN = """#!/bin/bash
for node in 0 1; do "$@" & done
wait
"""

SCONTROL = """#!/bin/bash
case "$1" in
    show) echo localhost; echo another ;;
    requeue) echo "$2" >> requeued ;;
esac
"""


def below(pid):
    """Processes that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = parents.get(pid, [])
    for child in found:
        found += parents.get(child, [])
    return found


def signal_step(job, ranks_only=False):
    """SIGTERM, as by Slurm's --signal, to every process of the steps, which are srun's; not to the script, nor to srun.
    Again to ranks alone: torchrun, which passes the first one on, may do so much later.
    """
    (srun,) = (pid for pid in below(job.pid) if b"/bin/srun" in command_of(pid))
    for pid in below(srun):
        if not ranks_only or (b"aapo_fast.cli" in command_of(pid) and b"torchrun" not in command_of(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


@needs_gloo
@pytest.mark.timeout(300)
def test_slurms_script(tmp_path, tiny_model, alone):
    """Two machines with a rank each, played by processes, as are srun and scontrol. Before the time is up every process
    of the step is sent SIGTERM: the run saves, and the script has the job queued again, which then comes to the end.
    """
    tree, truth = alone
    environment = launched(tmp_path / "job", tiny_model, tree) | {
        "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64",
    }  # fmt: skip
    (tmp_path / "job" / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "job" / "bin" / name).write_text(text)
        (tmp_path / "job" / "bin" / name).chmod(0o755)
    script = (
        block("bash", "#SBATCH").replace("--nproc-per-node 8", "--nproc-per-node 1").replace("29500", str(free_port()))
    )
    (tmp_path / "job" / "script").write_text(script)
    metrics, log = tmp_path / "job" / "RUN" / "metrics.jsonl", tmp_path / "job" / "log"

    def submit(interrupted):
        with open(log, "a") as output:
            job = subprocess.Popen(
                ["bash", "script"], cwd=tmp_path / "job", env=environment, stdout=output, stderr=output
            )
        deadline = time.monotonic() + 120
        while interrupted and not (metrics.exists() and len(read_lines(metrics)) >= 2):
            assert time.monotonic() < deadline and job.poll() is None, log.read_text()
            time.sleep(0.05)
        if interrupted:
            signal_step(job)
            while "interrupted: finishing" not in log.read_text():
                assert time.monotonic() < deadline and job.poll() is None, log.read_text()
                time.sleep(0.01)
            signal_step(job, ranks_only=True)
        job.wait(timeout=120)
        return json.loads((tmp_path / "job" / "RUN" / "summary.json").read_text())["status"]

    assert submit(interrupted=True) == "interrupted", log.read_text()
    assert (tmp_path / "job" / "requeued").read_text() == "17\n"
    assert submit(interrupted=False) == "finished", log.read_text()
    assert (tmp_path / "job" / "requeued").read_text() == "17\n"
    assert "resuming after step" in log.read_text()
    (tmp_path / "job" / "run").symlink_to("RUN")
    check_same(truth, tmp_path / "job", tiny_model)


RAY = """
import os
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_gpus": 1, "num_cpus": 32, "include_dashboard": False})
cluster.add_node(num_gpus=1, num_cpus=32)
os.environ["RAY_ADDRESS"] = cluster.address
exec(open("script").read(), {"__name__": "__main__"})
ray.shutdown()
cluster.shutdown()
"""


def ray_folder(tmp_path):
    """A folder with Ray and what it imports alone: `make test` installs it beside verl, whose packages are others."""
    (tmp_path / "packages").mkdir()
    for name in ("ray", "msgpack"):
        places = [Path(sys.prefix) / "verl" / name]
        spec = importlib.util.find_spec(name)
        places += [] if spec is None else [Path(spec.origin).parent]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            pytest.skip("Ray is not installed (make test installs it beside verl on Linux x86-64)")
        (tmp_path / "packages" / name).symlink_to(place)
    return tmp_path / "packages"


@needs_gloo
@pytest.mark.timeout(300)
def test_rays_script(tmp_path, tiny_model, alone):
    """On two nodes that a Ray cluster on this machine plays, with a GPU each that is none: a rank on each."""
    tree, truth = alone
    environment = launched(tmp_path / "job", tiny_model, tree)
    environment["PYTHONPATH"] += os.pathsep + str(ray_folder(tmp_path))
    script = block("python", "import ray").replace("nodes, gpus = 4, 8", "nodes, gpus = 2, 1")
    script = script.replace("29500", str(free_port())).replace(
        "/shared/CONFIG.toml", str(tmp_path / "job" / "CONFIG.toml")
    )
    (tmp_path / "job" / "script").write_text(script)
    command = [sys.executable, "-c", RAY]
    done = subprocess.run(command, cwd=tmp_path / "job", env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[0, 0]", done.stdout + done.stderr
    (tmp_path / "job" / "run").symlink_to("RUN")
    check_same(truth, tmp_path / "job", tiny_model)
