"""Many processes train what one would: DDP, FSDP2, hybrid sharding, a teacher on processes of its own; saved by some
and resumed by others; one lost, and the rest say which."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import Command, SaveModel
from stillroom.runs import read_json, read_metrics

SCRIPT = Path(__file__).with_name("fleet_runs.py")
Start = Callable[..., list[subprocess.Popen[str]]]
LIVE = ["teacher.dtype=float64"]
HIDDEN = (
    "objectives=[{kind: forward_kl, weight: 0.7}, {kind: hidden, weight: 0.5, distance: normalized_mse, "
    "layers: uniform, projector: {kind: linear, start: least_squares}}, {kind: hidden, weight: 0.1, "
    "distance: {kind: attention_relation, heads: 2}, layers: uniform}]"
)
HIDDEN_ALONE = "objectives=[{kind: hidden, weight: 1.0, distance: normalized_mse, layers: [[0, 0], [1, 2]]}]"
NEW = (
    "student={init: {kind: config, settings: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, intermediate_size: 24}}}"
)
CUT = "student={init: {kind: from_teacher, layers: 2}}"
CASES: dict[str, list[str]] = {
    "plain": LIVE,
    "tied": [*LIVE, "student.model={tied}", "teacher.model={tied_teacher}"],
    "lora": [*LIVE, "student.lora={{rank: 4}}"],
    "hidden": [*LIVE, HIDDEN.replace("{", "{{").replace("}", "}}")],
    "hidden-alone": [*LIVE, HIDDEN_ALONE.replace("{", "{{").replace("}", "}}")],
    "new": [*LIVE, NEW.replace("{", "{{").replace("}", "}}")],
    "cut": [*LIVE, CUT.replace("{", "{{").replace("}", "}}")],
    "new-lora": [*LIVE, NEW.replace("}}}", "}}, lora: {rank: 4}}").replace("{", "{{").replace("}", "}}")],
    "recomputed": [*LIVE, "student.gradient_checkpointing=true", "student.freeze=['*layers.0.mlp*']"],
    "store": ["teacher={{kind: store, path: {store}}}", "data={{format: store, length: 32}}", "held_out=null"],
}
"""What is trained, by what differs from the recipe."""
DDP, FSDP = "parallel.kind=ddp", "parallel.kind=fsdp"
MEASURED = "student={{init: {{kind: from_teacher, layers: {{kind: best, count: 2}}}}}}"
CASES["measured"] = [*LIVE, MEASURED]
TWO = [(case, how) for case in CASES for how in (DDP, FSDP) if case != "measured"]
TWO += [("plain", f"{FSDP} parallel.reshard=false"), ("measured", f"{DDP} teacher.placement=sharded")]
"""Of two processes."""
TEACHES = "teacher.ranks=1"
FOUR = [
    ("plain", f"{FSDP} parallel.replicas=2"),
    ("store", f"{FSDP} parallel.replicas=2"),
    ("plain", f"{FSDP} teacher.ranks=2 teacher.placement=sharded"),
    ("hidden", f"{FSDP} teacher.ranks=2"),
    ("tied", f"{DDP} teacher.ranks=3"),
]
"""Of four."""


def name_of(case: str, how: str) -> str:
    return f"{case} {how}".strip()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, saved_model: SaveModel, text_files: Path) -> Path:
    path = tmp_path_factory.mktemp("fleet") / "fleet.yaml"
    path.write_text(
        f"""\
student: {{model: {saved_model("llama", seed=1)}}}
teacher: {{kind: model, model: {saved_model("llama", seed=2, num_hidden_layers=3, hidden_size=24)}}}
data: {{path: {text_files}/train.jsonl, format: text, length: 32}}
held_out: {{path: {text_files}/valid.jsonl, every: 9}}
objectives:
  - {{kind: forward_kl, weight: 0.75}}
  - {{kind: cross_entropy, weight: 0.25}}
