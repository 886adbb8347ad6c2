"""Sparse pretraining with a plain `transformers.Trainer`: the two marked lines are all it takes.

python recipes/trainer_script.py [OUTPUT_DIR]
"""

from __future__ import annotations

import sys

from transformers import GPT2Config, Trainer, TrainingArguments, default_data_collator, set_seed

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingCallback, print_sparsity, sparsify
from sparseift_llm.data.loading import load_data
from sparseift_llm.data.options import DataConfig

SEQ_LEN = 128


def main(output_dir: str = "runs/trainer_script", steps: int = 300) -> float:
    """Train a small model on the built-in corpus, save it with its masks, and return the held-out loss."""
    set_seed(0)
    data = load_data(DataConfig(vocab_size=512, seq_len=SEQ_LEN, max_eval_sequences=64), f"{output_dir}/data")
    config = GPT2Config(
        vocab_size=len(data.tokenizer), n_positions=SEQ_LEN, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=data.tokenizer.eos_token_id, eos_token_id=data.tokenizer.eos_token_id,
    )  # fmt: skip
    model = sparsify(config, SparseIFTConfig(sparsity=0.75, structure="block", dst=DSTConfig("static")))  # line 1
    print_sparsity(model)
    args = TrainingArguments(
        output_dir, max_steps=steps, per_device_train_batch_size=16, learning_rate=4e-3, weight_decay=0.1,
        lr_scheduler_type="cosine", warmup_steps=0.05, logging_steps=20, save_steps=100, report_to="none",
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,  # all sequences have one length
        callbacks=[SparseTrainingCallback(tokens_per_step=16 * SEQ_LEN, seq_len=SEQ_LEN)],  # line 2
    )
    trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on with a run that was killed
    loss: float = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()  # for `sparseift compare` and `sparseift report`
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:])
