"""Cells of retrieval: kinds, lengths, depths, and the table of codes."""

import pytest
from reader import LetterTokenizer, LookupModel

from tqai.errors import InputError
from tqai.evaluation import cache_maker, evaluate_needles, lookup_tasks, make_needles


def test_cells_are_kinds_by_lengths_and_depths():
    cells = make_needles(LetterTokenizer(), (900, 1300), depths=(0.0, 0.9), questions=3)
    assert [(cell.kind, cell.prompt_tokens, cell.depth) for cell in cells] == [
        *(("single", tokens, depth) for tokens in (900, 1300) for depth in (0.0, 0.9)),
        *((kind, tokens, None) for kind in ("multi", "lookup") for tokens in (900, 1300)),
    ]
    assert all(cell.questions == 3 for cell in cells)
    single, deep, multi = cells[0], cells[1], cells[4]
    assert [len(task.questions) for task in single.tasks] == [1, 1, 1]
    assert [len(task.questions) for task in multi.tasks] == [3]
    assert max(task.depths[0] for task in single.tasks) < 0.1 < 0.7 < min(t.depths[0] for t in deep.tasks)


def test_a_table_holds_codes_alone_and_fits():
    tokenizer = LetterTokenizer()
    first, second = lookup_tasks(tokenizer, 1000, 6, seed=2)
    assert [len(first.questions), len(second.questions)] == [4, 2] and first.text != second.text
    lines = first.text.splitlines()
    assert all(line.startswith("The secret code for ") for line in lines) and len(set(lines)) == len(lines)
    for asked, code, depth in zip(first.questions, first.answers, first.depths, strict=True):
        assert 900 < len(tokenizer.encode(first.text + asked)) <= 1000
        line = lines[round(depth * len(lines))]
        assert line.endswith(f" is {code}.") and line[20:].split(" is ")[0] in asked
    assert lookup_tasks(tokenizer, 1000, 2, seed=3)[0].text == second.text


def test_reports_follow_the_cells():
    reader = LookupModel()
    cells = make_needles(LetterTokenizer(), (900,), questions=2)
    told = []
    found = evaluate_needles(reader, LetterTokenizer(), cells, [cache_maker("dynamic", reader)], told.append)
    assert [(r.correct, r.questions) for r in found["dynamic"]] == [(2, 2)] * 3 and told == [1, 2, 3]


def test_bad_requests_are_refused():
    with pytest.raises(InputError, match="kinds"):
        make_needles(LetterTokenizer(), (900,), ("single", "haystack"))
    with pytest.raises(InputError, match="kinds"):
        make_needles(LetterTokenizer(), ())
    with pytest.raises(InputError, match="questions=0"):
        lookup_tasks(LetterTokenizer(), 900, 0)
    with pytest.raises(InputError, match="too few"):
        lookup_tasks(LetterTokenizer(), 200, 4)
