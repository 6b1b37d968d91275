"""Models: load and save them, and tell which part is which: the backbone, the head."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from stillroom.config import Quantization, is_local
from stillroom.errors import (
    ConfigError,
    DataError,
    MismatchError,
    MissingError,
    OutOfMemoryError,
    StillroomError,
    did_you_mean,
)
from stillroom.lm_head import LMHead
from stillroom.models import safetensors_io
from stillroom.models.folder import check_folder, has_other_head
from stillroom.models.hidden_states import lm_head
from stillroom.models.quantization import check_quantized, num_numbers, quantized_loading
from stillroom.models.safetensors_io import check_whole, fill_local, is_adapter, materialize, own_rows


# --- on disk ---------------------------------------------------------------------------------------------------------
def read_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config.json, from a folder (whose weight files are looked at too) or from the hub."""
    folder = Path(name).expanduser() if is_local(name) else None
    if folder is not None:
        check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder or name), revision=revision, trust_remote_code=trust_remote_code)
        tied = config.get_text_config().tie_word_embeddings
    except Exception as error:  # what a config.json may hold makes a family's code raise anything
        raise _not_loaded(name, error) from error
    if folder is not None and tied and has_other_head(folder):
        _untie(config)
    return config


def _untie(config: PretrainedConfig) -> None:
    """Lets a config say that the head is not the embeddings."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _not_loaded(name: str, error: Exception) -> StillroomError:
    reason = " ".join(str(error).split())
    no_memory = "allocate memory" in reason or "out of memory" in reason.lower()
    if no_memory or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemoryError(
            f"there is too little memory to load the model {name}",
            {"reason": reason[:300] or type(error).__name__},
            why="All of its weights must fit into the memory of the machine or the device; its files may be whole.",
            fix="Use a smaller dtype or quantization, another device, or a machine with more memory; `stillroom plan` "
            "tells how much a run needs.",
        )
    if "trust_remote_code" in reason:
        return DataError(
            f"the model {name} brings its own code",
            {"trust_remote_code": "false"},
            why="Its code would run on this machine with your rights.",
            fix="Read the code first, then set trust_remote_code=true beside the model's name if you trust it.",
        )
    local = is_local(name)
    fix = "Check the name, the network and the access rights (`hf auth login`); or give a local folder."
    return (DataError if local else MissingError)(
        f"the model {'in ' if local else ''}{name} could not be loaded",
        {"reason": reason[:300]},
        why="Without it there is nothing to train or to learn from.",
        fix="Check that the folder is whole, and holds a causal model that `transformers` knows." if local else fix,
    )


WHOLE_BYTES = 4 * 2**30
"""Models of at most this size are known by all of their bytes; of larger ones samples are read."""


def fingerprint(name: str, config: PretrainedConfig) -> str:
    """The identity of a model: its commit on the hub; for a folder a hash of samples of its files, which is all that
    versions before knew, and one of every byte that is read: "sha256 <16 hex>, whole <16 hex>". Hashing all of 800 GB
    would take an hour, so the second is "sampled" above ``WHOLE_BYTES``. Compare by `runs.same_model`."""
    if not is_local(name):
        return f"commit {getattr(config, '_commit_hash', None)}"
    folder = Path(name).expanduser()
    files = check_folder(folder)
    digest = hashlib.sha256()
    for path in dict.fromkeys([files[0], *sorted({*files[1:], *folder.glob("*.safetensors")})]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in sorted({0, *(size * i // 64 for i in range(64)), max(0, size - 2**16)}):
                file.seek(place)
                digest.update(file.read(2**16))
    sampled = f"sha256 {digest.hexdigest()[:16]}"
    stats = [path.stat() for path in files]
    if sum(stat.st_size for stat in stats) > WHOLE_BYTES:
        return f"{sampled}, sampled"
    whole = hashlib.sha256()
    for path, stat in zip(files, stats, strict=True):
        digest_of = _file_digest if stat.st_size > 2**26 else _file_digest.__wrapped__
        whole.update(f"{path.name} {stat.st_size} ".encode() + digest_of(path, stat.st_ino, stat.st_mtime_ns))
    return f"{sampled}, whole {whole.hexdigest()[:16]}"


@lru_cache(maxsize=256)
def _file_digest(path: Path, _inode: int, _time_ns: int) -> bytes:
    """The sha256 of a file, which is read once by a process while it is not written."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


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
    folder = Path(name).expanduser() if is_local(name) else None
    if folder is not None:
        check_folder(folder)
        safetensors_io.check_made(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder or name),
            dtype=dtype,
            attn_implementation=attention,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **({} if quantization is None else quantized_loading(quantization, dtype, device)),
        )
    except Exception as error:  # what a config.json may hold makes a family's code raise anything
        raise _not_loaded(name, error) from error
    model, info = loaded
    check_whole(name, list(info["missing_keys"]), list(info["unexpected_keys"]), model.base_model_prefix)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.get_text_config().tie_word_embeddings and head.weight is not embeddings.weight:
        _untie(model.config)  # its files hold both, with different values
    if quantization is not None:
        check_quantized(model, quantization, name)
        return model.eval()
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise _not_loaded(name, error) from error


