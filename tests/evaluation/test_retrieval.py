"""Retrieval with a model that can only answer from what its cache gives back."""

import pytest
from reader import LetterTokenizer, LookupModel
from transformers import DynamicCache

from tqai.errors import InputError
from tqai.evaluation import CacheMaker, RetrievalTask, cache_maker, evaluate_retrieval, make_tasks
from tqai.evaluation.retrieval import split_prompt


class LastTokens(DynamicCache):
    """Gives back spaces instead of all but the newest 60 tokens."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys = keys.clone()
        keys[:, :, : max(keys.shape[-2] - 60 - key_states.shape[-2], 0)] = ord(" ")
        return keys, values


@pytest.fixture
def reader():
    return LookupModel()


def test_all_codes_are_found_with_a_cache_that_keeps_them(reader):
    tasks = make_tasks(LetterTokenizer(), 1500, questions=7, questions_per_document=3, seed=11)
    assert [len(task.questions) for task in tasks] == [3, 3, 1]
    makers = [
        cache_maker("dynamic", reader),
        CacheMaker("short", "test", lambda: LastTokens(config=reader.config)),
    ]
    reports = evaluate_retrieval(reader, LetterTokenizer(), tasks, makers)
    assert list(reports) == ["dynamic", "short"]
    good, bad = reports["dynamic"], reports["short"]
    assert (good.correct, good.questions, good.rate.value) == (7, 7, 1.0)
    assert good.same_as_uncompressed == 7
    assert all(answer.first_divergence is None for answer in good.answers)
    assert bad.correct == 0 and bad.same_as_uncompressed == 0
    assert all(answer.first_divergence in range(1, 7) for answer in bad.answers)
    assert {answer.text for answer in bad.answers} == {" 999999."}
    assert all(1400 < answer.prompt_tokens <= 1500 for answer in good.answers)
    plain = bad.to_dict()
    assert (plain["correct"], plain["questions"], len(plain["missed_depths"])) == (0, 7, 7)
    assert good.to_dict()["missed_depths"] == []


def test_each_document_is_read_once_and_questions_go_through_the_cache(reader):
    tokenizer = LetterTokenizer()
    tasks = make_tasks(tokenizer, 1500, questions=2, questions_per_document=2)
    evaluate_retrieval(reader, tokenizer, tasks, [cache_maker("dynamic", reader)])
    long = [tokens for held, tokens in reader.passes if tokens > 200]
    assert len(long) == 1 and 1300 < long[0] < 1500
    # Two questions to two caches (one is the reference), each to a copy that holds the document alone.
    assert [held for held, tokens in reader.passes if 1 < tokens <= 200] == [long[0]] * 4


def test_documents_differ_and_seeds_repeat():
    tokenizer = LetterTokenizer()
    first, second = make_tasks(tokenizer, 1000, questions=2, seed=3)
    assert first.text != second.text and first.answers != second.answers
    assert [second] == make_tasks(tokenizer, 1000, questions=1, seed=4)


@pytest.mark.parametrize("appends_end", [False, True])
def test_prompts_are_cut_where_they_part_not_where_the_text_ends(appends_end):
    tokenizer = LetterTokenizer(appends_end)
    # "\n" + "\n\nQuestion" is "\n\n", "\n", "Question" as one text, so the last shared token is "x".
    task = RetrievalTask("ab x\n", ("\n\nQuestion: A?", "\n\nQuestion: B?"), ("111111", "222222"), (0.0, 0.0))
    document, questions = split_prompt(tokenizer, task)
    plain = LetterTokenizer()
    assert plain.decode(document) == "ab x"
    for question, rest in zip(task.questions, questions, strict=True):
        assert document + rest == plain.encode(task.text + question)


def test_wrong_digits_are_wrong(reader):
    task = RetrievalTask(
        "The secret code for Ada is 123456.\n" * 3,
        ("\n\nQuestion: What is the secret code for Ada?\nAnswer: The secret code for Ada is",),
        ("123457",),
        (0.0,),
    )
    report = evaluate_retrieval(reader, LetterTokenizer(), [task], [cache_maker("dynamic", reader)])[
        "dynamic"
    ]
    assert report.correct == 0
    assert report.answers[0].text == " 123456."
    assert report.same_as_uncompressed == 1


def test_depth_is_passed_on():
    tasks = make_tasks(LetterTokenizer(), 1500, questions=2, depth=1.0)
    assert all(depth > 0.9 for task in tasks for depth in task.depths)


def test_progress_is_told(reader):
    seen = []
    tasks = make_tasks(LetterTokenizer(), 1000, questions=3)
    evaluate_retrieval(reader, LetterTokenizer(), tasks, [cache_maker("dynamic", reader)], seen.append)
    assert seen == [1, 2, 3]


def test_no_questions_are_refused(reader):
    with pytest.raises(InputError, match="no questions"):
        evaluate_retrieval(reader, LetterTokenizer(), [], [cache_maker("dynamic", reader)])
    with pytest.raises(InputError, match="questions=0"):
        make_tasks(LetterTokenizer(), 1000, questions=0)
