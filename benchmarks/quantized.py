"""What a teacher's quantised weights cost: how far it is from itself, and what loading it takes.

How far: stories3M on held-out TinyStories, each story alone, against the same model in float32. bfloat16 without any
quantisation stands beside them. Loading: a model of random weights, 285M parameters in float32 shards of 200 MB; the
most anonymous memory while it is loaded by a process of its own, which tells the C library to give back what is freed.

    python benchmarks/quantized.py [--stories 1000]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from results import data_folder, machine, save

from stillroom.models import loading

KINDS = (("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "fp8"), ("float32", "nf4"))
LENGTH = 256


def load(folder: Path, dtype: str, kind: str | None) -> Any:

    loading.quiet()
    return loading.load_model(str(folder), dtype=getattr(torch, dtype), quantization=kind)  # pyright: ignore


@torch.no_grad()
def distances(stories: int) -> dict[str, dict[str, float]]:
    from transformers import AutoTokenizer

    folder = data_folder() / "models" / "stories3M"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (data_folder() / "text" / "tinystories_valid.jsonl").read_text().splitlines()[:stories]
    ids = [torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:LENGTH]]) for line in lines]
    sides = {" ".join(filter(None, side)): load(folder, *side) for side in KINDS}
    found = {name: {"kl_nats": 0.0, "cross_entropy_nats": 0.0, "top1_agreement": 0.0, "time_s": 0.0} for name in sides}
    count = sum(one.shape[1] - 1 for one in ids)
    for one in ids:
        full = sides["float32"](one, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        for name, model in sides.items():
            start = time.perf_counter()
            logits = model(one, use_cache=False).logits
            found[name]["time_s"] += time.perf_counter() - start
            own = logits[0, :-1].double().log_softmax(-1)
            found[name]["kl_nats"] += (full.exp() * (full - own)).sum().item() / count
            found[name]["cross_entropy_nats"] -= own.gather(1, one[0, 1:, None]).sum().item() / count
            found[name]["top1_agreement"] += (own.argmax(-1) == full.argmax(-1)).sum().item() / count
    return {"tokens": {"count": count}, **found}


def held_bytes(parameter: torch.Tensor) -> int:
    """Of a parameter with its scales, which the quantisers hold in tensors of their own."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        scales = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        return sum(t.nbytes for t in [parameter, *scales])
    names = getattr(parameter, "tensor_data_names", None)
    return parameter.nbytes if names is None else sum(getattr(parameter, name).nbytes for name in names)


def memory_of_loading(folder: Path, kind: str) -> dict[str, float]:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    from stillroom.models.quantization import quantized_loading

    quantized_loading(kind, torch.float32, "cpu")  # pyright: ignore  (imports the package)
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.perf_counter()
    model = load(folder, "float32", kind)
    time_s = time.perf_counter() - start
    done.set()
    watching.join()
    return {
        "float32_bytes": 4 * loading.num_parameters(model),
        "held_bytes": sum(map(held_bytes, model.parameters())),
        "most_while_loading_bytes": most[0],
        "time_s": time_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stories", type=int, default=1000)
    parser.add_argument("--worker", nargs=2)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(memory_of_loading(Path(options.worker[0]), options.worker[1])))
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    result: dict[str, Any] = {"machine": machine(), "stories": distances(options.stories), "loading": {}}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
        LlamaForCausalLM(LlamaConfig(vocab_size=8192, **sizes)).save_pretrained(folder, max_shard_size="200MB")
        for kind in ("int8", "fp8", "nf4"):
            words = [sys.executable, __file__, "--worker", folder, kind]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
            result["loading"][kind] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result, indent=1))
    save(__file__, result)


if __name__ == "__main__":
    main()
