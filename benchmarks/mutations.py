"""Faults made by hand that the tests must catch: each is put into a copy of the checkout, whose tests must then fail.

    python benchmarks/mutations.py [--only NAME …] [--list] [--json FILE]

A mutation must follow the code that it changes: where that is moved or renamed, update its `path`, `before`, `after`
and `tests`; `--list` finds those that no longer fit. A mutation with `known_gap=True` is a fault that no unit test
catches yet; it runs too, but does not count as a failure. The tests run in processes that are forked from this one, so
that torch is imported only once.
"""

import argparse
import compileall
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "docs", "recipes", "examples", "benchmarks", "pyproject.toml", "README.md", "Makefile")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0",
               "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
IMPORTED = ("numba", "pyarrow", "pytest", "torch", "torch._dynamo", "torch.distributed.tensor",
            "transformers.conversion_mapping", "transformers.modeling_utils", "transformers.models.auto",
            "transformers.optimization", "transformers.tokenization_utils_tokenizers")  # fmt: skip
"""Modules that are imported before the first fork: slow ones, and none that a mutation changes."""
TIMEOUT_S = 300
"""A mutation whose tests run longer is an error."""


@dataclass(frozen=True)
class Mutation:
    name: str
    path: str
    """The file that is changed, in src/stillroom."""
    before: str
    """This text occurs exactly once in the file."""
    after: str
    """The faulty text in its place."""
    tests: str
    """The test files in tests/unit of which one must fail, and pytest options, separated by spaces."""
    why: str
    """The fault that the mutation stands for."""
    known_gap: bool = False
    """True where no unit test catches the fault yet."""

    def mutated(self) -> str:
        """Returns the text of the file with the fault in it.

        Raises:
            SystemExit: the code or its tests have changed, and the mutation must follow.
        """
        text = (ROOT / "src/stillroom" / self.path).read_text(encoding="utf-8")
        if (count := text.count(self.before)) != 1:
            raise SystemExit(f"{self.name}: `{self.before}` occurs {count} times in {self.path}, expected once")
        files = [ROOT / "tests/unit" / word for word in self.tests.split() if word.endswith(".py")]
        if missing := [str(file) for file in files if not file.exists()]:
            raise SystemExit(f"{self.name}: {', '.join(missing)} does not exist")
        return text.replace(self.before, self.after)


