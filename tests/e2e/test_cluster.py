"""recipes/cluster/: the scripts run, with stand-ins for what a cluster has, and start a run that is valid."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from torch.distributed.run import get_args_parser

from stillroom.cli.arguments import parse
from stillroom.cli.main import VERBS
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distributed.config import FsdpConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "cluster"
OUT = "runs/qwen2.5-72b-to-14b"
NODES = {
    "slurm": {
        "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "70001", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12",
    },
    "skypilot": {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    },
    "kubernetes": {"NUM_NODES": "2", "JOB_COMPLETION_INDEX": "1", "POD_IP": "10.0.0.2"},
}  # fmt: skip
"""What the second of two nodes is told."""
SLURM_PROCESS = "SLURM_PROCID=9 SLURM_LOCALID=1"
"""What `srun` tells one of its processes."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all(FOLDER / f"{name}.yaml"))


def container() -> dict[str, Any]:
    (found,) = documents("kubernetes")[1]["spec"]["template"]["spec"]["containers"]
    return found


def script(kind: str) -> tuple[str, dict[str, str]]:
    """What runs on a node, and the variables that its file sets."""
    if kind == "slurm":
        return (FOLDER / "slurm.sbatch").read_text(), {}
    if kind == "skypilot":
        (task,) = documents("skypilot")
        return task["run"], task["envs"]
    variables = {v["name"]: v["value"] for v in container()["env"] if "value" in v}
    return container()["args"][0], variables


