"""The line that says what a Sparse-IFT model is: by hand, before and after it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from sparseift_llm import DSTConfig, SparseIFTConfig, load_pretrained, print_sparsity, sparsify
from sparseift_llm.checkpoints.summary import dense_summary, sparsity_summary

TINY = GPT2Config(
    vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, n_inner=128
)


def test_a_wide_model_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = sparsify(TINY, SparseIFTConfig(sparsity=0.75, structure="block", block_size=16, dst=DSTConfig("static")))
    # per layer 12 * 64**2 weights in 4 matrices, of which a quarter is kept; forward FLOPs per token at T = 32:
    # projections 2 * 2 * 12 * 32**2 = 49,152, attention 4 * 32 * width * 2, logits 2 * width * 100
    dense, sparse = 49_152 + 4 * 32 * 32 * 2 + 2 * 32 * 100, 49_152 + 4 * 32 * 64 * 2 + 2 * 64 * 100
    stored = {side: module.num_parameters() for side, module in (("dense", GPT2LMHeadModel(TINY)), ("sparse", model))}
    print_sparsity(model)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split("; ") == [
        "wide, scope model: hidden 32->64, FFN 128->256",
        "75% of 98.3k weights in 8 sparse matrices are zero, in tiles of 16",
        f"{stored['dense'] / 1e3:.1f}k->{stored['sparse'] / 1e3:.1f}k ({stored['sparse'] / stored['dense']:.2f}x) "
        "parameters stored",
        "3.20k->6.40k (2.00x) of them in embeddings",
        f"FLOPs per token {sparse / dense:.2f}x (projections 1.00x, T=32)",
        "masks never change",
    ]
    model.save_pretrained(tmp_path)
    assert sparsity_summary(load_pretrained(tmp_path)) == line


@pytest.mark.parametrize(
    ("config", "begin", "embeddings"),
    [
        (SparseIFTConfig(family="doped", sparsity=0.5), "doped: hidden 32, FFN 128; ", "3.20k (1.00x) of them"),
        (
            SparseIFTConfig(scope="ffn", sparsity=0.75),
            "wide, scope ffn: hidden 32, FFN 128->512; ",
            "3.20k (1.00x) of them",
        ),
        (
            SparseIFTConfig(scope="ffn", structure="2:4"),
            "wide, scope ffn: hidden 32, FFN 128->256; 50% of 32.8k weights in 4 sparse matrices are zero, 2:4; ",
            "3.20k (1.00x) of them",
        ),
        (
            SparseIFTConfig(scope="ffn", structure="2:4", transposable=True),
            "wide, scope ffn: hidden 32, FFN 128->256; 50% of 32.8k weights in 4 sparse matrices are zero, 2:4 along "
            "both sides; ",
            "3.20k (1.00x) of them",
        ),
    ],
)
def test_what_does_not_change_is_written_once(config: SparseIFTConfig, begin: str, embeddings: str) -> None:
    line = sparsity_summary(sparsify(TINY, config))
    assert line.startswith(begin)
    assert embeddings in line
    assert "rigl changes masks every 100 steps" in line


def test_the_masks_of_now_count() -> None:
    model = sparsify(TINY, SparseIFTConfig(sparsity=0.75, dst=DSTConfig("gmp", update_every_steps=10)))
    assert "; 0% of 98.3k weights in 8 sparse matrices are zero; " in sparsity_summary(model)  # GMP starts dense


def test_a_dense_model() -> None:
    model = GPT2LMHeadModel(TINY)
    with pytest.raises(ValueError, match="has no sparse layers"):
        print_sparsity(model)
    assert dense_summary(model, 32).startswith("dense: hidden 32, FFN 128; ")
    assert "of which 3.20k of embeddings; 63.7kFLOP per token (T=32)" in dense_summary(model, 32)