MUTATIONS = (
    # --- losses
    Mutation("kl-swapped", "losses/divergences.py", "divergence(of_teacher)", "divergence(of_student)",
             "losses/test_kl.py", "forward KL is reverse KL"),
    Mutation("t2-not-on-gradient", "losses/divergences.py", "nats.mul_(temperature**2), gradient.mul_(temperature)",
             "nats.mul_(temperature**2), gradient", "losses/test_every_loss.py",
             "T² is on the reported loss but not on the gradient"),
    Mutation("adaptive-kl-share", "losses/divergences.py", "torch.lerp(others, summands, share)",
             "torch.lerp(summands, others, share)", "losses/test_every_loss.py", "head and tail are exchanged"),
    Mutation("smoothing-not-in-gradient", "losses/logits.py", "smoothing - 1.0", "-1.0",
             "losses/test_every_loss.py", "label smoothing is in the value but not in the gradient"),
    Mutation("mean-of-means", "losses/objective.py", "1 / num_kept_of_step", "1 / max(1, batch.num_kept)",
             "losses/test_reduce.py", "each micro-batch is divided by its own count"),
    Mutation("only-the-last-chunk", "losses/fused_linear.py", "first=start == 0", "first=True", "losses/test_linear.py",
             "the head's gradient is overwritten by each chunk"),
    Mutation("softcap-clips", "lm_head.py", "out.div_(head.softcap).tanh_().mul_(head.softcap)",
             "out.clamp_(-head.softcap, head.softcap)", "test_lm_head.py", "the softcap is not the model's"),
    Mutation("scale-not-in-gradient", "losses/fused_linear.py",
             "objective.weight * self.head.scale * self.counts[i, there]",
             "objective.weight * self.counts[i, there]", "losses/test_linear_gradients.py",
             "the logit scale is in the value but not in the gradient"),
    # --- sparse signals
    Mutation("rest-dropped", "losses/block.py", "(log_t.exp() * finite, log_residual.exp())",
             "(log_t.exp() * finite, torch.zeros_like(log_residual))", "losses/test_sparse.py",
             "reverse KL over a truncated support without the rest"),
    Mutation("not-renormalised", "losses/block.py", "y / y.sum(-1, keepdim=True)", "y",
             "losses/test_sparse.py", "missing=renormalise is missing=zero"),
    Mutation("tempered-without-rest", "signals.py", "(torch.logsumexp(scaled, -1) - log_kept)",
             "torch.logsumexp(scaled, -1)", "losses/test_sparse.py", "tempered entries have the bucket's mass too"),
    Mutation("rest-not-tempered", "kernels/selection.py", "residual - (kept / temperature).logsumexp(-1)",
             "residual - kept.logsumexp(-1)", "kernels/test_selection.py", "a temperature applied to the tail alone"),
    # --- kernels
    Mutation("numba-reverse-kl", "kernels/numba_divergences.py", "term = s * (x - y)", "term = s * (y - x)",
             "losses/test_fused.py", "the kernel's gradient has the wrong sign"),
    Mutation("numba-draw-weight", "kernels/numba_selection.py",
             "unit = max(mass / draw_ids.shape[1], least[i], 1e-30)", "unit = max(mass / draw_ids.shape[1], 1e-30)",
             "kernels/test_selection.py", "a draw weighs less than the least"),
    Mutation("triton-gradient-without-t", "kernels/triton_fused.py", " * temperatures[SLOTS[i]],)", ",)",
             "kernels/test_fused_kernels.py -k cuda", "the Triton kernel's gradient lacks the temperature"),
    # --- hidden states
    Mutation("one-projector", "training/hidden_objective.py", "self.projectors[0 if self.spec.shared else number]",
             "self.projectors[0]", "training/test_hidden_objective.py",
             "all pairs of layers share the first projector"),
    Mutation("normalised-by-student", "losses/hidden.py", "mean_square(teacher).squeeze(-1)",
             "mean_square(student).squeeze(-1)", "losses/hidden/test_mean_squared_errors.py",
             "the student makes the loss small by growing"),
    Mutation("cka-axis", "losses/hidden.py", "x = x - x.mean(1, keepdim=True)",
             "x = x - x.mean(2, keepdim=True)", "losses/hidden/test_every_distance.py",
             "centered over channels, not over positions"),
    Mutation("relation-mask", "losses/hidden.py", "triu_(rows.start + 1)", "triu_(rows.start + 2)",
             "losses/hidden/test_relations.py", "each position sees the next: the mask is off by one"),
    Mutation("every-nth-layer", "distill/hidden_plan.py", "layers.step * (i + 1) - 1", "layers.step * i",
             "distill/test_layer_maps.py", "the first layer of each stretch, not the last"),
    # --- data
    Mutation("mask-not-shifted", "data/dataloader.py", "loss_mask[r, start:end] = target_mask[1:]",
             "loss_mask[r, start:end] = target_mask[:-1]", "data/test_dataloader.py",
             "the loss mask is of inputs, not of labels"),
    Mutation("positions-go-on", "data/dataloader.py", "np.arange(end - start)", "np.arange(start, end)",
             "data/test_dataloader.py", "packed documents attend to each other"),
    Mutation("step-too-short", "data/dataloader.py", "total > self.tokens", "total >= self.tokens",
             "data/test_dataloader.py", "a step that is full to the token loses its last row"),
    Mutation("resume-skips-a-row", "data/dataloader.py", 'state["epoch"], state["row"], state["step"]',
             'state["epoch"], state["row"] + 1, state["step"]', "data/test_dataloader.py",
             "a resumed run skips documents"),
    Mutation("epochs-alike", "data/dataloader.py", '"order", epoch)', '"order", 0)', "data/test_packing.py",
             "the seed does not depend on the epoch"),
    Mutation("split-loses-a-label", "data/dataset.py", "len(tokens) - 1, config.length)",
             "len(tokens) - 1, config.length + 1)", "data/test_dataset.py", "pieces do not overlap by one token"),
    Mutation("cache-not-checked", "data/dataset.py", 'if crc32(path) != manifest["crc32"]:',
             'if "crc32" not in manifest:', "data/test_dataset.py", "the checksum is not compared"),
    # --- training
    Mutation("shifted-twice", "training/step.py", "batch.labels.flatten()[batch.kept]",
             "batch.labels.flatten().roll(-1)[batch.kept]", "training/test_step.py", "labels are shifted twice"),
    Mutation("local-count", "training/loop.py", "state.forward(batch, teacher_output, num_counted,",
             "state.forward(batch, teacher_output, batch.num_kept,", "training/test_loop.py",
             "the gradient is not divided by the global count"),
    Mutation("clip-factor", "training/loop.py", "clip / (norm + 1e-6)", "clip / (square + 1e-6)",
             "training/test_loop.py", "clipped by the square of the norm"),
    Mutation("worst-is-best", "training/loop.py", 'measured["loss_nats"] < state.best.get(',
             'measured["loss_nats"] > state.best.get(', "training/test_loop.py", "the best step is the worst"),
    Mutation("gradient-not-checked", "training/loop.py", "if not (math.isfinite(loss) and math.isfinite(grad_norm)):",
             "if not math.isfinite(loss):", "training/test_loop.py", "an update with a gradient that is not finite"),
    Mutation("norms-decay", "training/state.py", '"weight_decay": 0.0', '"weight_decay": config.weight_decay',
             "training/test_optimizer.py", "norms and biases decay"),
    Mutation("checkpoint-not-checked", "training/checkpoint.py", 'if numbers["files"] != found:',
             'if numbers["files"].keys() != found.keys():', "training/test_checkpoint.py",
             "checksums are not compared"),
    Mutation("random-state-lost", "training/checkpoint.py", "torch.set_rng_state(value)", "pass",
             "training/test_checkpoint.py", "dropout differs after a resume"),
    Mutation("best-pruned", "training/checkpoint.py", "[] if best is None else [self.at(best)]", "()",
             "training/test_checkpoint.py", "the best checkpoint is deleted"),
    Mutation("held-out-mean-of-means", "training/validation.py", "module(batch, teacher_output, 1, objectives",
             "module(batch, teacher_output, micro_batch.num_kept, objectives", "training/test_validation.py",
             "a mean of means"),
    Mutation("schedule-overshoots", "losses/objective.py", "min(progress / setting.over, 1.0)",
             "progress / setting.over", "distill/test_objectives.py", "a schedule goes on beyond its stop"),
    Mutation("export-does-not-stop", "training/student.py", "(tokenizer.eos_token_id, *before)", "before",
             "training/test_student.py", "the export does not stop where its tokenizer ends a sequence"),
    Mutation("distant-rows-lost", "teachers/live.py", "size = -(-len(batch.tokens) // number)",
             "size = max(1, len(batch.tokens) // number)", "distributed/test_group.py",
             "a question's last rows are asked of nobody"),
    Mutation("pairs-summed", "training/hidden_objective.py", "[1 / len(spec.pairs)] * len(spec.pairs)",
             "[1.0] * len(spec.pairs)", "training/test_hidden_objective.py",
             "the sum over pairs of layers, not the mean"),
    Mutation("export-in-float32", "distill/run.py", "dtype=getattr(torch, config.export.dtype))",
             "dtype=torch.float32)", "distill/test_run.py -k export", "export.dtype is not heeded"),
    Mutation("export-dtype-not-found", "distill/plan.py", "student.export_dtype(config.precision)", '"float32"',
             "distill/test_run.py -k export", "a bfloat16 checkpoint is exported in float32"),
    # --- many processes
    Mutation("all-do-it", "distributed/group.py", "make() if self.is_rank0 else None", "make()",
             "distributed/test_many_ranks.py", "every process writes what the first should"),
    Mutation("all-are-lost", "distributed/failures.py", " if rank not in failures.ends()]", "]",
             "distributed/test_many_ranks.py", "processes that are there are called lost"),
    Mutation("never-begun", "distributed/init.py", 'get("launchers", ())', 'get("launcher", ())',
             "distributed/test_init.py -k begun", "a restart by torchrun does not go on"),
    Mutation("first-fails-alone", "distributed/group.py", "except StillroomError:\n                self.barrier()",
             "except StillroomError:", "distributed/test_many_ranks.py -k fails",
             "where the first of a node fails, its others wait for ever"),
    Mutation("work-done-twice", "distributed/group.py", "things[self.rank :: self.world_size]", "things[self.rank :]",
             "distributed/test_many_ranks.py", "what is divided among processes is done more than once"),
    Mutation("attempts-alike", "distributed/init.py", 'f"attempt {restart_count()} " if of_torchrun else ""', '""',
             "distributed/test_init.py -k attempt", "a restarted process meets those that are gone"),
    Mutation("entries-alike", "distributed/init.py", "entry {next(_entries)}", "entry 1",
             "distributed/test_init.py -k leave", "a second run meets at the addresses of the first"),
    # --- text that a model writes
    Mutation("answer-without-its-end", "models/generation.py", "row[: places[0] + 1 if", "row[: places[0] if",
             "models/test_generation.py", "an answer lacks the token that ends it"),
    Mutation("text-beyond-the-vocabulary", "models/generation.py", "draw(scores[:, :vocab_size]", "draw(scores",
             "models/test_generation.py", "tokens are written that the two vocabularies do not share"),
    Mutation("end-of-turn-alone", "models/generation.py", "tokens[0] in tokenizer.added_tokens_decoder", "False",
             "models/test_generation.py", "a turn whose end only the chat template names goes on"),
    Mutation("padding-for-tokens", "models/generation.py", "or stands_padding(model)", "or True",
             "models/test_generation.py", "what a family writes depends on what shares its batch"),
    Mutation("one-seed-for-all", "models/generation.py", 'derived_seed(seed, "answer", j)', "0",
             "models/test_generation.py", "the answers to a prompt are one and the same"),
    # --- store
    Mutation("file-in-place", "runs.py", 'temporary = path.with_name(f".{path.name}.tmp")', "temporary = path",
             "test_runs.py", "a file has its name before it is whole"),
    Mutation("codec-error-mean", "store/writer.py", "(before.codec_error_nats * before.positions + self._error)",
             "(before.codec_error_nats + self._error)", "store/test_writer.py", "not a mean over positions"),
    Mutation("rounded-to-level", "store/quantize.py", "uniforms < share", "uniforms < exact - lower",
             "store/test_quantize.py", "log-probabilities are right on average, not probabilities"),
    Mutation("row-not-checked", "store/reader.py", 'found, self.column(row, "crc32").as_py())', "found, found)",
             "store/test_damage.py", "the checksum of a row is not compared"),
    Mutation("numbers-collide", "store/concat.py", "1 + max(0, int(each.max(initial=-1)))",
             "max(0, int(each.max(initial=-1)))", "store/test_concat.py",
             "two documents of a merged store share a number"),
    Mutation("seed-not-compared", "store/writer.py", '"seed", "hidden")', '"hidden")', "store/test_writer.py",
             "a capture is resumed with another seed"),
    # --- capture
    Mutation("resume-skips-a-document", "capture/run.py", "skip = done - (first_window - taken.start) * num_answers",
             "skip = done - (first_window - taken.start) * num_answers + (done > 0)", "capture/test_run.py",
             "a resumed capture skips a document"),
    Mutation("parts-by-end", "capture/parts.py", "2 * ends - each,", "2 * ends,", "capture/test_workers.py",
             "a window goes by its end, not its middle"),
    # --- evaluation
    Mutation("bootstrap-normaliser", "statistics.py", "interval(gains / weighed, value)",
             "interval(gains / weight, value)", "test_statistics.py", "resamples are divided by the whole's weight"),
    Mutation("bits-are-nats", "evaluate/metrics.py", '/ math.log(2) / t["bytes"]', '/ t["bytes"]',
             "evaluate/test_held_out_eval.py", "bits per byte are nats"),
    Mutation("passages-cross", "evaluate/metrics.py", "starts + PASSAGE_TOKENS, ends_of_documents)",
             "starts + PASSAGE_TOKENS, n)", "evaluate/test_breakdowns.py", "a passage reaches into the next document"),
    Mutation("shared-context", "evaluate/tasks/likelihood.py", "min((start for row in rows",
             "min((start + 1 for row in rows", "evaluate/tasks/test_likelihood.py",
             "a score is taken at the position before its own"),
    Mutation("beginning-not-compared", "evaluate/tasks/likelihood.py", "if row.tokens[i] != first[i]", "if False",
             "evaluate/tasks/test_likelihood.py", "a row is read with the beginning of another"),
    Mutation("beginning-of-a-row-not-compared", "evaluate/tasks/likelihood.py",
             "rows[-1].tokens[: len(inputs[i])] == inputs[i]", "rows[-1].tokens[:1] == inputs[i][:1]",
             "evaluate/tasks/test_likelihood.py", "a row answers for another that it does not begin with"),
    Mutation("calibration-bins", "evaluate/metrics.py", "(confidence * BINS).astype",
             "(confidence * BINS + 0.5).astype", "evaluate/test_metrics.py", "bins are shifted by half a bin"),
    # --- estimates
    Mutation("one-buffer", "estimates/memory.py", "buffers = 1 if load.teacher is None else 2", "buffers = 1",
             "estimates/test_memory.py", "the teacher's logits are forgotten"),
    Mutation("shortest-rows", "distill/preflight.py", "np.argsort(-rows.num_positions",
             "np.argsort(rows.num_positions", "distill/test_preflight.py",
             "the doctor's trial step is of the shortest rows"),
    # --- runs and recipes
    Mutation("overwrite-order", "runs.py", 'key=lambda p: p.name == "run.json"', 'key=lambda p: p.name != "run.json"',
             "test_runs.py", "a killed --overwrite leaves a folder that is no run's"),
    Mutation("replaced-in-two-steps", "runs.py", "elif _exchange(temporary, path):", "elif False:", "test_runs.py",
             "a kill while a folder is replaced leaves no folder under its name"),
    Mutation("replaced-not-moved-back", "runs.py", "aside.rename(path)\n            raise", "raise", "test_runs.py",
             "the old folder is lost where the new one cannot take its place"),
    Mutation("replaced-deleted-first", "runs.py", "path.rename(aside)", "shutil.rmtree(path)", "test_runs.py",
             "the old folder is deleted before the new one has its name"),
    Mutation("verb-not-checked", "config.py", "if verb != wanted:", "if verb is None:", "test_config.py -k verb",
             "a recipe of one verb is taken for another's"),
)  # fmt: skip