class Node:
    """One node of a cluster: a folder that all share, and programs that write down how they are called."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder, self.log = kind, folder, folder / "calls.jsonl"
        text, variables = script(kind)
        self.text = text.replace("/shared", str(folder))
        programs = folder / "programs"
        programs.mkdir()
        variables = {name: value.replace("/shared", str(folder)) for name, value in variables.items()}
        self.env = {**os.environ, **variables, **NODES[kind], "PATH": f"{programs}:{os.environ['PATH']}"}
        (folder / ("stillroom" if kind == "slurm" else "") / OUT).mkdir(parents=True)
        self.record = folder / ("stillroom" if kind == "slurm" else "") / OUT / "run.json"
        self.does(stillroom="exit 0", torchrun="exit 0", scontrol="echo a; echo b")
        (programs / "srun").write_text(
            f'#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n{SLURM_PROCESS} "$@"\nexit "${{SRUN_EXIT:-0}}"\n'
        )
        (programs / "srun").chmod(0o755)

    def does(self, **programs: str) -> None:
        """Says what programs do after they have written down their words."""
        note = f"import json,os,sys; print(json.dumps([sys.argv[1:], dict(os.environ)]), file=open('{self.log}','a'))"
        for name, then in programs.items():
            path = self.folder / "programs" / name
            path.write_text(f'#!/bin/bash\n{sys.executable} -S -c "{note}" {name} "$@"\n{then}\n')
            path.chmod(0o755)

    def run(self, **variables: str) -> int:
        command = ["bash", "-c", self.text]
        return subprocess.run(command, cwd=ROOT, env={**self.env, **variables}, check=False).returncode

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [(words[1:], env) for words, env in found if words[0] == name]

    def started(self) -> list[str]:
        """The words of `stillroom` as each process is started with them."""
        if self.kind == "slurm":
            return self.calls("stillroom")[-1][0]
        words = self.calls("torchrun")[-1][0]
        return words[words.index("--no-python") + 2 :]

    def is_done(self) -> None:
        self.record.write_text('{\n  "status": "done"\n}\n')


@pytest.fixture
def node(tmp_path: Path) -> Callable[[str], Node]:
    return lambda kind: Node(kind, tmp_path)


KINDS = pytest.mark.parametrize("kind", sorted(NODES))


@KINDS
def test_what_is_started_is_a_run_that_is_valid(kind, node):
    here = node(kind)
    here.is_done()
    assert here.run() == 0
    arguments = parse(here.started(), tuple(VERBS))
    assert arguments.verb == "distill"
    assert "resume" in arguments.flags
    config = load(DistillConfig, ROOT / arguments.recipe, arguments.overrides)
    assert isinstance(config.parallel, FsdpConfig)
    assert config.parallel.replicas == 2
    assert Path(config.out) == here.record.parent


@KINDS
def test_all_of_them_make_the_same_run(kind, node):
    here = node(kind)
    here.is_done()
    here.run()
    (recipe,) = [word for word in here.started() if word.endswith(".yaml")]
    assert recipe == "recipes/qwen2.5-72b-to-14b.yaml"
    assert here.record.parent.name == Path(recipe).stem


def test_slurm_tells_each_process_its_place(node):
    here = node("slurm")
    here.is_done()
    here.run()
    ((_, told),) = here.calls("stillroom")
    assert {name: told[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"
    }  # fmt: skip
    assert told["MASTER_PORT"].isdecimal()


@pytest.mark.parametrize(("kind", "first"), [("skypilot", "10.0.0.1"), ("kubernetes", "stillroom-0.stillroom")])
def test_torchrun_understands_its_words_and_meets_at_the_first_node(kind, first, node):
    here = node(kind)
    here.is_done()
    here.run()
    given, told = here.calls("torchrun")[-1]
    words = get_args_parser().parse_args(given)
    assert told["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"  # without it a restart does not find itself
    assert (words.nnodes, words.nproc_per_node, words.rdzv_endpoint) == ("2", "8", f"{first}:29400")
    assert (words.local_addr, words.no_python, words.training_script) == ("10.0.0.2", True, "stillroom")
    assert "is_host=false" in words.rdzv_conf
    assert words.shutdown_timeout > 30


@pytest.mark.parametrize(
    ("exit_code", "restarts", "requeued", "ends_with"),
    [("0", "0", 1, 0), ("143", "0", 1, 0), ("137", "0", 1, 0), ("137", "20", 0, 137), ("2", "0", 0, 2)],
    ids=["saved", "stopped-early", "lost", "lost-too-often", "to-be-mended"],
)
def test_slurm_queues_a_run_again_that_is_not_done(exit_code, restarts, requeued, ends_with, node):
    here = node("slurm")
    assert here.run(SRUN_EXIT=exit_code, SLURM_RESTART_COUNT=restarts) == ends_with
    asked = [words for words, _ in here.calls("scontrol") if words[0] == "requeue"]
    assert asked == [["requeue", "70001"]] * requeued


@pytest.mark.parametrize("kind", ["skypilot", "kubernetes"])
def test_processes_that_were_stopped_are_no_run_that_is_done(kind, node):
    here = node(kind)
    here.record.write_text('{"status": "interrupted"}')
    assert here.run() == 75
    here.does(torchrun="exit 1")
    assert here.run() == 1


@pytest.mark.parametrize("kind", ["skypilot", "kubernetes"])
def test_what_headers_tell_ends_it_before_torchrun(kind, node):
    here = node(kind)
    here.does(stillroom="exit 2")
    assert here.run() == 2
    assert not here.calls("torchrun")


@pytest.mark.parametrize("kind", ["skypilot", "kubernetes"])
def test_a_notice_reaches_torchrun_which_is_waited_for(kind, node):
    """torchrun stands for one that says when it is there, waits for SIGTERM, and ends in its own time."""
    here = node(kind)
    here.record.write_text('{"status": "interrupted"}')
    notice = "{s.SIGTERM}"  # which is waited for from before the word on
    body = (
        f"import signal as s; s.pthread_sigmask(s.SIG_BLOCK, {notice}); print('there', flush=True); s.sigwait({notice})"
    )
    here.does(torchrun=f"exec {sys.executable} -S -c \"{body}; print('saved', flush=True)\"")
    process = subprocess.Popen(["bash", "-c", here.text], cwd=ROOT, env=here.env, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 75


def test_kubernetes_knows_each_exit_code_of_its_script():
    job = documents("kubernetes")[1]["spec"]
    rules = {rule["action"]: rule.get("onExitCodes", {}).get("values") for rule in job["podFailurePolicy"]["rules"]}
    assert rules == {"Ignore": [75], "FailJob": [2]}
    assert job["completions"] == job["parallelism"] == int(script("kubernetes")[1]["NUM_NODES"])
    assert job["template"]["spec"]["subdomain"] == documents("kubernetes")[0]["metadata"]["name"]
    words = shlex.split(container()["args"][0], comments=True)
    patience = int(words[words.index("--shutdown-timeout") + 1])
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > patience


@pytest.mark.parametrize("text", [documents("skypilot")[0]["setup"], *(script(kind)[0] for kind in sorted(NODES))])
def test_every_script_is_bash(text):
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
