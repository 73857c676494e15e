"""Rename rules, exclude rules and chosen layers: which parameter comes from where, and what does not fit."""

import numpy as np
import pytest
from builders import SMALL, WrittenCheckpoint, write_checkpoint

from grokjax import CheckpointError, Grok, dequantize, init, load, load_parameters
from grokjax.checkpoint.mapping import map_parameters

CONFIG = SMALL.replace(num_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> WrittenCheckpoint:
    return write_checkpoint(tmp_path_factory.mktemp("release"), CONFIG, scale_blocks=4)


def gate(model: Grok, layer: int) -> np.ndarray:
    return np.asarray(dequantize(model.layers.feed_forward.gate.get_value())[layer])


def stored(checkpoint: WrittenCheckpoint, name: str) -> np.ndarray:
    return checkpoint.tensors[name].dequantised()


class TestRules:
    def test_first_match_wins(self) -> None:
        rules = [(r"layers\.0\.attention\.(query)", r"other.\1"), ("attention", "never"), ("query", "never")]
        sources = map_parameters(CONFIG, range(2), rules, [])
        assert sources["layers.0.attention.query"] == "other.query"
        assert sources["layers.0.attention.key"] == "layers.0.never.key"
        assert sources["layers.0.feed_forward.up"] == "layers.0.feed_forward.up"

    def test_exclusion_comes_before_renaming(self) -> None:
        sources = map_parameters(CONFIG, range(2), [("router", "gate")], [r"layers\.1\..*router"])
        assert sources["layers.1.feed_forward.router"] is None
        assert sources["layers.0.feed_forward.router"] == "layers.0.feed_forward.gate"

    def test_rules_see_the_checkpoint_s_layers(self) -> None:
        sources = map_parameters(CONFIG, [5, 3], [], [r"layers\.3\.attention\.key"])
        assert sources["layers.0.attention.query"] == "layers.5.attention.query"
        assert sources["layers.1.attention.key"] is None

    def test_an_expression_that_is_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
            map_parameters(CONFIG, range(2), [], ["("])

    def test_a_replacement_that_is_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'\\\\9' cannot replace 'gate' .*name groups that the pattern has"):
            map_parameters(CONFIG, range(2), [("gate", r"\9")], [])

    def test_parameters_by_an_expression_that_is_none_are_refused(self, checkpoint: WrittenCheckpoint) -> None:
        with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
            load_parameters(checkpoint.path, ["("], CONFIG)


class TestLoad:
    def test_renamed_parameters_are_read_from_their_source(self, checkpoint: WrittenCheckpoint) -> None:
        rename = [(r"feed_forward\.gate", "feed_forward.up"), (r"feed_forward\.up", "feed_forward.gate")]
        calls = []
        model = load(checkpoint.path, CONFIG, rename=rename, progress=calls.append)
        np.testing.assert_array_equal(gate(model, 1), stored(checkpoint, "layers.1.feed_forward.up"))
        reported = {call.parameter: call.source for call in calls}
        assert reported["layers.1.feed_forward.gate.0"] == "layers.1.feed_forward.up.0"
        assert reported["layers.1.attention.query"] == "layers.1.attention.query"

    def test_excluded_layers_keep_their_fresh_value(self, checkpoint: WrittenCheckpoint) -> None:
        calls = []
        model = load(checkpoint.path, CONFIG, exclude=[r"layers\.0\.feed_forward\.gate"], seed=3, progress=calls.append)
        fresh = init(CONFIG, seed=3)
        np.testing.assert_array_equal(gate(model, 0), gate(fresh, 0))
        np.testing.assert_array_equal(gate(model, 1), stored(checkpoint, "layers.1.feed_forward.gate"))
        assert [call.parameter for call in calls if call.source is None] == ["layers.0.feed_forward.gate"]

    def test_everything_excluded_is_a_fresh_model(self, checkpoint: WrittenCheckpoint) -> None:
        model, fresh = load(checkpoint.path, CONFIG, exclude=[""], seed=5), init(CONFIG, seed=5)
        np.testing.assert_array_equal(gate(model, 0), gate(fresh, 0))
        np.testing.assert_array_equal(model.embedding.table[...], fresh.embedding.table[...])

    def test_all_mismatches_in_one_list(self, checkpoint: WrittenCheckpoint) -> None:
        rename = [(r"layers\.0\.attention\.key", "layers.0.attention.query"), ("final_norm", "last_norm")]
        with pytest.raises(CheckpointError) as caught:
            load(checkpoint.path, CONFIG, rename=rename)
        text = str(caught.value)
        assert "2 problems" in text
        assert "final_norm.scale: the checkpoint has no last_norm.scale" in text
        assert "layers.0.attention.key from layers.0.attention.query: the weight has the shape [32, 64]" in text
        assert "rename and exclude what is meant to differ" in text
