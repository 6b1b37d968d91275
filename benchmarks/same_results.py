"""Whether a change of the code changed a result: tiny runs of every verb, and every number and byte that they leave.

python benchmarks/same_results.py --source OLD/src --out before.json    # of the code before the change
python benchmarks/same_results.py --against before.json                 # prints each difference; exits 1 where any is

Both must be made on one machine with the same packages, on its CPU. Only the command line is used, so the code before
may be laid out in another way. Each command has a process of its own: `torchrun` starts one run, and all others are
forked from this process, which has imported everything, since the imports take longer than a run. Times, paths,
versions, peaks of memory and sentences for people are not compared.
"""

import argparse
import hashlib
import itertools
import json
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

Facts = Any
"""What a case left, as JSON values."""

NOT_COMPARED = {
    "time_s", "tokens_per_s", "started", "versions", "git_commit", "machine", "peak_memory_bytes", "config",
    "launchers", "command", "sentence", "failed", "transformers_version", "_name_or_path", "sha256",
}  # fmt: skip
"""Keys of JSON files whose values differ from run to run, or are for people."""
RENAMED = {
    f"{kind}_loss": f"{kind}_nats" for kind in ("logit_mse", "hinge_ranking", "logistic_ranking", "total_variation")
}
"""Keys of JSON files that the code has renamed on purpose: the new name, and the one in the file of before."""

# --- the models and the text -----------------------------------------------------------------------------------------

TEXT = [
    "The still runs slowly, and what comes over first is thrown away.",
    "A teacher says what it thinks of every word; the student listens.",
    "User: how many drops? Assistant: 12 drops, no more than 34.",
    "def drip(n: int) -> int:\n    return n + 1\n",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": 304, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
DEEP = {"num_hidden_layers": 4, "hidden_size": 24, "intermediate_size": 40}
GPT2 = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "teacher": ("llama", False, DEEP),
    "student": ("llama", False, {}),
    "baseline": ("llama", False, {"tie_word_embeddings": True}),
    "capped": ("gemma2", False, {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 8}),
    "scaled": ("cohere", False, {"logit_scale": 0.25, "vocab_size": 320}),
    "biased": ("phi", False, {"vocab_size": 320}),
    "gpt2": ("gpt2", False, GPT2),
    "chat-teacher": ("qwen3", True, {**DEEP, "head_dim": 8}),
    "chat-student": ("llama", True, {"tie_word_embeddings": True}),
}
"""By folder: the family, whether there is a chat template, and what differs from SHAPE."""


def make_models() -> None:
    """Models in float32 whose logits are far from uniform and whose biases are not zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for seed, (folder, (family, chat, settings)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**SHAPE, **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0, 0.3)
        model.save_pretrained(folder)
        tokenizer = make_tokenizer(("<|im_start|>", "<|im_end|>") if chat else ())
        tokenizer.chat_template = CHATML if chat else None
        tokenizer.save_pretrained(folder)


def make_tokenizer(extra: tuple[str, ...]) -> Any:
    """A byte-level BPE with <s>, which stands before each text, and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=1 << 20,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_data() -> None:
    def text(i: int) -> str:
        return f"{i}: " + " ".join(TEXT[(i + k) % len(TEXT)] for k in range(1 + i % 2))[: 20 + 13 * i % 70]

    def turn(i: int, role: str) -> dict[str, str]:
        return {"role": role, "content": f"{i}?" if role == "user" else TEXT[i % 4][: 8 + i % 9]}

    pairs = [{"question": f"How many in {i}?", "answer": f"{12 + i} drops, no more."} for i in range(40)]
    chats = [{"messages": [turn(i + k, role) for k in range(1 + i % 2) for role in ("user", "assistant")]}
             for i in range(48)]  # fmt: skip
    quiz = [
        {"q": TEXT[i % 4][: 9 + i], "c": ["drops", "word", "the still"], "t": i % 3, "g": i % 2, "s": TEXT[1]}
        for i in range(12)
    ]
    write_lines("train.jsonl", [{"text": text(i), "weight": 0.5 + i % 4} for i in range(48)])
    write_lines("valid.jsonl", [{"text": text(i)} for i in range(100, 110)])
    write_lines("pairs.jsonl", pairs[:32])
    write_lines("pairs-valid.jsonl", pairs[32:])
    write_lines("chat.jsonl", chats[:40])
    write_lines("chat-valid.jsonl", chats[40:])
    write_lines("quiz.jsonl", quiz)
    for name, text_of_task in TASKS.items():
        Path(f"{name}.yaml").write_text(f"name: {name}\nitems: quiz.jsonl\n{text_of_task}\n")


