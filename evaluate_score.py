"""EER tables and DET plots from score files.

    python evaluate_score.py                                    # everything in ./result
    python evaluate_score.py --result_folder DIR [DIR ...] -t codecfake --format markdown --plot det.pdf

Reads `<subset>_result.txt` (rows `name score word`) in each result folder and in its sub-folders: a
folder is a model. Prints a table with a row a model, and below it what each EER is worth. Writes
nothing but the files asked for.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import bootstrap
import cli
import evaluation
import tables
from evaluation import SUBSETS, TASKS, Model, Result
from tables import Table

FORMATS = ("table", "markdown", "csv", "json", "latex")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="EER tables and DET plots from score files.")
    parser.add_argument("--result_folder", nargs="+", default=["result"], metavar="DIR",
                        help="folders with score files, or with one sub-folder a model (default: result)")
    parser.add_argument("-t", "--task", choices=TASKS, help="only the subsets of this task (default: all)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="of what is printed (default: table)")
    parser.add_argument("--plot", metavar="FILE", help="write DET curves to FILE (.png, .pdf or .svg)")
    parser.add_argument("--no_ci", action="store_true", help="no bootstrap intervals")
    parser.add_argument("--resamples", type=_positive, default=bootstrap.N_RESAMPLES, metavar="N",
                        help="bootstrap resamples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.plot:
        import plots
        plots.check_extension(args.plot)
    subsets = TASKS[args.task] if args.task else SUBSETS
    models = evaluation.find_models(args.result_folder, subsets)
    n_resamples = 0 if args.no_ci else args.resamples
    results = [result for model in models for result in evaluation.evaluate(model, n_resamples, args.seed)]
    if args.plot:
        plots.save(plots.det_plot(results), args.plot)
    show(eer_tables(args, models, results, subsets), [result.record() for result in results], args.format)


def eer_tables(args: argparse.Namespace, models: Sequence[Model], results: Sequence[Result], subsets: Sequence[str]) -> list[Table]:
    found = [tables.eer_table(results, models, subsets)]
    if not args.no_ci and args.format != "csv":
        found.append(tables.interval_table(results, args.resamples, args.seed))
    return found


def show(found: Sequence[Table], records: Sequence[dict], style: str) -> None:
    """Print tables or records. Where notes cannot stand beside the data they go to standard error."""
    if style == "json":
        print(json.dumps(records, indent=1, allow_nan=False))
    else:
        print("\n".join(tables.render(table, style) for table in found), end="")
    if style in ("json", "csv"):
        for note in (note for table in found for note in table.notes):
            print(cli.printable(note), file=sys.stderr)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    cli.run(main, if_stopped="nothing was changed; run the same command again")
