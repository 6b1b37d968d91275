"""The student: an existing model or a new one, with adapters, frozen parameters and checkpointing as asked."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.errors import ConfigError, MismatchError, require
from stillroom.models import loading, safetensors_io
from stillroom.models.hidden_states import blocks
from stillroom.models.safetensors_io import full_tensor, is_adapter
from stillroom.pruning.prune import PruneMask, write_mask
from stillroom.training.config import LoraConfig, StudentConfig


class Student(NamedTuple):
    model: PreTrainedModel
    """The model itself, with its adapters inside it where it has any."""
    adapters: Any = None
    """The `peft.PeftModel` around it, or None."""
    export: Literal["merged", "adapter"] = "merged"
    cut: PruneMask | None = None
    """The part of its teacher that it was at the start."""
    fill: Callable[[], None] | None = None
    """Gives its parameters their first values, where they have no memory yet; None where they have both."""

    def save(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        ranks: RankGroup = SINGLE_RANK,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes model and tokenizer under a temporary name and renames it to ``folder``, replacing an older one.

        Adapters are merged into the model or written alone, as the config says. This ends the student's training: its
        weights may have been merged and rounded in place.

        Args:
            ranks: the processes that hold it, which all call this; the first writes.
            dtype: the type to which the weights are rounded; None leaves them as they are.
        """
        end_as(self.model, tokenizer)
        with safetensors_io.new_model_folder(folder) if ranks.is_rank0 else nullcontext(folder) as place:
            self._write(place, dtype, writes=ranks.is_rank0)
            if ranks.is_rank0:
                tokenizer.save_pretrained(place)
                if self.cut is not None:
                    write_mask(place, self.cut)
        ranks.barrier()

    def _write(self, folder: Path, dtype: torch.dtype | None, *, writes: bool) -> None:
        """Writes the weights; those that lie in many processes are put together a few layers at a time."""
        sharded = isinstance(next(self.model.parameters()), DTensor)
        adapters: Any = self.adapters
        alone = self.adapters is not None and self.export == "adapter"
        if sharded and not alone:
            safetensors_io.save_weights(self.model, folder, writes=writes, dtype=dtype)
        elif sharded:
            whole = {
                name: full_tensor(p).to(dtype or p.dtype).cpu()
                for name, p in adapters.named_parameters()
                if is_adapter(name)
            }
            if writes:
                adapters.save_pretrained(folder, state_dict=whole, save_embedding_layers=False)
        elif writes:
            merged = self.model if self.adapters is None or alone else adapters.merge_and_unload()
            if dtype is not None:
                safetensors_io.round_weights(self.model, dtype)
            if alone:
                adapters.save_pretrained(folder, save_embedding_layers=False)
            else:
                merged.save_pretrained(folder)


