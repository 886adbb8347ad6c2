"""The built-in corpus: what belongs to it, and how it is split."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseift_llm.data import standard_library
from sparseift_llm.data.held_out import hold_out
from sparseift_llm.data.standard_library import builtin_source


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "stdlib"
    contents: dict[str, bytes] = {
        "b.py": b"b = 1\n",
        "a/z.py": b"z = 1\n",
        "a.py": b"# coding: latin-1\nname = '\xe9'\n",
        "broken.py": b"name = '\xe9'\n",
        "unknown.py": b"# coding: no-such-code\n",
        "empty.py": b"\n",
        "readme.txt": b"no",
        "a/test/t.py": b"no",
        "tests/t.py": b"no",
        "idlelib/idle_test/t.py": b"no",
        "site-packages/p.py": b"no",
        "dist-packages/p.py": b"no",
        "encodings/cp858.py": b"no",
        "pydoc_data/topics.py": b"no",
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(standard_library.sysconfig, "get_path", {"stdlib": str(root)}.__getitem__)
    return root


def test_builtin_is_the_sorted_sources_without_tests_and_tables(stdlib: Path) -> None:
    source = builtin_source()
    assert [key for key, _ in source.read()] == ["a.py", "a/z.py", "b.py", "empty.py"]
    assert list(source.documents()) == ["# coding: latin-1\nname = 'é'\n", "z = 1\n", "b = 1\n"]


def test_builtin_fingerprint_follows_content(stdlib: Path) -> None:
    before = builtin_source().fingerprint
    assert builtin_source().fingerprint == before
    (stdlib / "b.py").write_bytes(b"b = 2\n")
    assert builtin_source().fingerprint != before


def test_builtin_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match="corpus='builtin': no Python source files"):
        builtin_source()


def test_builtin_of_this_python() -> None:
    train, held_out = hold_out(builtin_source(), 0.05)
    train_keys, eval_keys = ([key for key, _ in side.read()] for side in (train, held_out))
    assert "argparse.py" in train_keys + eval_keys
    assert not [key for key in train_keys + eval_keys if "test" in key.split("/")]
    assert 0.02 < len(eval_keys) / len(train_keys) < 0.1
    assert sum(map(len, train.documents())) > 5_000_000


def test_no_file_is_most_of_the_builtin_held_out_text() -> None:
    _, held_out = hold_out(builtin_source(), 0.05)
    sizes = [len(text) for text in held_out.documents()]
    assert max(sizes) < sum(sizes) / 4
