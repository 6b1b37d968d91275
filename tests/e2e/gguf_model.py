"""Writes a small Llama model and its SentencePiece-like tokenizer as a GGUF file: `python gguf_model.py FOLDER FILE`.

It runs in the interpreter that has llama.cpp, so it needs `gguf` and numpy alone, and neither torch nor transformers.
"""

import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 arrays of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        arrays[name] = np.frombuffer(data[start:stop], np.float32).reshape(entry["shape"])
    return arrays


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of each head, from two halves (as transformers rotates them) to pairs (as llama.cpp does)."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any]) -> None:
    """The vocabulary; a piece's score is minus the rank of the merge that makes it, so merges happen in their order."""
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(tokenizer["model"]["merges"])))}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    kinds = []
    for token, number in vocabulary:
        if number == 0:
            kinds.append(TokenType.UNKNOWN)
        elif number in special:
            kinds.append(TokenType.CONTROL)
        else:
            kinds.append(TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else TokenType.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_scores([-float(ranks.get(token, 0)) for token, _ in vocabulary])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def write(folder: Path, file: Path) -> None:
    """Writes the Llama model in ``folder``, as transformers saves it, to ``file``."""
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    write_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, array in read_safetensors(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in fixed:
            writer.add_tensor(f"{fixed[stem]}.weight", array)
            continue
        layer, inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem).groups()  # pyright: ignore
        kind = NAMES[inner]
        writer.add_tensor(f"blk.{layer}.{kind}.weight", interleaved(array, heads[kind]) if kind in heads else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
