"""The parts of the benchmarks that compute without timing: what the peer is given, the tables of the page."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from builders import ROOT, random_model

from grokjax import GrokConfig, forward
from grokjax.quantization import dequantize

sys.path.append(str(ROOT / "benchmarks"))
import peer
import tables

CONFIG = GrokConfig.tiny().replace(head_dim=8, ffn_dim=136, num_layers=1)


class Fake:
    """A peer that computes what ours does, times a factor."""

    def __init__(self, model, factor: float):
        self.model, self.factor = model, factor

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        return self.factor * np.asarray(forward(self.model, prompt[None])[0])


def test_the_peer_gets_every_weight_transposed_and_padded() -> None:
    model = random_model(CONFIG)
    found = dict(peer.tensors(model))
    assert found["token_embd.weight"].shape == (512, 64)
    assert found["blk.0.ffn_gate_exps.weight"].shape == (8, 160, 64)
    assert found["blk.0.ffn_down_exps.weight"].shape == (8, 64, 160)
    assert len(found) == 2 + 4 + 4 + 1 + 3
    experts = model.layers.feed_forward
    down = np.asarray(dequantize(experts.down.get_value()))[0]  # [E, F, D]
    np.testing.assert_array_equal(found["blk.0.ffn_down_exps.weight"][..., :136], down.swapaxes(1, 2))
    assert not found["blk.0.ffn_down_exps.weight"][..., 136:].any()
    assert not found["blk.0.ffn_up_exps.weight"][:, 136:].any()
    query = np.asarray(dequantize(model.layers.attention.query.get_value()))[0]
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"], query.T)


def test_an_int8_table_is_given_to_the_peer() -> None:
    plain, quantized = (
        dict(peer.tensors(random_model(CONFIG, quantized_table=q)))["token_embd.weight"] for q in (False, True)
    )
    largest = np.abs(plain).max(axis=1, keepdims=True)
    assert (np.abs(plain - quantized) <= 0.51 * largest / 127).all()


@pytest.mark.parametrize(("factor", "difference"), [(1.0, 0.0), (1.1, 0.1)])
def test_a_peer_that_computes_the_same_is_accepted(factor: float, difference: float) -> None:
    model = random_model(CONFIG, dtype=jnp.float32)
    assert peer.difference(model, Fake(model, factor)) == pytest.approx(difference, abs=1e-6)


def test_a_peer_that_computes_something_else_is_refused() -> None:
    model = random_model(CONFIG, dtype=jnp.float32)
    with pytest.raises(SystemExit, match=r"logits differ by 0\.300 of their size, more than 0\.2: it does not compute"):
        peer.difference(model, Fake(model, 1.3))


def test_a_peer_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match=r"needs a package that is not installed \(gguf\): pip install '\.\[peer-"):
        peer.LlamaCpp(random_model(CONFIG), rows=1, max_len=32)


def test_a_model_that_the_peer_cannot_run_is_refused(monkeypatch) -> None:
    for name in ("gguf", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    with pytest.raises(SystemExit, match=r"8 x 16 is not 64\. Choose another --config, such as bench_1b\."):
        peer.LlamaCpp(random_model(GrokConfig.tiny()), rows=1, max_len=32)


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_a_page_is_what_the_command_makes(path: Path) -> None:
    page = path.read_text()
    assert tables.MARKED.search(page)
    assert tables.renew(page) == page


def test_no_page_with_tables_is_forgotten() -> None:
    folders = (ROOT.glob("*.md"), (ROOT / "docs").rglob("*.md"), (ROOT / "benchmarks").rglob("*.md"))
    written = [path for path in itertools.chain(*folders) if tables.MARKED.search(path.read_text())]
    assert sorted(tables.PAGES) == sorted(written)


def test_a_changed_table_is_made_anew(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    line = '{"jax": "0.12", "cold_seconds": 9.96, "warm_seconds": 4, "import_seconds": 1.5, "import_ratio": 1.25}'
    (tmp_path / "startup.jsonl").write_text(line + "\n")
    page = tables.renew("Before\n<!-- results startup -->\nold\n<!-- end -->\nafter")
    assert page.startswith("Before\n<!-- results startup -->\n| jax | first token, nothing compiled |")
    assert "| 0.12 | 10.0 | 4.0 | 1.50 | 1.25 |\n<!-- end -->\nafter" in page
    assert "old" not in page
    assert tables.renew(page) == page


def test_old_tables_are_told_and_made_anew(monkeypatch, tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("<!-- results moe: rows -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(tables, "PAGES", (page,))
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    with pytest.raises(SystemExit, match=r"of gpu\.md are not those of the results: run benchmarks/tables\.py --w"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["tables.py", "--write"])
    tables.main()
    assert page.read_text() == "<!-- results moe: rows -->\n| rows |\n| --- |\n| 1, 8, 128, 512 |\n<!-- end -->\n"


def test_a_page_chooses_columns(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "startup.jsonl").write_text('{"jax": "0.12", "cold_seconds": 9.96}\n')
    page = tables.renew("<!-- results startup: first token, nothing compiled; jax -->\n<!-- end -->")
    assert "-->\n| first token, nothing compiled | jax |\n| --- | --- |\n| 10.0 | 0.12 |\n<!--" in page
    assert tables.renew(page) == page
    with pytest.raises(SystemExit, match=r"table 'startup' has no column 'python': choose from jax; first token, noth"):
        tables.renew("<!-- results startup: jax; python -->\n<!-- end -->")


@pytest.mark.parametrize(
    ("name", "message"),
    [("other", "no table 'other': choose one of decode, prefill"), ("decode", "results of 'decode', and there is no")],
)
def test_a_table_that_cannot_be_made_is_named(monkeypatch, tmp_path: Path, name: str, message: str) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "other.jsonl").write_text("")
    with pytest.raises(SystemExit, match=message):
        tables.renew(f"<!-- results {name} -->\n<!-- end -->")
