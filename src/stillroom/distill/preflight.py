"""The pre-flight of a recipe: its models on some of its data, and one real step. Nothing of it is kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from stillroom.batch import Batch
from stillroom.config import replace
from stillroom.data.chat_templates import end_of_turn, learns_to_stop
from stillroom.data.config import StoredDataConfig
from stillroom.data.dataloader import DocumentSet, Step, collate, epoch_order, group, in_batches, plan_rows, totals
from stillroom.data.dataset import CountedDocuments, prepared
from stillroom.distill.build import asked_in_training, build_pair, build_state, build_teacher
from stillroom.distill.config import DistillConfig
from stillroom.distill.plan import make_plan
from stillroom.errors import OutOfMemoryError
from stillroom.losses.divergences import reverse_kl
from stillroom.losses.objective import Objective
from stillroom.models import loading
from stillroom.models.generation import Sampling, derived_seed, end_tokens, generate
from stillroom.runs import peak_memory_bytes
from stillroom.teachers.base import prompt_length
from stillroom.teachers.config import LiveTeacherConfig, StoreTeacherConfig
from stillroom.teachers.live import LiveTeacher
from stillroom.tokenizers import fingerprint, required_vocab_size, template_fingerprint
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.hidden_objective import fit_to_first_step
from stillroom.training.loop import Report, optimizer_step
from stillroom.training.prefetch import MicroBatches, Prefetcher
from stillroom.training.step import StudentStep
from stillroom.training.validation import measure_held_out

MOST_PROMPTS = 16

MOST_TOKENS = 32
"""The most tokens that are written after each prompt."""

Facts = dict[str, Any]
"""Values as JSON has them."""


class Preflight:
    """A recipe's tokenizer, data and models, in the order in which they can be looked at: ``fit``, ``look``, ``texts``,
    ``measure``, ``own_text``, ``step``. Nothing is written into ``out``; models are loaded by ``measure``.

    Args:
        sequences: the number of documents that are looked at.
        report: is called with what is going on.
    """

    def __init__(self, config: DistillConfig, sequences: int, report: Report = lambda *_: None) -> None:
        alone: dict[str, object] = {"parallel": {"kind": "none"}}  # there is one process, with the teacher whole
        if isinstance(config.teacher, LiveTeacherConfig):
            alone |= {"teacher.placement": "whole", "teacher.ranks": None}
        self.given, self.sequences, self.report = replace(config, alone), sequences, report

    def fit(self) -> Facts:
        """Compares tokenizer, chat template and vocabularies, from headers alone.

        Raises:
            StillroomError: they do not; all that a run's plan checks.
        """
        self.plan = plan = make_plan(self.given)
        models = (plan.student.config, plan.teacher_config)
        student, teacher = (None if m is None else m.get_text_config().vocab_size for m in models)
        return {
            "tokenizer": fingerprint(plan.tokenizer),
            "num_tokens": required_vocab_size(plan.tokenizer),
            "template": None if plan.template is None else template_fingerprint(plan.template),
            "learns_to_stop": learns_to_stop(plan.tokenizer, plan.template),
            "student_columns": student,
            "teacher_columns": teacher,
            "stored_columns": None if plan.store is None else plan.store.manifest.num_columns,
            "columns": plan.vocab_size or student,
            "device": plan.config.device,
        }

    def look(self) -> Facts:
        """Counts the documents that a run would read, as far as they can be had at once: all of them where they are
        tokenized already or stored, and otherwise those of the first rows, which are kept in no cache.

        Raises:
            StillroomError: the data cannot be read, or a row cannot be used.
        """
        plan, data = self.plan, self.plan.config.data
        self.whole = True
        if isinstance(data, StoredDataConfig):
            assert plan.store is not None
            self.documents = plan.store
        elif (there := prepared(data, plan.tokenizer, template=plan.template)) is not None:
            self.documents = there
        else:
            most = min(self.sequences, data.max_documents or self.sequences)
            self.documents = found = CountedDocuments(
                replace(data, {"max_documents": most}),
                plan.tokenizer,
                template=plan.template,
                report=lambda rows: self.report("tokenise", {"rows": rows, "path": data.path}),
            )
            self.whole = found.counts["rows"] < most or most == data.max_documents
        drawn = epoch_order(len(self.documents), True, plan.config.seed, 0)[: self.sequences]
        self.drawn = np.sort(drawn)
        return {"whole": self.whole, **self.documents.counts, "looked_at": len(self.drawn)}

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields the documents that are looked at, by name, as text without special tokens."""
        for number in self.drawn.tolist():
            tokens = self.documents.tokens(number).tolist()
            yield self.documents.name(number), str(self.plan.tokenizer.decode(tokens, skip_special_tokens=True))

    def measure(self) -> Facts:
        """Measures the untrained student and its teacher on the documents, with `validation.measure_held_out`.

        Raises:
            StillroomError: a model cannot be loaded, or is not understood; or the device has too little memory.
        """
        plan, config = self.plan, self.plan.config
        with self._enough_memory("the models and a batch of text"), TemporaryDirectory() as folder:
            self.teacher = build_teacher(plan, documents=self.documents)
            student, specs = build_pair(
                plan, self.teacher, self.documents, Path(folder), lambda text: self.report("note", {"text": text})
            )
            self.asked = asked_in_training(config.objectives, self.teacher)
            shuffle, tokens = config.data.shuffle, config.batch.tokens
            stream = plan.stream(self.documents, tokens=tokens, epochs=config.epochs, shuffle=shuffle)
            self.num_steps = config.steps or (stream.num_steps() if self.whole else None)
            self.state = build_state(plan, student, specs, Prefetcher(stream, self.asked), self.num_steps or 1)
            module = self.state.module
            assert isinstance(module, StudentStep)
            if self.asked is not None and any(spec.measures_first for spec in specs):
                fit_to_first_step(module, self.asked.forward, self._longest(), device=self.state.device)
            drawn = in_batches(
                self.documents,
                self.documents.lengths,
                self.drawn,
                length=plan.length,
                pack=config.data.pack,
                most=plan.micro_tokens,
                pad_token=plan.pad_token,
            )
            measured = measure_held_out(module, self.teacher, [list(drawn)], config.device)
        assert measured is not None  # nothing asked it to stop
        teacher = self.teacher
        return {
            "student": plan.student.kind,
            "student_parameters": loading.num_parameters(student.model),
            "student_trained": loading.num_parameters(student.model, trained_only=True),
            "teacher_parameters": loading.num_parameters(teacher.model) if isinstance(teacher, LiveTeacher) else None,
            **measured,
        }

    def own_text(self) -> Facts | None:
        """Measures how far the student is from a live teacher on text that it writes itself; None where it is not
        trained yet or no teacher can read it.

        Raises:
            OutOfMemoryError: the device has too little memory.
        """
        plan = self.plan
        if not isinstance(self.teacher, LiveTeacher) or plan.student.kind != "trained":
            return None
        module = self.state.module
        assert isinstance(module, StudentStep)
        assert plan.vocab_size is not None  # there is a teacher
        with self._enough_memory("a text of the student's own"):
            nats, num_tokens = on_policy_kl(
                module,
                self.teacher,
                self.documents,
                self.drawn.tolist(),
                vocab_size=plan.vocab_size,
                length=plan.length,
                ends=end_tokens(module.model, plan.tokenizer, end_of_turn(plan.tokenizer, plan.template)),
                seed=plan.config.seed,
            )
        return {"reverse_kl_nats": nats, "num_tokens": num_tokens} if num_tokens else None

    def step(self) -> Facts:
        """Makes one real optimizer step on the longest rows, as many as a step can hold.

        Before it one is made of its first micro-batch alone, after which everything that a later step finds in memory
        is there: the optimizer's states, and what is compiled or reserved at first use.

        Raises:
            StillroomError: the device has too little memory, or the loss or the gradient is not finite.
        """
        config, state, device = self.plan.config, self.state, self.state.device
        micro_batches = self._longest()
        checkpoints = Checkpoints(Path(config.out) / "checkpoints", keep=1)  # these are looked for and never written
        state.module.train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with self._enough_memory("a step on the longest rows"):
            for some in (self._micros([micro_batches[0][0]]), micro_batches):
                made = optimizer_step(state, self.asked, config.optimizer.clip, checkpoints, micro_batches=some).read()
        batches = [batch for batch, _ in micro_batches]
        on_device = device.type == "cuda"
        return {
            "rows": sum(len(batch.tokens) for batch in batches),
            "longest_row": max(batch.tokens.shape[1] for batch in batches),
            "micro_batches": len(batches),
            **{name: made[name] for name in ("num_tokens", "num_kept", "loss_nats", "grad_norm", "time_s")},
            "num_steps": self.num_steps,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_device else peak_memory_bytes(),
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_device else None,
        }

    # --- batches ------------------------------------------------------------------------------------------------------

    def _longest(self) -> MicroBatches:
        """Returns the micro-batches of a step of the longest rows of all; where they are too few, some come again."""
        config = self.plan.config
        rows = plan_rows(self.documents.lengths, self.plan.length, config.data.pack, np.arange(len(self.documents)))
        taken: list[np.ndarray] = []
        total = 0
        for row in cycle(np.argsort(-rows.num_positions, kind="stable").tolist()):
            total += int(rows.num_positions[row])
            if taken and total > config.batch.tokens:
                break
            taken.append(rows[row])
        groups = group(taken, self.documents.lengths, self.plan.micro_tokens)
        return self._micros([collate(self.documents, some, self.plan.pad_token) for some in groups])

    def _micros(self, batches: Sequence[Batch]) -> MicroBatches:
        return MicroBatches.of(Step(batches, totals(batches)), self.asked)

    # --- memory -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _enough_memory(self, wanted: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            text = error.values.get("device", error) if isinstance(error, OutOfMemoryError) else error
            _, on_cpu, of_cpu = str(text).partition("DefaultCPUAllocator: ")
            if not on_cpu and not isinstance(error, torch.OutOfMemoryError | MemoryError):
                raise
            config, ways = self.plan.config, []  # what asks for less memory, the least painful first
            if self.plan.micro_tokens >= 2 * self.plan.length:
                fewer = max(self.plan.length, self.plan.micro_tokens // 2)
                ways.append(f"batch.micro_tokens={fewer}, which does not change the result")
            if not config.student.gradient_checkpointing:
                ways.append("student.gradient_checkpointing=true")
            if config.teacher is not None and not isinstance(config.teacher, StoreTeacherConfig):
                ways.append("a store in the place of the live teacher (`stillroom capture`, then teacher.kind=store)")
            if config.student.lora is None:
                ways.append("student.lora={rank: 16}")
            ways += ["a smaller data.length", "a device with more memory"]
            reason = (of_cpu or str(text)).split(". ")[0]
            raise OutOfMemoryError(
                f"the device has too little memory for {wanted}",
                {"device": config.device, "reason": " ".join(reason.split())[:160]},
                why="The run would end here, at its first long batch if not at its first step.",
                fix="Ask for less, the first that is enough: " + "; ".join(ways) + ".",
            ) from error


# --- the student's own text -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudentText:
    """Texts that begin with a prompt; the tokens after it are the targets."""

    texts: Sequence[np.ndarray]
    starts: Sequence[int]

    def tokens(self, index: int) -> np.ndarray:
        return self.texts[index]

    def target_mask(self, index: int) -> np.ndarray:
        return np.arange(len(self.texts[index])) >= self.starts[index]


@torch.no_grad()
def on_policy_kl(
    module: StudentStep,
    teacher: LiveTeacher,
    documents: DocumentSet,
    numbers: Sequence[int],
    *,
    vocab_size: int,
    length: int,
    ends: Sequence[int],
    seed: int,
) -> tuple[float, int]:
    """Returns the mean of KL(student ‖ teacher) in nats over the tokens that the student draws at temperature 1 after
    the prompts of some documents, and the number of these tokens.

    Args:
        vocab_size: the columns of both heads that are compared; no other token is drawn.
        length: the most positions of a row.
        ends: the tokens that end a text.
    """
    module.eval()
    objectives = [Objective("own_text_kl_nats", reverse_kl)]
    prompts = []
    for number in numbers:
        tokens, size = documents.tokens(number), prompt_length(documents.target_mask(number))
        prompt = tokens[: size if size > 1 else max(1, len(tokens) // 2)]  # half, where all is to be learned
        if len(prompt) < length:
            prompts.append(prompt)
    device = next(module.parameters()).device
    total, num_tokens = 0.0, 0
    for number, prompt in enumerate(prompts[:MOST_PROMPTS]):
        sampling = Sampling(min(MOST_TOKENS, length + 1 - len(prompt)), temperature=1.0)
        seeds = [derived_seed(seed, "own text", number)]
        ((answer,),) = generate(
            module.model, [prompt], sampling, ends=ends, pad_token=0, seeds=seeds, vocab_size=vocab_size
        )
        text = np.concatenate([prompt, answer]).astype(np.int64)
        batch = collate(StudentText([text], [len(prompt)]), [np.array([0])], 0).to(device)
        total += module(batch, teacher.forward(batch), 1, objectives).sums[0].item()
        num_tokens += batch.num_kept
    return total / max(1, num_tokens), num_tokens