steps: 20
batch: {{tokens: 200, micro_tokens: 64}}
optimizer: {{learning_rate: 1e-3, warmup: 0.2}}
checkpoints: {{every: 7, keep: 9}}
precision: float64
device: cpu
out: {path.parent}/run
"""
    )
    return path


@pytest.fixture(scope="module")
def words(saved_model: SaveModel, recipe: Path, text_files: Path, command: Command) -> Callable[[str], list[str]]:
    """The settings of a case."""
    store = recipe.parent / "captured"
    teacher = saved_model("llama", seed=2, num_hidden_layers=3, hidden_size=24)
    command(
        "capture", f"teacher.model={teacher}", f"data={{path: {text_files}/train.jsonl, format: text, length: 32}}",
        "signal={kind: top_k, k: 8, label: true}", f"out={store}",
    )  # fmt: skip
    places = {
        "tied": str(saved_model("qwen2", seed=3)),
        "tied_teacher": str(saved_model("qwen2", seed=4, num_hidden_layers=3)),
        "store": f"{store}/store",
    }
    return lambda case: [word.format(**places) for word in CASES[case]]


def free_ports() -> Iterator[int]:
    """Ports that nobody listens on, with a hundred above each that are for its processes too."""
    for port in itertools.count(20_000 + os.getpid() % 100 * 100, 100):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                yield port


@pytest.fixture(scope="module")
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Starts processes as `torchrun` does: ``start(2, *words of a command)``."""
    begun: list[subprocess.Popen[str]] = []
    ports = free_ports()

    def ranks(size: int, *command: str, **settings: str) -> list[subprocess.Popen[str]]:
        port = next(ports)
        own = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        made = []
        for rank in range(size if size > 1 else 1):
            place = {**own, **settings, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            made.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**environment, **place},
                )
            )
        begun.extend(made)
        return made

    yield ranks
    for process in begun:
        if process.poll() is None:
            process.kill()
        if process.stdout is not None and not process.stdout.closed:
            process.communicate()


def ended(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    told = [process.communicate(timeout=400)[0] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, told, strict=True)]


def make(start: Start, recipe: Path, size: int, runs: list[dict[str, Any]]) -> list[tuple[int, str]]:
    plan = recipe.parent / f"runs-{len(list(recipe.parent.iterdir()))}.json"
    plan.write_text(json.dumps(runs))
    return ended(start(size, str(SCRIPT), str(recipe), str(plan)))


@pytest.fixture(scope="module")
def made(start: Start, recipe: Path, words: Callable[[str], list[str]]) -> Path:
    """The folder that holds every run, by one process, by two and by four."""
    folder = recipe.parent / "made"

    def run(case: str, how: str, size: int) -> dict[str, Any]:
        return {"words": [*words(case), *how.split(), f"out={folder}/{size} {name_of(case, how)}"]}

    stopped = f"out={folder}/stopped"
    of_two = [run(case, how, 2) for case, how in TWO]
    of_two += [
        run("plain", f"{DDP} {TEACHES}", 2),
        {"words": [*LIVE, FSDP, stopped, "checkpoints.background=true"], "stop_at": 11},
    ]
    plans = {1: [run(case, "", 1) for case in CASES], 2: of_two, 4: [run(case, how, 4) for case, how in FOUR]}
    for size, runs in plans.items():
        for code, text in make(start, recipe, size, runs):
            assert code == 0, text
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same(found: Path, wanted: Path) -> None:
    """Parameters within 1e-9, in float64."""
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-9)


# --- the same result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "case", "how"),
    [*((2, *two) for two in TWO), (2, "plain", f"{DDP} {TEACHES}"), *((4, *four) for four in FOUR)],
)
def test_many_processes_train_what_one_does(made, size, case, how):
    one, many = made / f"1 {case}", made / f"{size} {name_of(case, how)}"
    assert_same(many, one)
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (one, many)]
    assert len(lines[0]) == len(lines[1])
    for ours, theirs in zip(*lines, strict=True):
        held_out = ours.get("held_out", {}), theirs.get("held_out", {})
        for alone, together in ((ours, theirs), held_out):
            assert alone.keys() == together.keys()
            for name in alone.keys() - {"held_out", "time_s", "tokens_per_s"}:
                assert together[name] == pytest.approx(alone[name], rel=1e-7), name


def test_the_trained_model_is_another_than_at_the_start(made, saved_model):
    before = load_file(saved_model("llama", seed=1) / "model.safetensors")
    after = weights(made / "1 plain")
    assert max((after[name] - before[name].double()).abs().max().item() for name in before) > 1e-3


@pytest.mark.parametrize(("size", "how"), [(1, ""), (4, FSDP), (3, f"{DDP} {TEACHES}")])
def test_what_two_saved_others_resume(made, start, recipe, size, how):
    """SIGTERM in one process has all save, at the same step; and the data go on where they stood."""
    stopped = made / "stopped"
    assert read_json(stopped / "run.json")["status"] == "interrupted"
    resumed = made / f"resumed by {size}"
    shutil.copytree(stopped, resumed)
    for code, text in make(start, recipe, size, [{"words": [*LIVE, *how.split(), f"out={resumed}"], "resume": True}]):
        assert code == 0, text
    assert_same(resumed, made / "1 plain")
    steps = [line["step"] for line in read_metrics(resumed / "metrics.jsonl") if "held_out" not in line]
    assert steps == list(range(1, 21))


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "at", "last"), [("step", 20, "step-00000007"), ("save", 2, "step-00000007")])
def test_a_killed_process_is_named_and_nothing_whole_is_lost(made, start, recipe, where, at, last):
    out = recipe.parent / f"killed in {where}"
    run = {"words": [*LIVE, FSDP, f"out={out}"], "die": {"rank": 1, "in": where, "at": at}}
    (code, text), (killed, _) = make(start, recipe, 2, [run])
    assert killed == -signal.SIGKILL
    assert code == 1  # a script's; the command's is 2
    assert "a process of this run is lost" in text
    assert "rank 1, last heard at step " in text
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*"))[-1] == last
    for code, text in make(start, recipe, 2, [{"words": [*LIVE, FSDP, f"out={out}"], "resume": True}]):
        assert code == 0, text
    assert_same(out, made / "1 plain")


