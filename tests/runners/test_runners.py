"""The release's runners: the generator, what the release's own loop is made of, and the model's runner."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE
from flax import nnx
from goldens import ATOL_LOGITS
from jax.sharding import PartitionSpec

from grokjax import CheckpointError, Grok, init, make_mesh, prefill
from grokjax.runners import (
    InferenceRunner,
    LanguageModelConfig,
    ModelRunner,
    Request,
    SampleOutput,
    SampleSettings,
    TransformerConfig,
    pad_to_size,
    sample_from_model,
)
from grokjax.testing import write_release_checkpoint

SMALL = TINY_DENSE.replace(max_seq_len=48)


def small_model() -> LanguageModelConfig:
    """`SMALL` in the release's names; `widening_factor` 3 gives its hidden size."""
    transformer = TransformerConfig(
        emb_size=SMALL.model_dim,
        widening_factor=3,
        key_size=SMALL.head_dim,
        num_q_heads=SMALL.num_heads,
        num_kv_heads=SMALL.num_kv_heads,
        num_layers=SMALL.num_layers,
        attn_output_multiplier=SMALL.attention_multiplier,
        num_experts=SMALL.num_experts,
        num_selected_experts=SMALL.experts_per_token,
    )
    return LanguageModelConfig(
        model=transformer,
        vocab_size=SMALL.vocab_size,
        pad_token=0,
        eos_token=2,
        sequence_len=SMALL.max_seq_len,
        embedding_multiplier_scale=SMALL.embedding_multiplier,
        output_multiplier_scale=SMALL.output_multiplier,
        fprop_dtype=jnp.float32,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, trained_tokenizer_path: Path) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_release_checkpoint(path / "ckpt-0", small_model().to_config())
    (path / "tokenizer.model").write_bytes(trained_tokenizer_path.read_bytes())
    return path


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> InferenceRunner:
    """Two rows on two devices; each test leaves its engine idle."""
    runner = InferenceRunner(
        name="local",
        runner=ModelRunner(model=small_model(), bs_per_device=1),
        load=str(checkpoint),
        tokenizer_path=checkpoint / "tokenizer.model",
        local_mesh_config=(1, 2),
        pad_sizes=(16,),
    )
    runner.initialize()
    return runner


class TestGenerator:
    def test_texts_come_by_the_release_s_protocol(self, runner: InferenceRunner) -> None:
        """None while rows are free, then texts; `next` runs what there is; a bad request hurts nobody."""
        server = runner.run()
        assert next(server) is None
        assert next(server) is None
        long, short = (Request("the License", 0.0, 1.0, 1, count, ignore_eos=True) for count in (9, 3))
        assert server.send(long) is None
        first = server.send(short)
        assert (len(first.completion.token_ids), first) == (3, runner.tokenizer.decode(first.completion.token_ids))
        assert next(server) is None  # one row is free again
        bad = server.send(Request("", 0.0, 1.0, 1, 3))
        assert "the prompt is empty" in str(bad.completion.error)
        again = server.send(short)  # answered at the yield of a text
        texts = [text for text in (again, next(server), next(server), next(server)) if text is not None]
        assert sorted(len(text.completion.token_ids) for text in texts) == [3, 9]
        assert first in texts
        [alone] = runner.engine.generate(["the License"], temperature=0.0, max_new_tokens=9, ignore_eos=True)
        assert runner.tokenizer.decode(alone.token_ids) in texts

    def test_gives_exactly_as_many_tokens_as_were_asked_for(self, runner: InferenceRunner) -> None:
        server = runner.run()
        for count in (0, 1, 2):
            assert len(sample_from_model(server, "the", count, 1.0).completion.token_ids) == count
        with pytest.raises(ValueError, match="the prompt is empty"):
            sample_from_model(server, "", 3, 1.0)

    def test_one_that_is_left_early_makes_way(self, runner: InferenceRunner) -> None:
        server = runner.run()
        next(server)
        assert server.send(Request("the License", 0.0, 1.0, 1, 9, ignore_eos=True)) is None
        server.close()
        assert not runner.engine.has_work
        again = runner.run()
        assert sample_from_model(again, "the", 2, 1.0).completion.finish_reason == "length"

    def test_the_callers_mesh_changes_nothing(self, runner: InferenceRunner) -> None:
        request = Request("and the", 50.0, 0.9, 3, 4, ignore_eos=True)

        def run() -> tuple[tuple[int, ...], int, list[int]]:
            [done] = runner.engine.generate([request.to_engine()])
            batch = Batch(runner)
            return done.token_ids, batch.prefill(1, request), batch.step()

        expected = run()
        for mesh in (jax.make_mesh((1, 2), ("data", "model")), jax.make_mesh((8,), ("x",))):
            with jax.set_mesh(mesh):
                assert run() == expected

    def test_a_request_may_ask_for_more_than_the_release_s(self, runner: InferenceRunner) -> None:
        server = runner.run()
        next(server)
        mask = np.arange(SMALL.vocab_size) == 70
        options = {"mask": mask, "ignore_eos": True, "logprobs": 2}
        assert server.send(Request("the", 1.0, 1.0, 2**40 + 5, 4, **options)) is None
        text = next(server)
        assert text.completion.token_ids == (70,) * 4
        assert len(text.completion.logprobs[0].top) == 2
        with pytest.raises(ValueError, match="temperature=-1 must be a number, finite, 0"):
            Request("the", -1, 1.0, 0, 4)


