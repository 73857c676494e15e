"""The release's surface: its goldens through its names, its `run.py` with other imports, its generator at any batch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import GOLDEN_DIR, load_e2e, load_pure

from grokjax import CheckpointError, GrokConfig, KVCache, load_tokenizer, runners
from grokjax.runners import (
    InferenceRunner,
    LanguageModelConfig,
    ModelRunner,
    Request,
    SampleSettings,
    TransformerConfig,
    get_pad_bucket,
    insert_slice,
    pad_to_size,
    sample_from_model,
    sample_token,
    top_p_filter,
)
from grokjax.testing import write_release_checkpoint

SMALL = GrokConfig.tiny().replace(num_layers=1, max_seq_len=48)


def language_model(config: GrokConfig, **changes) -> LanguageModelConfig:
    """A small configuration in the release's names; `widening_factor` 3 gives its hidden size."""
    transformer = TransformerConfig(
        emb_size=config.model_dim,
        widening_factor=3,
        key_size=config.head_dim,
        num_q_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        num_layers=config.num_layers,
        attn_output_multiplier=config.attention_multiplier,
        num_experts=config.num_experts,
        num_selected_experts=config.experts_per_token,
    )
    fields = {
        "vocab_size": config.vocab_size,
        "pad_token": 0,
        "eos_token": 2,
        "sequence_len": config.max_seq_len,
        "embedding_multiplier_scale": config.embedding_multiplier,
        "output_multiplier_scale": config.output_multiplier,
        "fprop_dtype": jnp.float32,
    }
    return LanguageModelConfig(model=transformer, **{**fields, **changes})


def golden_model() -> LanguageModelConfig:
    """The e2e golden's configuration, from the release's own field names."""
    config = load_e2e().release_config
    return LanguageModelConfig(model=TransformerConfig(**config["model"]), **config["lm"])


def golden_requests() -> list[dict]:
    return [r for r in load_e2e().requests if r["temperature"] == 0.01 and r["strict_identical"]]


@pytest.mark.release_tokenizer
def test_one_by_one_the_texts_are_the_release_s(release_tokenizer_path: Path) -> None:
    runner = InferenceRunner(
        pad_sizes=(8, 16),
        runner=ModelRunner(model=golden_model(), bs_per_device=0.5, checkpoint_path=str(GOLDEN_DIR / "e2e")),
        name="local",
        load="",
        tokenizer_path=str(release_tokenizer_path),
        local_mesh_config=(1, 2),
    )
    runner.initialize()
    server = runner.run()
    assert len(golden_requests()) == 7
    for golden in golden_requests():
        text = sample_from_model(server, golden["prompt"], max_len=golden["max_len"], temperature=0.01)
        # The release gives two tokens where one is asked for.
        expected = golden["token_ids"][: golden["max_len"]]
        assert list(text.completion.token_ids) == expected
        assert text == runner.tokenizer.decode(expected)


@pytest.mark.release_tokenizer
def test_side_by_side_the_texts_are_the_release_s(release_tokenizer_path: Path) -> None:
    """Three rows and seven requests: what the release could not do without mixing them."""
    runner = InferenceRunner(
        pad_sizes=(16,),
        runner=ModelRunner(model=dataclasses.replace(golden_model(), fprop_dtype=jnp.float32), bs_per_device=3),
        name="local",
        load=str(GOLDEN_DIR / "e2e"),
        tokenizer_path=str(release_tokenizer_path),
    )
    runner.initialize()
    server = runner.run()
    waiting, texts = golden_requests(), []
    assert next(server) is None
    while len(texts) < 7:
        golden = waiting.pop() if waiting else None
        request = golden and Request(golden["prompt"], 0.01, golden["nucleus_p"], golden["rng_seed"], golden["max_len"])
        text = server.send(request)
        while text is not None:
            texts.append(text)
            text = next(server) if len(texts) < 7 else None
    tokenizer = load_tokenizer(release_tokenizer_path)
    expected = [tokenizer.decode(golden["token_ids"][: golden["max_len"]]) for golden in golden_requests()]
    assert sorted(texts) == sorted(expected)


