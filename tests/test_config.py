"""GrokConfig: the release's sizes, its field names, JSON, and what is said about a configuration that cannot be."""

import dataclasses
import json
from typing import Any

import pytest
from goldens import MODEL_CASES, load_case, load_e2e, load_pure

from grokjax.config import GrokConfig, ffn_size

PRESETS = {"grok_1": GrokConfig.grok_1(), "tiny": GrokConfig.tiny(), "bench_1b": GrokConfig.bench_1b()}
RELEASE = load_case("tiny-moe").release_config


def parameters(config: GrokConfig) -> int:
    """Numbers that a model of this size stores, embedding tied."""
    attention = config.model_dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    experts = config.num_experts * 3 * config.model_dim * config.ffn_dim
    layer = attention + experts + config.model_dim * config.num_experts + 4 * config.model_dim
    return config.vocab_size * config.model_dim + config.num_layers * layer + config.model_dim


@pytest.mark.parametrize("row", load_pure().tables["ffn_size"], ids=lambda row: f"{row['emb']}x{row['widening']}")
def test_ffn_size_is_the_release_s(row: dict[str, Any]) -> None:
    assert ffn_size(row["emb"], row["widening"]) == row["ffn"]


def test_grok_1_is_the_released_model() -> None:
    config = GrokConfig.grok_1()
    assert parameters(config) == 315_684_820_992
    assert config.ffn_dim == ffn_size(6144, 8)
    assert config.embedding_multiplier == pytest.approx(6144**0.5, rel=1e-15)
    assert config.output_multiplier == pytest.approx(3**-0.5, rel=1e-15)
    assert config.attention_multiplier == pytest.approx(128**-0.5, rel=1e-15)


def test_the_small_presets_are_as_large_as_they_say() -> None:
    assert parameters(GrokConfig.tiny()) == pytest.approx(0.5e6, rel=0.1)
    assert parameters(GrokConfig.bench_1b()) == pytest.approx(1.23e9, rel=0.01)