def evaluate(mutation: Mutation, copy: Path) -> str:
    """Runs the tests on a mutation; returns "caught by TEST", "SURVIVED" or "ERROR: …". The copy is restored."""
    path, output = copy / "src/stillroom" / mutation.path, copy / "output.txt"
    compiled, aside = path.parent / "__pycache__", path.parent / "__pycache__.aside"
    text = mutation.mutated()
    if has_kernels := "numba" in text:  # whose cache does not see that a function that is called has changed
        compiled.rename(aside)
    path.write_text(text, encoding="utf-8")
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(copy, mutation.tests, output))
    process.start()
    process.join(TIMEOUT_S)
    process.kill()
    process.join()
    shutil.copy2(ROOT / "src/stillroom" / mutation.path, path)
    if has_kernels:
        shutil.rmtree(compiled, ignore_errors=True)
        aside.rename(compiled)
    failed = re.search(r"^(?:FAILED|ERROR) tests/unit/([^\s\[]+)", said := output.read_text(encoding="utf-8"), re.M)
    if process.exitcode == 1 and failed:
        return f"caught by {failed[1]}"
    # Any other exit code means that no test failed: a file that cannot be imported is not caught by a test.
    return "SURVIVED" if process.exitcode == 0 else f"ERROR: pytest exited with {process.exitcode}: {said[-300:]}"


