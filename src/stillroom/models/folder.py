"""The folder of a local model: whether its files are all there and whole, from their headers."""

import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from stillroom.errors import DataError, MissingError
from stillroom.recipe import parse_json
from stillroom.tokenizers import refuse_lfs_pointer

MOST_HEADER_BYTES = 100_000_000
"""The longest header that safetensors itself accepts."""
INDEX_FILE = "model.safetensors.index.json"
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""How families call the number of their layers."""


def check_folder(folder: Path) -> list[Path]:
    """The files of a local model that will be read, config.json first, after a look at their headers.

    Raises MissingError where the folder, its config.json or one of its weight files is not there; DataError where a
    weight file is truncated, a git-lfs pointer, or not safetensors, or where the folder holds an adapter.
    """
    read_values(folder)
    weights = weight_files(folder)
    for path in weights:
        refuse_lfs_pointer(path, "weights")
        size, header, expected = path.stat().st_size, read_header(path), None
        with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
            tensors = parse_json(header).items()
            ends = [tensor["data_offsets"][1] for name, tensor in tensors if name != "__metadata__"]
            expected = 8 + len(header) + max(ends, default=0)
        if expected != size:
            raise DataError(
                f"{path} is truncated or damaged",
                {"bytes there": size, "bytes expected": expected or "unknown: the header is broken"},
                why="Some of the weights are missing or cannot be trusted.",
                fix="Copy or download the file again.",
            )
    check_num_layers(folder, weights)
    return [folder / "config.json", *weights]


def check_num_layers(folder: Path, weights: list[Path]) -> None:
    """Raises DataError where config.json tells of more layers than the files have tensors; a family's code would build
    them all first, without end."""
    values = read_values(folder)
    inner = values.get("text_config")
    told = [part.get(key) for part in (values, inner if isinstance(inner, dict) else {}) for key in LAYERS]
    num_layers = max((n for n in told if isinstance(n, int | float)), default=0)
    num_tensors = sum(len(tensors_of(path)) for path in weights)
    if num_layers > num_tensors:
        raise DataError(
            f"the weights in {folder} are not those of its config.json",
            {"num_hidden_layers": num_layers, "tensors in the files": num_tensors},
            why="Each layer has a tensor at the least, so the model cannot be built of these files.",
            fix="Mend num_hidden_layers in config.json, or download the model again.",
        )


def read_values(folder: Path) -> dict[str, Any]:
    """The values of a local model's config.json. Raises MissingError where there is none; DataError where it is no
    object in JSON, or where the folder holds an adapter."""
    _refuse_adapter(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise MissingError(
            f"{folder} is not a model folder",
            {"expected": "config.json", "found": _listing(folder)},
            why="A model is an ordinary Hugging Face folder with config.json and *.safetensors.",
            fix="Check the path; the name of a model on the hub has the form owner/name.",
        )
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The values of a model's file of JSON. Raises DataError where it is no object in JSON."""
    try:
        values = parse_json(path.read_bytes())
        if isinstance(values, dict):
            return values
        problem = f"a {type(values).__name__}"
    except ValueError as error:
        problem = str(error)
    raise DataError(
        f"{path} is damaged",
        {"expected": "an object in JSON", "found": problem},
        why="What the model is, and how large, is read from it.",
        fix="Copy or download the file again.",
    )


def _refuse_adapter(folder: Path) -> None:
    """Raises DataError where a folder holds an adapter: `transformers` would load it on top of another model."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = str(read_object(path).get("base_model_name_or_path") or "BASE")
    raise DataError(
        f"{folder} holds an adapter, not a model",
        {"adapter_config.json": path, "its base": base},
        why="An adapter is a change of the weights of its base, and a model is read here from its own weights alone.",
        fix="Merge it into its base first, and give the folder that this writes (or take adapter_config.json away, if "
        "the folder's own weights are the model):\n"
        "  from peft import AutoPeftModelForCausalLM as Adapted; from transformers import AutoTokenizer\n"
        f'  Adapted.from_pretrained("{folder}", dtype="auto").merge_and_unload().save_pretrained("MERGED")\n'
        f'  AutoTokenizer.from_pretrained("{base}").save_pretrained("MERGED")',
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that `transformers` reads the weights of a local model from, by name: the one that config.json names as
    transformers_weights, or model.safetensors, or those of the index where there is no such file. Everything that asks
    which file counts asks here; other files of the folder are no part of the model.

    Raises MissingError where one is not there; DataError where the index is damaged or leads out of the folder.
    """
    name = read_values(folder).get("transformers_weights")
    choices = ["model.safetensors", INDEX_FILE] if name is None else _inside([name], folder / "config.json")
    path = next((path for choice in choices if (path := folder / choice).is_file()), None)
    if path is None or not path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise MissingError(
            f"{folder} holds no safetensors weights",
            {"expected": " or ".join(choices), "found": _listing(folder)},
            why="Only safetensors are read, under the names that `transformers` reads: other formats can run code when "
            "they are opened.",
            fix="Convert the weights to safetensors, or check that the download was complete; a student that is to be "
            "new is student.init of kind config.",
        )
    if path.suffix == ".safetensors":
        return [path]
    named = _named_by(path)
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise MissingError(
            f"{folder} lacks some of its weights",
            {"named by the index": f"{len(named)} files", "missing": ", ".join(missing[:3])},
            why="The model cannot be whole without them.",
            fix="Copy or download the missing files.",
        )
    return [folder / name for name in named]


