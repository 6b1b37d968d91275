"""Models: load and save them, and tell which part is which: the backbone, the head."""

import hashlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from stillroom.batch import Batch
from stillroom.config import is_local
from stillroom.costs.quantized import Quantization
from stillroom.errors import ConfigError, DataError, MismatchError, MissingError, NonFiniteError
from stillroom.head import Head
from stillroom.model_folder import check_folder
from stillroom.weights import read
from stillroom.weights.parts import realise
from stillroom.weights.quantized import check_quantized, num_numbers, quantized_loading
from stillroom.weights.read import check_whole
from stillroom.weights.skeleton import initialise, skeleton

# --- on disk ---------------------------------------------------------------------------------------------------------


def read_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config.json, from a folder (whose weight files are looked at too) or from the hub."""
    if is_local(name):
        check_folder(Path(name).expanduser())
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> MissingError | DataError:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return DataError(
            f"the model {name} brings its own code",
            {"trust_remote_code": "false"},
            why="Its code would run on this machine with your rights.",
            fix="Read the code first, then set trust_remote_code=true beside the model's name if you trust it.",
        )
    if is_local(name):
        return DataError(
            f"the model in {name} could not be loaded",
            {"reason": reason[:300]},
            why="Without it there is nothing to train or to learn from.",
            fix="Check that the folder is whole, and that it holds a causal language model that `transformers` knows.",
        )
    return MissingError(
        f"the model {name} could not be loaded",
        {"reason": reason[:300]},
        why="Without it there is nothing to train or to learn from.",
        fix="Check the name, the network and the access rights (`hf auth login`); or give a local folder.",
    )


def fingerprint(name: str, config: PretrainedConfig) -> str:
    """What tells one model from another: the commit on the hub; for a folder a hash of its config, its tensors' names,
    shapes and places, and samples of each weight file (hashing all of 800 GB would take an hour)."""
    if not is_local(name):
        return f"commit {getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in check_folder(Path(name).expanduser()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in sorted({0, *(size * i // 64 for i in range(64)), max(0, size - 2**16)}):
                file.seek(place)
                digest.update(file.read(2**16))
    return f"sha256 {digest.hexdigest()[:16]}"


# --- loading, building, saving ---------------------------------------------------------------------------------------


def load_model(
    name: str,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str = "cpu",
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, in evaluation mode. Every weight must be there.

    Args:
        dtype: of its weights; auto is what its config.json says, or else what they are stored in.
        quantization: of the weights of its linear layers but the head, one by one as they are read, on the device; its
            arithmetic is in ``dtype``, which cannot be auto then.
    """
    if is_local(name):
        check_folder(Path(name).expanduser())
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(Path(name).expanduser()) if is_local(name) else name,
            dtype=dtype,
            attn_implementation=attention,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **({} if quantization is None else quantized_loading(quantization, dtype, device)),
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _not_loaded(name, error) from error
    model, info = loaded
    check_whole(name, list(info["missing_keys"]), list(info["unexpected_keys"]), model.base_model_prefix)
    if quantization is not None:
        check_quantized(model, quantization, name)
        return model.eval()
    return model.to(device).eval()


def local_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model: its own, or what is downloaded of it from the hub.

    Raises:
        MissingError: it cannot be had.
    """
    if is_local(name):
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.py"]))
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error


def configure(base: PretrainedConfig, settings: Mapping[str, Any]) -> PretrainedConfig:
    """A model's config with some of its settings changed, each of which must be known to the model's family."""
    import difflib

    values = base.to_dict()
    for key in settings:
        if key not in values:
            near = difflib.get_close_matches(key, values, n=1)
            raise MismatchError(
                f"the family {base.model_type} has no setting `{key}`",
                {"asked for": key, "did you mean": near[0] if near else "see the model's config.json"},
                why="It would be stored with the model and do nothing.",
                fix="Use the names of the family's config.json in init.settings.",
            )
    if "num_hidden_layers" in settings and "layer_types" not in settings:
        values.pop("layer_types", None)
    if {"hidden_size", "num_attention_heads"} & set(settings) and "head_dim" not in settings:
        values.pop("head_dim", None)
    with _possible(base.model_type, settings):
        return type(base)(**{**values, **settings})


@contextmanager
def _possible(family: str, settings: object) -> Iterator[None]:
    """Turns what a family's own code raises about its settings into an error of the user's."""
    try:
        yield
    except Exception as error:
        raise MismatchError(
            f"the family {family} cannot be built with these settings",
            {"settings": settings, "reason": " ".join(str(error).split())[:300]},
            why="They contradict each other or are not of the family's kind.",
            fix="Change init.settings; the family's documentation says which go together.",
        ) from error


def build_model(
    config: PretrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: str | None = None,
) -> PreTrainedModel:
    """A new model with random weights, the same for the same seed: see `weights.skeleton.initialise`."""
    model = build_skeleton(config, dtype=dtype, attention=attention)
    realise(model, device)
    model.tie_weights()
    initialise(model, seed)
    return model


def build_skeleton(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model whose parameters take no memory yet: see `weights.skeleton`."""
    with _possible(config.model_type, "those of its config.json"):
        return skeleton(config, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code)


