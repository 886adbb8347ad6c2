"""Sparse pretraining in a plain accelerate loop, without the Trainer: the two marked lines are all it takes.

accelerate launch recipes/accelerate_loop.py
"""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import GPT2Config

from sparseift_llm import SparseIFTConfig, SparseTrainingController, sparsify
from sparseift_llm.data.loading import load_data
from sparseift_llm.data.options import DataConfig

STEPS, BATCH, SEQ_LEN = 200, 16, 128


def main(output_dir: str = "runs/accelerate_loop", steps: int = STEPS) -> float:
    """Train a tiny model for `steps` optimizer steps, save it, and return the last loss."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    with accelerator.main_process_first():
        data = load_data(DataConfig(vocab_size=512, seq_len=SEQ_LEN, max_eval_sequences=64), f"{output_dir}/data")
    config = GPT2Config(
        vocab_size=len(data.tokenizer), n_positions=SEQ_LEN, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=data.tokenizer.eos_token_id, eos_token_id=data.tokenizer.eos_token_id,
    )  # fmt: skip
    model = sparsify(config, SparseIFTConfig(sparsity=0.75))  # line 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loader = DataLoader(data.train, batch_size=BATCH, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    controller = SparseTrainingController(model, optimizer, total_steps=steps)  # line 2
    accelerator.register_for_checkpointing(controller)  # masks travel with accelerator.save_state

    loss = torch.tensor(float("nan"))
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
    while controller.step < steps:
        batch = next(batches)
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and controller.step % 20 == 0:
            accelerator.print(f"step {controller.step}: loss {loss.item():.3f}")
    accelerator.unwrap_model(model).save_pretrained(output_dir, is_main_process=accelerator.is_main_process)
    return loss.item()


if __name__ == "__main__":
    main()