def write_lines(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


TASKS = {
    "choices": 'kind: multiple_choice\ncontext: "Q: {q}\\nA:"\nchoices: c\ntarget: t\nmetric: acc_norm\ngroup: t\n'
    "shots: 1\nexamples: [{q: Which?, c: [drops, word, the still], t: 1}]",
    "same_context": "kind: multiple_choice\ncontext: s\nchoices: ['{q}', drops]\ntarget: g",
    "pairs": 'kind: minimal_pairs\ngood: "{q} runs."\nbad: "runs {q}."',
    "written": "kind: exact_match\ncontext: q\ntarget: c\nmax_tokens: 6\nfilters: [strip, lower]",
    "last_word": 'kind: last_word\ntext: "{q} drops"',
}
"""Descriptions of local tasks, but for their names and items."""

# --- the commands ----------------------------------------------------------------------------------------------------

TRAIN_TEXT = "data={format: text, path: train.jsonl, length: 32}"
TRAIN = [
    "student.model=student", "teacher={kind: model, model: teacher}", "objectives=[{kind: forward_kl}]",
    TRAIN_TEXT, "steps=20", "batch={tokens: 128, micro_tokens: 64}",
    "optimizer={learning_rate: 1e-2, warmup: 0.2}", "device=cpu",
]  # fmt: skip
"""What every run of distill has, unless it says otherwise: a later setting replaces an earlier one."""
HELD_OUT = "held_out={path: valid.jsonl, every: 7}"
CHAT = [
    "student.model=chat-student", "teacher.model=chat-teacher", "data={format: chat, path: chat.jsonl, length: 64}",
    "held_out={path: chat-valid.jsonl, every: 7}",
]  # fmt: skip
PAIRS = (
    'data={format: prompt_completion, path: pairs.jsonl, length: 48, prompt: "Q: {question}\\nA: ", completion: answer}'
)
FLOAT64 = ["precision=float64"]
"""In which no kernel computes the losses, but the plain formulas."""
HIDDEN = (
    "objectives=[{kind: forward_kl, weight: 0.7}, {kind: hidden, weight: 0.5, distance: normalized_mse, layers: "
    "uniform, projector: {kind: linear, start: least_squares}}, {kind: hidden, weight: 0.1, distance: linear_cka}]"
)


def from_store(signal: str, *objectives: str, held_out: bool = True) -> list[str]:
    store = f"teacher={{kind: store, path: captured-{signal}/store}}"
    other = "held_out={path: captured-valid/store, every: 7}" if held_out else "held_out=null"
    return [store, "data={format: store, length: 32}", other, f"objectives=[{', '.join(objectives)}]"]


DISTILL: dict[str, list[str]] = {
    "forward-kl": [HELD_OUT, "objectives=[{kind: forward_kl, weight: 0.75}, {kind: cross_entropy, weight: 0.25}]"],
    "reverse-kl": [
        "objectives=[{kind: reverse_kl, temperature: 2.0, weight: 0.7}, "
        "{kind: cross_entropy, smoothing: 0.1, weight: 0.3}]"
    ],
    "hard-labels": ["teacher=null", PAIRS, "held_out.path=pairs-valid.jsonl", "objectives=[{kind: cross_entropy}]"],
    "mixtures": [
        "objectives=[{kind: jensen_shannon, beta: 0.3}, {kind: skew_kl, alpha: 0.2}, {kind: skew_reverse_kl}]"
    ],
    "other-divergences": [
        "objectives=[{kind: adaptive_kl, mu: 0.6}, {kind: alpha_beta, alpha: 0.4, beta: 0.7}, {kind: total_variation}]"
    ],
    "alpha-beta": ["objectives=[{kind: alpha_beta, alpha: 0.4, beta: 0.7, temperature: 1.5}]"],
    "logits": [
        "objectives=[{kind: logit_mse, weight: 0.1}, {kind: hinge_ranking, k: 8}, {kind: logistic_ranking, k: 8}]"
    ],
    "token-weights": [
        "data.weight=weight",
        "objectives=[{kind: forward_kl, token_weight: {kind: teacher_entropy, certain: 0.2}}, "
        "{kind: cross_entropy, token_weight: {kind: student_entropy}}, "
        "{kind: reverse_kl, token_weight: {kind: data}}, "
        "{kind: hidden, weight: 0.2, distance: cosine, token_weight: {kind: data}}]",
    ],
    "hidden-mse": [
        HELD_OUT,
        "objectives=[{kind: forward_kl}, {kind: hidden, distance: mse, weight: 0.5, normalise: rms, "
        "layers: [[0, 0], [1, 3], [final_norm, final_norm]], weights_by_layer: [0.5, 1.0, 2.0]}]",
    ],
    "hidden-projectors": [
        HELD_OUT,
        "objectives=[{kind: forward_kl}, {kind: hidden, distance: normalized_mse, normalise: layer_norm, "
        "projector: {kind: linear, shared: true, start: identity}}, {kind: hidden, distance: channel_scaled_mse, "
        "projector: {kind: linear, start: least_squares}}, {kind: hidden, distance: {kind: channel_kl, "
        "temperature: 2.0}, layers: {last: 1}}]",
    ],
    "hidden-relations": [
        HELD_OUT,
        "objectives=[{kind: forward_kl}, {kind: hidden, distance: linear_cka, weight: 0.3}, "
        "{kind: hidden, distance: attention_relation, weight: 0.3, layers: {every: 2}}]",
    ],
    "cut": [
        HELD_OUT, "student={init: {kind: from_teacher, layers: {kind: best, count: 2}, documents: 16, "
        "width: {hidden_size: 16, num_attention_heads: 2, intermediate_size: 24}}}",
        "objectives=[{kind: forward_kl}, {kind: hidden, layers: kept}]",
    ],
    "cut-evenly": ["student={init: {kind: from_teacher, layers: 2}}"],
    "new": ["student={init: {kind: config, settings: {hidden_size: 16, num_hidden_layers: 2, intermediate_size: 24}}}"],
    "new-family": ["student={init: {kind: config, family: qwen2, settings: {vocab_size: 304, hidden_size: 16, "
                   "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 24, "
                   "max_position_embeddings: 64}}}", "seed=3"],
    "lora": ["student.lora={rank: 4, dropout: 0.1}", HELD_OUT],
    "lora-adapter": ["student.lora={rank: 2, export: adapter, targets: [q_proj, down_proj]}"],
    "chat": CHAT,
    "gradient-checkpointing": [*CHAT, "student.gradient_checkpointing=true", "student.freeze=['*layers.0.mlp*']"],
    "schedules": [
        "optimizer={learning_rate: 1e-2, schedule: linear, weight_decay: 0.1, clip: null}",
        "objectives=[{kind: forward_kl, weight: {kind: linear, start: 1.0, stop: 0.2}, temperature: {kind: cosine, "
        "start: 2.0, stop: 1.0, over: 0.5}}, {kind: hidden, weight: {kind: cosine, start: 1.0, stop: 0.0, over: 0.6}}]",
    ],
    "accumulation": ["batch={tokens: 256, micro_tokens: 32}", "optimizer.schedule=constant", HELD_OUT],
    "unpacked": ["data={format: text, path: train.jsonl, length: 24, pack: false, shuffle: false, overlong: cut}",
                 "steps=null", "epochs=2", "batch={tokens: 192}"],
    "bfloat16": ["precision=bfloat16", HELD_OUT],
    "float64": [
        *FLOAT64, "teacher.dtype=float64", HELD_OUT,
        "objectives=[{kind: forward_kl}, {kind: reverse_kl}, {kind: jensen_shannon, temperature: 1.5}, "
        "{kind: skew_kl}, {kind: skew_reverse_kl}, {kind: adaptive_kl}, {kind: alpha_beta}, {kind: total_variation}, "
        "{kind: logit_mse}, {kind: cross_entropy, smoothing: 0.2}, {kind: hidden, weight: 0.2, distance: cosine}]",
    ],
    "float64-store": [*FLOAT64, *from_store("top_k", "{kind: forward_kl, temperature: 2.0}", "{kind: reverse_kl}")],
    "keep-best": ["optimizer={learning_rate: 0.2}", "held_out={path: valid.jsonl, every: 4}",
                  "checkpoints={every: 4, best: true}"],
    "families": ["student.model=scaled", "teacher.model=capped"],
    "other-families": ["student.model=gpt2", "teacher.model=biased", "objectives=[{kind: reverse_kl}]"],
    "small-logits": ["logits_bytes=20000", "objectives=[{kind: forward_kl}, {kind: cross_entropy}, {kind: logit_mse}]"],
    "store-top_k": from_store("top_k", "{kind: forward_kl, temperature: 2.0}", "{kind: reverse_kl}",
                              "{kind: cross_entropy, token_weight: {kind: teacher_entropy}}"),
    "store-top_k-missing": from_store("top_k", "{kind: forward_kl, missing: renormalise}",
                                      "{kind: forward_kl, missing: label}", "{kind: forward_kl, missing: zero}"),
    "store-top_p": from_store("top_p", "{kind: jensen_shannon}", "{kind: total_variation}", held_out=False),
    "store-sampled": from_store("sampled", "{kind: forward_kl}", held_out=False),
    "store-head_and_sample": from_store("head_and_sample", "{kind: forward_kl}", "{kind: cross_entropy, weight: 0.2}"),
    "store-full": from_store("full", "{kind: forward_kl}", "{kind: logit_mse}", held_out=False),
    "store-hidden": from_store("hidden-int8", "{kind: forward_kl}",
                               "{kind: hidden, layers: [[0, 1], [1, 3], [final_norm, final_norm]]}"),
    "store-generated": [*from_store("chat-generated", "{kind: forward_kl}", held_out=False),
                        "student.model=chat-student", "data.length=64"],
}  # fmt: skip
MANY: dict[str, tuple[int, list[str]]] = {
    "ddp": (2, ["parallel.kind=ddp", HELD_OUT, HIDDEN]),
    "fsdp": (2, ["parallel.kind=fsdp", HELD_OUT, HIDDEN, "checkpoints={every: 4}"]),
    "fsdp-store": (2, ["parallel.kind=fsdp", *from_store("top_k", "{kind: forward_kl}")]),
    "ddp-teacher-apart": (3, ["parallel.kind=ddp", "teacher.ranks=1", HELD_OUT]),
}
"""Of several processes: how many, and the settings of each run of six steps."""

CAPTURE: dict[str, list[str]] = {
    "top_k": ["signal={kind: top_k, k: 8, label: true, entropy: true, temperatures: [2.0]}"],
    "top_p": ["signal={kind: top_p, mass: 0.9, most: 20}"],
    "sampled": ["signal={kind: sampled, draws: 12}", "seed=5"],
    "head_and_sample": ["signal={kind: head_and_sample, head: 6, draws: 4, label: true}", "shard_positions=400"],
    "full": ["signal={kind: full}"],
    "hidden-int8": ["signal={kind: top_k, k: 8}", "hidden={layers: [1, 3, final_norm]}"],
    "hidden-bfloat16": ["signal={kind: top_k, k: 4}", "hidden={layers: [embeddings, 2], format: bfloat16}"],
    "valid": ["data.path=valid.jsonl", "signal={kind: top_k, k: 8, label: true, entropy: true, temperatures: [2.0]}",
              "hidden={layers: [1, 3, final_norm]}"],
    "pairs": [PAIRS],
    "generated": ["data.overlong=cut",
                  "generate={max_tokens: 8, temperature: 0.7, top_p: 0.9, answers: 2, prompt_tokens: 6}"],
    "chat-generated": ["teacher.model=chat-teacher", "data={format: chat, path: chat.jsonl, length: 64}",
                       "generate={max_tokens: 10, temperature: 0.0}", "signal={kind: top_k, k: 8}"],
}  # fmt: skip
ASK = ["teacher.model=teacher", TRAIN_TEXT, "teacher.engine={kind: transformers, device: cpu}"]
PRUNE: dict[str, list[str]] = {
    "best-and-width": ["layers={kind: best, count: 2}", "width={hidden_size: 16, intermediate_size: 24}"],
    "loss-increase": ["layers={kind: best, count: 3, by: loss_increase, contiguous: true}"],
    "listed": ["layers=[0, 3]", "data=null", "held_out=null", "dtype=bfloat16"],
}


# --- running ---------------------------------------------------------------------------------------------------------


class FailedError(Exception):
    """A command ended with another exit code than it should."""


LOGS = map("log-{}".format, itertools.count())


def stillroom(*words: str, ranks: int = 1, codes: tuple[int, ...] = (0,)) -> tuple[int, str]:
    """Runs the command line in a forked process, or as many ranks; returns the exit code and what was said.

    Raises:
        FailedError: another exit code than ``codes``.
    """
    log, place = Path(next(LOGS)), {}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    children = [
        forked(log, partial(command, words, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if place else {}))
        for rank in range(ranks)
    ]
    found = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return checked(words, found, log.read_text(), codes)


def checked(words: tuple[str, ...], found: list[int], said: str, codes: tuple[int, ...]) -> tuple[int, str]:
    if set(found) - set(codes):
        raise FailedError(f"stillroom {' '.join(words)}\nexit codes {found}, not {codes}\n{said[-3000:]}")
    return found[0], said


def command(words: tuple[str, ...], environment: Mapping[str, str]) -> int:
    from stillroom.cli.main import main as command_line

    os.environ.update(environment)
    return command_line(list(words))


def forked(log: Path, work: Callable[[], int | None]) -> int:
    """Starts a child that runs a function, which returns its exit code or None for 0; returns the process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def made(work: Callable[[], None]) -> None:
    """Runs a function in a forked process, so that this one starts no threads and draws no random numbers."""
    log = Path(next(LOGS))
    code = os.waitstatus_to_exitcode(os.waitpid(forked(log, work), 0)[1])
    if code:
        raise FailedError(log.read_text())


# --- what they leave -------------------------------------------------------------------------------------------------


def tidy(value: Any) -> Any:
    """Returns JSON values without the keys that are not compared."""
    if isinstance(value, dict):
        return {RENAMED.get(k, k): tidy(v) for k, v in value.items() if k not in NOT_COMPARED}
    if isinstance(value, str):  # fingerprints of models, which have grown
        return re.sub(", whole [0-9a-f]+$|, sampled$", "", value)
    return [tidy(item) for item in value] if isinstance(value, list) else value


def json_of(path: Path) -> Facts:
    return tidy(json.loads(path.read_bytes()))


def lines_of(path: Path) -> Facts:
    return [tidy(json.loads(line)) for line in path.read_text().splitlines()]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def model_facts(folder: Path) -> Facts:
    """Returns what a model's folder holds: the tensors, by their bytes in float32, config.json and the tokenizer."""
    import torch
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                values = tensor.to(torch.float32).contiguous().numpy().tobytes()
                dtype = str(tensor.dtype).removeprefix("torch.")
                tensors[name] = {"sha256": sha256(values), "dtype": dtype, "shape": list(tensor.shape)}
    found = {"tensors": tensors, "tokenizer": sha256((folder / "tokenizer.json").read_bytes())}
    for name in ("config.json", "adapter_config.json", "cut.json"):
        if (folder / name).exists():
            found[name] = json_of(folder / name)
    if "adapter_config.json" in found:
        found["adapter_config.json"]["target_modules"].sort()  # peft writes a set, in any order
    return found


def run_facts(out: str) -> Facts:
    record = json_of(Path(out, "run.json"))
    if "report" in record:
        record["report"] = re.findall(r"\d[\d.,%]*", record["report"])
    metrics = Path(out, "metrics.jsonl")
    found = {"run": record, "metrics": lines_of(metrics) if metrics.exists() else None}
    return found | ({"model": model_facts(Path(out, "model"))} if Path(out, "model").is_dir() else {})


def store_facts(store: Path) -> Facts:
    manifest = json_of(store / "manifest.json")
    manifest.pop("sha256", None)  # it covers the versions too
    paths = [path for path in store.rglob("*") if path.is_file() and not path.name.startswith((".", "manifest"))]
    return {"manifest": manifest, "files": {str(p.relative_to(store)): sha256(p.read_bytes()) for p in paths}}


def parquet_facts(path: Path) -> Facts:
    """Returns what the columns hold, since the bytes of the file name the versions of its writers."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {name: sha256(json.dumps(table[name].to_pylist()).encode()) for name in table.column_names}
    note = json.loads((table.schema.metadata or {}).get(b"stillroom", b"null"))
    return {"columns": columns, "types": [str(field) for field in table.schema], "note": tidy(note)}


# --- the cases -------------------------------------------------------------------------------------------------------


def distill(name: str, *words: str, ranks: int = 1) -> Facts:
    out = f"distilled-{name}"
    stillroom("distill", *TRAIN, *DTYPE, *words, f"out={out}", "--quiet", ranks=ranks)
    facts = run_facts(out)
    if set(FLOAT64) & set(words):  # which the model is written in unless export.dtype says otherwise
        del facts["model"]["config.json"]
        for tensor in facts["model"]["tensors"].values():
            del tensor["dtype"]
    return facts


DTYPE: list[str] = []
"""The settings by which the model is written in float32, where the code has any."""


def detect_dtype() -> Facts:
    words = ("distill", *TRAIN, "export.dtype=float32", "out=never", "--dry-run")
    if stillroom(*words, codes=(0, 2))[0] == 0:
        DTYPE.append("export.dtype=float32")
    return {}


def resume() -> Facts:
    """Takes the last checkpoint and the model of a run away, and resumes it from the checkpoint before."""
    lora = ("student.lora={rank: 4, dropout: 0.1}", "checkpoints={every: 8, keep: 9}")
    words = (*TRAIN, *DTYPE, HIDDEN, HELD_OUT, *lora)
    stillroom("distill", *words, "out=whole", "--quiet")
    whole = run_facts("whole")
    shutil.copytree("whole", "resumed")
    for path in [*Path("resumed/checkpoints").glob("step-*20"), Path("resumed/model")]:
        shutil.rmtree(path)
    record = Path("resumed/run.json")
    values = {key: value for key, value in json.loads(record.read_text()).items() if key != "sha256"}
    record.write_text(json.dumps({**values, "status": "started"}))
    _, said = stillroom("distill", *words, "out=resumed", "--resume")
    if not re.search(r"resum\D*16\b", said):
        raise FailedError(f"it did not resume after step 16:\n{said}")
    resumed = run_facts("resumed")
    return {"whole": whole, "resumed is the same": json.dumps(resumed) == json.dumps(whole), "resumed": resumed}


def torchrun() -> Facts:
    words = ("distill", *TRAIN, *DTYPE, "parallel.kind=ddp", "steps=6", HELD_OUT, "out=by-torchrun", "--quiet")
    line = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "stillroom", *words]
    done = subprocess.run([sys.executable, "-m", *line], capture_output=True, text=True, check=False)
    checked(words, [done.returncode], done.stderr, (0,))
    return run_facts("by-torchrun")


def capture(name: str, *words: str) -> Facts:
    out = f"captured-{name}"
    stillroom("capture", *ASK, *words, f"out={out}", "--quiet")
    return {**run_facts(out), "store": store_facts(Path(out, "store"))}


def store_tools() -> Iterator[tuple[str, Callable[[], Facts]]]:
    def join() -> Facts:
        for index in range(2):
            part = f"part={{index: {index}, of: 2}}"
            stillroom("capture", *ASK, *CAPTURE["head_and_sample"], part, "out=parts", "--quiet")
        stillroom("store", "join", "parts")
        return store_facts(Path("parts/store"))

    def concat() -> Facts:
        words = ("captured-generated/store", "captured-pairs/store", "out=concatenated")
        if stillroom("store", "concat", *words, codes=(0, 2))[0]:
            stillroom("store", "merge", *words)  # as it was called once
        return store_facts(Path("concatenated"))

    def export(name: str) -> Facts:
        stillroom("store", "export", f"captured-{name}/store", f"{name}.parquet")
        return parquet_facts(Path(f"{name}.parquet"))

    def import_(name: str, *words: str) -> Facts:
        stillroom("store", "import", f"{name}.parquet", f"out=imported-{name}", "tokenizer=teacher", *words)
        return store_facts(Path(f"imported-{name}"))

    def import_packed() -> Facts:
        made(write_packed)
        return import_("packed", "step=0.05")

    def looked_at() -> Facts:
        captured = ("captured-hidden-int8/store", "captured-sampled/store")
        stores = (*captured, "concatenated", "parts/store", "imported-top_k")
        shutil.copytree("captured-top_k/store", "broken")
        broken = Path("broken/00000.arrow")
        broken.write_bytes(broken.read_bytes()[:-100])
        checks = {store: stillroom("store", "check", store)[0] for store in stores}
        shows = {store: [stillroom("store", "show", store, *row)[0] for row in ([], ["1"])] for store in captured}
        return {"check": checks, "broken": stillroom("store", "check", "broken", codes=(2,))[0], "show": shows}

    yield "join", join
    yield "concat", concat
    for name in ("top_k", "head_and_sample"):
        yield f"export-{name}", partial(export, name)
    yield "import", partial(import_, "top_k")
    yield "import-distillkit", import_packed
    yield "check-and-show", looked_at


def write_packed() -> None:
    """Writes a file as DistillKit does: of four log-probabilities it has two exact values and a fit of the others."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    rows = []
    for length in (12, 7, 20):
        ids = np.argsort(draw.random((length, 290)), axis=1)[:, :4]
        digits = (ids[:, :, None] >> np.arange(8, -1, -1)) & 1
        exact = np.sort(draw.uniform(-2.0, -1.0, (length, 2)))[:, ::-1]
        values = np.concatenate([exact, draw.uniform((-3.5, -0.2), (-3.0, -0.1), (length, 2))], 1).astype("<f4")
        rows.append({
            "input_ids": draw.integers(2, 290, length).tolist(),
            "bytepacked_indices": np.packbits(digits.reshape(length, -1).astype(np.uint8), axis=1).tolist(),
            "compressed_logprobs": values.view(np.uint8).reshape(length, -1).tolist(),
        })  # fmt: skip
    lists = pa.list_(pa.list_(pa.uint8()))
    types = {"input_ids": pa.list_(pa.uint64()), "compressed_logprobs": lists, "bytepacked_indices": lists}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(types.items()))), "packed.parquet")
    settings = "{d: 304, k: 4, exact_k: 2, polynomial_terms: [0, 1], residual_bins: [], delta_encoding: false}\n"
    Path("compression_config.yaml").write_text(settings)