def load_head(model: PreTrainedModel, folder: Path, device: torch.device | str) -> Head:
    """The head alone of a model that is a skeleton, from its folder."""
    tied = model.config.get_text_config().tie_word_embeddings
    part = model.get_input_embeddings() if tied else model.get_output_embeddings()
    assert part is not None
    realise(part, device)
    model.tie_weights()
    read.load(model, folder, whole=False)
    made = head(model)
    return Head(made.weight.detach(), None if made.bias is None else made.bias.detach(), made.scale, made.softcap)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Activations are computed again in the backward pass instead of being kept ("gradient checkpointing")."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def num_parameters(model: nn.Module, *, trained_only: bool = False) -> int:
    """Parameters, tied ones counted once."""
    return sum(num_numbers(p) for p in model.parameters() if p.requires_grad or not trained_only)


def max_length(config: PretrainedConfig) -> int | None:
    """The most tokens that a model can read; None where its config does not say."""
    text = config.get_text_config()
    keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    return next((n for key in keys if (n := getattr(text, key, None))), None)


def check_length(length: int, config: PretrainedConfig, who: str, shown: object = None) -> None:
    """Returns where a model can read rows of ``length`` tokens; an error quotes them as ``shown``.

    Raises:
        ConfigError: it has fewer positions.
    """
    limit = max_length(config)
    if limit is not None and length > limit:
        raise ConfigError(
            f"data.length is longer than the {who} can read",
            {"data.length": shown or length, f"the {who}'s max_position_embeddings": limit},
            why="Positions beyond that have no embedding, or one that the model never saw.",
            fix=f"Set data.length to at most {limit}.",
        )


def rope_border(config: PretrainedConfig) -> int | None:
    """The number of tokens beyond which a model turns the positions of all rows of a batch in another way (LongRoPE,
    arXiv 2402.13753, as `transformers` does it); None where what a row says never depends on the rows beside it."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    borders = [
        one.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for one in kinds
        if one.get("rope_type") == "longrope"
    ]
    return min(borders, default=None)


def resolve_device(device: str, setting: str) -> str:
    """The device that is meant: for auto a CUDA device where there is one, and else the CPU.

    Raises:
        MissingError: it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MissingError(
            f"the device `{device}` is not there",
            {"asked for": device, "CUDA devices": torch.cuda.device_count()},
            why=" ".join(str(error).split())[:200],
            fix=f"Set {setting}=cpu, or {setting}=auto to take what is there.",
        ) from None
    return device


def device_name(device: str) -> str:
    """What a device calls itself: "NVIDIA H100 80GB HBM3"; cpu, mps by these names."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def device_memory(device: str) -> int | None:
    """Bytes of memory that a device has; None where it does not tell."""
    return torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else None


def quiet() -> None:
    """Keeps `transformers` from writing progress bars and advice between a command's own lines."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")


# --- which part is which ---------------------------------------------------------------------------------------------


def backbone(model: PreTrainedModel) -> nn.Module:
    """All of the model below its head: tokens to the last hidden state."""
    body = getattr(model, model.base_model_prefix, None)
    if body is None:
        body = model.get_decoder()
    if body is model:
        raise MismatchError(
            f"the backbone of {type(model).__name__} is not found",
            {"family": model.config.model_type, "looked for": f"`{model.base_model_prefix}`"},
            why="Backbone and head have to be run apart, so that no logits tensor is ever held.",
            fix="Use a model whose class is a causal language model around a backbone, as almost all are.",
        )
    return body


