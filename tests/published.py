"""Published models: the sizes of their config.json, and how many parameters their makers count."""

from typing import Any

LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
QWEN2: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 152064}
MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None) -> dict[str, Any]:
    found = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip
    return found if kv_heads is None else {**found, "num_key_value_heads": kv_heads}


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 3.1 8B": ({**LLAMA, **sizes(4096, 14336, 32, 32)}, 8_030_261_248),
    "Llama 3.1 70B": ({**LLAMA, **sizes(8192, 28672, 80, 64)}, 70_553_706_496),
    "Llama 3.1 405B": ({**LLAMA, **sizes(16384, 53248, 126, 128)}, 405_853_388_800),
    "Qwen2 1.5B": (
        {**QWEN2, "vocab_size": 151936, "tie_word_embeddings": True, **sizes(1536, 8960, 28, 12, 2)},
        1_543_714_304,
    ),
    "Qwen2 7B": ({**QWEN2, **sizes(3584, 18944, 28, 28, 4)}, 7_615_616_512),
    "Qwen2.5 14B": ({**QWEN2, **sizes(5120, 13824, 48, 40, 8)}, 14_770_033_664),
    "Qwen2.5 72B": ({**QWEN2, **sizes(8192, 29568, 80, 64, 8)}, 72_706_203_648),
    "Mistral 7B v0.1": ({**MISTRAL, "vocab_size": 32000}, 7_241_732_096),
    "Mistral 7B v0.3": ({**MISTRAL, "vocab_size": 32768}, 7_248_023_552),
    "Gemma 2 2B": (
        {"model_type": "gemma2", "vocab_size": 256000, "head_dim": 256, **sizes(2304, 9216, 26, 8, 4)},
        2_614_341_888,
    ),
    "Gemma 2 9B": (
        {"model_type": "gemma2", "vocab_size": 256000, "head_dim": 256, **sizes(3584, 14336, 42, 16, 8)},
        9_241_705_984,
    ),
    "Mixtral 8x7B": (
        {**MISTRAL, "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
        46_702_792_704,
    ),
}
