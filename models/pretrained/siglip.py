"""SigLIP's vision encoder (transformers' SiglipVisionModel; Idefics3's has the same names)."""

from models.pretrained.engine import Table

BLOCK = [
    ("ln1", "layer_norm1"),
    ("ln2", "layer_norm2"),
    ("attn.q_proj", "self_attn.q_proj"),
    ("attn.k_proj", "self_attn.k_proj"),
    ("attn.v_proj", "self_attn.v_proj"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
]

TABLE: Table = [
    ("patch_embedding.position_embedding", "embeddings.position_embedding.weight"),
    *(
        (f"patch_embedding.conv.{kind}", f"embeddings.patch_embedding.{kind}")
        for kind in ("weight", "bias")
    ),
    *(
        (f"blocks.{{i}}.{ours}.{kind}", f"encoder.layers.{{i}}.{theirs}.{kind}")
        for ours, theirs in BLOCK
        for kind in ("weight", "bias")
    ),
    *((f"layer_norm.{kind}", f"post_layernorm.{kind}") for kind in ("weight", "bias")),
]
IGNORE = ("position_ids",)