def _named_by(index: Path) -> list[str]:
    """The weight files that an index names. Raises as `weight_files` does."""
    try:
        names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
        return _inside(names, index)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"the index {index} is damaged",
            {"expected": "weight_map with the file of each tensor", "found": f"{type(error).__name__}: {error}"},
            why="Nobody can tell which files belong to the model.",
            fix="Copy or download the index again.",
        ) from None


def _inside(names: list[str], where: Path) -> list[str]:
    """The names, none of which leads out of the folder of the file that gives them."""
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(
                f"{where} names a file outside its folder",
                {"named": name, "folder": where.parent},
                why="A model's files never leave its folder.",
                fix="Do not use this model; its index was tampered with.",
            )
    return names


def tensors_of(path: Path) -> dict[str, Any]:
    """What the header of a safetensors file says of each tensor. Raises DataError where it has no such header."""
    try:
        tensors = {name: dict(tensor) for name, tensor in parse_json(read_header(path)).items()}
        tensors.pop("__metadata__", None)
        for tensor in tensors.values():
            start, end = tensor["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*tensor["shape"], start, end)):
                raise ValueError
        return tensors
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f"{path} is not a safetensors file",
            {"bytes": path.stat().st_size, "expected": "a header that names each tensor with its type and shape"},
            why="How large its weights are is read from its header.",
            fix="Copy or download the file again; a git-lfs pointer needs `git lfs pull`.",
        ) from None


HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight", "lm_head.out_proj.weight")
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tokens_embed.weight",
    "embeddings.weight", "shared.weight",
)  # fmt: skip
"""How the names of a head and of input embeddings end in the files of the families of `transformers`."""


def has_other_head(folder: Path) -> bool:
    """Whether the files hold a head that differs from the embeddings: `transformers` leaves it untied, whatever
    tie_word_embeddings of config.json says."""
    places = {name: (path, tensor) for path in weight_files(folder) for name, tensor in tensors_of(path).items()}

    def ending(endings: tuple[str, ...]) -> list[tuple[Path, Any]]:
        return [places[name] for name in places if any(f".{name}".endswith(f".{end}") for end in endings)]

    heads, embeddings = ending(HEADS), ending(EMBEDDINGS)
    pairs = [(a, b) for a in heads for b in embeddings if a[1]["shape"] == b[1]["shape"]]
    return bool(pairs) and not any(_same_bytes(a, b) for a, b in pairs)


def _same_bytes(one: tuple[Path, Any], other: tuple[Path, Any]) -> bool:
    """Whether two tensors of files hold the same, a block at a time."""
    if one[1]["dtype"] != other[1]["dtype"]:
        return False
    with ExitStack() as stack:
        files = []
        for path, tensor in (one, other):
            file = stack.enter_context(path.open("rb"))
            length = struct.unpack("<Q", file.read(8))[0]
            file.seek(8 + length + tensor["data_offsets"][0])
            files.append(file)
        left = one[1]["data_offsets"][1] - one[1]["data_offsets"][0]
        while left > 0:
            block, again = (file.read(min(left, 2**24)) for file in files)
            if block != again or not block:
                return False
            left -= len(block)
    return True


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "an empty folder"


def read_header(path: Path) -> bytes:
    """The header of a safetensors file, as it stands there; nothing where it has none that can be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        return file.read(length) if 8 + length <= size and length <= MOST_HEADER_BYTES else b""
