"""EER tables, what they are worth, comparisons, exports and plots, from score files.

    python evaluate_score.py                                    # everything in ./result
    python evaluate_score.py --result_folder DIR [DIR ...] -t codecfake --plot det.pdf
    python evaluate_score.py --scores FILE --labels LIST        # anyone's scores
    python evaluate_score.py --compare result/modelA result/modelB
    python evaluate_score.py --metrics --calibrate dev_result.txt --report report

Reads `<subset>_result.txt` in each result folder and in its sub-folders (a folder is a model), or
the files named by --scores. Prints a table with a row a model, and below it what each EER is worth.
Writes nothing but the files asked for. docs/evaluation.md: every option, every convention.
"""

from __future__ import annotations

from runtime import cli

if __name__ == "__main__":
    cli.end_quietly_if_stopped()  # the imports below take seconds

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation import analyses, bootstrap, comparisons, exports, results, tables, units
from evaluation.results import (
    SUBSETS,
    TASKS,
    Evaluated,
    Figures,
    Model,
    Settings,
    distinctly_named,
    evaluate_with,
    find_models,
    merge_records,
    model_of_file,
)
from evaluation.tables import Table
from formats import score_files, trial_lists
from formats.protocols import Trial
from runtime import files
from runtime.cli import InputError

if TYPE_CHECKING:
    from evaluation.report import Section

FORMATS = ("table", "markdown", "csv", "json", "latex")
PLOTS = ("det", "histogram", "eer", "reliability")
DEFAULT_FOLDER = "result"


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "-t", "--task", choices=TASKS, help="only the subsets of this task (default: all)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="of what is printed (default: table); json holds everything",
    )
    add_input_options(parser.add_argument_group("what is read"))
    add_interval_options(parser.add_argument_group("what an EER is worth"))
    add_metric_options(parser.add_argument_group("more metrics"))
    add_output_options(parser.add_argument_group("files to write"))
    return parser


def add_input_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--result_folder",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="folders with score files, or with one sub-folder a model (default: result)",
    )
    group.add_argument(
        "--scores",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="score files of any name and known form, each a model",
    )
    group.add_argument(
        "--name",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="of each file of --scores (default: its file's)",
    )
    group.add_argument(
        "-d",
        "--path_to_database",
        metavar="CORPUS",
        help="corpus of the task (default task: codecfake): gives labels, speakers and attacks, "
        "and is held against the score files",
    )
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="the same from a list: a corpus's protocol, or named columns (utt, label, and speaker "
        "and attack if there are)",
    )
    group.add_argument(
        "--columns",
        metavar="KIND=NAME[,..]",
        type=columns,
        default={},
        help="which column of a header is the name, score, label, speaker or attack",
    )
    group.add_argument(
        "--negate", action="store_true", help="the scores are higher for fake trials: turn them"
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="a score file that does not match -d or --labels is an error",
    )


def add_interval_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--no_ci", action="store_true", help="no intervals")
    group.add_argument(
        "--cluster_by",
        metavar="UNIT",
        help="what is drawn: speaker (default; with attacks where these are known), utterance, "
        "trial, or a list with the columns utt and cluster",
    )
    group.add_argument(
        "--resamples",
        type=cli.at_least(2),
        metavar="N",
        help=f"bootstrap resamples (default: {bootstrap.N_RESAMPLES})",
    )
    group.add_argument("--seed", type=cli.at_least(0), help="of the bootstrap (default: 0)")
    group.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="paired test of two or more models: folders, score files, or names in the result "
        "folder",
    )
    group.add_argument(
        "--paper",
        nargs="?",
        const="",
        metavar="TABLE:ROW",
        help="the paper's figures beside ours; the row is told from the name of a released model, "
        "or given",
    )
    group.add_argument(
        "--by", choices=["source"], help="EER of each codec or attack against all real trials"
    )


def add_metric_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--metrics",
        action="store_true",
        help="AUC; minDCF, actDCF and Cllr of ASVspoof 5; accuracy, precision, recall and F1",
    )
    group.add_argument(
        "--asv_scores",
        metavar="FILE",
        help="ASVspoof 2019's ASV scores: adds 19LA's min t-DCF (legacy 2019)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="of accuracy, precision, recall and F1 (default: probability 0.5, log odds 0)",
    )
    group.add_argument(
        "--threshold_from",
        metavar="DEV",
        help="development score file: the threshold is that of its EER",
    )
    group.add_argument(
        "--calibrate",
        metavar="DEV",
        help="development score file: adds actDCF and Cllr calibrated on it",
    )


