"""Train a Sparse-IFT model on with other text: as it is, or with LoRA on its dense twin.

    python recipes/finetune.py sparse runs/wide75 runs/tuned --corpus train.txt --eval_corpus valid.txt
    python recipes/finetune.py lora runs/wide75 runs/adapter --corpus train.txt --eval_corpus valid.txt

`sparse` keeps the zeros: masks stay where pretraining left them, and the result is a Sparse-IFT model. `lora` (`pip
install peft`) trains adapters on `to_dense(model)`; the folder gets the adapters, and `merged/` in it a stock model
with them filled in, which has no zeros any more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from sparseift_llm import SparseTrainingCallback, load_pretrained, to_dense
from sparseift_llm.data.loading import load_data
from sparseift_llm.data.options import DataConfig

RATES = {"sparse": 1e-4, "lora": 1e-3}  # a tenth of what small models are pretrained with; adapters take more


def main(words: list[str] | None = None) -> dict[str, float]:
    """Fine-tune, save, and return the held-out losses in nats per token, before and after."""
    options = arguments(words)
    output, source = Path(options.output), str(options.model)
    model = load_pretrained(source)
    data = load_data(
        DataConfig(
            corpus=options.corpus, eval_corpus=options.eval_corpus, tokenizer=source, seq_len=options.seq_len
        ),
        output / "data",
    )  # fmt: skip
    trained: Any = keep_masks(model) if options.method == "sparse" else with_adapters(model)
    trainer = Trainer(
        model=trained,
        args=TrainingArguments(
            str(output), max_steps=options.max_steps, learning_rate=options.learning_rate or RATES[options.method],
            per_device_train_batch_size=options.batch_size, warmup_steps=options.max_steps // 20, save_strategy="no",
            report_to="none", logging_steps=10, dataloader_pin_memory=False,
        ),
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=default_data_collator,
        callbacks=[SparseTrainingCallback(metrics=False)] if options.method == "sparse" else [],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    data.tokenizer.save_pretrained(output)
    if options.method == "lora":
        trained.merge_and_unload().save_pretrained(output / "merged")
        data.tokenizer.save_pretrained(output / "merged")
    print(f"held-out loss {before:.4f} -> {after:.4f} nats per token; wrote {output}")
    return {"before": before, "after": after}


def keep_masks(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, whose masks stay as they are from now on, however they were searched."""
    model.config.sparse_ift["transformation"]["dst"]["algorithm"] = "static"
    return model


def with_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Adapters on all projections of the dense twin of `model`."""
    from peft import LoraConfig, get_peft_model

    dense = to_dense(model)
    adapted: PreTrainedModel = get_peft_model(
        dense,
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return adapted


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(RATES))
    parser.add_argument("model", help="folder of a Sparse-IFT model with its tokenizer")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--corpus", required=True, help="training text: a file, folder, glob or hub data set")
    parser.add_argument("--eval_corpus", help="held-out text")
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
