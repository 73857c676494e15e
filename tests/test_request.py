"""What a request may ask for: every number at its limits, masks and biases, prompts."""

import math

import jax
import numpy as np
import pytest

from grokjax.request import Request, bias_row, check_prompt, check_stop_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be an integer, 0 or more"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens=2\.0 must be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be an integer"),
        ({"temperature": -0.1}, r"temperature=-0\.1 must be a number, finite, 0 \(greedy\) or more"),
        ({"temperature": math.nan}, "temperature=nan must be a number"),
        ({"temperature": math.inf}, "temperature=inf must be a number"),
        ({"temperature": 10**400}, "temperature=1000.* must be a number"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"top_p": 1.1}, r"top_p=1\.1 must be a number, from 0 to 1"),
        ({"min_p": -1}, "min_p=-1 must be a number, from 0 to 1"),
        ({"top_k": -1}, "top_k=-1 must be an integer between 0 and 2147483647"),
        ({"top_k": 2**31}, "top_k=2147483648 must be an integer between"),
        ({"seed": -1}, "seed=-1 must be an integer between 0 and 4294967295"),
        ({"seed": jax.random.key(0)}, r"seed=key<.*>\[\] must be an integer between 0 and 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 must be an integer between"),
        ({"n": 0}, "n=0 must be an integer between 1 and 1024"),
        ({"n": 10**9}, "n=1000000000 must be an integer between"),
        ({"logprobs": -1}, "logprobs=-1 must be an integer, 0 or more"),
        ({"priority": 0.5}, r"priority=0\.5 must be an integer\."),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\] must be strings of at least one character"),
        ({"stop": ""}, "stop='' must be strings of at least one character"),
        ({"stop": [1]}, r"stop=\[1\] must be strings"),
        ({"stop": None}, "stop=None must be strings"),
        ({"stop_ids": [3.0]}, r"stop_ids has 3\.0: token ids are integers"),
        ({"stop_ids": [True]}, "stop_ids has True: token ids are integers"),
        ({"stop_ids": np.array([[1]])}, r"stop_ids has array\(\[1\]\): token ids are integers"),
        ({"stop_ids": 3}, "stop_ids=3 must be token ids: give a list of integers"),
        ({"stop_ids": "3"}, "stop_ids='3' must be token ids"),
        ({"ignore_eos": "no"}, r"ignore_eos='no' must be true or false\."),
        ({"ignore_eos": 1}, r"ignore_eos=1 must be true or false\."),
        ({"prompt_logprobs": 3}, r"prompt_logprobs=3 must be true or false\."),
        ({"prompt_logprobs": None}, r"prompt_logprobs=None must be true or false\."),
        ({"user": 3}, r"user=3 must be a text, or None\."),
        ({"deadline": 0}, "deadline=0 must be a number of seconds, finite and more than 0, or None"),
        ({"deadline": -1.5}, r"deadline=-1\.5 must be a number of seconds"),
        ({"deadline": math.nan}, "deadline=nan must be a number of seconds"),
        ({"deadline": math.inf}, "deadline=inf must be a number of seconds"),
        ({"deadline": 10**400}, "deadline=1000.* must be a number of seconds"),
        ({"deadline": True}, "deadline=True must be a number of seconds"),
        ({"deadline": "soon"}, "deadline='soon' must be a number of seconds"),
        ({"logit_bias": [(1, 2.0)]}, r"logit_bias=\[\(1, 2.0\)\] must map token ids to numbers, such as \{42: -1.5\}"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request("a", **options)


def test_limits_are_allowed() -> None:
    Request("a", max_new_tokens=0, temperature=0, top_p=0, min_p=1, top_k=2**31 - 1, seed=2**32 - 1, priority=-5)
    Request([1], max_new_tokens=np.int64(3), temperature=np.float32(0.5), logprobs=0, deadline=np.float32(0.1), user="")


def test_numpys_booleans_are_taken() -> None:
    request = Request("a", ignore_eos=np.True_, prompt_logprobs=np.False_)
    assert (request.ignore_eos, request.prompt_logprobs) == (True, False)
    assert type(request.ignore_eos) is type(request.prompt_logprobs) is bool


def test_one_stop_string_is_a_list_of_one() -> None:
    assert Request("a", stop="end").stop == ("end",)
    assert Request("a", stop=["x", "y"]).stop == ("x", "y")


class TestBias:
    def test_none_is_made_where_none_is_asked_for(self) -> None:
        assert bias_row(Request("a"), 4) is None
        assert bias_row(Request("a", logit_bias={}), 4) is None

    def test_what_stands_for_all_holds_whatever_else_is_asked_for(self) -> None:
        standing = np.array([0, 0, -1e10, -1e10], np.float32)
        assert bias_row(Request("a"), 4, standing) is standing
        asked = Request("a", allowed_tokens=[0, 1, 1, 0], logit_bias={1: 2.0, 2: 1e10})
        assert bias_row(asked, 4, standing).tolist() == pytest.approx([-1e10, 2, -1e10, -1e10])
        with pytest.raises(ValueError, match="the mask and the bias leave no token"):
            bias_row(Request("a", allowed_tokens=[0, 0, 1, 1]), 4, standing)

    def test_mask_and_bias_work_together(self) -> None:
        row = bias_row(Request("a", allowed_tokens=[1, 0, 1, 1], logit_bias={1: 5.0, 2: -2, 3: -math.inf}), 4)
        assert row.tolist() == pytest.approx([0, -1e10, -2, -1e10])
        assert row.dtype == np.float32

    @pytest.mark.parametrize("kind", [bool, np.int8, np.float32, object])
    def test_masks_of_every_kind_are_taken(self, kind: type) -> None:
        mask = np.array([True, False, True, True]).astype(kind)
        assert bias_row(Request("a", allowed_tokens=mask), 4).tolist() == [0, -1e10, 0, 0]

    def test_numpys_numbers_are_taken(self) -> None:
        row = bias_row(Request("a", logit_bias={np.int64(1): np.float32(0.5), 2: np.int32(3)}), 4)
        assert row.tolist() == [0, 0.5, 3, 0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"allowed_tokens": [True] * 3}, r"allowed_tokens has shape \(3,\): give one value for each of the 4"),
            ({"allowed_tokens": [[1, 0], [1]]}, r"allowed_tokens has shape \(2,\): give one value"),
            ({"allowed_tokens": [1, 0, 1, math.nan]}, "allowed_tokens has nan: give true or false, or 1 or 0"),
            ({"allowed_tokens": [1, 0.5, 1, 1]}, r"allowed_tokens has 0\.5: give true or false"),
            ({"allowed_tokens": ["0", "1", "1", "1"]}, "allowed_tokens has '0': give true or false"),
            ({"allowed_tokens": [True, None, True, True]}, "allowed_tokens has None: give true or false"),
            ({"allowed_tokens": [1, [0, 1], 1, 1]}, r"allowed_tokens has \[0, 1\]: give true or false"),
            ({"allowed_tokens": [False] * 4}, "the mask and the bias leave no token"),
            ({"logit_bias": dict.fromkeys(range(4), -math.inf)}, "the mask and the bias leave no token"),
            ({"logit_bias": {4: 1.0}}, "logit_bias has the token id 4, outside the vocabulary of 4"),
            (
                {"logit_bias": {1: math.inf}},
                "logit_bias of token 1 is inf: give a number up to 1e10, or minus infinity",
            ),
            ({"logit_bias": {1: 1e39}}, r"logit_bias of token 1 is 1e\+39: give a number up to 1e10"),
            ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 is nan"),
            ({"logit_bias": {1: 10**400}}, "logit_bias of token 1 is 1000.*: give a number up to 1e10"),
            ({"logit_bias": {1: "much"}}, "logit_bias of token 1 is 'much'"),
            ({"logit_bias": {1: True}}, "logit_bias of token 1 is True"),
            ({"logit_bias": {1.5: 1.0}}, r"logit_bias has 1\.5: token ids are integers"),
            ({"logit_bias": {2**70: 1.0}}, "logit_bias has the token id 1180591620717411303424, outside"),
        ],
        ids=str,
    )
    def test_impossible_masks_and_biases_are_refused(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            bias_row(Request("a", **options), 4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt is empty: give it some text"),
        ([1] * 8, "the prompt has 8 tokens and at most 7 leave room"),
        ([True] * 8, "the prompt has 8 tokens and at most 7 leave room"),  # before each of millions is looked at
        ([1, 4], "the prompt has the token id 4, outside the vocabulary of 4 tokens"),
        ([-1], "the prompt has the token id -1"),
        ([[1, 2]], r"must be text or a list of token ids, not \[\[1, 2\]\]\."),
        (None, r"must be text or a list of token ids, not None\."),
        (5, r"must be text or a list of token ids, not 5\."),
        (b"ab", "must be text or a list of token ids, not b'ab'"),
        ({1: 2}, r"must be text or a list of token ids, not \{1: 2\}"),
        ({1, 2}, r"must be text or a list of token ids, not \{1, 2\}"),
        ([1, 1.5], r"the prompt has 1\.5: token ids are integers"),
        (np.array([1.5]), r"the prompt has .*1\.5.*: token ids are integers"),
        ([True, 1], "the prompt has True: token ids are integers"),
        (["a", 1], "the prompt has 'a': token ids are integers"),
        ([[1, 2], [3]], r"the prompt has \[1, 2\]: token ids are integers"),
        ([2**70], "the prompt has the token id 1180591620717411303424, outside the vocabulary of 4"),
        ([2**63, 1], "the prompt has the token id 9223372036854775808, outside the vocabulary of 4"),
    ],
    ids=str,
)
def test_impossible_prompts_are_refused(ids: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompt(ids, vocab_size=4, max_len=8)


def test_prompts_and_stop_ids_of_every_kind_are_taken() -> None:
    prompt = check_prompt(np.array([1, 3], np.int64), vocab_size=4, max_len=3)
    assert (prompt.tolist(), prompt.dtype) == ([1, 3], np.int32)
    assert check_prompt(range(3), vocab_size=4, max_len=5).tolist() == [0, 1, 2]
    assert check_stop_ids([3, 1, 3], 4) == {1, 3}
    assert Request("a", stop_ids=np.array([3, 1])).stop_ids == (3, 1)
    assert check_stop_ids((), 4) == frozenset()
    with pytest.raises(ValueError, match="stop_ids has the token id 4"):
        check_stop_ids([4], 4)
