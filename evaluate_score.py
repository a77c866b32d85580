"""EER tables, what they are worth, and plots, from score files.

    python evaluate_score.py                                    # everything in ./result
    python evaluate_score.py --result_folder DIR [DIR ...] -t codecfake --format markdown --plot det.pdf
    python evaluate_score.py --compare result/modelA result/modelB
    python evaluate_score.py --metrics --calibrate dev_result.txt --report report

Reads `<subset>_result.txt` (rows `name score word`) in each result folder and in its sub-folders: a
folder is a model. Prints a table with a row a model, and below it what each EER is worth. Writes
nothing but the files asked for.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation import analyses, bootstrap, comparisons, tables
from evaluation.results import (
    SUBSETS,
    TASKS,
    Evaluated,
    Figures,
    Model,
    evaluate,
    find_models,
    merge_records,
)
from evaluation.tables import Table
from formats import score_files
from runtime import cli, files
from runtime.cli import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("table", "markdown", "csv", "json", "latex")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="EER tables, what they are worth, and plots, from score files."
    )
    parser.add_argument(
        "--result_folder",
        nargs="+",
        default=["result"],
        metavar="DIR",
        help="folders with score files, or with one sub-folder a model (default: result)",
    )
    parser.add_argument(
        "-t", "--task", choices=TASKS, help="only the subsets of this task (default: all)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="of what is printed (default: table); json holds everything",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="paired bootstrap of two models: their folders, or their names in the result folder",
    )

    worth = parser.add_argument_group("what an EER is worth")
    worth.add_argument("--no_ci", action="store_true", help="no bootstrap intervals")
    worth.add_argument(
        "--resamples",
        type=cli.at_least(1),
        default=bootstrap.N_RESAMPLES,
        metavar="N",
        help="bootstrap resamples (default: %(default)s)",
    )
    worth.add_argument(
        "--seed", type=cli.at_least(0), default=0, help="of the bootstrap (default: %(default)s)"
    )
    worth.add_argument(
        "--paper",
        nargs="?",
        const="",
        metavar="TABLE:ROW",
        help="the paper's figures beside ours; the row is told from the name of a released model, or given",
    )

    more = parser.add_argument_group("more metrics")
    more.add_argument(
        "--metrics", action="store_true", help="AUC, and minDCF, actDCF and Cllr of ASVspoof 5"
    )
    more.add_argument(
        "--asv_scores",
        metavar="FILE",
        help="ASVspoof 2019's ASV scores: adds 19LA's min t-DCF (legacy 2019)",
    )
    more.add_argument(
        "--threshold_from",
        metavar="DEV",
        help="development score file: adds accuracy, FRR and FAR at its EER threshold",
    )
    more.add_argument(
        "--calibrate",
        metavar="DEV",
        help="development score file: adds actDCF and Cllr calibrated on it",
    )

    corpus = parser.add_argument_group("against the corpus")
    corpus.add_argument(
        "-d",
        "--path_to_database",
        metavar="CORPUS",
        help="corpus of the task (default task: codecfake): its protocol is held against the score files",
    )
    corpus.add_argument(
        "--strict",
        action="store_true",
        help="a score file that does not match the protocol is an error",
    )
    corpus.add_argument(
        "--by", choices=["source"], help="EER of each codec or attack against all real trials"
    )

    output = parser.add_argument_group("files to write")
    output.add_argument("--plot", metavar="FILE", help="DET curves (.png, .pdf or .svg)")
    output.add_argument(
        "--plot_kind",
        choices=["det", "histogram", "eer", "reliability"],
        default="det",
        help="what --plot draws (default: det; histogram is of one model)",
    )
    output.add_argument(
        "--report", metavar="DIR", help="a self-contained page of tables, plots and provenance"
    )
    output.add_argument(
        "--export_asvspoof5",
        metavar="DIR",
        help="scores as ASVspoof 5 takes them (filename<TAB>cm-score)",
    )
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = get_parser()
    args = parser.parse_args(argv)
    if (args.strict or args.by) and not args.path_to_database:
        parser.error("--strict and --by need the corpus: give its folder with -d")
    if args.compare and (
        args.plot or args.report or args.by or args.paper is not None or args.strict
    ):
        parser.error(
            "--compare prints its table only; ask for plots, reports and other tables without it"
        )
    args.metrics = bool(
        args.metrics or args.asv_scores or args.threshold_from or args.calibrate or args.report
    )
    if args.format == "csv" and bool(args.metrics) + bool(args.by) + (args.paper is not None) > 1:
        parser.error(
            "--format csv prints one table: ask for one of --metrics, --by and --paper at a time, or for json"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    subsets = TASKS[args.task] if args.task else SUBSETS
    if args.compare:
        a, b = (pick_model(name, args.result_folder, subsets) for name in args.compare)
        table, records = comparisons.compare(a, b, args.resamples, args.seed)
        show([table], records, args.format)
        return
    if args.plot:
        from evaluation import plots

        plots.check_extension(args.plot)
    models = find_models(args.result_folder, subsets)
    labels = check_protocols(args, models) if args.path_to_database else {}
    n_resamples = 0 if args.no_ci else args.resamples
    evaluated = [evaluate(model, n_resamples, args.seed) for model in models]
    found, figures = make_tables(args, evaluated, subsets, labels)
    if args.export_asvspoof5:
        export_asvspoof5(evaluated, Path(args.export_asvspoof5))
    if args.plot:
        plots.save(draw(args.plot_kind, evaluated, n_resamples, args.seed), args.plot)
    if args.report:
        command = ["evaluate_score.py", *(sys.argv[1:] if argv is None else argv)]
        make_report(args, found, evaluated, shlex.join(command))
    # CSV is one table: the last one asked for, or the EERs.
    shown = found[-1:] if args.format == "csv" else found
    show(shown, merge_records(evaluated, figures), args.format)
    if args.plot:
        sys.stdout.flush()  # the table first, also where both streams go to one file
        print(f"plot: {cli.printable(args.plot)}", file=sys.stderr)


def pick_model(name: str, folders: Sequence[str], subsets: Sequence[str]) -> Model:
    """The model in a folder, or of that name in the result folders."""
    if Path(name).is_dir():
        models = [model for model in find_models([name], subsets) if model.folder == Path(name)]
    else:
        models = [model for model in find_models(folders, subsets) if model.name == name]
    if not models:
        raise InputError(
            f"--compare: {name}: expected a folder of score files, or the name of a model in {' or '.join(folders)}"
        )
    return models[0]


Labels = dict[str, dict[str, tuple[bool, str]]]  # subset -> trial -> (is real, source)


def check_protocols(args: argparse.Namespace, models: Sequence[Model]) -> Labels:
    """Hold the score files against the corpus: warn, or with --strict end."""
    task = args.task or "codecfake"
    scored = [s for s in TASKS[task] if any(s in model.files for model in models)]
    if not scored:
        raise InputError(
            f"-d {args.path_to_database}: no score file of {task} to hold against it; "
            "name the corpus's task with -t"
        )
    labels = {
        subset: analyses.protocol_labels(task, args.path_to_database, subset) for subset in scored
    }
    problems = []
    for model in models:
        for subset in scored:
            if subset in model.files:
                problems += analyses.find_problems(model.files[subset], labels[subset])
    kind = "mismatch" if args.strict else "warning"
    for problem in problems:
        print(cli.printable(f"{kind}: {problem}"), file=sys.stderr)
    if problems and args.strict:
        raise InputError(
            f"{len(problems)} mismatch(es) between the score files and the protocols of "
            f"{args.path_to_database}, named above; score the missing trials, remove the others, "
            "or leave out --strict"
        )
    return labels


def make_tables(
    args: argparse.Namespace,
    evaluated: Sequence[Evaluated],
    subsets: Sequence[str],
    labels: Labels,
) -> tuple[list[Table], list[Figures]]:
    """The tables asked for, and what their analyses add to the records."""
    found, figures = [tables.eer_table(evaluated, subsets)], []
    if not args.no_ci and args.format != "csv":
        found.append(tables.interval_table(evaluated, args.resamples, args.seed))
    further = []
    if args.metrics:
        asv = score_files.read_asv_scores(args.asv_scores) if args.asv_scores else None
        inputs = analyses.MetricInputs(asv, args.threshold_from, args.calibrate)
        further.append(analyses.metrics_table(evaluated, inputs))
    if args.by:
        sources = {
            subset: {name: source for name, (_, source) in rows.items()}
            for subset, rows in labels.items()
        }
        n_resamples = 0 if args.no_ci else args.resamples
        further.append(analyses.by_source_table(evaluated, sources, n_resamples, args.seed))
    if args.paper is not None:
        further.append(comparisons.beside_paper(evaluated, args.paper))
    for table, of_results in further:
        found.append(table)
        figures.append(of_results)
    return found, figures


def draw(kind: str, evaluated: Sequence[Evaluated], n_resamples: int, seed: int) -> Figure:
    """The figure that --plot writes."""
    from evaluation import plots

    results = [result for of_model in evaluated for result in of_model.results.values()]
    if kind == "det":
        return plots.det_plot(results, plots.det_bands(results, seed=seed) if n_resamples else None)
    if kind == "histogram" and len(evaluated) > 1:
        raise InputError(
            "--plot_kind histogram draws one model; name its folder with --result_folder"
        )
    kinds = {
        "histogram": plots.histograms,
        "eer": plots.eer_bars,
        "reliability": plots.reliability_plot,
    }
    return kinds[kind](results)


def make_report(
    args: argparse.Namespace, found: Sequence[Table], evaluated: Sequence[Evaluated], command: str
) -> None:
    from evaluation import plots, report

    n_resamples = 0 if args.no_ci else args.resamples
    shaded = ", 95 % intervals shaded" if n_resamples else ""
    results = [result for of_model in evaluated for result in of_model.results.values()]
    figures = [
        (
            "True EERs (over 50 %: the scores point the wrong way) on a square-root scale",
            plots.eer_bars(results),
        )
    ]
    for of_model in evaluated:
        name, of_results = of_model.name, list(of_model.results.values())
        figures += [
            (
                f"{name}: DET curves on normal deviate axes; a dot marks each EER{shaded}",
                draw("det", [of_model], n_resamples, args.seed),
            ),
            (
                f"{name}: reliability at even odds; on the diagonal, scores mean what they say "
                f"(bins of {plots.LEAST_IN_BIN} trials and more)",
                plots.reliability_plot(of_results),
            ),
            (f"{name}: scores of real and fake trials", plots.histograms(of_results, columns=2)),
        ]
    path = report.write_report(args.report, found, figures, evaluated, command)
    print(f"report: {cli.printable(str(path))}", file=sys.stderr)


def export_asvspoof5(evaluated: Sequence[Evaluated], folder: Path) -> None:
    """One `<model>_<subset>.tsv` a score file, as ASVspoof 5's evaluation package reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for of_model in evaluated:
        for subset, result in of_model.results.items():
            name = f"{of_model.name}_{subset}.tsv".replace("/", "_")
            rows = zip(result.trials.names, result.trials.scores.tolist(), strict=True)
            with files.atomic_write(folder / name) as file:
                file.write("filename\tcm-score\n")
                file.writelines(f"{trial}\t{score!r}\n" for trial, score in rows)


def show(found: Sequence[Table], records: Sequence[dict], style: str) -> None:
    """Print tables or records. Notes that cannot stand beside the data go to standard error."""
    if style == "json":
        print(json.dumps(records, indent=1, allow_nan=False))
    else:
        print("\n".join(tables.render(table, style) for table in found), end="")
    if style in ("json", "csv"):
        for table in found:
            for note in table.notes:
                print(cli.printable(note), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, if_stopped="nothing was changed; run the same command again")
