"""What the release's `run.py` does: the texts of its goldens by its names, and the script itself with other imports."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from goldens import GOLDEN_DIR, load_e2e

from grokjax import load_tokenizer, runners
from grokjax.runners import (
    InferenceRunner,
    LanguageModelConfig,
    ModelRunner,
    Request,
    TransformerConfig,
)


def golden_model() -> LanguageModelConfig:
    """The e2e golden's configuration, from the release's own field names."""
    config = load_e2e().release_config
    return LanguageModelConfig(model=TransformerConfig(**config["model"]), **config["lm"])


def golden_requests() -> list[dict]:
    return [r for r in load_e2e().requests if r["temperature"] == 0.01 and r["strict_identical"]]


@pytest.mark.release_tokenizer
@pytest.mark.thorough
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
        pad_sizes=(16,),
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
    """The release's script in a process of its own, with the golden model's numbers."""
    (tmp_path / "checkpoints").symlink_to(GOLDEN_DIR / "e2e")
    (tmp_path / "tokenizer.model").symlink_to(release_tokenizer_path)
    (tmp_path / "run.py").write_text(RUN_PY)
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    golden = next(r for r in golden_requests() if r["prompt"] == "E = mc^2")
    assert done.stdout == f"Output for prompt: E = mc^2 {golden['text']}\n"


def test_the_configuration_is_the_releases() -> None:
    golden = load_e2e()
    assert golden_model().to_config() == golden.config
    names = {"LanguageModelConfig", "TransformerConfig", "ModelRunner", "InferenceRunner", "Request", "SampleSettings"}
    names |= {"SampleOutput", "sample_from_model", "make_mesh", "pad_to_size", "top_p_filter", "sample_token"}
    assert names | {"insert_slice", "get_pad_bucket"} < set(runners.__all__)
