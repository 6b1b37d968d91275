"""A run over four hosts with addresses of their own: network namespaces of this machine, joined by a bridge."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_processes import FSDP, LIVE, SCRIPT, assert_same, ended

from conftest import SaveModel

NET = "10.211.77"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of four namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need `ip` and the rights of root")
    bridge = f"still{os.getpid()}"[:15]
    names = [f"{bridge}-{number}" for number in range(4)]
    try:
        ip("link", "add", bridge, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            outside = f"v{number}-{os.getpid()}"[:15]
            ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", outside, "master", bridge, "up")
            inside = ["netns", "exec", name, "ip"]
            ip(*inside, "addr", "add", f"{NET}.{number + 1}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            ip(*inside, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        ip("link", "del", bridge)


def make(hosts: list[str], environment: dict[str, str], recipe: Path, port: int, run: dict[str, Any]) -> list[Any]:
    """A process on each host."""
    plan = recipe.parent / f"hosts-{port}.json"
    plan.write_text(json.dumps([run]))
    context = {"WORLD_SIZE": str(len(hosts)), "MASTER_ADDR": f"{NET}.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    begun = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, str(SCRIPT), str(recipe), str(plan)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, **context, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "eth0"},
        )
        for rank, host in enumerate(hosts)
    ]
    try:
        return ended(begun)
    finally:
        for process in begun:
            process.kill()
            process.communicate()


def test_four_hosts_train_what_one_does_and_one_that_was_cut_off_comes_back(
    hosts, environment, command, tmp_path_factory, saved_model: SaveModel, text_files
):
    folder = tmp_path_factory.mktemp("hosts")
    recipe = folder / "hosts.yaml"
    recipe.write_text(
        f"""\
student: {{model: {saved_model("llama", seed=1)}}}
teacher: {{kind: model, model: {saved_model("llama", seed=2)}}}
data: {{path: {text_files}/train.jsonl, format: text, length: 32}}
objectives:
  - {{kind: forward_kl}}
steps: 12
batch: {{tokens: 200, micro_tokens: 64}}
optimizer: {{learning_rate: 1e-3}}
checkpoints: {{every: 4}}
precision: float64
device: cpu
out: {folder}/many
"""
    )
    command("distill", str(recipe), *LIVE, f"out={folder}/one")
    words = [*LIVE, FSDP, "parallel.replicas=2", "parallel.timeout_s=6"]
    cut = {"words": words, "die": {"rank": 3, "in": "step", "at": 9, "how": "cut"}}
    told = make(hosts, environment, recipe, 23_456, cut)
    assert all(code != 0 for code, _ in told)
    said = "".join(text for _, text in told[:3])
    assert said.count("LostError: ") == 1
    assert "lost: rank 3, last heard at step " in said
    assert "a process of this run is lost" in told[3][1]
    ip("netns", "exec", hosts[3], "ip", "link", "set", "eth0", "up")
    for code, text in make(hosts, environment, recipe, 23_457, {"words": words, "resume": True}):
        assert code == 0, text
    assert_same(folder / "many", folder / "one")