def add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--plot", metavar="FILE", help="a figure (.png, .pdf or .svg)")
    group.add_argument(
        "--plot_kind",
        choices=PLOTS,
        help="what --plot draws (default: det; histogram is of one model)",
    )
    group.add_argument(
        "--subset",
        choices=(*SUBSETS, results.OTHER_SUBSET),
        help="--plot_kind det: one panel with all models on this subset",
    )
    group.add_argument(
        "--width",
        type=centimetres,
        metavar="CM",
        help="of the figure, letters included; a column of a paper has 8.5",
    )
    group.add_argument(
        "--report", metavar="DIR", help="a self-contained page of tables, plots and provenance"
    )
    group.add_argument(
        "--export_asvspoof5",
        metavar="DIR",
        help="log-likelihood ratios as ASVspoof 5 takes them (filename<TAB>cm-score)",
    )
    group.add_argument(
        "--export_arena",
        metavar="DIR",
        help="scores.txt and result.yaml of the Speech Anti-Spoofing Arena",
    )
    group.add_argument(
        "--det_points", metavar="FILE", help="CSV of every threshold with both error rates"
    )


def columns(text: str) -> dict[str, str]:
    """An argparse type: "score=llr,name=clip" -> {"score": "llr", "name": "clip"}."""
    found = {}
    for part in text.split(","):
        kind, separator, name = part.partition("=")
        if not separator or not name or kind not in trial_lists.COLUMN_NAMES:
            raise argparse.ArgumentTypeError(
                f"expected KIND=NAME with KIND one of {', '.join(trial_lists.COLUMN_NAMES)}, "
                f"got {part!r}"
            )
        found[kind] = name
    return found


def centimetres(text: str) -> float:
    """An argparse type: a width that a figure can have."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 5 <= value <= 60:
        raise argparse.ArgumentTypeError(f"expected 5 to 60 centimetres, got {text!r}")
    return value


# ── Options that contradict each other ───────────────────────────────────────────────────────────

# Option -> what it needs one of; alone it would be ignored.
NEEDS = {
    "strict": ("path_to_database", "labels"),
    "name": ("scores",),
    "plot_kind": ("plot",),
    "subset": ("plot",),
    "width": ("plot",),
}
EXCLUDES = [
    ("path_to_database", "labels"),
    ("threshold", "threshold_from"),
    ("no_ci", "resamples"),
    ("no_ci", "seed"),
    ("no_ci", "cluster_by"),
]
NOT_COMPARED = (  # options of the tables and files that --compare does not make
    ("no_ci", "paper", "by", "metrics", "asv_scores", "threshold", "threshold_from", "calibrate")
    + ("plot", "report", "export_asvspoof5", "export_arena", "det_points", "strict")
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = get_parser()
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value not in (None, False, {})}
    for option, needed in NEEDS.items():
        if option in given and not given & set(needed):
            parser.error(f"{_flag(option)} needs {' or '.join(map(_flag, needed))}")
    for pair in EXCLUDES:
        if given >= set(pair):
            parser.error(f"{_flag(pair[0])} and {_flag(pair[1])} exclude each other")
    if "compare" in given:
        ignored = [option for option in NOT_COMPARED if option in given]
        if ignored:
            parser.error(
                f"--compare prints its table only; {_flag(ignored[0])} has to be asked for without "
                "it"
            )
        if len(args.compare) < 2:
            parser.error("--compare needs two models at least")
    if args.subset and args.plot_kind not in (None, "det"):
        parser.error("--subset draws DET curves: --plot_kind det")
    if args.name and len(args.name) != len(args.scores):
        parser.error(f"--name: expected {len(args.scores)} names, one a file of --scores")
    wants_decisions = args.threshold is not None or args.threshold_from
    args.metrics = bool(args.metrics or args.asv_scores or args.calibrate or args.report)
    args.decisions = bool(args.metrics or wants_decisions)
    if (
        args.format == "csv"
        and sum(map(bool, (args.decisions, args.by))) + (args.paper is not None) > 1
    ):
        parser.error(
            "--format csv prints one table: ask for one of --metrics, --by and --paper at a time, "
            "or for json"
        )
    args.seed = args.seed or 0
    return args


def _flag(option: str) -> str:
    return "-d" if option == "path_to_database" else f"--{option}"


# ── From the options to what is printed ──────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.compare:
        compare(args)
        return
    check_outputs(args)
    models = choose_models(args)
    check_plot(args, models)
    settings = make_settings(args, models)
    check_against_lists(args, models, settings)
    evaluated = [evaluate_with(settings, model) for model in models]
    found, figures = make_tables(args, evaluated, settings)
    write_files(args, evaluated, settings, found, argv)
    # CSV is one table: the last one asked for, or the EERs.
    shown = found[-1:] if args.format == "csv" else found
    show(shown, merge_records(evaluated, figures), args.format)
    if args.plot:
        sys.stdout.flush()  # the table first, also where both streams go to one file
        say(f"plot: {args.plot}")


def say(line: str) -> None:
    """A line that is no result."""
    print(cli.printable(line), file=sys.stderr)


def wanted_subsets(args: argparse.Namespace) -> Sequence[str]:
    return TASKS[args.task] if args.task else SUBSETS


def choose_models(args: argparse.Namespace) -> list[Model]:
    """The files of --scores, and the folders of --result_folder (the default without --scores)."""
    models = []
    for number, path in enumerate(args.scores or []):
        models.append(model_of_file(path, args.name[number] if args.name else None))
    if args.result_folder or not args.scores:
        models += find_models(args.result_folder or [DEFAULT_FOLDER], wanted_subsets(args))
    return distinctly_named(models)


def pick_model(args: argparse.Namespace, name: str) -> Model:
    """The model in a folder, in a score file, or of that name in the result folders."""
    subsets, folders = wanted_subsets(args), args.result_folder or [DEFAULT_FOLDER]
    if Path(name).is_file():
        return model_of_file(name)
    if Path(name).is_dir():
        models = [model for model in find_models([name], subsets) if model.folder == Path(name)]
    else:
        models = [model for model in find_models(folders, subsets) if model.name == name]
    if not models:
        raise InputError(
            f"--compare: {name}: expected a folder of score files, a score file, or the name of a "
            f"model in {' or '.join(folders)}"
        )
    return models[0]


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse files that could not be written before anything is computed."""
    if args.plot:
        from evaluation import plots

        plots.check_extension(args.plot)
    for path in (args.plot, args.det_points):
        if path:
            files.require_place_for_file(path)
    for folder in (args.report, args.export_asvspoof5, args.export_arena):
        if folder:
            files.require_place_for_folder(folder)


