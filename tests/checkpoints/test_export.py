"""Exports: `dense` loads without the package, `sparse` is as small as is said and comes back to the bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, api, load_pretrained, save_export, sparsify, to_dense
from sparseift_llm.checkpoints.mask_file import MASKS_NAME
from sparseift_llm.cli import main
from sparseift_llm.data.options import DataConfig
from sparseift_llm.data.tokenizer import load_tokenizer
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.models import gradients_of, logits_of, shake, tiny_model
from tests.helpers.pages import ALL_TEXT
from tests.helpers.texts import TEXTS
from tests.helpers.tiny_runs import differences, masks, sparse_gpt2, sparse_trainer

WEIGHTS = "model.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "wide": {},
    "wide ffn": {"scope": "ffn"},
    "parallel": {"family": "parallel"},
    "factorized": {"family": "factorized", "nonlinearity": "gelu"},
    "factorized, u only": {"family": "factorized", "sparse_u_only": True},
    "doped": {"family": "doped"},
    "tiles": {"structure": "block", "block_size": 16},
    "gradual": {"dst": DSTConfig("gmp")},
}


def sparse_model(kind: str, arch: str = "gpt2", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Some active weights are exactly 0, as just after growth."""
    torch.manual_seed(0)
    model = sparsify(tiny_model(arch, dtype, **changes), SparseIFTConfig(**KINDS[kind]))
    shake(model)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.weight.masked_fill_(layer.weight > 0.1, 0)
    return model.eval()