class Batch:
    """What the release's own loop keeps beside the parameters of a runner: the arguments of its three functions."""

    def __init__(self, runner: InferenceRunner):
        rows, vocab = runner.runner.batch_size, runner.vocab_size
        self.runner = runner
        self.rngs = jax.random.split(jax.random.PRNGKey(1), rows)
        self.memory = runner.new_memory(runner.params, rows, runner.runner.model.sequence_len)
        zeros = np.zeros(rows, np.float32)
        self.settings = SampleSettings(zeros, zeros, np.ones((rows, vocab), bool), np.zeros(rows, bool))
        top = np.zeros((rows, 8), np.int32), np.zeros((rows, 8), np.float32)
        self.last_output = SampleOutput(np.zeros((rows, 1), np.int32), zeros[:, None], *top)

    def prefill(self, i: int, request: Request, *, size: int | None = None, length: int | None = None) -> int:
        """The first token of a request in row `i`."""
        ids = self.runner.tokenizer.encode(request.prompt)
        prompt = pad_to_size(ids, size or self.runner.get_pad_bucket(len(ids))).tokens
        mask = np.ones(self.runner.vocab_size, bool) if request.mask is None else request.mask
        self.rngs, self.last_output, self.memory, self.settings = self.runner.prefill_memory(
            self.runner.params,
            self.rngs,
            self.memory,
            self.settings,
            self.last_output,
            prompt,
            len(ids) if length is None else length,
            np.uint64(request.rng_seed),
            SampleSettings(request.temperature, request.nucleus_p, mask, np.True_),
            i,
        )
        return np.asarray(self.last_output.token_id)[i, 0].item()

    def step(self) -> list[int]:
        """The next token of every row."""
        self.rngs, self.last_output, self.memory = self.runner.sample_step(
            self.runner.params, self.rngs, self.last_output, self.memory, self.settings
        )
        return np.asarray(self.last_output.token_id)[:, 0].tolist()