def check_plot(args: argparse.Namespace, models: Sequence[Model]) -> None:
    """Refuse a figure that cannot be drawn before anything takes time."""
    if args.plot_kind == "histogram" and len(models) > 1:
        raise InputError(
            "--plot_kind histogram draws one model; name its folder with --result_folder"
        )
    if args.subset and not any(args.subset in model.files for model in models):
        raise InputError(f"--subset {args.subset}: no score file of it")


def make_settings(args: argparse.Namespace, models: Sequence[Model]) -> Settings:
    cluster_by = args.cluster_by or "speaker"
    if cluster_by not in units.CHOICES:
        if not Path(cluster_by).is_file():
            raise InputError(
                f"--cluster_by {cluster_by}: expected {', '.join(units.CHOICES)}, or a file"
            )
        cluster_by = trial_lists.read_clusters(cluster_by)
    return Settings(
        n_resamples=n_resamples(args),
        seed=args.seed,
        cluster_by=cluster_by,
        columns=args.columns,
        labels=read_lists(args, models),
        negate=args.negate,
    )


def n_resamples(args: argparse.Namespace) -> int:
    """0 where nobody asked for intervals, or would see them: a CSV of EERs or metrics has none."""
    elsewhere = (args.by, args.paper is not None, args.plot, args.report, args.compare)
    unseen = args.format == "csv" and not any(elsewhere)
    return 0 if args.no_ci or unseen else args.resamples or bootstrap.N_RESAMPLES


def read_lists(args: argparse.Namespace, models: Sequence[Model]) -> dict[str, list[Trial]]:
    """Subset -> what -d or --labels says of its trials."""
    if args.labels:
        trials = trial_lists.read_labels(args.labels)
        return {subset: trials for model in models for subset in model.files}
    if not args.path_to_database:
        return {}
    task = args.task or "codecfake"
    scored = [s for s in TASKS[task] if any(s in model.files for model in models)]
    others = [s for model in models for s in model.files if s == results.OTHER_SUBSET]
    if others and len(TASKS[task]) == 1:
        trials = analyses.protocol_trials(task, args.path_to_database, TASKS[task][0])
        return {subset: trials for subset in {*scored, results.OTHER_SUBSET}}
    if not scored:
        raise InputError(
            f"-d {args.path_to_database}: no score file of {task} to hold against it; "
            "name the corpus's task with -t"
        )
    return {
        subset: analyses.protocol_trials(task, args.path_to_database, subset) for subset in scored
    }


