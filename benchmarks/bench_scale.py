"""Start-up time and memory of the three scripts on a protocol of a million rows. Prints Markdown.

    python -m benchmarks.bench_scale [--rows N] [--num_workers N]

Each script's own main() runs from end to end in a process of its own, on the CPU. Stood in for are
the audio files (the folder's listing and the clips, 16 samples each), the front end and the head (a
linear layer on features 5 x 8), so that memory which grows with the corpus shows and the rest stays
small. The last row of the table trains some steps on full-sized rows, 201 x 1024 in sqrt8, of which
a sparse file holds as many. "Above the imports" is what a process takes beyond a fresh one with all
modules loaded. Memory of workers counts pages they share with the main process; training reads in
threads and has none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import dataset
import frontends
import generate_score
import main_train
import model
import preprocess
from dataset import Trial
from formats import audio, feature_cache, protocols
from formats.feature_cache import DONE, CacheWriter
from runtime import cli

SHAPE, CLIP_SAMPLES = (5, 8), 16
FULL_SHAPE, FULL_STEPS = (201, 1024), 30
DEV_ROWS = 256
MIB = 1024  # ru_maxrss counts KiB


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rows",
        type=cli.at_least(DEV_ROWS),
        default=1_000_000,
        metavar="N",
        help="of the protocol (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=cli.at_least(1),
        default=2,
        metavar="N",
        help="decoding processes, reading threads (default: %(default)s)",
    )
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        PARTS[args.part](args)
        return
    print(
        f"## Memory and start-up\n\n{args.rows:,} rows, {args.num_workers} workers; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    print(
        "| run | start-up, s | of it CPU | whole run, s | peak MiB | above the imports, MiB | peak "
        "MiB of a worker |\n"
        "| :-- | --: | --: | --: | --: | --: | --: |"
    )
    with tempfile.TemporaryDirectory() as folder:
        make_protocols(Path(folder), args.rows)
        for part in PARTS:
            found = measured_apart(part, folder, args)
            print(
                f"| {part} | {found['start_wall']:.1f} | {found['start_cpu']:.1f} | "
                f"{found['whole']:.0f} | {found['peak']:.0f} | "
                f"{found['peak'] - found['imports']:.0f} | {found['worker']:.0f} |",
                flush=True,
            )


def measured_apart(part: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Run a part in a process of its own; what it reports on its last line."""
    command = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--folder",
        folder,
        "--rows",
        str(args.rows),
        "--num_workers",
        str(args.num_workers),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{part} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ── What stands in ──


def make_protocols(root: Path, rows: int) -> None:
    """Codecfake's train and dev, 19LA's eval, each name as long as the corpora's own; no audio."""
    (root / "label").mkdir()
    (root / "ASVspoof2019_LA_cm_protocols").mkdir()
    for folder in ("train", "dev", "ASVspoof2019_LA_eval/flac"):
        (root / folder).mkdir(parents=True)
    for part, count in (("train", rows), ("dev", DEV_ROWS)):
        with open(root / "label" / f"{part}.txt", "w") as file:
            file.writelines(
                f"{codecfake_name(row)} {f'fake {row % 7}' if row % 7 else 'real 0'}\n"
                for row in range(count)
            )
    with open(root / "ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.eval.trl.txt", "w") as file:
        file.writelines(
            f"LA_{row % 100:04d} LA_E_{row:08d} - {'A07 spoof' if row % 7 else '- bonafide'}\n"
            for row in range(rows)
        )


def codecfake_name(row: int) -> str:
    return f"F0{row % 7}_SSB{row:08d}.wav" if row % 7 else f"SSB{row:08d}.wav"


def stand_in_listing(rows: int) -> Callable[[str], set[str]]:
    """protocols.files_with_content() with the audio that the protocols name."""

    def listing(folder: str) -> set[str]:
        for part, count in (("/train", rows), ("/dev", DEV_ROWS)):
            if folder.endswith(part):
                return {codecfake_name(row) for row in range(count)}
        return {f"LA_E_{row:08d}.flac" for row in range(rows)}

    return listing


def stand_in_clip(path: str) -> audio.Recording:
    """A clip that only this path has: its last characters."""
    clip = torch.tensor(list(path[-CLIP_SAMPLES:].encode()), dtype=torch.float32)
    return audio.Recording(clip, dataset.SAMPLE_RATE)


class CheapFrontEnd(frontends.FrontEnd):
    feat, dim = "mel", SHAPE[1]

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.new_zeros(len(clips), *SHAPE)


class CheapHead(torch.nn.Module):
    name, feat, info = "cheap", "mel", {}

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(SHAPE[1], 2)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = features[..., : SHAPE[1]].mean(dim=1)
        return embedding, self.linear(embedding)


# ── The runs ──


