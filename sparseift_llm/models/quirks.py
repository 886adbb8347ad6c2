"""What the library has to know about single model types by name, because nothing on a built model shows it.

Everything else about a model is read from its config (architectures.py) or found on its modules (projections.py).
"""

from __future__ import annotations

# Each token of these models sees the later ones, too, although they count as causal language models.
SEE_LATER_TOKENS = ("cpmant",)

# Further config fields that must equal the hidden size.
HIDDEN_TWINS = {"opt": ("word_embed_proj_dim",)}

# The children of an MLP in the order of its forward pass, where it is a plain chain: the projection into the FFN, the
# activation, the projection out of it, and what follows.
FEED_FORWARD_CHAINS = {
    "gpt2": ("c_fc", "act", "c_proj", "dropout"),
    "gpt_neox": ("dense_h_to_4h", "act", "dense_4h_to_h"),
}

# The same for an MLP that computes down(activation(gate(x)) * up(x)): gate, activation, up, down.
GATED_FEED_FORWARD_CHAINS = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma"), ("gate_proj", "act_fn", "up_proj", "down_proj")
)

# How a fused QKV matrix orders its output rows:
#   blocks      all queries, then all keys, then all values
#   per_head    query, key and value of the first head, then those of the second, ...
#   falcon      per group of heads that share a key: the group's queries, its key, its value
#   bigcode     blocks where heads share one key (multi_query), per_head otherwise
#   codegen     four chunks, one for each core of the machine it was written for: queries, values, keys
QKV_LAYOUTS = {
    "gpt2": "blocks",
    "openai-gpt": "blocks",
    "mpt": "blocks",
    "phi3": "blocks",
    "gpt_neox": "per_head",
    "gpt_neox_japanese": "per_head",
    "bloom": "per_head",
    "persimmon": "per_head",
    "falcon": "falcon",
    "gpt_bigcode": "bigcode",
    "codegen": "codegen",
}
CODEGEN_CHUNKS = 4

# Model types with an FFN matrix whose first half of rows is the gate; the second half is what the gate multiplies.
FUSED_GATES = ("glm", "glm4", "modernbert-decoder", "phi3")

# Model types with latent attention, whose factors of keys and values are laid out as in DeepSeek's models.
LATENT_ATTENTION = ("minicpm3", "youtu")
