"""The training loop.    python -m pytest tests/test_main_train.py"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dataset
import main_train
import model
from dataset import FEATURE_SHAPES, Trial
from formats import torch_files
from formats.feature_cache import CacheWriter
from main_train import Sharpness, train_step
from runtime.cli import InputError

SAM, ASAM = Sharpness(0.05, adaptive=False), Sharpness(0.05, adaptive=True)


# ── One step ──


def without_dropout(head: nn.Module) -> nn.Module:
    """Train mode, every dropout switched off: functional dropout asks the layer that calls it."""
    head.train()
    for module in head.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False
    return head


@pytest.mark.parametrize("kind, sharpness", [("adam", None), ("sam", SAM)])
def test_three_steps_follow_the_published_dynamics(
    reference: Path, kind: str, sharpness: Sharpness | None
) -> None:
    """Losses to 1e-5, running statistics to 1e-5 and 1e-4: the latter show whether SAM's second
    pass left them alone.
    """
    from safetensors.torch import load_file

    expected = json.loads((reference / "training_dynamics.json").read_text())[kind]
    head = without_dropout(model.load_head(reference / "checkpoints" / "codec_w2v2aasist"))
    optimiser = torch.optim.Adam(head.parameters(), lr=5e-4, weight_decay=5e-4)
    features = load_file(reference / "codec_w2v2aasist.parity.safetensors")["features"].float()
    labels = torch.tensor([0, 1, 1, 0])
    losses = [float(train_step(head, optimiser, features, labels, sharpness)) for _ in range(3)]
    np.testing.assert_allclose(losses, expected["losses"], atol=1e-5)
    state = head.state_dict()
    for name, values in expected["running"].items():
        np.testing.assert_allclose(
            state[name][:6],
            values,
            atol=1e-5 if name.startswith("first_bn.") else 1e-4,
            err_msg=name,
        )
    with torch.inference_mode():
        np.testing.assert_allclose(head.eval()(features)[1], expected["logits_after"], atol=0.1)


def test_the_loss_divides_by_the_sum_of_weights() -> None:
    logits, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 1, 0, 1])
    weights = torch.tensor([10.0, 1.0])[labels]
    plain = (weights * F.cross_entropy(logits, labels, reduction="none")).sum() / weights.sum()
    torch.testing.assert_close(main_train.weighted_cross_entropy(logits, labels), plain)


@pytest.mark.parametrize("sharpness", [SAM, ASAM])
def test_the_perturbation_is_that_of_the_papers(sharpness: Sharpness) -> None:
    """Its length in the right metric is rho: ||e|| for SAM, ||e / |w||| for ASAM; one norm over all
    parameters.
    """
    head = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    head(torch.randn(5, 3)).square().sum().backward()
    before = {p: value for p, value in main_train.climb(head, sharpness)}
    moved = torch.cat(
        [
            ((p - value) / (value.abs() if sharpness.adaptive else 1)).flatten()
            for p, value in before.items()
        ]
    )
    torch.testing.assert_close(moved.norm(), torch.tensor(sharpness.rho), atol=1e-5, rtol=0)
    for p, value in before.items():
        direction = p.grad * (value.square() if sharpness.adaptive else 1)
        torch.testing.assert_close(
            F.normalize((p - value).flatten(), dim=0),
            F.normalize(direction.flatten(), dim=0),
            atol=1e-4,
            rtol=0,
        )
    main_train.descend(list(before.items()))
    assert all(torch.equal(p, value) for p, value in before.items())


def test_batchnorm_statistics_are_left_alone_in_the_second_pass() -> None:
    """They normalise by the batch there, and not even the count of batches moves."""
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3) * 5 + 2
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    with main_train.frozen_batchnorm(nn.Sequential(norm)):
        assert norm(x).mean().abs() < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    norm(x)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    "build, backend",
    [(lambda: model.LCNN("mel"), "aot_eager"), (model.W2VAASIST, "eager")],
    ids=["LCNN", "W2VAASIST"],
)
def test_three_steps_of_a_compiled_head_are_those_of_the_plain_one(
    build: Callable[[], nn.Module], backend: str, monkeypatch
) -> None:
    """With SAM, as one graph: the losses, and the weights to which the gradients led. aot_eager
    traces the backward pass too, which LCNN writes by hand; it takes a minute for W2VAASIST.
    """
    monkeypatch.setattr(main_train, "COMPILER", backend)
    torch.manual_seed(0)
    plain = without_dropout(build())
    other = copy.deepcopy(plain)
    frames, dim = FEATURE_SHAPES[plain.feat]
    features, labels = torch.randn(3, 4, frames, dim), torch.tensor([0, 1, 1, 0])
    losses = []
    for head, network in ((plain, plain), (other, main_train.CompiledHead(other, 4))):
        optimiser = torch.optim.SGD(head.parameters(), lr=0.01)
        steps = [train_step(network, optimiser, x, labels, SAM) for x in features]
        losses.append(torch.stack(steps))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=0)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_gradient_of_the_larger_half_is_the_same_compiled() -> None:
    x, grad = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 3, 4)
    x[:, 3] = x[:, 0]  # a tie goes to the first half
    gradients = []
    for layer in (model.MaxFeatureMap2D(), torch.compile(model.MaxFeatureMap2D(), backend="eager")):
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(grad)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


# ── Runs ──


def make_features(
    folder: Path,
    n: int,
    seed: int,
    task: str = "codecfake",
    shift: float = 0.05,
    dtype: str = "float16",
) -> Path:
    """A mel cache whose classes differ a little."""
    for part, rows in (("train", n), ("dev", 6)):
        rng = np.random.default_rng((seed, rows))
        labels = np.arange(rows) % 3 > 0
        values = rng.random((rows, 505, 80), np.float32) * 0.1 + shift * labels[:, None, None]
        writer = CacheWriter(
            folder / part / "mel",
            [Trial(f"{task}{i}.wav", "", int(f), "-") for i, f in enumerate(labels)],
            {"feat": "mel"},
            (505, 80),
            dtype,
        )
        writer.write(range(rows), values)
        writer.close()
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("features")
    return make_features(root / "Codecfake", 8, 0), make_features(root / "LA", 4, 1, "LA")


def train(features: tuple[Path, Path], out: Path, *options: str, task: str = "co-train") -> Path:
    main_train.main(
        [
            "-t",
            task,
            "-m",
            "lcnn",
            "--feat",
            "mel",
            "-f",
            str(features[0]),
            "-f1",
            str(features[1]),
            "-o",
            str(out),
            "--batch_size",
            "4",
            "--num_workers",
            "1",
            "--gpu",
            "-1",
            *options,
        ]
    )
    return out


def weights(out: Path, name: str = "anti-spoofing_feat_model.pt") -> bytes:
    return (out / name).read_bytes()


@pytest.mark.parametrize("options", [(), ("--CSAM",), ("--ASAM", "True")])
def test_two_epochs_resumed_for_two_equal_four(
    features, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """To the last bit: weights, optimiser, schedule, order (CSAM's smaller corpus carries over) and
    dropout all go on.
    """
    whole = train(features, tmp_path / "whole", "--num_epochs", "4", *options)
    halves = train(features, tmp_path / "halves", "--num_epochs", "2", *options)
    train(features, halves, "--num_epochs", "4", "--continue_training", *options)
    for name in (
        "anti-spoofing_feat_model.pt",
        *(f"checkpoint/anti-spoofing_feat_model_{epoch}.pt" for epoch in (1, 2, 3, 4)),
    ):
        assert weights(whole, name) == weights(halves, name), name
    assert weights(whole, "checkpoint/anti-spoofing_feat_model_3.pt") != weights(
        whole, "checkpoint/anti-spoofing_feat_model_4.pt"
    )


def test_eight_bit_features_train_as_exact_ones_do(tmp_path: Path) -> None:
    """Losses of two epochs differ by 0.04, as those of float16 and float32 do by 0.03: Adam
    magnifies any difference in so short a run. With codes of three steps instead of 127 they differ
    by 0.3.
    """
    losses = []
    for dtype in ("float32", "sqrt8"):
        features = make_features(tmp_path / dtype, 12, 0, shift=0.3, dtype=dtype)
        out = train(
            (features, features), tmp_path / f"{dtype}_model", "--num_epochs", "2", task="codecfake"
        )
        losses.append(
            [
                (record["loss"], record["dev_loss"])
                for record in map(json.loads, (out / "log.jsonl").read_text().splitlines())
            ]
        )
    np.testing.assert_allclose(losses[1], losses[0], atol=0.1)


def test_codes_decoded_in_the_loop_train_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, for which rows stay codes until they are there."""
    features = make_features(tmp_path / "sqrt8", 8, 0, dtype="sqrt8")
    options = ("--num_epochs", "1")
    expected = train((features, features), tmp_path / "host", *options)
    monkeypatch.setattr(dataset, "is_gpu", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(dataset.JoinedFeatures, "read", None)
    found = train((features, features), tmp_path / "device", *options)
    assert weights(found) == weights(expected)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_goes_on_in_the_middle_of_an_epoch(
    features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Also where losses are looked at one step late, as on a GPU."""
    whole = train(features, tmp_path / "whole", "--num_epochs", "2", "--SAM")
    steps = 0
    real_step = main_train.shard_step

    def stop_at_the_fifth(*arguments):
        nonlocal steps
        steps += 1
        if steps == 5:  # an epoch has three steps; this is the second of epoch 2
            raise KeyboardInterrupt
        return real_step(*arguments)

    monkeypatch.setitem(main_train.STEPS_AHEAD, "cpu", ahead)
    monkeypatch.setattr(main_train, "SAVE_EVERY", -1)
    monkeypatch.setattr(main_train, "shard_step", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train(features, tmp_path / "stopped", "--num_epochs", "2", "--SAM")
    assert torch_files.load(tmp_path / "stopped/last_state.pt")["progress"]["step"] == 1
    monkeypatch.undo()
    train(features, tmp_path / "stopped", "--num_epochs", "2", "--SAM", "--continue_training")
    for name in ("anti-spoofing_feat_model.pt", "checkpoint/anti-spoofing_feat_model_2.pt"):
        assert weights(whole, name) == weights(tmp_path / "stopped", name)


def test_a_late_look_at_the_losses_changes_nothing(
    features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = []
    for ahead in (0, 1, 7):
        monkeypatch.setitem(main_train.STEPS_AHEAD, "cpu", ahead)
        outs.append(train(features, tmp_path / str(ahead), "--num_epochs", "2"))
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (out / "log.jsonl").read_text().splitlines()]
        for out in outs
    ]
    assert logs[1] == logs[0] and logs[2] == logs[0]
    assert weights(outs[1]) == weights(outs[0]) == weights(outs[2])


def test_the_step_of_a_bad_loss_is_named_also_when_it_is_seen_late(
    features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step = main_train.shard_step
    messages = []
    for ahead in (0, 1):
        steps = itertools.count(1)

        def bad_at_the_second(*arguments, steps=steps):
            loss = real_step(*arguments)
            return (lambda: float("nan")) if next(steps) == 2 else loss

        monkeypatch.setattr(main_train, "shard_step", bad_at_the_second)
        monkeypatch.setitem(main_train.STEPS_AHEAD, "cpu", ahead)
        with pytest.raises(InputError) as refused:
            train(features, tmp_path / str(ahead), "--num_epochs", "1")
        messages.append(str(refused.value))
    assert messages[0].startswith("epoch 1, step 2: the loss is nan; the batch's first clips: ")
    assert messages[1] == messages[0]


def test_what_a_run_leaves_behind(features, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = train(features, tmp_path / "run", "--num_epochs", "3", "--interval", "1", "--lr", "0.001")
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["lr"] for record in records] == [0.001, 0.0005, 0.00025]
    assert all({"loss", "dev_loss", "dev_eer", "seconds"} <= set(record) for record in records)
    assert printed.count("dev EER") == 3 and any((out / "tensorboard").iterdir())
    best = min(records, key=lambda record: record["dev_loss"])
    head = model.load_head(out)
    assert (
        head.info["epoch"] == best["epoch"]
        and head.info["train_task"] == "co-train"
        and head.info["seed"] == 688
    )
    assert head.info["labels"] == ["real", "fake"] and head.info["front_end"] == {"feat": "mel"}
    assert f"best epoch {best['epoch']}" in printed


def test_the_dev_loss_is_that_of_the_whole_set(features, tmp_path: Path) -> None:
    """The mean of batch means would be another number: the batches hold 4 and 2 clips."""
    out = train(features, tmp_path / "run", "--num_epochs", "1", task="codecfake")
    dev = dataset.open_features(features[0], "dev", "mel")
    stored, labels = dev.read(np.arange(6))
    with torch.inference_mode():
        logits = model.load_head(out)(stored.float())[1]
    expected = main_train.weighted_cross_entropy(logits, labels)
    assert model.load_head(out).info["dev_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_a_used_folder_is_never_overwritten(features, tmp_path: Path) -> None:
    out = train(features, tmp_path / "run", "--num_epochs", "1", task="19LA")
    before = weights(out)
    with pytest.raises(
        InputError, match=r"not empty \(.*\), and no run is ever overwritten; .*--continue_training"
    ):
        train(features, out, "--num_epochs", "1", task="19LA")
    with pytest.raises(InputError, match="was trained with lr 0.0005, now it is 0.1"):
        train(features, out, "--num_epochs", "2", "--continue_training", "--lr", "0.1", task="19LA")
    train(features, out, "--num_epochs", "1", "--continue_training", task="19LA")
    assert weights(out) == before


def test_a_run_does_not_go_on_with_rows_stored_in_another_type(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 505, 80), np.float32)
    for dtype, part in itertools.product(("float16", "sqrt8"), ("train", "dev")):
        writer = CacheWriter(
            tmp_path / dtype / part / "mel",
            [Trial("a", "", 0, "-"), Trial("b", "", 1, "-")],
            {"feat": "mel"},
            (505, 80),
            dtype,
        )
        writer.write([0, 1], values)
        writer.close()
    command = [
        "-t",
        "19LA",
        "-m",
        "lcnn",
        "--feat",
        "mel",
        "-o",
        str(tmp_path / "run"),
        "--num_epochs",
        "1",
        "--gpu",
        "-1",
        "--num_workers",
        "0",
    ]
    main_train.main([*command, "-f1", str(tmp_path / "float16")])
    with pytest.raises(
        InputError,
        match=r"was trained with dtypes \['float16', 'float16'\], now it is \['sqrt8', 'sqrt8'\]",
    ):
        main_train.main([*command, "-f1", str(tmp_path / "sqrt8"), "--continue_training"])


def test_going_on_needs_a_run(features, tmp_path: Path) -> None:
    """A mistyped folder, and one that holds only weights: nothing is trained over them."""
    options = ("--num_epochs", "1", "--continue_training")
    with pytest.raises(InputError, match="is empty, there is no run to go on with; check -o"):
        train(features, tmp_path / "mistyped", *options, task="19LA")
    torch.manual_seed(0)
    released = tmp_path / "released" / model.WEIGHTS
    released.parent.mkdir()
    model.save_head(released, model.LCNN("mel"), {})
    before = released.read_bytes()
    with pytest.raises(InputError, match="holds no last_state.pt to go on from.*--init_from"):
        train(features, released.parent, *options, task="19LA")
    assert released.read_bytes() == before


def test_a_run_killed_in_its_first_epoch_goes_on(features, tmp_path: Path, monkeypatch) -> None:
    whole = train(features, tmp_path / "whole", "--num_epochs", "1", task="19LA")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main_train, "train_step", killed)
        train(features, tmp_path / "killed", "--num_epochs", "1", task="19LA")
    train(features, tmp_path / "killed", "--num_epochs", "1", "--continue_training", task="19LA")
    assert weights(tmp_path / "killed") == weights(whole)


def test_a_run_begins_from_given_weights(features, tmp_path: Path, monkeypatch) -> None:
    first = train(features, tmp_path / "first", "--num_epochs", "1", task="19LA")
    begun = []
    real_step = main_train.train_step

    def noted(head, *arguments):
        begun.append({name: value.clone() for name, value in head.state_dict().items()})
        return real_step(head, *arguments)

    monkeypatch.setattr(main_train, "train_step", noted)
    out = tmp_path / "tuned"
    train(features, out, "--num_epochs", "1", "--init_from", str(first), task="codecfake")
    given = model.load_head(first).state_dict()
    assert all(torch.equal(begun[0][name], given[name]) for name in given)
    train(features, out, "--num_epochs", "2", "--continue_training", task="codecfake")
    assert "init_from" in model.load_head(out).info


@pytest.mark.parametrize("adaptive", [False, True])
def test_all_parameters_climb_at_once_as_they_do_one_by_one(adaptive: bool) -> None:
    """Equal to the bit, up and back down."""
    torch.manual_seed(0)
    head = model.LCNN("mel")
    for p in head.parameters():
        p.grad = torch.randn_like(p)
    start = [p.detach().clone() for p in head.parameters()]
    scaled = [p.grad * p.detach().abs() if adaptive else p.grad for p in head.parameters()]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in scaled]))
    expected = []
    for p, value in zip(head.parameters(), start, strict=True):
        direction = value.square() if adaptive else 1
        expected.append(value + direction * p.grad * (0.05 / (norm + 1e-12)))
    original = main_train.climb(head, main_train.Sharpness(0.05, adaptive))
    assert all(map(torch.equal, head.parameters(), expected))
    main_train.descend(original)
    assert all(map(torch.equal, head.parameters(), start))


def test_a_broken_tensorboard_costs_only_its_curves(
    features, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = train(features, tmp_path / "run", "--num_epochs", "1", task="19LA")
    assert "note: no TensorBoard curves" in capsys.readouterr().out
    assert (out / "log.jsonl").exists() and (out / model.WEIGHTS).exists()


@pytest.mark.parametrize(
    "option, value, wanted",
    [
        ("--lr", "-1", "above 0"),
        ("--lr", "nan", "above 0"),
        ("--lr_decay", "-1", "above 0"),
        ("--beta_1", "1.5", "of at least 0 and below 1"),
        ("--beta_2", "-0.1", "of at least 0 and below 1"),
        ("--eps", "-1", "above 0"),
        ("--rho", "-1", "above 0"),
        ("--rho", "wide", "above 0"),
    ],
)
def test_settings_out_of_range_are_one_line(option, value, wanted, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main_train.main(["-t", "19LA", option, value])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1 and f"expected a number {wanted}, got {value!r}" in lines[0], lines


def test_a_diverged_head_names_epoch_and_rate(features, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"epoch 1.*lower --lr"):
        train(features, tmp_path / "run", "--num_epochs", "3", "--lr", "1e9", task="19LA")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--SAM", "--ASAM"], "exclude each other"),
        (["-t", "19LA", "--CSAM"], "--CSAM mixes the two corpora"),
        (["--CSAM", "--batch_size", "1"], "at least 2"),
        (["--SAM", "maybe"], "expected True or False"),
        (["-t", "everything"], "invalid choice"),
        (["--batch_size", "0"], "at least 1"),
        (["--num_epochs", "ten"], "a whole number of at least 1"),
    ],
)
def test_options_that_make_no_sense(
    options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main_train.parse(["-t", "co-train", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], False),
        (["--SAM"], True),
        (["--SAM", "True"], True),
        (["--SAM", "False"], False),
        (["--SAM", "false"], False),
    ],
)
def test_switches_mean_what_they_say(words: list[str], expected: bool) -> None:
    assert main_train.parse(["-t", "19LA", *words]).SAM is expected


def test_a_loss_that_is_not_finite_stops_with_the_names(features, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"epoch \d, step \d: the loss is (nan|inf); the batch's first clips: codecfake\d",
    ):
        train(features, tmp_path / "run", "--num_epochs", "3", "--lr", "1e30", task="codecfake")


def test_caches_of_different_front_ends_do_not_mix(features, tmp_path: Path) -> None:
    other = tmp_path / "LA"
    for part in ("train", "dev"):
        writer = CacheWriter(
            other / part / "mel",
            [Trial("a", "", 0, "-"), Trial("b", "", 1, "-")],
            {"feat": "mel", "n_fft": 1024},
            (505, 80),
        )
        writer.write([0, 1], np.zeros((2, 505, 80), np.float32))
        writer.close()
    make_features(tmp_path / "CF", 4, 3)  # says nothing of n_fft, so it does not contradict
    assert (
        dataset.common_front_end(
            [
                dataset.open_features(tmp_path / "CF", "dev", "mel"),
                dataset.open_features(other, "dev", "mel"),
            ]
        )["n_fft"]
        == 1024
    )
    clash = [dataset.open_features(other, part, "mel") for part in ("train", "dev")]
    clash[1].front_end = {"feat": "mel", "n_fft": 512}
    with pytest.raises(InputError, match="made with n_fft 512, .* with 1024"):
        dataset.common_front_end(clash)


@pytest.mark.parametrize(
    "build", [lambda: model.LCNN("mel"), model.W2VAASIST], ids=["LCNN", "W2VAASIST"]
)
def test_bfloat16_keeps_the_loss_and_the_direction_of_the_gradient(
    build: Callable[[], nn.Module],
) -> None:
    """From one state, on one batch of smooth features.

    What training makes of the difference after a few steps is chance.

    Measured with AMX's, AVX-512's and AVX2's products: cosine 0.987 and 0.995 to 0.997, losses
    within 0.2 %.
    """
    torch.manual_seed(1)
    head = build()
    frames, dim = FEATURE_SHAPES[head.feat]
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])
    smooth = F.interpolate(
        torch.randn(8, 1, frames // 8, dim // 8), size=(frames, dim), mode="bilinear"
    )[:, 0]
    features = smooth + 0.5 * labels[:, None, None] * torch.randn(frames, dim)
    losses, gradients = [], []
    for precision in ("fp32", "bf16"):
        trained = without_dropout(copy.deepcopy(head))
        loss = main_train.batch_loss(trained, features, labels, precision)
        loss.backward()
        losses.append(float(loss.detach()))
        grads = [p.grad for p in trained.parameters() if p.grad is not None]
        assert all(grad.dtype == torch.float32 for grad in grads)
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert F.cosine_similarity(*gradients, dim=0) > 0.95


def test_a_compiled_run_leaves_the_weights_of_a_plain_one(
    features, tmp_path: Path, monkeypatch
) -> None:
    """Under the same names; the last batch is a short one."""
    monkeypatch.setattr(main_train, "COMPILER", "aot_eager")
    options = ("--num_epochs", "1", "--batch_size", "3")
    plain = train(features, tmp_path / "plain", *options, task="19LA")
    compiled = train(features, tmp_path / "compiled", *options, "--compile", task="19LA")
    expected = model.load_head(plain).state_dict()
    found = torch_files.load(compiled / model.WEIGHTS)["state_dict"]
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


def test_a_run_in_bfloat16_leaves_float32_weights(features, tmp_path: Path) -> None:
    exact, coarse = (
        train(
            features,
            tmp_path / precision,
            "--num_epochs",
            "1",
            "--precision",
            precision,
            task="codecfake",
        )
        for precision in ("fp32", "bf16")
    )
    head = model.load_head(coarse)
    assert head.info["precision"] == "bf16"
    assert all(tensor.dtype != torch.bfloat16 for tensor in head.state_dict().values())
    assert weights(exact) != weights(coarse), "the option reaches the loop"


def test_rows_of_two_corpora_keep_the_type_they_share(features, tmp_path: Path) -> None:
    """float16 goes to the GPU as it is stored; a mixture of types becomes float32."""
    wide = make_features(tmp_path / "wide", 4, 1, dtype="float32")
    rows = np.array([9, 0, 8, 3])
    for other, expected in ((features[1], torch.float16), (wide, torch.float32)):
        stores = [dataset.open_features(root, "train", "mel") for root in (features[0], other)]
        values, _ = dataset.JoinedFeatures(stores).read(rows)
        assert values.dtype == expected
        for row, value in zip(rows, values, strict=True):
            store, at = (stores[0], row) if row < 8 else (stores[1], row - 8)
            assert torch.equal(value.float(), store.read(np.array([at]))[0][0].float())