class TestFunctionsOfABatch:
    def test_a_loop_over_them_draws_what_the_engine_draws(self, runner: InferenceRunner) -> None:
        """A greedy request, and a drawn one that comes to the other row two steps later, and there once more."""
        greedy = Request("the License", 0.0, 1.0, 1, 6, ignore_eos=True)
        drawn = Request("and the", 50.0, 0.9, 2**40 + 5, 3, ignore_eos=True)  # so hot that the keys decide
        lengths = [len(runner.tokenizer.encode(request.prompt)) for request in (drawn, greedy)]
        batch = Batch(runner)
        others = [batch.prefill(1, greedy), batch.step()[1], batch.step()[1]]
        assert batch.memory.lengths.tolist() == [0, lengths[1] + 2]
        ours = [batch.prefill(0, drawn)]
        for _ in range(2):
            for row, token in zip((ours, others), batch.step(), strict=True):
                row.append(token)
        assert batch.prefill(0, drawn) == ours[0]
        again, last = batch.step()
        assert again == ours[1]
        assert batch.memory.lengths.tolist() == [lengths[0] + 1, lengths[1] + 5]
        handles = [runner.engine.submit(request.to_engine()) for request in (drawn, greedy)]
        runner.engine.run()
        assert [list(handle.completion.token_ids) for handle in handles] == [ours, [*others, last]]

    def test_a_draw_comes_with_its_probability_and_the_most_probable(self, runner: InferenceRunner) -> None:
        batch = Batch(runner)
        best = batch.prefill(0, Request("the License", 0.0, 1.0, 1, 6))
        only = batch.prefill(1, Request("and the", 1.0, 1.0, 1, 6, mask=np.arange(SMALL.vocab_size) == 70))
        for _ in range(2):
            output = batch.last_output
            assert output.top_k_token_ids.shape == (2, 8)
            assert output.top_k_token_ids[:, 0].tolist() == [best, only]
            np.testing.assert_allclose(output.prob[:, 0], output.top_k_probs[:, 0], rtol=1e-6)
            assert (only, output.prob[1, 0]) == (70, 1)
            best, only = batch.step()

    def test_a_request_that_does_not_fit_is_refused(self, runner: InferenceRunner) -> None:
        batch, request = Batch(runner), Request("the License", 0.0, 1.0, 1, 6)
        with pytest.raises(ValueError, match="length=0 leaves the prompt empty: give at least one token"):
            batch.prefill(0, request, length=0)
        with pytest.raises(ValueError, match="row 2 is outside the cache's 2 rows"):
            batch.prefill(2, request)
        with pytest.raises(ValueError, match="49 tokens a row exceed the cache's max_len=48"):
            batch.prefill(0, request, size=49)
        with pytest.raises(ValueError, match="max_len=49 must be between 1 and max_seq_len=48"):
            runner.new_memory(runner.params, 2, 49)
        batch.memory = runner.new_memory(runner.params, 1, 48)
        with pytest.raises(ValueError, match=r"the cache holds keys of shape .* and with batch_size=2"):
            batch.step()

    def test_parameters_can_be_placed_by_their_shardings(self, runner: InferenceRunner) -> None:
        copy = jax.device_put(jax.tree.map(np.asarray, runner.params), runner.params_sharding)
        for ours, theirs in zip(jax.tree.leaves(copy), jax.tree.leaves(runner.params), strict=True):
            assert ours.sharding == theirs.sharding
            np.testing.assert_array_equal(ours, theirs)
        assert runner.params.embedding.table.shape[0] == runner.vocab_size


# What the release makes to find out shapes.
INIT_DATA = {"inputs": np.zeros((1, 256), np.int32), "targets": np.zeros((1, 256), np.int32)}


