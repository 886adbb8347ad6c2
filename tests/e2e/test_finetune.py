"""recipes/finetune.py: a pretrained sparse model trained on, as it is and with adapters on its dense twin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from sparseift_llm import DSTConfig, SparseIFTConfig, load_pretrained, sparsify
from sparseift_llm.data.loading import load_data
from sparseift_llm.data.options import DataConfig
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.pretrain_runs import write_corpus
from tests.helpers.scripts import load_script

SEQ_LEN = 16


@pytest.fixture(params=["unstructured", "block"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a sparse model that was made for RigL, its tokenizer, and text beside it."""
    train, held_out = write_corpus(tmp_path, num_words=600)
    text = DataConfig(corpus=str(train), eval_corpus=str(held_out), vocab_size=260, seq_len=SEQ_LEN)
    tokenizer = load_data(text, tmp_path / "data").tokenizer
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=SEQ_LEN,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
    )
    torch.manual_seed(0)
    size = {"structure": "block", "block_size": 8} if request.param == "block" else {}
    model = sparsify(config, SparseIFTConfig(sparsity=0.75, dst=DSTConfig("rigl", update_every_steps=2), **size))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def tuned(folder: Path, method: str) -> tuple[Path, dict[str, float]]:
    output = folder / method
    words = [method, str(folder / "model"), str(output), "--corpus", str(folder / "train.txt"), "--max_steps", "12"]
    words += ["--eval_corpus", str(folder / "held_out.txt"), "--seq_len", str(SEQ_LEN), "--learning_rate", "0.01"]
    return output, load_script("recipes/finetune.py").main(words)


@pytest.mark.filterwarnings("ignore:block-sparse .* tiles", "ignore:.*pin_memory")
def test_training_on_keeps_masks_and_zeros(pretrained: Path) -> None:
    output, losses = tuned(pretrained, "sparse")
    assert losses["after"] < losses["before"] - 0.1
    before, after = load_pretrained(pretrained / "model"), load_pretrained(output)
    changed = 0
    for name, layer in sparse_layers(after).items():
        assert torch.equal(layer.current_mask(), sparse_layers(before)[name].current_mask())
        changed += not torch.equal(layer.weight, sparse_layers(before)[name].weight)
    assert changed == len(sparse_layers(after))


@pytest.mark.filterwarnings("ignore")  # of PEFT's own
def test_adapters_are_saved_and_merged_into_a_stock_model(pretrained: Path) -> None:
    pytest.importorskip("peft")
    output, losses = tuned(pretrained, "lora")
    assert losses["after"] < losses["before"]
    assert (output / "adapter_model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    assert not sparse_layers(merged)
    assert getattr(merged.config, "sparse_ift", None) is None
    weight = merged.transformer.h[0].mlp.c_fc.weight
    assert (weight == 0).float().mean() < 0.01  # filled in