def prune(name: str, *words: str) -> Facts:
    data = [TRAIN_TEXT, "held_out.path=valid.jsonl", "device=cpu"]
    stillroom("prune", "model=teacher", *data, *words, f"out=pruned-{name}", "--quiet")
    return run_facts(f"pruned-{name}")


def evaluate() -> Facts:
    models = ["models.teacher=teacher", "models.distilled=student", "models.baseline=baseline"]
    data = ["data={format: text, path: valid.jsonl, length: 32}", f"tasks=[{', '.join(f'{k}.yaml' for k in TASKS)}]"]
    stillroom("evaluate", *models, *data, "device=cpu", "out=evaluated", "--quiet")
    results = json_of(Path("evaluated/results.json"))
    results["refused"] = {name: sorted(metrics) for name, metrics in results["refused"].items()}
    items = {path.name: lines_of(path) for path in sorted(Path("evaluated/items").iterdir())}
    report = stillroom("report", "evaluated")[0]
    return {"results": results, "items": items, "exit code of report": report}


def exit_codes() -> Facts:
    def code(*words: str) -> int:
        return stillroom(*words, codes=(0, 2))[0]

    def plan(verb: str, *words: str) -> int:
        """Tells the verb where the plan wants it, as it may where there is no recipe."""
        return code("plan", *words, "out=never") and code("plan", f"verb={verb}", *words, "out=never")

    trained = ("teacher.model=distilled-accumulation/model", "out=never", "tasks=[choices.yaml]")
    no_fit = from_store("sampled", "{kind: reverse_kl}")
    return {
        "doctor": code("doctor", *TRAIN, *trained),
        "doctor of random weights": code("doctor", *TRAIN, "out=never"),
        "doctor of a store": code("doctor", *TRAIN, *DISTILL["store-top_k"], "out=never"),
        "plan of distill": plan("distill", *[word for word in TRAIN if word != "device=cpu"]),
        "plan of capture": plan("capture", *ASK),
        "plan of prune": plan("prune", "model=teacher", "layers=2"),
        "plan of evaluate": plan("evaluate", "models.teacher=teacher", "tasks=[choices.yaml]"),
        "plan storage": code("plan", "storage", "prompts=1000", "vocab=300", "length=32"),
        "dry run": code("distill", *TRAIN, "out=never", "--dry-run"),
        "an unknown setting": code("distill", *TRAIN, "out=never", "stepz=1"),
        "a folder that is there": code("distill", *TRAIN, "out=distilled-forward-kl"),
        "done already": code("distill", *TRAIN, *DTYPE, *DISTILL["forward-kl"], "out=distilled-forward-kl", "--resume"),
        "a signal that does not fit": code("distill", *TRAIN, *no_fit, "out=never"),
    }