RUN_PY = """
from grokjax.runners import LanguageModelConfig, TransformerConfig, QuantizedWeight8bit as QW8Bit
from grokjax.runners import InferenceRunner, ModelRunner, sample_from_model


CKPT_PATH = "./checkpoints/"


def main():
    grok_1_model = LanguageModelConfig(
        vocab_size=128 * 1024,
        pad_token=0,
        eos_token=2,
        sequence_len=128,
        embedding_init_scale=1.0,
        output_multiplier_scale=0.5773502691896257,
        embedding_multiplier_scale=78.38367176906169,
        model=TransformerConfig(
            emb_size=24,
            widening_factor=8,
            key_size=8,
            num_q_heads=4,
            num_kv_heads=2,
            num_layers=2,
            attn_output_multiplier=0.35355339059327373,
            shard_activations=True,
            # MoE.
            num_experts=8,
            num_selected_experts=2,
            # Activation sharding.
            data_axis="data",
            model_axis="model",
        ),
    )
    inference_runner = InferenceRunner(
        pad_sizes=(64,),
        runner=ModelRunner(
            model=grok_1_model,
            bs_per_device=0.25,
            checkpoint_path=CKPT_PATH,
        ),
        name="local",
        load=CKPT_PATH,
        tokenizer_path="./tokenizer.model",
        local_mesh_config=(1, 4),
        between_hosts_config=(1, 1),
    )
    inference_runner.initialize()
    gen = inference_runner.run()

    inp = "E = mc^2"
    print(f"Output for prompt: {inp}", sample_from_model(gen, inp, max_len=16, temperature=0.01))


if __name__ == "__main__":
    main()
"""


@pytest.mark.release_tokenizer
def test_run_py_needs_other_imports_only(release_tokenizer_path: Path, tmp_path: Path) -> None:
    """The release's script, its numbers those of the golden model, in a process of its own."""
    (tmp_path / "checkpoints").symlink_to(GOLDEN_DIR / "e2e")
    (tmp_path / "tokenizer.model").symlink_to(release_tokenizer_path)
    (tmp_path / "run.py").write_text(RUN_PY)
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    golden = next(r for r in golden_requests() if r["prompt"] == "E = mc^2")
    assert done.stdout == f"Output for prompt: E = mc^2 {golden['text']}\n"