def local_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model: its own, or what is downloaded of it from the hub. Raises MissingError where it cannot
    be had."""
    if is_local(name):
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.py"]))
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error


def configure(base: PretrainedConfig, settings: Mapping[str, Any]) -> PretrainedConfig:
    """A model's config with some of its settings changed, each of which must be known to the model's family."""
    values = base.to_dict()
    for key in settings:
        if key not in values:
            near = did_you_mean(key, values) or {"did you mean": "see the model's config.json"}
            raise MismatchError(
                f"the family {base.model_type} has no setting `{key}`",
                {"asked for": key, **near},
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
    """A new model with random weights, the same for the same seed: see `initialize`."""
    model = build_meta_model(config, dtype=dtype, attention=attention)
    materialize(model, device)
    model.tie_weights()
    initialize(model, seed)
    return model


def build_meta_model(
    config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model whose parameters take no memory yet: only its buffers (a few numbers, such as the frequencies of
    positions) are there."""
    with _possible(config.model_type, "those of its config.json"), parameters_on_meta():
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, modules are built with parameters that take no memory, and draw no random numbers for them."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = without_memory  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@torch.no_grad()
def initialize(model: PreTrainedModel, seed: int) -> None:
    """Gives a new model its random values, as its family draws them, one module after the other.

    Of each module the whole is drawn on the CPU and this process's part kept, so the model is the same for the same
    seed, however many processes hold it. It must have memory already (`materialize`). Parameters beside those
    of the family (adapters) stay as they are.
    """
    families = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for name, module in model.named_modules():
        module.__dict__.pop("_is_hf_initialized", None)
        if is_adapter(f".{name}"):
            module._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    for family in families:
        family._init_weights = partial(_draw, family)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.initialize_weights()
    finally:
        for family in families:
            del family.__dict__["_init_weights"]


def _draw(family: PreTrainedModel, module: nn.Module) -> None:
    """Draws a module as its family does, over stand-ins for its parameters that are whole and on the CPU."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    for name, parameter in held.items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    try:
        type(family)._init_weights(family, module)
        for name, parameter in held.items():
            drawn: Any = module._parameters[name]
            fill_local(parameter, drawn.detach()[own_rows(parameter)] if drawn.ndim else drawn.detach())
    finally:
        module._parameters.update(held)


def load_head(model: PreTrainedModel, folder: Path, device: torch.device | str) -> LMHead:
    """The head alone of a model that is a skeleton, from its folder."""
    tied = model.config.get_text_config().tie_word_embeddings  # as `read_config` found it in the files
    part = model.get_input_embeddings() if tied else model.get_output_embeddings()
    assert part is not None
    materialize(part, device)
    model.tie_weights()
    safetensors_io.load_weights(model, folder, whole=False)
    made = lm_head(model)
    return LMHead(made.weight.detach(), None if made.bias is None else made.bias.detach(), made.scale, made.softcap)


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


def scaled_length(config: PretrainedConfig) -> tuple[int, str] | None:
    """The tokens that a model can read by the scaling of its rotary positions, and the words for that; None where its
    config asks for none. Of several kinds of layers, each with its own, the one that reads the least counts."""
    text = config.get_text_config()
    limit, rope = max_length(config), getattr(text, "rope_parameters", None) or {}
    found: list[tuple[int, str]] = []
    for one in [one for one in rope.values() if isinstance(one, dict)] or [rope]:
        kind, factor = one.get("rope_type", "default"), one.get("factor")
        original = one.get("original_max_position_embeddings") or limit
        if kind == "default" or not isinstance(factor, int | float) or not isinstance(original, int):
            return None
        found.append((int(factor * original), f"{factor:g} * {original} = {int(factor * original)} ({kind})"))
    return min(found, default=None)


def check_length(length: int, config: PretrainedConfig, who: str, shown: object = None) -> None:
    """Returns where a model can read rows of ``length`` tokens, by its positions or by their scaling; an error quotes
    them as ``shown``. Raises ConfigError where it cannot."""
    limit, scaled = max_length(config), scaled_length(config)
    most = None if limit is None else max(limit, 0 if scaled is None else scaled[0])
    if most is not None and length > most:
        raise ConfigError(
            f"data.length is longer than the {who} can read",
            {"data.length": shown or length, f"the {who}'s max_position_embeddings": limit}
            | ({} if scaled is None else {"its rope scaling, factor * original": scaled[1]}),
            why="Positions beyond that have no embedding, or one that the model never saw.",
            fix=f"Set data.length to at most {most}.",
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
    """The device that is meant: for auto a CUDA device where there is one, and else the CPU. Raises MissingError
    where it is not there."""
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
    """The name that a device gives itself: "NVIDIA H100 80GB HBM3"; cpu, mps by these names."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def device_memory(device: str) -> int | None:
    """Bytes of memory that a device has; None where it does not tell."""
    return torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else None


def quiet() -> None:
    """Keeps `transformers` from writing progress bars and advice between a command's own lines."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")
