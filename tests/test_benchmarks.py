"""The benchmarks run, and their arithmetic is right; what they measure is not looked at.

python -m pytest tests/test_benchmarks.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import before_after, bench_lcnn, bench_openvino, estimates, gpu
from runtime.cli import InputError

# ── gpu.py ──


@pytest.fixture
def run(tmp_path: Path) -> gpu.Run:
    return gpu.Run(tmp_path, torch.device("cpu"), gpu.QUICK, tmp_path / "results.json", 10)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small operators wait for a second thread longer than it helps, above all beside tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_part_of_the_gpu_run_works_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture, one_thread: None
) -> None:
    gpu.main(["--quick", "-o", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "FAILED" not in printed, printed
    assert "left out" not in printed, printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["Seconds"]) == {part.__name__ for _, part in gpu.PARTS}
    assert results["Front end"]["fp32, 2"]["relative error"] < 1e-6
    assert 1e-4 < results["Front end"]["bf16, 2"]["relative error"] < 0.1
    for table in ("Front end", gpu.EXTRACTION, gpu.STEPS, gpu.EPOCHS):
        assert results[table]["W2VAASIST, fp32" if "Train" in table else "fp32, 2"]["clips/s"] > 0


def test_without_a_gpu_the_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a GPU.*--quick"):
        gpu.main([])


def test_a_line_that_fails_says_so_and_the_rest_goes_on(
    run: gpu.Run, capsys: pytest.CaptureFixture
) -> None:
    def broken() -> list[float]:
        raise RuntimeError("out of\nmemory")

    table = run.table("Speed", "what", "clips/s")
    table.row("first", broken)
    table.row("second", lambda: [1234.5])
    run.ends = -1
    table.row("third", lambda: [1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "| first | FAILED: RuntimeError: out of memory |",
        "| second | 1,234 |",
        "| third | left out: no time left |",
    ]
    saved = json.loads(run.out.read_text())["Speed"]
    assert saved["second"] == {"clips/s": 1234.5}
    assert (run.value("Speed", "first", "clips/s"), run.value("Speed", "second", "clips/s")) == (
        None,
        1234.5,
    )


def test_a_part_that_fails_does_not_end_the_run(
    run: gpu.Run, capsys: pytest.CaptureFixture
) -> None:
    def broken(run: gpu.Run) -> None:
        raise ValueError("no such thing")

    gpu.do_part(run, 1, broken)
    gpu.do_part(run, 100, broken)  # more than twice the budget that is left
    printed = capsys.readouterr().out
    assert "broken FAILED: ValueError: no such thing" in printed
    assert "broken: left out" in printed


def test_estimates_fail_outside_a_quarter(run: gpu.Run, capsys: pytest.CaptureFixture) -> None:
    run.results = {
        "Front end": {
            "bf16, 32": {"relative error": 1.4e-2},
            "tf32, 32": {"relative error": 1.3e-3},
            "fp16, 32": {"FAILED": "no such precision"},
        }
    }
    gpu.compare(run)
    verdicts = {name: row["verdict"] for name, row in run.results["Estimates"].items()}
    assert verdicts == {
        "Front end: bf16, 32: relative error": "holds",
        "Front end: tf32, 32: relative error": "fails",
    }


# ── bench_lcnn.py, bench_openvino.py, before_after.py ──


@pytest.mark.parametrize("script", [bench_lcnn, bench_openvino, before_after])
def test_a_table_is_printed(
    script: ModuleType, one_thread: None, capsys: pytest.CaptureFixture
) -> None:
    script.main(["--quick"])
    printed = capsys.readouterr().out
    assert printed.count("\n|") >= 3, printed
    assert "DIFFERENT" not in printed and "OUTSIDE" not in printed, printed


@pytest.mark.parametrize("feat", ["xls-r-5", "mel"])
def test_other_ways_of_the_lcnn_give_its_numbers(feat: str) -> None:
    """The losses and the first layer's gradient; channels last sum in another order, so that a few
    maxima fall to the other half.
    """
    features = torch.randn(2, *bench_lcnn.FEATURE_SHAPES[feat], generator=torch.manual_seed(0))
    labels = torch.arange(2)
    losses, gradients = [], []
    for _, change, precision in bench_lcnn.WAYS:
        if precision == "fp32":
            head = bench_lcnn.build("lcnn", feat, change)
            losses.append(float(bench_lcnn.step(head, features, labels, precision)))
            gradients.append(next(head.conv1.parameters()).grad)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    for gradient, tolerance in zip(gradients, (0, 1e-5, 0, 3e-2, 3e-2), strict=True):
        assert (gradient - gradients[0]).norm() <= tolerance * gradients[0].norm()


# ── estimates.py ──


def test_steps_take_what_the_arithmetic_says() -> None:
    """H100, W2V2-AASIST, by hand: 492 / 30 + 38 / 2.8 ms in float32, 492 / 250 + 20 / 2.8 in bf16,
    twice that with SAM; on a card without limits 1,238 kernels of 5 us.
    """
    card, head = estimates.CARDS["H100"], estimates.HEADS["W2VAASIST"]
    assert estimates.step_seconds(card, head, "fp32") == pytest.approx(0.02997, rel=1e-3)
    assert estimates.step_seconds(card, head, "bf16") == pytest.approx(0.00911, rel=1e-3)
    assert estimates.step_seconds(card, head, "bf16", sam=True) == pytest.approx(0.01822, rel=1e-3)
    assert estimates.training_rate(card, head, "fp32") == pytest.approx(4_271, rel=1e-3)
    slow = estimates.Card((), {}, 100.0, {"bf16": 1e6})
    assert estimates.step_seconds(slow, head, "bf16") == pytest.approx(1_238 * 5e-6)


def test_cards_are_told_by_their_names() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "Tesla T4": None,
    }
    assert {name: estimates.card_of(name) for name in names} == names