def end_as(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Has the model stop where the tokenizer's sequences end, besides where it stopped before."""
    settings: list[Any] = [model.config.get_text_config()]
    if model.generation_config is not None:
        settings.append(model.generation_config)
    for config in settings:
        if tokenizer.bos_token_id is not None:
            config.bos_token_id = tokenizer.bos_token_id
        before = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = list(dict.fromkeys(t for t in (tokenizer.eos_token_id, *before) if t is not None))
        config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if model.generation_config is not None:
        # Published configs that contradict themselves (a temperature without sampling) can be written back as they
        # were; transformers refuses to write them once they differ from what was loaded.
        model.generation_config._original_object_hash = hash(model.generation_config)


def build_student(
    student: StudentConfig,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int,
    fresh: PretrainedConfig | None = None,
    pruned: tuple[PreTrainedModel | Path, PruneMask] | None = None,
) -> Student:
    """Builds the whole student on a device; on the meta device without values, so that no process ever holds all of it
    once it is sharded.

    Args:
        dtype: the type of its weights.
        seed: seeds new weights and adapters.
        fresh: the config of a new student with random weights.
        pruned: a student that was pruned from its teacher, or the folder where it lies for the meta device.
    """
    attention = None if student.attention == "auto" else student.attention
    settings: dict[str, Any] = {"dtype": dtype, "attention": attention}
    code, (part, cut), fill = student.trust_remote_code, pruned or (None, None), None
    if device == "meta" and fresh is not None:
        model = loading.build_meta_model(fresh, trust_remote_code=code, **settings)
        fill = partial(loading.initialize, model, seed)
    elif device == "meta":
        folder = part if isinstance(part, Path) else loading.local_folder(str(student.model), student.revision)
        described = loading.read_config(str(folder), trust_remote_code=code)
        model = loading.build_meta_model(described, trust_remote_code=code, **settings)
        fill = partial(safetensors_io.load_weights, model, folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    elif isinstance(part, PreTrainedModel):
        model = part.to(device, dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if attention is not None:
            model.set_attn_implementation(attention)
    elif fresh is not None:
        model = loading.build_model(fresh, seed=seed, device=device, **settings)
    else:
        assert student.model is not None
        settings |= {"device": device, "revision": student.revision, "trust_remote_code": code}
        model = loading.load_model(student.model, **settings)
    return _prepared(model, student, seed, cut)._replace(fill=fill)


def _prepared(model: PreTrainedModel, student: StudentConfig, seed: int, cut: PruneMask | None) -> Student:
    """Adds adapters, freezes parameters, and sets up activation checkpointing and compiled blocks, as asked."""
    model.requires_grad_(True)
    adapters = None if student.lora is None else _with_adapters(model, student.lora, seed)
    names = [name for name, _ in model.named_parameters()]
    for pattern in student.freeze:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(
                f"student.freeze has a pattern that matches nothing: `{pattern}`",
                {"pattern": pattern, "the student has, for example": ", ".join(names[:3])},
                why="The parameters that were meant would be trained all the same.",
                fix='Write patterns over whole names, such as "*embed_tokens*" or "model.layers.0.*".',
            )
        for name in matching:
            model.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "nothing of the student is left to train",
            {"student.freeze": list(student.freeze), "parameters": len(names)},
            why="Every parameter is frozen.",
            fix="Take some patterns out of student.freeze.",
        )
    if student.gradient_checkpointing:
        loading.checkpoint_activations(model)
    if student.compile:
        for block in blocks(model):
            block.compile()
    return Student(model, adapters, "merged" if student.lora is None else student.lora.export, cut)


def _with_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> Any:
    """Puts adapters into the model's layers, and returns the `peft.PeftModel` around it."""
    require("peft", "lora", "student.lora")
    import peft

    targets: Any = lora.targets if lora.targets == "all-linear" else list(lora.targets)
    if _is_tied_target(model, model.get_input_embeddings(), targets):
        raise MismatchError(
            "an adapter cannot sit on embeddings that the head shares",
            {"student.lora.targets": targets, "tie_word_embeddings": True},
            why="The head would not get it while training, and would once it is merged.",
            fix="Leave the embeddings out of student.lora.targets.",
        )
    head: Any = model.get_output_embeddings()
    if lora.export == "merged" and _is_tied_target(model, head, targets):
        # merged into a weight that the embeddings share, the adapter would change these too
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        adapters = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise MismatchError(
            "the student has no layers of the names in student.lora.targets",
            {"targets": targets, "reason": " ".join(str(error).split())[:200]},
            why="Adapters sit beside layers of the student.",
            fix="Use names such as q_proj and down_proj, or all-linear.",
        ) from None
    _initialize_adapters(model, seed)
    if lora.dropout and hasattr(model.get_output_embeddings(), "lora_A"):
        raise MismatchError(
            "an adapter on the head cannot have dropout",
            {"student.lora.dropout": lora.dropout, "targets": targets},
            why="The head and the loss are one operation, which takes the head's weight with its adapter in it.",
            fix="Set student.lora.dropout=0, or leave the head out of student.lora.targets.",
        )
    return adapters


def _is_tied_target(model: PreTrainedModel, layer: nn.Module | None, targets: Sequence[str]) -> bool:
    """Returns whether ``layer`` is tied to another and gets an adapter; all-linear names neither end of a model."""
    if targets == "all-linear" or not model.config.get_text_config().tie_word_embeddings:
        return False
    names = [name for name, module in model.named_modules() if module is layer and layer is not None]
    return any(f".{name}".endswith(f".{target}") for name in names for target in targets)


def _initialize_adapters(model: PreTrainedModel, seed: int) -> None:
    """Gives adapters their first values, those beside weights that have no memory yet too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if not hasattr(layer, "lora_A"):
                continue
            for name, parameter in list(layer.named_parameters()):
                if is_adapter(f".{name}") and parameter.is_meta:
                    module_name, _, own = name.rpartition(".")
                    values = torch.empty(parameter.shape, dtype=parameter.dtype)
                    layer.get_submodule(module_name)._parameters[own] = nn.Parameter(values)
            for adapter in layer.active_adapters:  # pyright: ignore
                layer.reset_lora_parameters(adapter, True)  # pyright: ignore