def check_equal(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit: parameters, masks, logits, gradients."""
    assert not differences(dict(found.named_parameters()), dict(expected.named_parameters()))
    assert not differences(masks(found), masks(expected))
    assert torch.equal(logits_of(found), logits_of(expected))
    assert not differences(gradients_of(found), gradients_of(expected))


# ---- sparse


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arch", "dtype"), [("gpt2", torch.float32), ("gpt2", torch.bfloat16), ("llama", torch.float32)]
)
def test_sparse_is_lossless(kind: str, dtype: torch.dtype, arch: str, tmp_path: Path) -> None:
    width = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64, "intermediate_size": 128}}[arch]
    model = sparse_model(kind, arch, dtype, **width)
    before = copy.deepcopy(model.state_dict())
    assert save_export(model, tmp_path / "sparse", "sparse") == tmp_path / "sparse"
    assert not differences(dict(model.state_dict()), dict(before))
    check_equal(load_pretrained(tmp_path / "sparse", dtype="auto"), model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto")
    check_equal(loaded, model)
    assert loaded.dtype == dtype
    ignored = {"_name_or_path"}
    assert {**loaded.config.to_dict(), **dict.fromkeys(ignored)} == {**model.config.to_dict(), **dict.fromkeys(ignored)}
    loaded.save_pretrained(tmp_path / "again")  # as an ordinary checkpoint
    model.save_pretrained(tmp_path / "first")
    for name in (WEIGHTS, "config.json", MASKS_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def stored_share(folder: Path, model: PreTrainedModel) -> tuple[float, float]:
    """Bytes of the sparse matrices in an export, file of masks included, over dense ones; and the active fraction."""
    stored, layers = load_file(folder / WEIGHTS), sparse_layers(model)
    names = [f"{name}.{part}" for name in layers for part in ("weight", "columns")]
    num_bytes = sum(stored[name].nbytes for name in names if name in stored) + (folder / MASKS_NAME).stat().st_size
    size = sum(layer.num_weights for layer in layers.values())
    active = sum(layer.count_active() for layer in layers.values())
    return num_bytes / (size * model.dtype.itemsize), active / size


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gradual"])
def test_sparse_takes_active_weights_and_a_bit_each(kind: str, tmp_path: Path) -> None:
    model = sparse_model(kind, n_embd=256)
    save_export(model, tmp_path / "sparse", "sparse")
    share, active = stored_share(tmp_path / "sparse", model)
    assert active < 0.9
    assert share <= active + 1 / 32 + 0.02
    model.save_pretrained(tmp_path / "saved")
    whole = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
    exported = sum(path.stat().st_size for path in (tmp_path / "sparse").glob("*.safetensors"))
    assert exported < whole or kind == "tiles"


def test_in_bfloat16_the_bit_weighs_twice_and_the_pages_say_so(tmp_path: Path) -> None:
    shares = {}
    for dtype, bit in ((torch.float32, 1 / 32), (torch.bfloat16, 1 / 16)):
        model = sparse_model("wide", dtype=dtype, n_embd=256)
        save_export(model, tmp_path / str(dtype), "sparse")
        shares[dtype], active = stored_share(tmp_path / str(dtype), model)
        assert shares[dtype] <= active + bit + 0.02
    assert f"{shares[torch.float32]:.3f} times their dense bytes in float32, {shares[torch.bfloat16]:.3f}" in ALL_TEXT


def test_the_checks_catch_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model("wide")
    save_export(model, tmp_path / "sparse", "sparse")
    loaded = load_pretrained(tmp_path / "sparse")
    layer = next(iter(sparse_layers(loaded).values()))
    with torch.no_grad():
        layer.weight[layer.mask] = layer.weight[layer.mask].flip(0)
    with pytest.raises(AssertionError):
        check_equal(loaded, model)
    monkeypatch.setattr(api, "save_packed", lambda model, folder: model.save_pretrained(folder))
    save_export(sparse_model("wide", n_embd=256), tmp_path / "unpacked", "sparse")
    share, active = stored_share(tmp_path / "unpacked", sparse_model("wide", n_embd=256))
    assert share > active + 1 / 32 + 0.02


def test_values_and_masks_of_two_exports_do_not_mix(tmp_path: Path) -> None:
    model = sparse_model("wide")
    save_export(model, tmp_path / "first", "sparse")
    layer = next(iter(sparse_layers(model).values()))
    layer.set_mask(layer.current_mask().roll(1, dims=1))  # as many active weights, elsewhere
    save_export(model, tmp_path / "second", "sparse")
    (tmp_path / "second" / MASKS_NAME).replace(tmp_path / "first" / MASKS_NAME)
    for load in (load_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"the masks in .*first are not those of its weights"):
            load(tmp_path / "first")


def test_masks_of_another_model(tmp_path: Path) -> None:
    """Whose digest config.json has, too: only the number of layers that it gives is another one."""
    save_export(sparse_model("wide ffn", n_embd=32), tmp_path / "first", "sparse")
    path = tmp_path / "first" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "n_layer": 3}))
    with pytest.raises(ValueError, match=r"the weights in .*first are missing or damaged: no transformer\.h\.2\."):
        load_pretrained(tmp_path / "first")


# ---- dense


@pytest.mark.parametrize("kind", ["wide", "tiles", "doped"])
def test_dense_is_a_stock_model(kind: str, tmp_path: Path) -> None:
    model = sparse_model(kind, n_embd=64)
    save_export(model, tmp_path / "dense")
    assert not (tmp_path / "dense" / MASKS_NAME).exists()
    written = (tmp_path / "dense" / "config.json").read_text()
    assert "sparse_ift" not in written
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not sparse_layers(stock)
    assert torch.equal(logits_of(stock), logits_of(to_dense(model)))
    torch.testing.assert_close(logits_of(stock), logits_of(model))


def test_dense_is_refused_where_a_non_linearity_forbids_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Parallel with a LayerNorm in each branch is not a linear map"):
        save_export(sparse_model("parallel"), tmp_path / "dense")
    assert not list(tmp_path.iterdir())


# ---- refusals


def test_wrong_arguments(tmp_path: Path) -> None:
    model = sparse_model("wide")
    with pytest.raises(ValueError, match="format='spars' is not one of 'dense', 'sparse'; did you mean 'sparse'"):
        save_export(model, tmp_path / "new", "spars")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for taken in (tmp_path / "full", tmp_path / "full" / "notes"):
        with pytest.raises(ValueError, match="exists already; give a new folder"):
            save_export(model, taken)
    with pytest.raises(ValueError, match="no sparse layers"):
        save_export(tiny_model("gpt2"), tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes"]
    (tmp_path / "empty").mkdir()
    save_export(model, tmp_path / "empty")
    assert (tmp_path / "empty" / WEIGHTS).is_file()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("sparseift_llm.checkpoints.saving.save_masks", fail)
    with pytest.raises(OSError, match="no space left"):
        save_export(sparse_model("wide"), tmp_path / "new", "sparse")
    assert not list(tmp_path.iterdir())


# ---- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer = sparse_trainer(sparse_gpt2("rigl").float(), folder, steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model()
    return folder


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (run, run / "checkpoint-4"):
        for format in ("dense", "sparse"):
            target = tmp_path / source.name / format
            assert main(["export", str(source), "--format", format, "--output", str(target)]) == 0
            assert f"wrote {target}" in capsys.readouterr().out
        check_equal_small(load_pretrained(tmp_path / source.name / "sparse"), load_pretrained(run))
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / source.name / "dense")
        assert not differences(dict(stock.named_parameters()), dict(load_pretrained(run).named_parameters()))


def check_equal_small(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert not differences(dict(found.named_parameters()), dict(expected.named_parameters()))
    assert not differences(masks(found), masks(expected))


def copied(run: Path, target: Path, *left_out: str) -> Path:
    target.mkdir(parents=True)
    for path in run.iterdir():
        if path.is_file() and path.name not in left_out:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def refused(source: Path, message: str, capsys: pytest.CaptureFixture[str], format: str = "sparse") -> None:
    target = source.parent / "target"
    assert main(["export", str(source), "--format", format, "--output", str(target)]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_runs_that_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "nowhere", "is not a folder", capsys)
    killed = tmp_path / "killed"
    copied(run / "checkpoint-4", killed / "checkpoint-4")
    refused(killed, f"{killed} holds no model of its own (no config.json); give one of its checkpoints, ", capsys)
    refused(killed, f"the last is {killed / 'checkpoint-4'}", capsys)
    copied(run / "checkpoint-4", killed / "checkpoint-12")
    copied(run / "checkpoint-4", killed / "checkpoint-100", "trainer_state.json")  # half-written
    refused(killed, f"the last is {killed / 'checkpoint-12'}\n", capsys)
    for folder in ("checkpoint-4", "checkpoint-12"):
        (killed / folder / "trainer_state.json").unlink()
    refused(killed, "holds no model of its own (no config.json) and no whole checkpoint", capsys)
    half = copied(run / "checkpoint-4", tmp_path / "a" / "checkpoint-4", "trainer_state.json")
    refused(half, "was not written to its end", capsys)
    aside = copied(run / "checkpoint-4", tmp_path / "a" / "incomplete-checkpoint-4")
    refused(aside, "was not written to its end", capsys)
    refused(copied(run, tmp_path / "b", MASKS_NAME), f"{MASKS_NAME} is missing", capsys)
    refused(copied(run, tmp_path / "c", WEIGHTS), "are missing or damaged", capsys)
    short = copied(run, tmp_path / "d")
    (short / WEIGHTS).write_bytes((short / WEIGHTS).read_bytes()[:-9])
    refused(short, f"the weights in {short} are missing or damaged", capsys)
    tiny_model("gpt2").save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", "not a Sparse-IFT model", capsys)
    refused(run, "format='csr' is not one of", capsys, "csr")


def test_options_are_checked_before_anything_is_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load_pretrained", lambda *_, **__: pytest.fail("loaded first"))
    (tmp_path / "empty").mkdir()
    for source in (run, tmp_path / "empty", tmp_path / "nowhere"):
        refused(source, "format='dens' is not one of 'dense', 'sparse'; did you mean 'dense'?", capsys, "dens")
        assert main(["export", str(source), "--format", "dense", "--output", str(run)]) == 2
        assert f"output={str(run)!r} exists already" in capsys.readouterr().err


def test_outputs_that_cannot_be_written_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").write_text("")
    outputs = {tmp_path / "afile" / "x": tmp_path / "afile", Path("/proc/x"): Path("/proc/x")}
    for output, named in outputs.items():
        for format in ("dense", "sparse"):
            assert main(["export", str(run), "--format", format, "--output", str(output)]) == 2
            assert f"sparseift: cannot read or write {named}: " in capsys.readouterr().err


def test_a_checkpoint_by_hand_is_none_of_the_trainers(run: Path, tmp_path: Path) -> None:
    model = load_pretrained(run)
    model.save_pretrained(tmp_path / "checkpoint-4")
    api.export_run(tmp_path / "checkpoint-4", tmp_path / "sparse", "sparse")
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["quantization_config"].keys() == {
        "quant_method",
        "packed_by",
    }


def test_the_tokenizer_goes_along(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    words = load_tokenizer(DataConfig(vocab_size=300), TEXTS)
    source = copied(run, tmp_path / "run")
    words.save_pretrained(source)
    api.export_run(source, tmp_path / "dense", "dense")
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").get_vocab() == words.get_vocab()