def cases() -> Iterator[tuple[str, Callable[[], Facts]]]:
    """Yields each case with its name; a case comes after those whose output it reads."""
    yield "export.dtype", detect_dtype
    for name, words in CAPTURE.items():
        yield f"capture {name}", partial(capture, name, *words)
    for name, case in store_tools():
        yield f"store {name}", case
    for name, words in DISTILL.items():
        yield f"distill {name}", partial(distill, name, *words)
    for name, (ranks, words) in MANY.items():
        yield f"distill {name}", partial(distill, name, "steps=6", *words, ranks=ranks)
    yield "distill by torchrun", torchrun
    yield "distill resumed", resume
    for name, words in PRUNE.items():
        yield f"prune {name}", partial(prune, name, *words)
    yield "evaluate", evaluate
    yield "exit codes", exit_codes


def import_everything(source: Path) -> None:
    """Imports all of the package, so that a forked process need not."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import stillroom as package

    if not Path(package.__file__).is_relative_to(source):
        raise SystemExit(f"stillroom is imported from {package.__file__}, not from {source}")
    for module in pkgutil.walk_packages(package.__path__, "stillroom."):
        if not module.name.endswith("__main__"):
            with suppress(Exception):  # what needs a GPU; or the case that needs it fails
                import_module(module.name)
    for name in ("peft", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
        with suppress(ImportError):
            import_module(name)


def warm_up() -> None:
    """Does once what would take each process a second: `transformers` compiles its patterns, and numba is set up."""
    import numba
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    re._MAXCACHE = 10_000  # pyright: ignore
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_pretrained("teacher")
    numba.njit(lambda x: x)(1)


def run_all(folder: Path, source: Path) -> dict[str, Facts]:
    """Runs every case in an empty folder; a case that fails leaves ``failed to run`` as its facts."""
    own = {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "STILLROOM_CACHE": f"{folder}/cache", "NUMBA_CACHE_DIR": f"{folder}/numba", "PYTHONPATH": str(source),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    os.environ.update(own)
    sys.path.insert(0, str(source))
    sys.dont_write_bytecode = True
    import_everything(source)
    os.chdir(folder)
    made(make_models)
    make_data()
    warm_up()
    found = {}
    for name, case in cases():
        start = time.monotonic()
        try:
            found[name] = case()
        except Exception as error:
            found[name] = {"failed to run": str(error) if isinstance(error, FailedError) else traceback.format_exc()}
        failed = ": failed" if "failed to run" in found[name] else ""
        print(f"{time.monotonic() - start:6.1f} s  {name}{failed}", file=sys.stderr, flush=True)
    return found


def flat(value: Facts, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields each value with its dotted key, as JSON."""
    if isinstance(value, dict | list) and value:
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value)


