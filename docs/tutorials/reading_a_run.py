# %% [markdown]
# # Reading a run
#
# What a run writes while it trains, what the numbers mean, and the page that `sparseift report` makes of them. The run
# is a small one, so that this notebook takes less than a minute on a CPU.

# %% [markdown]
# ## A run from a recipe
#
# A recipe is a YAML file with a model, data, a transformation and the Trainer's arguments. Here it is written into
# a file; `recipes/` has some to start from.

# %%
from pathlib import Path

Path("train.txt").write_text("the quick brown fox jumps over the lazy dog. " * 2000)
Path("valid.txt").write_text("the lazy dog sleeps under the brown fox. " * 200)
Path("tutorial.yaml").write_text("""
model:
  name: gpt3-small
  config: {n_embd: 32, n_layer: 2, n_head: 2, n_positions: 64}
data: {corpus: train.txt, eval_corpus: valid.txt, vocab_size: 300, seq_len: 64}
sparse_ift:
  family: wide
  sparsity: 0.75
  dst: {algorithm: rigl, update_every_steps: 5}
training:
  output_dir: runs/tutorial
  max_steps: 40
  per_device_train_batch_size: 8
  learning_rate: 4e-3
  logging_steps: 5
  eval_strategy: steps
  eval_steps: 10
  save_steps: 20
  report_to: none
  disable_tqdm: true
""")

# %% [markdown]
# On a terminal this is `sparseift pretrain tutorial.yaml`. The twin without a transformation takes one more word.

# %%
from sparseift_llm.cli import main as sparseift

assert sparseift(["pretrain", "tutorial.yaml"]) == 0
assert sparseift(["pretrain", "tutorial.yaml", "--output_dir", "runs/tutorial_dense", "--sparse_ift", "null"]) == 0

# %% [markdown]
# ## The result
#
# `summary.json` is written at the end. Losses are in nats per token; bits per byte can be compared between tokenizers.

# %%
import json

summary = json.loads(Path("runs/tutorial/summary.json").read_text())
for key in ("eval_loss", "perplexity", "bits_per_byte", "linear_sparsity", "train_tokens", "forward_flops_per_token"):
    print(f"{key:24} {summary[key]:,.4g}")

# %% [markdown]
# ## While it trained
#
# `metrics.jsonl` has a line per log event. A run that is still going on, or was killed, has this file, too.

# %%
lines = [json.loads(line) for line in Path("runs/tutorial/metrics.jsonl").read_text().splitlines()]
for line in lines:
    if "loss" in line:
        print(f"step {line['step']:3}  loss {line['loss']:.3f}  explored {line.get('exploration', float('nan')):.2f}")

# %% [markdown]
# `exploration` is the share of positions that were active at any time so far. It begins at one minus the sparsity, and
# grows with each mask update; with static masks it stays. `mask_churn` is how much the last update changed, and
# `mask_survival` how much of what was grown is still there. If almost nothing survives, updates come too often.
#
# `layers.jsonl` says the same for each layer.

# %%
layers = [json.loads(line) for line in Path("runs/tutorial/layers.jsonl").read_text().splitlines()]
for name, values in list(layers[-1]["layers"].items())[:3]:
    print(name, {key: values[key] for key in ("sparsity", "exploration", "churn")})

# %% [markdown]
# ## Side by side

# %%
assert sparseift(["compare", "runs/tutorial_dense", "runs/tutorial", "--output", "runs/comparison"]) == 0

# %% [markdown]
# Look at the whole-model FLOPs beside the linear ones: the projections cost the same, the wider attention and logits do
# not. `sparseift compare` refuses runs on other data, and says so.
#
# ## The page
#
# `report` puts everything on one page that needs no network: loss over FLOPs, tokens and time, what the masks did,
# and the settings that differ.

# %%
assert sparseift(["report", "runs/tutorial_dense", "runs/tutorial", "-o", "runs/report.html"]) == 0
print(f"{Path('runs/report.html').stat().st_size / 1e3:.0f} kB")

# %% [markdown]
# Open `runs/report.html` in a browser. [Look at runs](../guides/reports.md) says which folders it takes, and
# [Metrics](../metrics.md) defines every number.
