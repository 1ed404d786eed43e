"""What may not stand in our code: ways to run what came in as data."""

import ast
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("triattention", "replicas", "deploy", "dashboards", "bundled", "benchmarks")
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def unsafe(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNSAFE_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append("trust_remote_code")
        elif isinstance(node, ast.Call):
            found += _unsafe_call(node)
    return found


def _unsafe_call(call: ast.Call) -> list[str]:
    if isinstance(call.func, ast.Name):
        return [call.func.id] if call.func.id in UNSAFE_CALLS else []
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load" and given.get("weights_only") != "True":
        return ["torch.load"]
    if (name == "yaml.load" and "Safe" not in ast.unparse(call)) or given.get("shell") == "True" or name == "os.system":
        return [name]
    return ["allow_pickle"] if given.get("allow_pickle") == "True" else []


def test_nothing_that_comes_in_as_data_is_run() -> None:
    assert len(FILES) > 100
    found = {str(file.relative_to(ROOT)): unsafe(ast.parse(file.read_text())) for file in FILES}
    assert {file: what for file, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "eval(x)", "f(trust_remote_code=True)", "torch.load(x)",
     "yaml.load(x)", "subprocess.run(x, shell=True)", "numpy.load(x, allow_pickle=True)"],
)  # fmt: skip
def test_the_check_sees_what_it_looks_for(line: str) -> None:
    assert unsafe(ast.parse(line))


def test_pins_are_renewed_from_what_is_installed() -> None:
    namespace: dict[str, object] = {}
    exec((ROOT / "requirements" / "renew.py").read_text(), namespace)  # a script, not a module of ours
    renewed = namespace["renewed"]
    text = "# a comment\npyyaml==0.1\n--extra-index-url x\n"
    assert renewed(text) == f"# a comment\npyyaml=={version('pyyaml')}\n--extra-index-url x\n"  # type: ignore[operator]
