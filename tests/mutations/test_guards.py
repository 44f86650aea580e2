"""The list is of the code as it is; `make mutations` breaks each guard, which takes minutes."""

import ast

import pytest

from tests.mutations import GUARDS
from tests.mutations.guard import ROOT, Guard


@pytest.mark.parametrize("guard", GUARDS, ids=str)
def test_each_guard_stands_where_the_list_says_and_its_test_exists(guard: Guard):
    assert (ROOT / guard.file).read_text().count(guard.code) == 1
    file, _, name = guard.test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
