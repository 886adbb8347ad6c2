# %% [markdown]
# # A small pretraining
#
# A dense GPT-2 and its sparse twin, trained on the same tokens on a CPU in less than a minute. You will see what
# `sparsify` changes, how masks move, and what a checkpoint holds.

# %% [markdown]
# ## Text
#
# The source files of Python's standard library are text enough, and every machine has them. A byte is a token, so no
# tokenizer has to be trained.

# %%
import sysconfig
from pathlib import Path

import torch

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = b"".join(path.read_bytes() for path in files)[: 2000 * 64]
rows = torch.tensor(list(text)).view(-1, 64)
train = [{"input_ids": row, "labels": row} for row in rows[:-64]]
held_out = [{"input_ids": row, "labels": row} for row in rows[-64:]]
len(train), len(held_out)

# %% [markdown]
# ## A dense model, and what becomes of it
#
# `plan` says what a transformation will do, without building anything. At a sparsity of 75% all sides are twice as
# long, and a quarter of the weights is active: as many as before.

# %%
from transformers import GPT2Config

from sparseift_llm import DSTConfig, SparseIFTConfig, plan

config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
transformation = SparseIFTConfig(
    sparsity=0.75,
    structure="block",
    block_size=16,
    dst=DSTConfig("rigl", update_every_steps=10),
)
result = plan(config, transformation, 64)
for layer in result.layers[:4]:
    print(f"{layer.kind:8} dense {layer.dense_shape}, sparse {layer.sparse_shape}, {layer.num_active:,} active weights")

# %% [markdown]
# The projections cost the same. Attention and logits do not, because they become wider and stay dense.

# %%
dense_flops, sparse_flops = result.dense.flops, result.sparse.flops
print(f"projections: {sparse_flops.linear / dense_flops.linear:.3f} times the dense model's FLOPs")
print(f"whole model: {sparse_flops.forward / dense_flops.forward:.3f} times")

# %% [markdown]
# ## Training both
#
# The sparse model needs one callback. It makes the mask updates at the right steps, and saves the masks with each
# checkpoint.

# %%
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from sparseift_llm import SparseTrainingCallback, sparsify


def train_model(model, name, callbacks):
    args = TrainingArguments(
        f"runs/{name}",
        max_steps=60,
        learning_rate=4e-3,
        per_device_train_batch_size=16,
        save_steps=30,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=held_out, callbacks=callbacks)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


torch.manual_seed(0)
dense_loss = train_model(GPT2LMHeadModel(config), "tutorial_dense", [])
torch.manual_seed(0)
model = sparsify(config, transformation)
sparse_loss = train_model(model, "tutorial_sparse", [SparseTrainingCallback()])
print(f"held-out loss: dense {dense_loss:.2f}, sparse {sparse_loss:.2f} nats per byte")

# %% [markdown]
# One run of 60 steps at one learning rate is no comparison. `sparseift sweep` makes one: rates and seeds for both.
#
# ## What is in the model
#
# A projection stores its active tiles alone. `to_dense` writes them into the wide matrix, with zeros.

# %%
from sparseift_llm import to_dense
from sparseift_llm.layers.base import sparse_layers

name, layer = next(iter(sparse_layers(model).items()))
print(name, "stores", tuple(layer.weight.shape), "of a mask of tiles", tuple(layer.mask_shape))
wide = to_dense(model).get_submodule(name).weight
print("as a matrix", tuple(wide.shape), f"of which {(wide == 0).float().mean():.2%} are zero")

# %% [markdown]
# ## Loading it again

# %%
from sparseift_llm import load_pretrained

model.save_pretrained("runs/tutorial_model")
loaded = load_pretrained("runs/tutorial_model")
prompt = torch.tensor([list(b"import os\n")])
assert torch.equal(loaded.eval()(prompt).logits, model.eval()(prompt).logits)
bytes(loaded.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist())

# %% [markdown]
# The checkpoint `runs/tutorial_sparse/checkpoint-60` is resumed by `trainer.train(resume_from_checkpoint=True)`, to the
# same bits. The next tutorial, [Reading a run](reading_a_run.md), looks at what a run leaves behind.