def check_against_lists(
    args: argparse.Namespace, models: Sequence[Model], settings: Settings
) -> None:
    """Hold the score files against the lists of trials: warn, or with --strict end."""
    problems = []
    for model in models:
        for subset, path in model.files.items():
            if subset in settings.labels:
                trials = settings.labels[subset]
                problems += analyses.find_problems(path, trials, settings.columns)
    kind = "mismatch" if args.strict else "warning"
    for problem in problems:
        say(f"{kind}: {problem}")
    if problems and args.strict:
        source = args.path_to_database or args.labels
        raise InputError(
            f"{len(problems)} mismatch(es) between the score files and the protocols of {source}, "
            "named above; score the missing trials, remove the others, or leave out --strict"
        )


def compare(args: argparse.Namespace) -> None:
    """--compare: one table of all pairs, and nothing else."""
    models = distinctly_named([pick_model(args, name) for name in args.compare])
    if len(models) < 2:
        raise InputError("--compare: the same model twice; name two")
    settings = make_settings(args, models)
    table, records = comparisons.compare(models, settings, given=bool(args.resamples))
    show([table], records, args.format)


def make_tables(
    args: argparse.Namespace, evaluated: Sequence[Evaluated], settings: Settings
) -> tuple[list[Table], list[Figures]]:
    """The tables asked for, and what their analyses add to the records."""
    found: list[Table] = [tables.eer_table(evaluated, wanted_subsets(args))]
    if settings.n_resamples and args.format != "csv":
        found.append(tables.interval_table(evaluated))
    further = []
    asv = score_files.read_asv_scores(args.asv_scores) if args.asv_scores else None
    inputs = analyses.MetricInputs(
        asv, args.threshold, args.threshold_from, args.calibrate, settings
    )
    if args.metrics:
        further.append(analyses.metrics_table(evaluated, inputs))
    if args.decisions:
        further.append(analyses.decisions_table(evaluated, inputs))
    if args.by:
        further.append(analyses.by_source_table(evaluated, settings, args.metrics))
    if args.paper is not None:
        further.append(comparisons.beside_paper(evaluated, args.paper))
    found += [table for table, _ in further]
    return found, [figures for _, figures in further]


def write_files(
    args: argparse.Namespace,
    evaluated: Sequence[Evaluated],
    settings: Settings,
    found: Sequence[Table],
    argv: Sequence[str] | None,
) -> None:
    """The files asked for; what went into them is said on standard error."""
    if args.export_asvspoof5:
        for line in exports.write_asvspoof5(evaluated, Path(args.export_asvspoof5)):
            say(line)
    if args.export_arena:
        for line in exports.write_arena(evaluated, Path(args.export_arena)):
            say(line)
    if args.det_points:
        exports.write_det_points(evaluated, Path(args.det_points))
    if args.plot:
        from evaluation import plots

        figure = draw(args.plot_kind or "det", evaluated, settings, args.subset, args.width)
        plots.save(figure, args.plot)
    if args.report:
        from evaluation import report

        command = ["evaluate_score.py", *(sys.argv[1:] if argv is None else argv)]
        sections = report_sections(found, evaluated, settings)
        path = report.write_report(args.report, sections, evaluated, shlex.join(command))
        say(f"report: {path}")


def draw(
    kind: str,
    evaluated: Sequence[Evaluated],
    settings: Settings,
    subset: str | None = None,
    width: float | None = None,
):
    """The figure of a kind, as matplotlib has it."""
    from evaluation import plots

    style = plots.Style.of(evaluated, width)
    if kind == "det":
        bands = plots.det_bands(evaluated, settings.seed) if settings.n_resamples else {}
        return plots.det_plot(evaluated, style, bands, subset)
    kinds = {
        "histogram": plots.histograms,
        "eer": plots.eer_points,
        "reliability": plots.reliability_plot,
    }
    return kinds[kind](evaluated, style)


def report_sections(
    found: Sequence[Table], evaluated: Sequence[Evaluated], settings: Settings
) -> list[Section]:
    """The tables, each with the figures that belong to it."""
    from evaluation import report

    return report.make_sections(found, evaluated, partial(draw, settings=settings))


def show(found: Sequence[Table], records: Sequence[dict], style: str) -> None:
    """Print tables or records. Notes that cannot stand beside the data go to standard error."""
    if style == "json":
        print(json.dumps(records, indent=1, allow_nan=False))
    else:
        print("\n".join(tables.render(table, style) for table in found), end="")
    if style in ("json", "csv"):
        for table in found:
            for note in table.notes:
                say(note)


if __name__ == "__main__":
    cli.run(main, if_stopped="nothing was changed; run the same command again")