class TestPureGoldens:
    @pytest.mark.parametrize("case", [c for c in load_pure().tables["sample"] if c["dtype"] == "float32"], ids=str)
    def test_sample_token_draws_as_the_release(self, case: dict) -> None:
        arrays, name = load_pure().arrays, case["i"]
        recorded = {f: arrays[f"{name}_{f}"] for f in ("keys", "logits", "temperature", "nucleus_p", "mask")}
        settings = SampleSettings(
            recorded["temperature"], recorded["nucleus_p"], recorded["mask"], np.ones(case["B"], bool)
        )
        with jax.threefry_partitionable(case["rng"] == "part"):
            drawn = sample_token(jnp.asarray(recorded["keys"]), jnp.asarray(recorded["logits"]), settings)
        np.testing.assert_array_equal(drawn.token_id, arrays[f"{name}_jit_token_id"])
        np.testing.assert_allclose(drawn.prob, arrays[f"{name}_jit_prob"], rtol=1e-5)
        np.testing.assert_allclose(drawn.top_k_probs, arrays[f"{name}_jit_top_k_probs"], rtol=1e-5, atol=1e-12)
        assert drawn.top_k_token_ids.shape == (case["B"], 8)

    def test_sample_token_takes_outputs_with_logits(self) -> None:
        @dataclasses.dataclass
        class Outputs:
            logits: jax.Array

        logits = jnp.array([[[0.0, 3.0, 1.0]]])
        settings = SampleSettings(np.zeros(1), np.ones(1), np.ones((1, 3)), np.ones(1))
        drawn = sample_token(jax.random.split(jax.random.key(0), 1), Outputs(logits), settings, num_top=2)
        assert drawn.token_id.tolist() == [[1]]
        assert drawn.top_k_token_ids.tolist() == [[1, 2]]

    def test_top_p_filter_keeps_what_the_release_keeps(self) -> None:
        arrays = load_pure().arrays
        logits, p, expected = (arrays[f"topp0_{name}"] for name in ("logits", "p", "jit"))
        # At p = 0 and below, the release may keep everything; sampling's own tests hold the definition.
        rows = [row for row in range(len(p)) if p[row].item() > 0]
        np.testing.assert_array_equal(top_p_filter(jnp.asarray(logits), jnp.asarray(p))[rows,], expected[rows,])

    def test_pad_to_size_pads_as_the_release(self) -> None:
        for case in load_pure().tables["pad_to_size"]:
            padded = pad_to_size(np.array(case["x"], case["dtype"]), case["size"])
            assert padded.tokens.tolist() == case["out"]
            assert padded.length == min(len(case["x"]), case["size"])

    def test_get_pad_bucket_chooses_as_the_release(self) -> None:
        for case in load_pure().tables["get_pad_bucket"]:
            assert get_pad_bucket(case["size"], case["pad_sizes"]) == case["out"]

    @pytest.mark.parametrize("row", range(3))
    def test_insert_slice_inserts_as_the_release(self, row: int) -> None:
        arrays = load_pure().arrays

        def ours(entries: np.ndarray) -> jax.Array:
            return jnp.asarray(entries.swapaxes(2, 3))  # [L, B, S, K, H] -> [L, B, K, S, H]

        memory = KVCache(
            ours(arrays["insert_mem_k"]), ours(arrays["insert_mem_v"]), jnp.asarray(arrays["insert_mem_step"][0])
        )
        one = KVCache(ours(arrays["insert_slice_k"]), ours(arrays["insert_slice_v"]), jnp.array([99]))
        made = insert_slice(memory, one, 7, row)
        np.testing.assert_array_equal(made.keys, ours(arrays[f"insert_out{row}_k"]))
        np.testing.assert_array_equal(made.values, ours(arrays[f"insert_out{row}_v"]))
        np.testing.assert_array_equal(made.lengths, arrays[f"insert_out{row}_step"][0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, trained_tokenizer_path: Path) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_release_checkpoint(path / "ckpt-0", language_model(SMALL).to_config())
    (path / "tokenizer.model").write_bytes(trained_tokenizer_path.read_bytes())
    return path


def inference_runner(checkpoint: Path, *, rows: float = 2, **changes) -> InferenceRunner:
    runner = InferenceRunner(
        name="local",
        runner=ModelRunner(model=language_model(SMALL), bs_per_device=rows, **changes),
        load=str(checkpoint),
        tokenizer_path=checkpoint / "tokenizer.model",
        pad_sizes=(16,),
    )
    runner.initialize()
    return runner


class TestGenerator:
    def test_texts_come_by_the_release_s_protocol(self, checkpoint: Path) -> None:
        """None while rows are free, then texts; `next` runs what there is; a bad request hurts nobody."""
        runner = inference_runner(checkpoint)
        server = runner.run()
        assert next(server) is None
        assert next(server) is None
        long, short = (Request("the License", 0.0, 1.0, 1, count, ignore_eos=True) for count in (9, 3))
        assert server.send(long) is None
        first = server.send(short)
        assert (len(first.completion.token_ids), first) == (3, first.completion.text)
        assert next(server) is None  # one row is free again
        bad = server.send(Request("", 0.0, 1.0, 1, 3))
        assert "the prompt is empty" in str(bad.completion.error)
        again = server.send(short)  # answered at the yield of a text
        texts = [text for text in (again, next(server), next(server), next(server)) if text is not None]
        assert sorted(len(text.completion.token_ids) for text in texts) == [3, 9]
        assert first in texts
        [alone] = runner.engine.generate(["the License"], temperature=0.0, max_new_tokens=9, ignore_eos=True)
        assert alone.text in texts

    def test_gives_exactly_as_many_tokens_as_were_asked_for(self, checkpoint: Path) -> None:
        server = inference_runner(checkpoint, rows=1).run()
        for count in (0, 1, 2):
            assert len(sample_from_model(server, "the", count, 1.0).completion.token_ids) == count
        with pytest.raises(ValueError, match="the prompt is empty"):
            sample_from_model(server, "", 3, 1.0)

    def test_one_that_is_left_early_makes_way(self, checkpoint: Path) -> None:
        runner = inference_runner(checkpoint)
        server = runner.run()
        next(server)
        assert server.send(Request("the License", 0.0, 1.0, 1, 9, ignore_eos=True)) is None
        server.close()
        assert not runner.engine.has_work
        again = runner.run()
        assert sample_from_model(again, "the", 2, 1.0).completion.finish_reason == "length"

    def test_a_request_may_ask_for_more_than_the_release_s(self, checkpoint: Path) -> None:
        server = inference_runner(checkpoint, rows=1).run()
        next(server)
        mask = np.arange(SMALL.vocab_size) == 70
        options = {"mask": mask, "ignore_eos": True, "logprobs": 2}
        text = server.send(Request("the", 1.0, 1.0, 2**40 + 5, 4, **options))
        assert text.completion.token_ids == (70,) * 4
        assert len(text.completion.logprobs[0].top) == 2
        with pytest.raises(ValueError, match="temperature=-1 must be a number, finite, 0"):
            Request("the", -1, 1.0, 0, 4)


class TestModelRunner:
    def test_a_batch_of_nothing_is_refused(self) -> None:
        runner = ModelRunner(model=language_model(SMALL), bs_per_device=0.125)
        with pytest.raises(
            ValueError, match=r"bs_per_device=0\.125 on 4 devices is a batch of no rows: set it to at l"
        ):
            runner.initialize((1, 4))
        runner.initialize((2, 4))
        assert runner.batch_size == 1

    def test_devices_that_are_not_there_are_refused(self) -> None:
        with pytest.raises(ValueError, match="needs 16 devices and there are 8"):
            ModelRunner(model=language_model(SMALL)).initialize((2, 8))

    def test_a_pad_size_beyond_the_sequence_is_refused(self, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match="the prefill bucket 64 must be an integer between 1 and the 48 entries"):
            dataclasses.replace(inference_runner(checkpoint), pad_sizes=(64,)).initialize()

    def test_the_model_is_loaded_made_or_given(self, checkpoint: Path) -> None:
        runner = ModelRunner(model=language_model(SMALL), checkpoint_path=str(checkpoint))
        runner.initialize()

        def table(model) -> np.ndarray:
            return np.asarray(model.embedding.table[...])

        loaded, fresh = runner.load_or_init(), runner.load_or_init(from_checkpoint=False)
        np.testing.assert_array_equal(table(fresh), table(runner.init()))
        assert (table(loaded) != table(fresh)).any()
        assert runner.load_or_init(init_fn=lambda: fresh) is fresh

    def test_parameters_are_renamed_and_excluded(self, checkpoint: Path) -> None:
        rules = {"load_exclude_rules": ["^embedding"], "load_rename_rules": [(r"attention\.key$", "attention.value")]}
        runner = ModelRunner(model=language_model(SMALL), checkpoint_path=str(checkpoint), **rules)
        runner.initialize()
        made, fresh = runner.load_or_init(), runner.init()
        loaded = dataclasses.replace(runner, load_exclude_rules=None, load_rename_rules=None)
        loaded.initialize()
        loaded = loaded.load_or_init()

        def leaves(param: nnx.Param) -> list[np.ndarray]:
            return [np.asarray(leaf) for leaf in jax.tree.leaves(param.get_value())]

        for ours, theirs in (
            (made.embedding.table, fresh.embedding.table),
            (made.layers.attention.key, loaded.layers.attention.value),
            (made.layers.attention.value, loaded.layers.attention.value),
            (made.layers.feed_forward.up, loaded.layers.feed_forward.up),
        ):
            for mine, their in zip(leaves(ours), leaves(theirs), strict=True):
                np.testing.assert_array_equal(mine, their)
        runner.load_rename_rules = [("query", "nowhere")]
        with pytest.raises(CheckpointError, match=r"the checkpoint has no layers\.0\.attention\.nowhere"):
            runner.load_or_init()


def test_the_configuration_is_the_releases() -> None:
    golden = load_e2e()
    assert golden_model().to_config() == golden.config
    names = {"LanguageModelConfig", "TransformerConfig", "ModelRunner", "InferenceRunner", "Request", "SampleSettings"}
    names |= {"SampleOutput", "sample_from_model", "make_mesh", "pad_to_size", "top_p_filter", "sample_token"}
    assert names | {"insert_slice", "get_pad_bucket"} < set(runners.__all__)
