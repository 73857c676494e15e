"""Tasks of the evaluation harness, from local files, against what the model says by itself."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from looked_into import make

from grokjax import ByteTokenizer, Engine
from grokjax.research import drop_experts, edit, evaluate_tasks, load_tasks, perplexity, score_continuations

TOKENIZER = ByteTokenizer(264)
QUESTIONS = [
    {"question": "one ", "choices": ["two", "four", "nine"], "answer": 0},
    {"question": "a longer question", "choices": ["yes", "no"], "answer": 1},
    {"question": "", "choices": ["7", "8"], "answer": 0},
]
TASKS = {
    "choose": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"},
    "roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}, and more"},
    "write": {"output_type": "generate_until", "generation_kwargs": {"until": ["x"], "max_gen_toks": 6}},
}
METRICS = {"choose": "acc", "roll": "bits_per_byte", "write": "exact_match"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of each kind whose questions stand in one file; JSON is YAML, too."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, fields in TASKS.items():
        data = {"data_files": str(folder / "questions.jsonl")}
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "train",
            "fewshot_split": "train",
            "target_delimiter": "",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": METRICS[name], "aggregation": "mean", "higher_is_better": True}],
        }
        if name == "roll":
            del task["metric_list"][0]["aggregation"]
        (folder / f"{name}.yaml").write_text(json.dumps(task | fields))
    (folder / "everything.yaml").write_text(json.dumps({"group": "everything", "task": list(TASKS)}))
    return folder


@pytest.fixture(autouse=True)
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing is downloaded, and no time goes into reading the files of the thousands of tasks that the harness has."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    if importlib.util.find_spec("lm_eval"):
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))


def best_choices(model) -> list[int]:
    """The choice of each question that is the most probable behind it."""
    best = []
    for question in QUESTIONS:
        context = TOKENIZER.encode(question["question"].rstrip()) or [TOKENIZER.bos_id]
        space = " " * question["question"].endswith(" ")
        pairs = [(context, TOKENIZER.encode(space + choice)) for choice in question["choices"]]
        best.append(int(np.argmax([score.logprob for score in score_continuations(model, pairs)])))
    return best


@pytest.mark.harness
def test_tasks_of_each_kind_are_measured_as_the_model_answers_them(folder: Path) -> None:
    tasks = load_tasks(["choose", "roll", "write"], include_path=folder)
    found = evaluate_tasks(make(), TOKENIZER, tasks, slots=2, max_len=20)["results"]
    right = [answer == question["answer"] for answer, question in zip(best_choices(make()), QUESTIONS, strict=True)]
    assert found["choose"]["acc,none"] == pytest.approx(np.mean(right))
    texts = [f"{question['question']}, and more" for question in QUESTIONS]
    nats = [perplexity(make(), [1, *TOKENIZER.encode(text)], 20, 19).logprobs.sum() for text in texts]
    bits = -sum(nats) / math.log(2) / sum(map(len, texts))
    assert found["roll"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.harness
def test_texts_are_continued_up_to_their_end_behind_what_fits_of_their_context(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from grokjax.research.harness_model import HarnessModel

    options = {"add_bos": True, "cache_dtype": None, "allow_oom": False}
    model = HarnessModel(make(), TOKENIZER, slots=2, max_len=20, **options)
    contexts = ["one", "a question that is longer than there is room for", ""]
    with Engine(make(), TOKENIZER, slots=2, max_len=20) as engine:
        prompts = [[1, *TOKENIZER.encode(context)][-14:] for context in contexts]
        whole = [done.text for done in engine.generate(prompts, max_new_tokens=6, temperature=0)]
    stop = whole[0][2]

    def continued(**settings: object) -> list[str]:
        asked = [Instance("generate_until", {}, (context, settings), 0) for context in contexts]
        return model.generate_until(asked, disable_tqdm=True)

    assert continued(until=[], max_gen_toks=6) == whole
    assert continued(until=stop, max_gen_toks=6, do_sample=False) == [text.partition(stop)[0] for text in whole]
    drawn = continued(until=[], max_gen_toks=6, do_sample=True, temperature=5.0)
    assert drawn == continued(until=[], max_gen_toks=6, do_sample=True, temperature=5.0)
    assert drawn != whole
    with pytest.raises(ValueError, match=r"generation with num_beams: grokjax knows until, max_gen_toks"):
        continued(until=[], max_gen_toks=6, num_beams=4)
    with pytest.raises(ValueError, match=r"asks for 20 new tokens, and max_len=20 has no room"):
        continued(until=[], max_gen_toks=20)


@pytest.mark.harness
def test_a_group_few_questions_examples_and_another_model(folder: Path) -> None:
    tasks = load_tasks(["cho*", "choose"], include_path=folder, num_fewshot=1)
    found = evaluate_tasks(make(), TOKENIZER, tasks, limit=2)
    assert found["n-samples"]["choose"]["effective"] == 2
    assert found["n-shot"]["choose"] == 1
    other = edit(make(), drop_experts({0: [0, 1], 1: [2, 3]}))
    right = [answer == question["answer"] for answer, question in zip(best_choices(other), QUESTIONS, strict=True)]
    tasks = load_tasks(["everything"], include_path=folder)
    assert tasks.names == ["everything"]
    found = evaluate_tasks(other, TOKENIZER, tasks, slots=2, max_len=20)
    assert found["results"]["choose"]["acc,none"] == pytest.approx(np.mean(right))
    assert set(found["results"]) == {"everything", *TASKS}


@pytest.mark.harness
def test_what_is_wrong_with_tasks_is_known_before_there_is_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no task 'chose': did you mean choose\?"):
        load_tasks(["chose"], include_path=folder)
    with pytest.raises(ValueError, match="num_fewshot=-1 must be an integer, 0 or more"):
        load_tasks(["choose"], num_fewshot=-1)
    with pytest.raises(ValueError, match=r"include_path=.*questions.jsonl is no folder"):
        load_tasks(["choose"], include_path=folder / "questions.jsonl")
    broken = json.loads((folder / "choose.yaml").read_text())
    broken["dataset_kwargs"]["data_files"] = str(tmp_path / "absent.jsonl")
    (tmp_path / "broken.yaml").write_text(json.dumps(broken | {"task": "broken"}))
    with pytest.raises(ValueError, match=r"the tasks broken cannot be loaded: FileNotFoundError"):
        load_tasks(["broken"], include_path=tmp_path)


def test_without_the_harness_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"the extra `eval`: run pip install '\.\[eval\]' in the checkout\."):
        load_tasks(["choose"])
    with pytest.raises(ValueError, match=r"the extra `eval`"):
        evaluate_tasks(make(), TOKENIZER, object())