class TestModelRunner:
    def test_a_batch_of_nothing_is_refused(self) -> None:
        runner = ModelRunner(model=small_model(), bs_per_device=0.125)
        with pytest.raises(
            ValueError, match=r"bs_per_device=0\.125 on 4 devices is a batch of no rows: set it to at l"
        ):
            runner.initialize(local_mesh_config=(1, 4))
        runner.initialize(local_mesh_config=(2, 4))
        assert runner.batch_size == 1

    def test_devices_that_are_not_there_are_refused(self) -> None:
        with pytest.raises(ValueError, match="needs 16 devices and there are 8"):
            ModelRunner(model=small_model()).initialize(INIT_DATA, (2, 8), (1, 1))

    def test_a_mesh_in_the_place_of_the_data_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"init_data=\(1, 4\) must be a mapping of arrays or None: name the mesh"):
            ModelRunner(model=small_model()).initialize((1, 4))

    def test_each_process_has_its_share_of_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = ModelRunner(model=small_model(), bs_per_device=1.5)
        runner.initialize(INIT_DATA, (1, 4), (1, 1))
        assert runner.batch_size == runner.local_batch_size == 6
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        runner.initialize(INIT_DATA, (1, 4), (1, 1))
        assert (runner.batch_size, runner.local_batch_size) == (6, 3)

    def test_a_pad_size_beyond_the_sequence_is_refused(self, runner: InferenceRunner) -> None:
        with pytest.raises(ValueError, match="the prefill bucket 64 must be an integer between 1 and the 48 entries"):
            dataclasses.replace(runner, pad_sizes=(64,)).initialize()

    def test_the_state_lies_where_its_sharding_says(self, runner: InferenceRunner) -> None:
        model_runner, state = runner.runner, runner.params
        assert model_runner.state_sharding.embedding.table.get_value().spec == PartitionSpec("model", None)
        for shardings in (model_runner.state_sharding, model_runner.get_state_sharding(INIT_DATA)):
            assert jax.tree.structure(shardings) == jax.tree.structure(state)
            for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    def test_the_model_is_loaded_made_or_given(self, runner: InferenceRunner) -> None:
        model_runner = runner.runner

        def table(model: Grok) -> np.ndarray:
            return np.asarray(model.embedding.table[...])

        loaded, fresh = model_runner.load_or_init(INIT_DATA), model_runner.load_or_init(from_checkpoint=False)
        np.testing.assert_array_equal(table(loaded), table(runner.params))
        np.testing.assert_array_equal(table(fresh), table(model_runner.init()))
        assert (table(loaded) != table(fresh)).any()
        given = []
        made = model_runner.load_or_init(INIT_DATA, init_fn=lambda *arguments: given.append(arguments) or fresh)
        assert made is fresh
        [(rng, data)] = given
        assert data is INIT_DATA
        np.testing.assert_array_equal(table(model_runner.init_fn(rng, data)), table(fresh))
        assert (table(model_runner.init_fn(jax.random.key(7), data)) != table(fresh)).any()

    def test_the_forward_pass_is_a_pair_of_pure_functions(self, runner: InferenceRunner) -> None:
        model_runner, tokens = runner.runner, np.arange(16)[None] + 70
        forward = model_runner.make_forward_fn(model_runner.mesh)
        made = forward.init(jax.random.PRNGKey(7), tokens)
        expected = init(SMALL, seed=7, mesh=model_runner.mesh, dtype=jnp.float32)
        np.testing.assert_array_equal(made.embedding.table[...], expected.embedding.table[...])
        logits, memory = forward.apply(runner.params, None, tokens), runner.new_memory(runner.params, 2, 48)
        last, _ = prefill(runner.params, tokens, [16], memory.reset(0), rows=np.array([0]))
        np.testing.assert_allclose(logits[:, -1], last, rtol=0, atol=ATOL_LOGITS)
        with pytest.raises(ValueError, match="the mesh axis 'model' of 3 devices does not divide"):
            model_runner.make_forward_fn(make_mesh((1, 3))).init(jax.random.PRNGKey(7), tokens)

    def test_parameters_are_renamed_and_excluded(self, runner: InferenceRunner) -> None:
        rules = {"load_exclude_rules": ["^embedding"], "load_rename_rules": [(r"attention\.key$", "attention.value")]}
        ruled = dataclasses.replace(runner.runner, **rules)
        ruled.initialize(INIT_DATA, (1, 2), (1, 1))
        made, fresh, loaded = ruled.load_or_init(), ruled.init(), runner.params

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
        ruled.load_rename_rules = [("query", "nowhere")]
        with pytest.raises(CheckpointError, match=r"the checkpoint has no layers\.0\.attention\.nowhere"):
            ruled.load_or_init()
