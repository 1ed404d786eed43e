"""One Prometheus page out of the engines' own: every sample gets its replica's name."""

from collections.abc import Mapping


def merged(pages: Mapping[str, str], prefix: str) -> str:
    """The families whose names begin with `prefix`, each once, with the samples of every replica.

    `pages`: replica -> its page in the text format, as prometheus_client writes it: HELP and TYPE before samples.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif family.startswith(prefix):
                samples.setdefault(family, []).append(_labelled(line, replica))
    lines = [line for family, found in samples.items() for line in (*heads[family], *found)]
    return "".join(f"{line}\n" for line in lines)


def _labelled(sample: str, replica: str) -> str:
    """`name{a="b"} 1` or `name 1` with one more label."""
    label = f'replica="{replica}"'
    name, brace, rest = sample.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
