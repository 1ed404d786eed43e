"""`trifleet evaluate` without an engine: intervals, reductions, problems of a file, names of policies, plots."""

import json
import pickle
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.environment import engine_environment
from benchmarks.quality.engine import EngineRun, Reply
from benchmarks.quality.policies import PolicyError, compression
from benchmarks.quality.problems import Problem, ProblemError, from_file, held_out
from benchmarks.quality.report import Report, wilson
from bundled import tasks
from deploy.cli import app


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def made_run(right: dict[str, int], n: int, peak: int) -> EngineRun:
    replies = [
        Reply(Problem(task, "", 1, lambda reply: True), number < count, 10, peak - number % 2)
        for task, count in right.items()
        for number in range(n)
    ]
    return EngineRun(replies, 5, 0, 100.0, 4096, 1.0)


def made_report() -> Report:
    return Report.of(
        "a model",
        [
            ("full", None, made_run({"search": 98, "needle": 100}, 100, 40)),
            ("triattention", 256, made_run({"search": 97, "needle": 60}, 100, 20)),
            ("triattention:segments=8", 128, made_run({"search": 93, "needle": 40}, 100, 8)),
            ("triattention", 64, made_run({"search": 20, "needle": 0}, 100, 4)),
            ("random", 64, made_run({"search": 98, "needle": 100}, 100, 4)),
        ],
    )


def test_parity_is_the_largest_reduction_of_triattention_whose_interval_overlaps_full_attentions() -> None:
    report = made_report()
    assert report.reduction_at_parity("search") == 5.0
    assert report.reduction_at_parity("needle") == 1.0


def test_the_json_has_the_keys_that_it_is_read_by(tmp_path: Path) -> None:
    made_report().write_json(tmp_path / "deep" / "out.json")
    values = json.loads((tmp_path / "deep" / "out.json").read_text())
    keys = {"task", "policy", "budget", "n", "accuracy", "ci_low", "ci_high", "peak_blocks", "reduction"}
    assert all(set(cell) == keys for cell in values["cells"])
    assert values["full_attention"] == {"search": 0.98, "needle": 1.0}
    assert values["reduction_at_parity"] == {"search": 5.0, "needle": 1.0}
    assert [cell["peak_blocks"] for cell in values["cells"] if cell["task"] == "search"] == [40, 20, 8, 4, 4]


def test_both_plots_come_as_png_and_svg(tmp_path: Path) -> None:
    paths = made_report().plot(tmp_path)
    assert sorted(path.name for path in paths) == [
        "accuracy-by-budget.png", "accuracy-by-budget.svg", "accuracy-by-memory.png", "accuracy-by-memory.svg",
    ]  # fmt: skip
    assert all(path.stat().st_size > 5_000 for path in paths)


def test_problems_of_a_file_are_right_where_the_last_line_has_the_answer_as_words_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text('{"prompt": "6 x 7?", "answer": "42"}\n\n{"prompt": "Capital of Spain?", "answer": "Madrid"}\n')
    numbers, capitals = from_file(file, max_tokens=50)
    assert (numbers.task, numbers.max_tokens) == ("sums", 50)
    for reply in ("42", "I think so.\nThe answer is 42.\n", "\\boxed{42}"):
        assert numbers.is_correct(reply)
    for reply in ("", "142", "42.5", "4 2", "42\nor rather 41"):
        assert not numbers.is_correct(reply)
    assert capitals.is_correct("It is Madrid!")


def test_problems_reach_the_process_of_an_engine(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text('{"prompt": "6 x 7?", "answer": "42"}')
    for problem in (*from_file(file, max_tokens=50), *held_out("needle", 1, 300, 500)):
        arrived = pickle.loads(pickle.dumps(problem))
        assert arrived.is_correct(problem.reply or "42")
        assert not arrived.is_correct("41")


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("5", ["5", "x=5.", "5, I think", "(5)", "**5**", "$5$", "1, 5", "5%", "3 - 5"],
         ["-5", "−5", "+5", "1/5", "5/6", "12,5", "5,000", "5.5", ".5", "15", "50", "5e3"]),
        ("-5", ["-5", "x=-5."], ["5", "3-5", "-5.5", "-5,000"]),
        ("3/4", ["3/4"], ["3/40", "-3/4", "13/4", "3/4/5"]),
        ("1,000", ["1,000", "1,000."], ["1,000,000", "21,000", "-1,000", "1000"]),
        ("5 km", ["5 km", "5   km."], ["-5 km", "12,5 km", "5 kms"]),
        ("Apollo 1", ["Apollo 1.", "(Apollo 1)", "so,Apollo 1"], ["Apollo 11", "Apollo 1,1"]),
    ],
)  # fmt: skip
def test_a_number_is_right_where_it_is_the_whole_number(
    tmp_path: Path, answer: str, right: list[str], wrong: list[str]
) -> None:
    file = tmp_path / "numbers.jsonl"
    file.write_text(json.dumps({"prompt": "?", "answer": answer}))
    (problem,) = from_file(file, max_tokens=50)
    assert [reply for reply in right if not problem.is_correct(reply)] == []
    assert [reply for reply in wrong if problem.is_correct(reply)] == []


def test_a_file_has_lines_that_end_with_newlines_alone_and_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "words.jsonl"
    lines = ('{"prompt": "a\u2028b\u0085c", "answer": "d"}', '{"prompt": "e", "answer": "f"}')
    file.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [problem.prompt for problem in from_file(file, max_tokens=50)] == ["a\u2028b\u0085c", "e"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', "line 2 is no problem"),
        ("not json", "line 1 is no problem"),
        ('{"prompt": 3, "answer": "b"}', "line 1 is no problem"),
        ("[]", "line 1 is no problem"),
        ("\n", "has no problems"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(ProblemError, match=sentence):
        from_file(file, max_tokens=50)


def test_held_out_problems_of_every_task_know_their_right_reply() -> None:
    for task in tasks.TASKS:
        for problem in held_out(task, 3, 300, 500):
            assert problem.is_correct(problem.reply)
            assert not problem.is_correct("")


def test_a_policy_is_named_with_its_settings(tmp_path: Path) -> None:
    statistics = tmp_path / "statistics.safetensors"
    config = compression("triattention:selection=per_head,segments=8,window=16", 128, 64, 32, statistics)
    assert config is not None
    assert (config.selection, config.segments, config.window, config.interval) == ("per_head", 8, 16, 64)
    assert (config.budget, config.statistics) == (128, statistics)
    assert compression("full", None, 64, 32, None) is None


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("snapkv", "not registered: use one of"),
        ("random:segments", "sets nothing"),
        ("random:segments=0", "segments: "),
        ("random:colour=red", "colour: "),
        ("random:window=500", "window is 500 but budget is 128"),
        ("triattention", "statistics is not set"),
    ],
)
def test_a_policy_that_cannot_be_run_is_refused_in_a_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        compression(spec, 128, 64, 32, None)


def test_the_command_refuses_mistakes_before_any_engine_starts(tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments, sentence in (
        (["--task", "chess"], 'task is "chess"'),
        (["--policy", "snapkv"], 'policy is "snapkv"'),
        (["--problems", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--shortest", "900", "--longest", "800"], "--shortest is 900"),
    ):
        result = runner.invoke(app, ["evaluate", "--instances", "1", *arguments])
        assert result.exit_code == 1
        assert sentence in " ".join(result.output.split())


def test_an_engine_on_a_gpu_needs_no_nvcc_and_whoever_has_one_may_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    assert engine_environment()["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert engine_environment()["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