def hidden_states(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "b t d"]:
    """The last hidden states, from which the head makes logits. Documents in one row do not see each other."""
    body = backbone(model)
    return body(**_inputs(body, batch))[0]


def _inputs(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """No attention mask is given: `transformers` builds it from positions that restart, unless it fills a cache."""
    takes_positions = "position_ids" in inspect.signature(module.forward).parameters
    positions = {"position_ids": batch.positions} if takes_positions else {}
    return {"input_ids": batch.tokens, "use_cache": False, **positions}


def head(model: PreTrainedModel) -> Head:
    """The model's head, with what its family does to logits. An adapter on the head is part of its weight."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise MismatchError(
            f"{type(model).__name__} has no output head",
            {"expected": "a causal language model", "found": type(model).__name__},
            why="Distillation compares next-token distributions, which the head makes.",
            fix="Use a model with a language-modelling head.",
        )
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = (factor if isinstance(factor, int | float) else 1.0) / (divisor or 1.0)
    weight, bias = _weight_and_bias(layer)
    return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None))


def _weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if hasattr(layer, "lora_A"):  # peft's wrapper around a linear layer
        weight, bias = _weight_and_bias(layer.base_layer)  # pyright: ignore[reportArgumentType]
        for name in layer.active_adapters:  # pyright: ignore[reportGeneralTypeIssues]
            weight = weight + layer.get_delta_weight(name)  # pyright: ignore[reportCallIssue]
        return weight, bias
    return layer.weight, getattr(layer, "bias", None)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def verify(model: PreTrainedModel, name: str, *, pack: bool, device: torch.device | None = None) -> None:
    """Tries the model on a few tokens, so that no wrong assumption about its architecture goes unnoticed.

    Args:
        device: where it works; None is where its parameters are, which may be elsewhere where they are offloaded.

    Raises:
        NonFiniteError: it says something that is not a number.
        MismatchError: backbone and head do not give the model's own logits; or a position sees what comes after it; or,
            with ``pack``, a document that shares a row with another is read differently for it.
    """
    generator = torch.Generator().manual_seed(0)
    device = device or next(model.parameters()).device
    tokens = torch.randint(0, head(model).num_columns, (3, 16), generator=generator)
    tokens[1, 8:] = tokens[0, 8:]
    tokens[2, :15] = tokens[0, :15]
    positions = torch.arange(8).repeat(3, 2)
    ones = torch.ones_like(tokens)
    batch = Batch(tokens, tokens, ones.bool(), positions, ones).to(device)
    was_training = model.training
    model.eval()
    try:
        hidden = hidden_states(model, batch)
        own = model(**_inputs(model, batch)).logits
    finally:
        model.train(was_training)
    if torch.isnan(own).any():
        raise NonFiniteError(
            f"what {name} says is not a number",
            {"logits": "not a number", "at": f"{int(torch.isnan(own).sum()):,} of {own.numel():,} places"},
            why="No loss and no score of it would mean anything.",
            fix="Check its weights; where they are good, another dtype or attention may mend it.",
        )
    tolerance = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 1e-2
    ours = head(model).logits(hidden.flatten(0, 1)).view(own.shape)
    error = ((ours - own).abs().max() / own.abs().max().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise MismatchError(
            f"the head of {name} is not understood",
            {"family": model.config.model_type, "logits differ by": f"{error:.1%} of the largest"},
            why="Its family changes the logits in a way that would be left out of every loss.",
            fix="Please report the family; until it is described it cannot be distilled.",
        )
    largest = hidden.abs().max().clamp_min(1e-6)
    if not ((hidden[0, :15] - hidden[2, :15]).abs().max() / largest).item() <= tolerance:
        raise MismatchError(
            f"{name} sees the tokens that it is to predict",
            {"family": model.config.model_type, "expected": "a causal language model"},
            why="Its hidden states depend on what comes later, so every loss would be meaningless.",
            fix="Use a decoder; for some families that is a setting, such as is_decoder.",
        )
    leak = ((hidden[0, 8:] - hidden[1, 8:]).abs().max() / largest).item()
    if pack and leak > tolerance / 10:  # the same arithmetic on the same numbers differs by nothing, or nearly so
        raise MismatchError(
            f"{name} lets documents that share a row see each other",
            {"family": model.config.model_type, "hidden states differ by": f"{leak:.1%} of the largest"},
            why="The model would be trained on contexts that never occur.",
            fix="Set data.pack=false.",
        )