def test_a_process_that_hangs_is_named(start, recipe):
    out = recipe.parent / "hangs"
    settings = [*LIVE, FSDP, f"out={out}", "parallel.timeout_s=4", "steps=100000", "held_out=null"]
    first, second = start(2, "-m", "stillroom", "distill", str(recipe), *settings)
    until(lambda: (out / "metrics.jsonl").is_file() and len(read_metrics(out / "metrics.jsonl")) > 2)
    second.send_signal(signal.SIGSTOP)
    told = first.communicate(timeout=120)[0]
    second.kill()
    second.communicate()
    assert first.returncode == 2
    assert "error: a process of this run is lost" in told
    assert "lost: rank 1, last heard at step " in told
    assert "Traceback" not in told


def until(true: Callable[[], bool]) -> None:
    """Waits for something that another process does."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < 120
        time.sleep(0.05)


def test_torchrun_restarts_a_run_which_resumes_by_itself(made, environment, recipe):
    out = recipe.parent / "restarted"
    plan = recipe.parent / "restarted.json"
    plan.write_text(json.dumps([{"words": [*LIVE, DDP, f"out={out}"], "die": {"rank": 0, "in": "step", "at": 20}}]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(SCRIPT), str(recipe), str(plan)],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(out, made / "1 plain")


def test_torchrun_does_not_take_up_a_run_that_it_did_not_begin(made, environment, recipe):
    out = made / "stopped"
    before = read_json(out / "run.json")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "stillroom", "distill", str(recipe), *LIVE, DDP, f"out={out}"],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: the output folder") == 2  # once for each attempt
    assert read_json(out / "run.json") == before


@pytest.mark.parametrize("how", [FSDP, f"{DDP} {TEACHES}"])
def test_sigterm_ends_all_in_good_order(start, recipe, how):
    """Also where it comes to the process that runs the teacher, the last."""
    out = recipe.parent / f"ended {how}"
    settings = [*LIVE, *how.split(), f"out={out}", "steps=100000", "held_out=null"]
    both = start(2, "-m", "stillroom", "distill", str(recipe), *settings)
    until(lambda: (out / "metrics.jsonl").is_file() and len(read_metrics(out / "metrics.jsonl")) > 2)
    both[1].send_signal(signal.SIGTERM)
    (code, told), (other, silent) = ended(both)
    assert (code, other) == (0, 0)
    assert "Resume with: stillroom distill " in told
    assert told.rstrip().endswith("--resume")
    assert "esume" not in silent


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{}, {"steps": "19"}], "the processes of this run have different settings"),
        ([{}, {"teacher.model": "nowhere"}], "rank 1 on"),
        ([{"parallel.replicas": "3"}] * 2, "2 processes cannot hold 3 copies of the student"),
        ([{"teacher.ranks": "2"}] * 2, "no process is left for the student"),
        ([{"parallel.kind": "none"}] * 2, "2 processes were started for a run of one"),
        ([{"data.path": "nowhere.jsonl"}] * 2, "nowhere.jsonl"),
        ([{"device": "cuda:0"}] * 2, "2 processes cannot share one device"),
    ],
)
def test_what_does_not_fit_is_said_once(start, recipe, changes, said):
    out = recipe.parent / f"never-{abs(hash(said))}"
    with together(start, recipe, out, changes) as both:
        (code, told), (other, silent) = ended(both)
    assert (code, other) == (2, 2)
    assert told.count("error: ") + silent.count("error: ") == 1
    assert said in told
    assert "Traceback" not in told + silent
    assert not out.exists()


def test_a_step_that_is_not_finite_is_told_once_with_the_documents_of_all(start, recipe):
    wild = ["optimizer.learning_rate=1e300", "optimizer.warmup=0", "optimizer.clip=null", "steps=9", "held_out=null"]
    settings = [*LIVE, DDP, *wild, f"out={recipe.parent}/wild"]
    (code, told), (other, silent) = ended(start(2, "-m", "stillroom", "distill", str(recipe), *settings))
    (alone,) = ended(
        start(1, "-m", "stillroom", "distill", str(recipe), *settings[:1], *wild, f"out={recipe.parent}/wild1")
    )
    assert (code, other, alone[0]) == (2, 2, 2)
    assert "error: " not in silent
    documents = [next(line for line in text.splitlines() if "documents:" in line) for text in (told, alone[1])]
    assert documents[0] == documents[1]


@contextmanager
def together(
    start: Start, recipe: Path, out: Path, changes: list[dict[str, str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of which each has settings of its own."""
    script = recipe.parent / f"{out.name}.py"
    each = [[*LIVE, FSDP, f"out={out}", *(f"{k}={v}" for k, v in own.items())] for own in changes]
    script.write_text(
        f"""import os, sys
from stillroom.cli.main import main
sys.exit(main(["distill", {str(recipe)!r}, *{each!r}[int(os.environ["RANK"])]]))
"""
    )
    yield start(len(changes), str(script))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR not set"),
        ({"RANK": None}, "the environment does not say this process's RANK"),
        ({"RANK": "first"}, "the environment does not say this process's RANK"),
    ],
)
def test_an_environment_that_lacks_something(environment, recipe, changes, said):
    place = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        **changes,
    }
    env = {**environment, **{name: value for name, value in place.items() if value is not None}}
    done = subprocess.run(
        [sys.executable, "-m", "stillroom", "distill", str(recipe)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 2
    assert f"error: {said}" in done.stderr or said in done.stderr
    assert "Traceback" not in done.stderr


# --- what a process holds and sends ----------------------------------------------------------------------------------

BIG = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 24, "num_attention_heads": 4}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has the C library give back at once what is freed, so that what a process has is what it holds."""


@pytest.fixture(scope="module")
def watched(start: Start, recipe: Path, saved_model: SaveModel) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The parameters of a model by part, and what each of two processes held and sent that trained it by FSDP2."""
    model = saved_model("llama", seed=5, **BIG)
    settings = ["teacher=null", "objectives=[{kind: cross_entropy}]", "precision=float32", "held_out=null", FSDP]
    settings += ["steps=2", "batch={tokens: 64, micro_tokens: 32}"]  # whose activations are small beside the model
    tiny = [*settings, f"out={recipe.parent}/tiny"]
    big = [*settings, f"student.model={model}", f"out={recipe.parent}/watched"]
    places = [recipe.parent / f"watched-{rank}.json" for rank in range(2)]
    script = recipe.parent / "watched.py"
    script.write_text(
        f"""import os, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
from watched_run import main
main({list(map(str, places))!r}[int(os.environ["RANK"])], {str(recipe)!r}, {tiny!r}, {big!r})
"""
    )
    for code, text in ended(start(2, str(script), **GIVES_BACK)):
        assert code == 0, text
    parts = {"blocks": 0, "embeddings": 0, "rest": 0}
    for name, tensor in load_file(model / "model.safetensors").items():
        kind = "blocks" if ".layers." in name else "embeddings" if "embed_tokens" in name else "rest"
        parts[kind] += tensor.numel()
    return parts, [json.loads(place.read_text()) for place in places]


@pytest.mark.parametrize("phase", ["load", "step", "save", "export"])
def test_no_process_holds_more_than_its_part(watched, phase):
    """Never more than its share of weights, gradients and AdamW's moments and 15 % of all of them."""
    parts, told = watched
    state = 16 * sum(parts.values())
    for of_rank in told:
        assert 0 < of_rank["most"][phase] <= (1 / 2 + 0.15) * state
    for of_rank in told:  # nor the weights whole, where nothing but weights is there
        if phase == "load":
            assert of_rank["most"][phase] < 4 * sum(parts.values())


def test_a_step_sends_what_it_must(watched):
    """Each block is put together for its forward and its backward pass, and its gradient added up; what stands around
    the blocks is put together once, but for the embeddings; and one sum tells all of the rest."""
    parts, told = watched
    blocks, embeddings, rest = parts["blocks"], parts["embeddings"], parts["rest"]
    for of_rank in told:
        for step in of_rank["sent"]:
            passes = step["_reduce_scatter_base_"][0] // (BIG["num_hidden_layers"] + 2)
            assert passes >= 1
            assert step["_allgather_base_"] == [
                passes * (2 * (BIG["num_hidden_layers"] + 1) + 1),
                passes * 4 * (2 * (blocks + embeddings) + rest),
            ]
            assert step["_reduce_scatter_base_"][1] == passes * 4 * (blocks + embeddings + rest)
            assert step["allreduce_"] == [1, 8 * 4]  # loss, squares of gradients, one objective, a signal
            assert set(step) == {"_allgather_base_", "_reduce_scatter_base_", "allreduce_"}
