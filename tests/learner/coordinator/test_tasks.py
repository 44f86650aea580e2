import json
import sys
from collections import Counter

import pytest

from common.environments import EnvironmentSpec
from learner.coordinator import rows as rows_module
from learner.coordinator.rows import DataError, open_rows
from learner.coordinator.tasks import open_tasks, shuffled


def a_jsonl_file(tmp_path, num_rows=10):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(num_rows)))
    return path


@pytest.fixture
def a_module(tmp_path, monkeypatch):
    """Writes a module and makes it importable; returns its name."""

    def write(text):
        (tmp_path / "prompts_of_a_user.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "prompts_of_a_user", raising=False)
        return "prompts_of_a_user"

    return write


def prompts(tasks, task_ids):
    return [json.loads(tasks.task(task_id).row)["prompt"] for task_id in task_ids]


@pytest.mark.parametrize("num_places", [1, 2, 3, 4, 5, 16, 17, 100, 1000])
def test_shuffling_is_a_permutation(num_places):
    assert sorted(shuffled(place, num_places, key="a") for place in range(num_places)) == list(range(num_places))


def test_shuffling_spreads_every_place_over_all_others():
    counts = Counter(shuffled(0, 8, key=str(key)) for key in range(4000))
    assert sorted(counts) == list(range(8))
    assert max(counts.values()) < 1.25 * min(counts.values())


def test_each_epoch_goes_through_all_rows_once_in_an_order_of_its_own(tmp_path):
    tasks = open_tasks(str(a_jsonl_file(tmp_path, 50)), seed=3)
    first, second = prompts(tasks, range(50)), prompts(tasks, range(50, 100))
    assert sorted(first) == sorted(second) == sorted(f"question {number}" for number in range(50))
    assert first != second
    assert first != prompts(open_tasks(str(a_jsonl_file(tmp_path, 50)), seed=4), range(50))


def test_a_task_is_the_same_whenever_and_wherever_it_is_made(tmp_path):
    path = str(a_jsonl_file(tmp_path))
    forwards = [open_tasks(path, seed=1).task(task_id) for task_id in range(30)]
    backwards = [open_tasks(path, seed=1).task(task_id) for task_id in reversed(range(30))]
    assert forwards == backwards[::-1]
    assert len({task.seed for task in forwards}) == 30  # the same row in another epoch is sampled anew
    assert all(0 <= task.seed < 1 << 53 for task in forwards)


def test_the_order_of_tasks_never_changes_between_versions_of_the_code():
    assert [shuffled(place, 10, key="order 0 0") for place in range(10)] == [4, 3, 6, 7, 9, 0, 2, 8, 5, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Input data was truncated"),
        ("[1]", "Expected `object`, got `array`"),
        ('{"question": "x"}', "Object missing required field `prompt`"),
        ('{"prompt": 3}', "Expected `str | array`, got `int`"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": []}', "the prompt is empty"),
        ('{"prompt": [{"role": "user"}]}', "Object missing required field `content`"),
        ('{"prompt": "x", "answer": NaN}', "JSON is malformed"),
        ('{"prompt": "' + "x" * (1 << 20) + '"}', "at most 1048576 are possible"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError) as error:
        open_rows(str(path), seed=0)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_chat_prompts_and_further_columns_are_kept_as_they_are(tmp_path):
    path = tmp_path / "chat.jsonl"
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "answer": 4, "nested": {"a": [1.5, None]}}
    path.write_text(json.dumps(row))
    assert json.loads(open_rows(str(path), seed=0).row(0)) == row


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        open_rows(str(tmp_path / "none.jsonl"), seed=0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the file has no rows"):
        open_rows(str(tmp_path / "empty.jsonl"), seed=0)


def test_another_content_has_another_name(tmp_path):
    before = open_tasks(str(a_jsonl_file(tmp_path, 10)), seed=1).name
    assert before == open_tasks(str(a_jsonl_file(tmp_path, 10)), seed=1).name
    assert before != open_tasks(str(a_jsonl_file(tmp_path, 10)), seed=2).name
    assert before != open_tasks(str(a_jsonl_file(tmp_path, 11)), seed=1).name


@pytest.mark.parametrize(
    "source", ["prompts.csv", "python:module", "python:a:b:c", "python::f", "hf:", "hf:a:b:c:d", "hf:a::train"]
)
def test_a_source_of_unknown_form_is_refused_with_the_known_forms(source):
    with pytest.raises(DataError, match="expected"):
        open_rows(source, seed=0)


def test_an_infinite_generator_is_read_as_far_as_needed(a_module):
    name = a_module(
        "def rows(seed):\n    number = 0\n    while True:\n"
        "        yield {'prompt': f'{seed} {number}'}\n        number += 1\n"
    )
    tasks = open_tasks(f"python:{name}:rows", seed=5)
    assert prompts(tasks, [3, 0, 4]) == ["5 3", "5 0", "5 4"]


def test_a_finite_generator_is_called_again_with_the_next_seed(a_module):
    name = a_module("def rows(seed):\n    yield {'prompt': f'a {seed}'}\n    yield {'prompt': f'b {seed}'}\n")
    assert prompts(open_tasks(f"python:{name}:rows", seed=5), range(5)) == ["a 5", "b 5", "a 6", "b 6", "a 7"]


def test_a_generator_without_seed_is_called_without(a_module):
    name = a_module("def rows():\n    yield {'prompt': 'a'}\n")
    assert prompts(open_tasks(f"python:{name}:rows", seed=5), range(2)) == ["a", "a"]


def test_rows_that_are_no_longer_kept_are_generated_again(a_module, monkeypatch):
    monkeypatch.setattr(rows_module, "KEPT_ROW_BYTES", 40)
    name = a_module("def rows():\n    for number in range(100):\n        yield {'prompt': f'question {number}'}\n")
    rows = open_rows(f"python:{name}:rows", seed=0)
    assert json.loads(rows.row(50)) == {"prompt": "question 50"}
    assert len(rows._kept) == 1
    assert json.loads(rows.row(2)) == {"prompt": "question 2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def rows():\n    return []\n", "the generator raised EOFError: it yielded no rows in round 1"),
        ("def rows():\n    raise KeyError(3)\n", "row 0: the generator raised KeyError: 3"),
        ("def rows():\n    yield {'answer': 1}\n", "row 0: expected"),
        ("def rows():\n    yield {'prompt': 'a', 'x': object()}\n", "row 0: the row cannot be written as JSON"),
        ("import no_such_module\n", "cannot be imported: No module named 'no_such_module'"),
        ("rows = 3\n", "has no function rows"),
    ],
)
def test_a_bad_generator_is_an_error_that_names_it(a_module, text, message):
    name = a_module(text)
    with pytest.raises(DataError) as error:
        open_rows(f"python:{name}:rows", seed=0)
    assert f"python:{name}:rows" in str(error.value)
    assert message in str(error.value)


def test_tasks_are_in_memory_if_the_rows_of_every_environment_are(a_module, tmp_path):
    file, name = str(a_jsonl_file(tmp_path)), a_module("def rows():\n    yield {'prompt': 'a'}\n")
    generator = f"python:{name}:rows"

    def mixed(*sources):
        return open_tasks("", seed=0, specs=[EnvironmentSpec(name=data, url="", data=data) for data in sources])

    assert open_tasks(file, seed=0).are_in_memory
    assert open_tasks("system:Say.", seed=0).are_in_memory
    assert not open_tasks(generator, seed=0).are_in_memory
    assert mixed(file, "system:Say.").are_in_memory
    assert not mixed(file, generator).are_in_memory


def test_an_environment_that_makes_its_own_tasks_needs_a_system_message_alone():
    tasks = open_tasks("system:Say the answer alone.", seed=0)
    rows = {tasks.task(task_id).row for task_id in range(5)}
    assert rows == {b'{"prompt":[{"role":"system","content":"Say the answer alone."}]}'}
    assert len({tasks.task(task_id).seed for task_id in range(5)}) == 5


def test_a_dataset_of_hugging_face_is_read_from_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"question {number}", "answer": number} for number in range(4)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_rows(f"hf:{tmp_path / 'data'}", seed=0)
    assert [json.loads(source.row(index)) for index in range(4)] == rows
    assert not source.are_in_memory
    with pytest.raises(DataError, match="the dataset cannot be loaded"):
        open_rows(f"hf:{tmp_path / 'data'}:test", seed=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the split has no rows"),
        ([{"question": "x"}], "row 0: expected"),
        ([{"prompt": "x", "image": object()}], "row 0: a column cannot be written as JSON"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_an_error_that_says_why(monkeypatch, rows, message):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    with pytest.raises(DataError, match=message):
        open_rows("hf:some/dataset", seed=0)
