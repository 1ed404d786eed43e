"""The bundled model's tasks: every answer against an independent solver that reads the prompt alone."""

import re
from random import Random

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundled import tasks, tokenizer

TOKENS = tokenizer.build()
LARGEST_BUDGET = 512
"""More than the largest one that `trifleet evaluate` tries by default."""


def solve_search(prompt: str) -> str:
    """networkx walks the whole tree; the stack after k steps is read off its labelled edges."""
    graph = networkx.Graph()
    graph.add_node(0)
    graph.add_edges_from(tuple(map(int, pair)) for pair in re.findall(r"(\d+)-(\d+)", prompt))
    steps = int(prompt.split()[-1])
    moves = networkx.dfs_labeled_edges(graph, source=0, sort_neighbors=sorted)
    moves = ((v, kind) for u, v, kind in moves if kind != "nontree")
    stack: list[int] = []
    for _, (node, kind) in zip(range(steps), moves, strict=False):
        if kind == "forward":
            stack.append(node)
        else:
            assert stack.pop() == node
    return f"stack {' '.join(f'={node}' for node in stack)}"


def solve_program(prompt: str) -> str:
    """A plain interpreter of the program, run for every name of the chain."""
    listed, rest = prompt.split(" run ")
    runs, rest = rest.split(" add ")
    recalls, rest = rest.split(" ask ")
    asked, start = rest.split(" start ")
    program = [word.split(":")[1] for word in listed.split() if re.fullmatch(r"\d+:.*", word)]
    assert program.pop() == "mark"
    following = dict(word.split(">") for word in runs.split())
    added = dict(word.split("&") for word in recalls.split())
    *state, name = start.split()
    values = {register: int(value) for register, value in (word.split("=") for word in state)}
    marks: dict[str, int] = {}
    while name != "end":
        for instruction in program:
            target, source = instruction.split("+")
            values[target] = (values[target] + (values[source] if source in values else int(source))) % 10
        marks[name] = values["a"]
        values["a"] = (values["a"] + marks[added[name]]) % 10
        name = following[name]
    assert marks.keys() == added.keys() == following.keys()
    if asked == "code":
        return f"report code *{solve_arrows(prompt)}"
    found = ["report"]
    for query in asked.split():
        number, name = query.split("?")
        found += [number, query, *([] if name == "end" else [f"{name}={marks[name]}"])]
    return " ".join(found)


def solve_arrows(prompt: str) -> str:
    """The last node before `end` of the chain that starts where the prompt begins."""
    arrows = networkx.DiGraph(pair.split("<") for pair in prompt.split() if "<" in pair and "begin" not in pair)
    start = re.search(r"begin<(\w+)", prompt).group(1)
    *_, last, end = networkx.shortest_path(arrows, start, "end")
    assert end == "end"
    return last


def solve(task: str, prompt: str) -> str:
    return solve_search(prompt) if task == "search" else solve_program(prompt)


@pytest.mark.parametrize("task", tasks.TASKS)
@settings(max_examples=60)  # instances are drawn until one fits
@given(seed=st.integers(0, 10**6))
def test_a_held_out_instance_has_the_answer_that_an_independent_solver_finds(task: str, seed: int) -> None:
    instance = tasks.held_out(task, seed, 300, 1_500)
    assert solve(task, instance.prompt) == instance.answer
    assert instance.is_correct(instance.reply)


@given(st.integers(0, 10**6), st.sampled_from(tasks.FAMILIES), st.integers(2, tasks.LARGEST_GRAPH), st.floats(0, 1))
def test_a_search_of_any_size_and_length_has_the_stack_that_networkx_finds(
    seed: int, family: str, nodes: int, share: float
) -> None:
    instance = tasks.search(Random(seed), family, nodes, share)
    assert solve_search(instance.prompt) == instance.answer


@given(st.integers(0, 10**6))
def test_a_search_lists_every_node_with_its_entry_or_as_new(seed: int) -> None:
    instance = tasks.held_out("search", seed, 300, 900)
    entered = re.findall(r"new ((\d+)>(\d+))", instance.reply)
    entries = {"0": "top>0", **{node: entry for entry, _, node in entered}}
    assert len(entries) == len(entered) + 1
    edges = set(re.findall(r"(\d+)-(\d+)", instance.prompt))
    assert all((source, node) in edges for _, source, node in entered)
    listed = re.findall(r"(\d+)\? (\S+)", instance.reply.splitlines()[-1])
    nodes = re.findall(r"(\d+):", instance.prompt)
    assert listed == [(node, entries.get(node, "new")) for node in reversed(nodes)]
    asked = [found for line in instance.reply.splitlines()[:-1] for found in re.findall(r"(\d+)\? (\d+>\d+)", line)]
    assert all(entries[node] == entry for node, entry in asked)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_graphs_are_of_the_family_that_they_are_called(family: str) -> None:
    for seed in range(20):
        prompt = tasks.search(Random(seed), family, tasks.LARGEST_GRAPH, 1.0).prompt
        graph = networkx.Graph(re.findall(r"(\d+)-(\d+)", prompt))
        if family == "tree":
            assert networkx.is_tree(graph)
            assert len(graph) == tasks.LARGEST_GRAPH
        elif family == "small_world":
            assert 42 <= graph.number_of_edges() <= 48
        else:
            assert 44 <= graph.number_of_edges() <= 122  # 276 pairs at .3: 82.8, sigma 7.6


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize(("low", "high"), [(300, 700), (1_000, 1_600)])
def test_replies_are_as_long_as_asked_for(task: str, low: int, high: int) -> None:
    for seed in range(5):
        instance = tasks.held_out(task, seed, low, high)
        reply = TOKENS.encode(instance.reply, add_special_tokens=False)
        assert low <= len(reply) + 1 == tasks.reply_tokens(instance) <= high


@pytest.mark.parametrize("task", tasks.TASKS)
def test_most_answers_need_a_generated_token_that_is_older_than_any_budget_tried(task: str) -> None:
    instances = [tasks.held_out(task, seed, 1_000, 2_250) for seed in range(200)]
    assert sum(instance.reach > LARGEST_BUDGET for instance in instances) >= 100


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_wrong_missing_or_unfinished_answer_is_not_correct(task: str) -> None:
    instance = tasks.held_out(task, 3, 300, 700)
    assert instance.is_correct(instance.reply)
    assert not instance.is_correct("")
    assert not instance.is_correct(instance.reply[: instance.reply.index(instance.answer)])
    assert not instance.is_correct(instance.reply[: instance.reply.index(instance.answer) + len(instance.answer) - 2])
    assert not instance.is_correct(f"{instance.reply}\n {instance.answer} =1")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_length_that_no_instance_has_is_refused_by_a_sentence(task: str) -> None:
    with pytest.raises(ValueError, match=f"no {task} with a reply of 41 to 41 tokens was found: widen the range"):
        tasks.held_out(task, 0, 41, 41)
