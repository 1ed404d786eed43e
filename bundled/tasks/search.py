"""Recursive state query: depth-first search of an undirected graph, and its exact stack after k steps.

    user:      Search: 0: 0-1 0-2 1: 1-0 2: 2-0 list 2? steps 4
    assistant:  0? top>0 at 0? top>0 depth 1 left 3            the search starts at node 0; 3 steps are left
                0: 0-1 1? new 0>1 at 1? 0>1 depth 2 left 2     after `0:` comes edge 0-1, to node 1, a new one
                1: 1-0 0? top>0 at 1? 0>1 depth 2 left 2       node 0 was entered before
                1-0 2: back 1? 0>1 at 0? top>0 depth 1 left 1  no edge of node 1 is left: back to where it came from
                0-1 0-2 2? new 0>2 at 2? 0>2 depth 2 left 0    after edge 0-1 comes 0-2
                up 2? 0>2 0^2 0? top>0                         from the current node to the root
                stack =0 =2                                    the answer
                list 2? 0>2 1? 0>1 0? top>0

(The notes are not part of the reply.) Neighbours are taken in ascending order. A line starts with what the next entry
of the prompt's row comes after. Whether and from where a node was entered stands only in the reply itself, in the lines
that were at it or asked for it, however long ago.
"""

from random import Random

from bundled.tasks.instance import Instance, Line, text

LARGEST_GRAPH = 24
MOST_STEPS = 2 * LARGEST_GRAPH
FAMILIES = ("tree", "small_world", "random")

Graph = dict[int, list[int]]
"""Node -> its neighbours, ascending."""


def make_graph(random: Random, family: str, nodes: int) -> Graph:
    """A graph whose node 0 reaches at least half of the nodes.

    `tree`: uniform among labelled trees. `small_world`: a ring with 4 neighbours each, an edge rewired with
    probability .1 (Watts and Strogatz 1998), at least one: the ring alone would be in every series. `random`: every
    edge with probability .3 (.6 below 8 nodes).
    """
    while True:
        edges: set[tuple[int, int]] = set()
        if family == "tree":
            # The first entries into each node of a random walk (Broder 1989).
            here, entered = 0, {0}
            while len(entered) < nodes:
                there = random.randrange(nodes)
                if there not in entered:
                    entered.add(there)
                    edges.add((here, there))
                here = there
        elif family == "small_world":
            is_new = False
            for node in range(nodes):
                for distance in (1, 2):
                    other = (node + distance) % nodes
                    if random.random() < 0.1:
                        other, is_new = random.randrange(nodes), True
                    if other != node and (other, node) not in edges:
                        edges.add((node, other))
            if not is_new:
                continue
        else:
            share = 0.3 if nodes >= 8 else 0.6
            edges = {(a, b) for a in range(nodes) for b in range(a) if random.random() < share}
        neighbours: dict[int, set[int]] = {node: set() for node in range(nodes)}
        for one, other in edges:
            neighbours[one].add(other)
            neighbours[other].add(one)
        graph = {node: sorted(others) for node, others in neighbours.items()}
        if 2 * len(_reached(graph)) >= nodes:
            return graph


def _reached(graph: Graph) -> set[int]:
    reached, pending = {0}, [0]
    while pending:
        for other in graph[pending.pop()]:
            if other not in reached:
                reached.add(other)
                pending.append(other)
    return reached


def search(random: Random, family: str, nodes: int, share: float) -> Instance:
    """A search of a `family` graph of `nodes` nodes, stopped after a `share` (0 to 1) of the steps it would take."""
    assert 2 <= nodes <= LARGEST_GRAPH
    graph = make_graph(random, family, nodes)
    steps = max(1, round(share * (2 * len(_reached(graph)) - 1)))
    return _solve(graph, steps)


def _solve(graph: Graph, steps: int) -> Instance:
    last = len(graph) - 1
    rows = [[f"{node}:", *(f"{node}-{other}" for other in others)] for node, others in graph.items()]
    prompt = f"Search: {' '.join(word for row in rows for word in row)} list {last}? steps {steps}"
    left = steps - 1
    stack, entries = [0], {0: "top>0"}

    def state() -> Line:
        return ["at", f"{stack[-1]}?", entries[stack[-1]], "depth", str(len(stack)), "left", str(left)]

    lines: list[Line] = [["0?", entries[0], *state()]]
    anchor = "0:"
    while left:
        here = stack[-1]
        for other in graph[here]:
            edge = f"{here}-{other}"
            if anchor != f"{here}:" and other <= int(anchor.split("-")[1]):
                continue
            if other in entries:
                lines.append([anchor, edge, f"{other}?", entries[other], *state()])
                anchor = edge
                continue
            left -= 1
            entries[other] = f"{here}>{other}"
            stack.append(other)
            lines.append([anchor, edge, f"{other}?", "new", entries[other], *state()])
            anchor = f"{other}:"
            break
        else:
            left -= 1
            stack.pop()
            after = "list" if here == last else f"{here + 1}:"
            lines.append([anchor, after, "back", f"{here}?", entries[here], *state()])
            anchor = f"{stack[-1]}-{here}"
    answer = ["stack", *(f"={node}" for node in stack)]
    latest_first = [word for line in reversed(lines) for word in ["\n", *reversed(line)]]
    reach = max((latest_first.index(entries[node]) + 1 for node in stack[1:]), default=0)
    up = ["up"]
    for below, node in zip([None, *reversed(stack)], reversed(stack), strict=False):
        up += [*([] if below is None else [f"{node}^{below}"]), f"{node}?", entries[node]]
    listed = ["list"]
    for node in range(last, -1, -1):
        listed += [f"{node}?", entries.get(node, "new")]
    return Instance(prompt, text([*lines, up, answer, listed]), " ".join(answer), reach)


def words() -> list[str]:
    """Every word that a search may hold, each a token."""
    numbers = range(LARGEST_GRAPH)
    return [
        *("Search:", "list", "steps", "new", "back", "up", "stack", "at", "depth", "left", "top>0"),
        *(form.format(n) for form in ("{}:", "{}?", "={}") for n in numbers),
        *map(str, range(MOST_STEPS + 1)),
        *(f"{one}{sign}{other}" for sign in "->^" for one in numbers for other in numbers if one != other),
    ]