def test_a_config_is_frozen_hashable_and_comparable() -> None:
    config = GrokConfig.tiny()
    assert hash(config) == hash(GrokConfig.tiny())
    assert config != config.replace(num_layers=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_json_reads_back_equal(config: GrokConfig) -> None:
    assert GrokConfig.from_json(config.to_json()) == config


def test_json_may_leave_out_fields_with_defaults() -> None:
    fields = json.loads(GrokConfig.tiny().to_json())
    for name in ("attention_softcap", "rope_base", "norm_eps", "pad_id", "bos_id", "eos_id"):
        del fields[name]
    assert GrokConfig.from_json(json.dumps(fields)) == GrokConfig.tiny()


def test_a_byte_order_mark_is_passed_over() -> None:
    assert GrokConfig.from_json("\ufeff" + GrokConfig.tiny().to_json()) == GrokConfig.tiny()


@pytest.mark.parametrize("name", MODEL_CASES)
def test_the_release_s_field_names_are_understood(name: str) -> None:
    case = load_case(name)
    lm, model, config = case.release_config["lm"], case.release_config["model"], case.config
    assert config.ffn_dim == case.release_config["ffn"]
    assert (config.vocab_size, config.max_seq_len) == (lm["vocab_size"], lm["sequence_len"])
    assert (config.pad_id, config.eos_id, config.bos_id) == (lm["pad_token"], lm["eos_token"], 1)
    assert config.embedding_multiplier == lm["embedding_multiplier_scale"]
    assert config.output_multiplier == lm["output_multiplier_scale"]
    assert config.attention_multiplier == model["attn_output_multiplier"]
    assert (config.model_dim, config.head_dim, config.num_layers) == tuple(
        model[field] for field in ("emb_size", "key_size", "num_layers")
    )
    assert (config.num_heads, config.num_kv_heads) == (model["num_q_heads"], model["num_kv_heads"])
    assert (config.num_experts, config.experts_per_token) == (model["num_experts"], model["num_selected_experts"])
    assert GrokConfig.from_json(json.dumps(case.release_config)) == config


def test_the_end_to_end_case_has_the_full_vocabulary() -> None:
    assert load_e2e().config.vocab_size == GrokConfig.grok_1().vocab_size


@pytest.mark.parametrize("experts", [0, 1])
def test_one_expert_or_none_is_a_dense_model(experts: int) -> None:
    dense = {
        "lm": RELEASE["lm"],
        "model": {**RELEASE["model"], "num_experts": experts, "num_selected_experts": experts},
    }
    config = GrokConfig.from_release(dense)
    assert (config.num_experts, config.experts_per_token) == (1, 1)


def test_the_release_s_default_widening_factor_is_four() -> None:
    model = {name: value for name, value in RELEASE["model"].items() if name != "widening_factor"}
    config = GrokConfig.from_release({"lm": RELEASE["lm"], "model": model})
    assert config.ffn_dim == ffn_size(64, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6}, r"num_heads=6 is not a multiple of num_kv_heads=4: every kv head serves the same number"),
        ({"head_dim": 15}, r"head_dim=15 is odd: RoPE pairs its halves, so it must be even"),
        ({"experts_per_token": 9}, r"experts_per_token=9 exceeds num_experts=8: choose at most as many experts"),
        ({"pad_id": 512}, r"pad_id=512 is outside the vocabulary of 512 tokens"),
        ({"bos_id": 600}, r"bos_id=600 is outside the vocabulary"),
        ({"eos_id": 512}, r"eos_id=512 is outside the vocabulary"),
        ({"num_layers": 0}, r"num_layers=0 must be an integer, 1 or more"),
        ({"num_layers": 2.0}, r"num_layers=2\.0 must be an integer, 1 or more"),
        ({"num_experts": True}, r"num_experts=True must be an integer, 1 or more"),
        ({"model_dim": "64"}, r"model_dim='64' must be an integer, 1 or more"),
        ({"vocab_size": 10**400}, r"vocab_size=1000.*000 must be an integer, 1 or more, and at most 2147483647"),
        ({"rope_base": 10**400}, r"rope_base=1000.*000 must be a finite number above 0"),
        ({"pad_id": -1}, r"pad_id=-1 must be a token id, 0 or more"),
        ({"norm_eps": 0.0}, r"norm_eps=0\.0 must be a finite number above 0"),
        ({"output_multiplier": -0.5}, r"output_multiplier=-0\.5 must be a finite number above 0"),
        ({"embedding_multiplier": 1e300}, r"1e\+300 must be .* that float32 holds, from 1\.2e-38 to 3\.4e\+38\."),
        ({"attention_multiplier": 1e-300}, r"attention_multiplier=1e-300 must be .* that float32 holds"),
        ({"rope_base": float("inf")}, r"rope_base=inf must be a finite number above 0"),
        ({"attention_softcap": float("nan")}, r"attention_softcap=nan must be a finite number above 0"),
        ({"output_multiplier": True}, r"output_multiplier=True must be a finite number above 0"),
        ({"embedding_multiplier": None}, r"embedding_multiplier=None must be a finite number above 0"),
    ],
)
def test_impossible_sizes_are_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrokConfig.tiny().replace(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"the configuration is not JSON: "),
        ("[" * 100_000, r"the configuration is not JSON: "),
        ("9" * 5000, r"the configuration is not JSON: "),
        ("[1]", r"the configuration must be a JSON object of field names, not a list"),
        (
            '{"depth": 3}',
            r"has unknown fields \['depth'\] and lacks \['attention_multiplier', .*'vocab_size'\]: the fields",
        ),
        (
            GrokConfig.tiny().to_json().replace("num_heads", "heads"),
            r"unknown fields \['heads'\] and lacks \['num_heads'\]",
        ),
        (
            '{"lm": {}, "model": {}}',
            r"lacks lm\.vocab_size, .*model\.emb_size.*: add what the checkpoint was made with",
        ),
    ],
    ids=["no_json", "nested", "endless", "a_list", "unknown", "misspelt", "empty_release"],
)
def test_json_that_is_no_config_is_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrokConfig.from_json(text)


def _changed(**changes: Any) -> dict[str, Any]:
    return {"lm": RELEASE["lm"], "model": {**RELEASE["model"], **changes}}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"lm": {}}, r"needs the keys 'lm' and 'model', each a mapping of fields; 'model' is missing here \(found"),
        ({"lm": 3, "model": {}}, r"'lm' is no mapping here"),
        ({"lm": RELEASE["lm"], "model": {"emb_size": 64}}, r"lacks model\.key_size, model\.num_q_heads"),
        (_changed(emb_size="64"), r"model\.emb_size='64' of the release configuration must be a number"),
        (_changed(emb_size=10**400), r"model\.emb_size=1000.*000 must be an integer, 1 or more"),
        (_changed(widening_factor=1e308), r"model\.emb_size \* widening_factor=inf must be a finite number"),
        (_changed(widening_factor="8"), r"model\.widening_factor='8' of the release configuration must be a number"),
        (_changed(num_experts=True), r"model\.num_experts=True of the release configuration must be a number"),
        (_changed(num_selected_experts=None), r"model\.num_selected_experts=None of the release configuration"),
        (_changed(num_selected_experts=9), r"experts_per_token=9 exceeds num_experts=8"),
    ],
)
def test_an_incomplete_release_configuration_is_refused_in_words(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrokConfig.from_release(mapping)