def run_tests(copy: Path, tests: str, output: Path) -> None:
    """Runs pytest on the copy, in a process of its own, and ends the process with pytest's exit code."""
    import pytest

    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"], sys.dont_write_bytecode = str(copy / "src"), True
    sys.path[:1] = [str(copy), str(copy / "src")]  # in the place of the folder of this file
    words = [f"tests/unit/{word}" if word.endswith(".py") else word for word in tests.split()]
    code = pytest.main(["-x", "-q", "--tb=no", "-rfE", "--assert=plain", *words])
    sys.stdout.flush()
    os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks that the tests catch faults made by hand.")
    names = [mutation.name for mutation in MUTATIONS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="run only these")
    parser.add_argument("--list", action="store_true", help="list the mutations and run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a file")
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if mutation.name in args.only]
    for mutation in chosen:
        mutation.mutated()
        if args.list:
            print(f"{mutation.name:26} {mutation.path:30} {mutation.why}{' (known gap)' * mutation.known_gap}")
    if args.list:
        return 0
    os.environ |= ENVIRONMENT
    for module in IMPORTED:  # not at the top of this file, which processes that are spawned by tests import again
        importlib.import_module(module)
    results = {}
    with TemporaryDirectory() as folder:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, Path(folder, name))
        compileall.compile_dir(Path(folder, "src"), quiet=2)
        for mutation in chosen:
            start = time.monotonic()
            result = evaluate(mutation, Path(folder))
            results[mutation.name] = {"result": result, "seconds": round(time.monotonic() - start, 1)}
            print(f"{mutation.name:26} {result} ({results[mutation.name]['seconds']} s)", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    missed = [mutation for mutation in chosen if not results[mutation.name]["result"].startswith("caught")]
    failures = [mutation.name for mutation in missed if not mutation.known_gap]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught, {len(missed) - len(failures)} known gaps, "
          f"{len(failures)} failures{': ' * bool(failures)}{', '.join(failures)}")  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
