"""The decoder of Llama, SmolLM2, Qwen2 and Qwen3, without the head.

In transformers: LlamaModel and kin.
Which biases and norms exist is the config's business: names of absent parameters are never asked
for.
"""

from models.pretrained.engine import Table

BLOCK = [
    ("norm1.weight", "input_layernorm.weight"),
    ("norm2.weight", "post_attention_layernorm.weight"),
    *(
        (f"attn.{p}_proj.{kind}", f"self_attn.{p}_proj.{kind}")
        for p in "qkvo"
        for kind in ("weight", "bias")
    ),
    ("attn.q_norm.weight", "self_attn.q_norm.weight"),
    ("attn.k_norm.weight", "self_attn.k_norm.weight"),
    *((f"mlp.{p}_proj.weight", f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")),
]

TABLE: Table = [
    ("token_embedding.weight", "embed_tokens.weight"),
    ("norm.weight", "norm.weight"),
    *((f"blocks.{{i}}.{ours}", f"layers.{{i}}.{theirs}") for ours, theirs in BLOCK),
]
IGNORE = ("rotary_emb.inv_freq",)