def differences(before: dict[str, Facts], now: dict[str, Facts]) -> Iterator[str]:
    for name in dict.fromkeys([*before, *now]):
        old, new = (dict(flat(facts.get(name, {}))) for facts in (before, now))
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                yield f"{name}: {key}: {old.get(key, 'nothing')} before, {new.get(key, 'nothing')} now"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="write what the runs leave to this file")
    what.add_argument("--against", type=Path, help="compare what they leave with such a file")
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "src", help="the code to run")
    given = parser.parse_args()
    before = json.loads(given.against.read_text()) if given.against else None
    out, here = given.out and given.out.resolve(), Path.cwd()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder), given.source.resolve())
        os.chdir(here)
    failed = [f"{name} failed: {facts['failed to run']}" for name, facts in found.items() if "failed to run" in facts]
    numbers = sum(1 for facts in found.values() for _ in flat(facts))
    print(f"{len(found)} cases, {numbers:,} values, {time.monotonic() - start:.0f} s", file=sys.stderr)
    for text in failed:
        print(text)
    if before is None:
        if not failed:
            out.write_text(json.dumps(found, indent=0) + "\n")
        return 1 if failed else 0
    other = list(differences(before, found))
    for text in other:
        print(text)
    cases_of = {text.partition(":")[0] for text in other}
    print(f"{len(other):,} differences in {len(cases_of)} cases" if other else "no difference")
    return 1 if other or failed else 0


if __name__ == "__main__":
    sys.exit(main())