def measure(args: argparse.Namespace, run: Callable[[], None], owner: object, name: str) -> None:
    """Print what a run took, start-up being all before its first call of `owner.name`."""
    imports, wall, cpu, started = (
        peak(resource.RUSAGE_SELF),
        time.perf_counter(),
        time.process_time(),
        {},
    )
    real = getattr(owner, name)

    def timed(*arguments: object, **options: object) -> object:
        started.setdefault("start_wall", time.perf_counter() - wall)
        started.setdefault("start_cpu", time.process_time() - cpu)
        return real(*arguments, **options)

    with (
        mock.patch.object(owner, name, timed),
        mock.patch.object(protocols, "files_with_content", stand_in_listing(args.rows)),
        mock.patch.object(audio, "load_recording", stand_in_clip),
        mock.patch.object(dataset, "CLIP_SAMPLES", CLIP_SAMPLES),
        mock.patch.object(preprocess, "FLUSH_EVERY", 2**14),
        mock.patch.dict(dataset.FEATURE_SHAPES, {"mel": SHAPE}),
        mock.patch.object(frontends, "load_frontend", lambda *names: CheapFrontEnd()),
        mock.patch.object(model, "build_head", lambda *names: CheapHead()),
        mock.patch.object(generate_score, "load_heads", lambda folders: {"cheap": CheapHead()}),
    ):
        run()
    print()
    print(
        json.dumps(
            started
            | {
                "imports": imports,
                "peak": peak(resource.RUSAGE_SELF),
                "worker": peak(resource.RUSAGE_CHILDREN),
                "whole": time.perf_counter() - wall,
            }
        )
    )


def peak(who: int) -> float:
    """Most resident memory so far, MiB."""
    return resource.getrusage(who).ru_maxrss / MIB


def extraction(args: argparse.Namespace) -> None:
    measure(
        args,
        lambda: preprocess.main(
            [
                "-d",
                str(args.folder),
                "-f",
                str(args.folder / "features"),
                "--feat",
                "mel",
                "--gpu",
                "-1",
                "--batch_size",
                "256",
                "--num_workers",
                str(args.num_workers),
            ]
        ),
        preprocess,
        "extract",
    )


def training(args: argparse.Namespace) -> None:
    measure(
        args,
        lambda: main_train.main(train_options(args, args.folder / "features", "one_epoch")),
        main_train,
        "train_epoch",
    )


def scoring(args: argparse.Namespace) -> None:
    measure(
        args,
        lambda: generate_score.main(
            [
                "-t",
                "19LA",
                "-d",
                str(args.folder),
                "--result_folder",
                str(args.folder / "result"),
                "--gpu",
                "-1",
                "--batch_size",
                "256",
                "--num_workers",
                str(args.num_workers),
            ]
        ),
        generate_score.Scorer,
        "score_files",
    )


def training_on_full_rows(args: argparse.Namespace) -> None:
    """Features of XLS-R's size; the epoch is cut short."""
    trials = [Trial(codecfake_name(row), "", int(row % 7 > 0), "-") for row in range(args.rows)]
    for part, count in (("train", args.rows), ("dev", DEV_ROWS)):
        make_sparse_cache(args.folder / "full" / part / "mel", trials[:count])
    del trials
    batches = dataset.shuffled_batches
    with (
        mock.patch.object(sys.modules[__name__], "SHAPE", FULL_SHAPE),
        mock.patch.object(dataset, "shuffled_batches", lambda *order: batches(*order)[:FULL_STEPS]),
    ):
        measure(
            args,
            lambda: main_train.main(train_options(args, args.folder / "full", "full_rows")),
            main_train,
            "train_epoch",
        )


def make_sparse_cache(folder: Path, trials: list[Trial]) -> None:
    """A complete cache whose rows are holes, all zero."""
    space = os.statvfs("/")
    with mock.patch.object(
        os, "statvfs", lambda path: os.statvfs_result((*space[:4], 2**50, *space[5:]))
    ):
        writer = CacheWriter(folder, trials, {"feat": "mel"}, FULL_SHAPE, "sqrt8")
    rows = np.arange(len(trials))
    crc = np.full(len(trials), zlib.crc32(bytes(writer.layout.row_bytes)), np.uint32)
    writer._mark(rows, np.stack([crc, feature_cache._guard(rows, crc, DONE)], axis=1))
    writer.close()


def train_options(args: argparse.Namespace, features: Path, out: str) -> list[str]:
    return [
        "-t",
        "codecfake",
        "--feat",
        "mel",
        "-m",
        "lcnn",
        "-f",
        str(features),
        "-o",
        str(args.folder / out),
        "--num_epochs",
        "1",
        "--gpu",
        "-1",
        "--num_workers",
        str(args.num_workers),
    ]


PARTS = {
    "preprocess.py": extraction,
    "main_train.py": training,
    "generate_score.py": scoring,
    "main_train.py, full rows": training_on_full_rows,
}


if __name__ == "__main__":
    cli.run(main, if_stopped="run the same command again")
