"""llama.cpp on the same random weights, run in turn with grokjax by `--peer llama.cpp`: the GGUF file and the steps.

Needs the packages of the extra `peer-llama`. The file holds every matrix in llama.cpp's Q8_0: int8 with a scale for
each 32 numbers. llama.cpp divides the probabilities of a token's experts by their sum; the norm that follows makes that
no difference.
"""

import argparse
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from grokjax import Grok, forward
from grokjax.quantization import QuantizedTable, Weight, dequantize

# Largest difference of the logits, as part of their own size, at which both compute the same model: rounding alone
# gives up to a tenth.
_SAME_LOGITS = 0.2
# Numbers that share a scale in Q8_0, which divide every row.
_BLOCK = 32

# Our parameter -> llama.cpp's tensor of one layer.
_NORMS = {
    "pre_attention_norm": "attn_norm",
    "post_attention_norm": "attn_output_norm",
    "pre_feed_forward_norm": "ffn_norm",
    "post_feed_forward_norm": "layer_output_norm",
}
_ATTENTION = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output"}
_EXPERTS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=("llama.cpp",), help="also runs it, in turn, on the same weights and cores")


def tensors(model: Grok) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values of llama.cpp's tensors, matrices as [outputs, inputs], F padded with zeros."""
    layers = model.layers
    yield "token_embd.weight", _table(model.embedding.table.get_value())
    yield "output_norm.weight", np.asarray(model.final_norm.scale[...])
    for i in range(model.config.num_layers):
        for ours, theirs in _NORMS.items():
            yield f"blk.{i}.{theirs}.weight", np.asarray(getattr(layers, ours).scale[i])
        for ours, theirs in _ATTENTION.items():
            yield f"blk.{i}.{theirs}.weight", _matrix(getattr(layers.attention, ours), i)
        yield f"blk.{i}.ffn_gate_inp.weight", _matrix(layers.feed_forward.router, i)
        missing = -model.config.ffn_dim % _BLOCK
        for ours, theirs in _EXPERTS.items():
            padding = ((0, 0), (0, 0), (0, missing)) if ours == "down" else ((0, 0), (0, missing), (0, 0))
            yield f"blk.{i}.{theirs}.weight", np.pad(_matrix(getattr(layers.feed_forward, ours), i), padding)


def _table(table: Weight | QuantizedTable) -> np.ndarray:
    if isinstance(table, QuantizedTable):
        return np.asarray(table.weight, np.float32) * np.asarray(table.scales)[:, None]
    return np.asarray(table, np.float32)


def _matrix(param: nnx.Variable, layer: int) -> np.ndarray:
    weight = nnx.state({"weight": param})["weight"].get_value()
    return np.asarray(dequantize(_layer(weight, layer))).swapaxes(-1, -2)


def _layer(weight: Weight, layer: int) -> Weight:
    return jax.tree.map(lambda leaf: leaf[layer], weight)


def write_gguf(model: Grok, path: Path) -> None:
    """Writes the model for llama.cpp, its matrices but the router's in Q8_0."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "grok")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.model_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_dim + -config.ffn_dim % _BLOCK)
    writer.add_expert_feed_forward_length(config.ffn_dim + -config.ffn_dim % _BLOCK)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_logit_scale(config.output_multiplier)
    writer.add_attn_output_scale(config.attention_multiplier)
    writer.add_attn_logit_softcapping(config.attention_softcap)
    writer.add_tokenizer_model("none")
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, values in tensors(model):
        if values.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp with a model of ours: rows that are filled and decoded together, on all cores."""

    def __init__(self, model: Grok, *, rows: int, max_len: int):
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except ImportError as error:
            raise SystemExit(
                f"--peer llama.cpp needs a package that is not installed ({error.name}): pip install '.[peer-llama]' "
                "in the checkout, which builds it from source."
            ) from error
        config = model.config
        if config.num_heads * config.head_dim != config.model_dim:
            raise SystemExit(
                f"llama.cpp runs Grok only where heads times head size is the model's: {config.num_heads} x "
                f"{config.head_dim} is not {config.model_dim}. Choose another --config, such as bench_1b."
            )
        self.library, self.rows, self.vocab_size = llama_cpp, rows, config.vocab_size
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            options = llama_cpp.llama_model_default_params()
            options.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # the file is gone soon
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        self.context = self._context(max_len)
        self.batch = llama_cpp.llama_batch_init(rows * max_len, 0, 1)

    def _context(self, max_len: int):
        library = self.library
        options = library.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch = self.rows * max_len, self.rows, self.rows * max_len
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it lacks the cap of Grok's scores
        return library.llama_init_from_model(self.model, options)

    def prefill(self, prompts: np.ndarray) -> np.ndarray:
        """Logits [rows, V] after prompts [rows, T], which replace what was there."""
        self._clear()
        ends = np.zeros(prompts.shape, bool)
        ends[:, -1] = True
        return self._run(prompts, 0, wanted=ends)

    def decode(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Logits [rows, V] after one more token of each row, [rows]."""
        return self._run(tokens[:, None], position, wanted=np.ones((self.rows, 1), bool))

    def logits(self, prompt: np.ndarray) -> np.ndarray:
        """Logits [T, V] after each token of one prompt [T], which replaces what was there."""
        self._clear()
        return self._run(prompt[None], 0, wanted=np.ones((1, len(prompt)), bool))

    def _clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def _run(self, tokens: np.ndarray, position: int, *, wanted: np.ndarray) -> np.ndarray:
        batch, length = self.batch, tokens.shape[1]
        batch.n_tokens = tokens.size
        for i, token in enumerate(tokens.ravel().tolist()):
            row, column = divmod(i, length)
            batch.token[i], batch.pos[i] = token, position + column
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = int(wanted[row, column])
        if self.library.llama_decode(self.context, batch) != 0:
            raise SystemExit(f"llama.cpp could not run {len(tokens)} rows of {length} tokens.")
        found = [self.library.llama_get_logits_ith(self.context, int(i)) for i in np.flatnonzero(wanted)]
        return np.stack([np.ctypeslib.as_array(logits, (self.vocab_size,)) for logits in found])


def difference(model: Grok, peer: LlamaCpp) -> float:
    """Distance of both logits after a token, as part of ours: the median over a short prompt.

    The median, because rounding makes some tokens choose other experts.

    Raises:
      SystemExit: They are those of another model.
    """
    prompt = np.random.default_rng(1).integers(3, model.config.vocab_size, 32)
    ours, theirs = np.asarray(forward(model, prompt[None])[0]), peer.logits(prompt)
    found = float(np.median(np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(ours, axis=-1)))
    if not found < _SAME_LOGITS:
        raise SystemExit(
            f"The peer's logits differ by {found:.3f} of their size, more than {_SAME_LOGITS}: it does not compute the "
            "same model, and its speed says nothing."
        )
    return found
