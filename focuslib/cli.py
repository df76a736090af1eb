"""The `focus` command: a thin layer on experiments and evaluate."""

import argparse
import inspect
import os
import shutil
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

from focuslib.errors import UserError, pick


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; a user's mistake is one line on stderr and exit status 1."""
    options, rest = _parser().parse_known_args(arguments)
    if rest and options.run is not _lmms_eval:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    if options.run not in (_fetch, _lmms_eval):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a run reads what is on this disk; `focus fetch` downloads
    try:
        status = options.run(options)
    except UserError as error:
        print(f"focus: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("focus: interrupted; run the same command again to go on from here", file=sys.stderr)
        status = 130
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="focus", description="Token concentration for vision-language models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", default="tiny_onevision", help="adapter name (default %(default)s)")
    shared.add_argument("--checkpoint", help="checkpoint folder or hub id (default: the adapter's published one)")
    shared.add_argument("--method", default="focus", help="dense, focus, … (default %(default)s)")
    shared.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter of the method"
    )
    shared.add_argument(
        "--list-settings", action=_ListSettings, nargs=0, help="say every method's hyper-parameters, and end"
    )
    shared.add_argument("--limit", type=_positive, help="only the first so many questions of each task")
    shared.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default %(default)s)")
    shared.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto (default)")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument(
        "--workers",
        type=_positive,
        default=1,
        help="processes that share the work, such as one a GPU (with --device cuda)",
    )

    run = commands.add_parser(
        "run",
        parents=[shared],
        help="score one method on one data set, and record its trace",
        description="Score one method on one data set through lmms-eval. Answered questions are kept: a run that was "
        "stopped goes on where it was. Hyper-parameters come from params/methods.yaml; --set replaces them.",
        epilog="example: focus run --model tiny_onevision --task tinyvideo_motion --method focus --limit 50 "
        "--set similarity_threshold=0.85 --set selected_layers=2,4,6 --set retention=.4,.2,.1",
    )
    run.add_argument("--task", required=True, help="data set, such as tinyvideo_motion or videomme")
    run.add_argument("--trace-dir", type=Path, help="also write the median question's trace here (.pth)")
    run.add_argument("--out", type=Path, default=Path("results/run"), help="folder of results (default %(default)s)")
    run.set_defaults(run=_run)

    tune = commands.add_parser(
        "tune",
        parents=[shared],
        help="choose a method's settings on a tune split",
        description="Score a grid of settings, or bisect one setting to a target computation sparsity.",
        epilog="examples: focus tune --method focus --task tinyvideo_motion_tune --grid similarity_threshold=.8,.9 "
        "--grid retention=.5:.4:.3:.2:.1,.4:.3:.2:.15:.1 · focus tune --method cmc --task tinyvideo_motion_tune "
        "--bisect linear_threshold=0.1,2 --target-sparsity 70",
    )
    tune.add_argument("--task", action="append", required=True, help="data set; give several to average over them")
    choice = tune.add_mutually_exclusive_group(required=True)
    choice.add_argument("--grid", action="append", metavar="NAME=A,B,C", help="values to try; lists are written 1:3:5")
    choice.add_argument("--bisect", metavar="NAME=LOW,HIGH", help="one setting to bisect")
    tune.add_argument("--target-sparsity", type=float, help="computation sparsity in percent, with --bisect")
    tune.add_argument(
        "--tolerance", type=float, default=2.0, help="points that may be lost to dense (default %(default)s)"
    )
    tune.add_argument("--out", type=Path, default=Path("results/tune"), help="folder of results (default %(default)s)")
    tune.set_defaults(run=_tune)

    reproduce = commands.add_parser(
        "reproduce",
        help="run the experiment notebooks",
        description="Execute the notebooks with a profile's parameters. Cells with a result are not run again.",
    )
    reproduce.add_argument("--profile", default="laptop", help="folder of params/ (default %(default)s)")
    reproduce.add_argument("--only", help="one notebook, such as main")
    reproduce.set_defaults(run=_reproduce)

    verify = commands.add_parser(
        "verify",
        help="run the experiments anew and compare their tables with the expected ones",
        description="Run a profile's notebooks into results/verify and compare the tables with those that are "
        "committed in results/expected/<profile>, "
        "within the tolerances of focuslib/experiments/verify.py; exit status 1 on a difference.",
    )
    verify.add_argument("--profile", default="laptop", help="folder of params/ (default %(default)s)")
    verify.add_argument("--resume", action="store_true", help="go on with a verification that was stopped")
    verify.add_argument("--fresh", type=Path, help="compare this results folder and run nothing")
    verify.set_defaults(run=_verify)

    report = commands.add_parser("report", help="write the executed notebooks as one self-contained HTML page")
    report.add_argument("--profile", default="laptop", help="folder of results/ (default %(default)s)")
    report.set_defaults(run=_report)

    export = commands.add_parser("export", help="write the architecture simulator's .pth of a native trace")
    export.add_argument("trace", type=Path, help="native trace, such as results/laptop/cells/trace_….trace")
    export.add_argument("pth", type=Path, help="file to write")
    export.set_defaults(run=_export)

    check = commands.add_parser(
        "check",
        help="say what a profile lacks before it starts",
        description="Weights, data sets, videos, GPU and the published hours of a profile's cells. Makes no network "
        "call; exit status 1 if anything is missing.",
    )
    check.add_argument("--profile", default="paper", help="folder of params/ (default %(default)s)")
    check.set_defaults(run=_check)

    fetch = commands.add_parser(
        "fetch",
        help="download models and data sets",
        description="Download what `focus check` misses into the hub's cache.",
    )
    fetch.add_argument("name", nargs="+", help="model or data set, such as llava_vid or videomme")
    fetch.set_defaults(run=_fetch)

    stock = commands.add_parser(
        "lmms-eval",
        add_help=False,
        help="the stock lmms-eval command, also where torchvision lacks its compiled part",
    )
    stock.set_defaults(run=_lmms_eval)
    return parser


class _ListSettings(argparse.Action):
    """Print what each method can be set to, from its docstring and defaults."""

    def __call__(self, parser, *_) -> None:
        from focuslib.methods import METHODS  # imports torch

        for name, method in METHODS.items():
            defaults = ", ".join(f"{field.name}={field.default}" for field in fields(method)) or "nothing to set"
            print(f"{name}: {defaults}\n\n{textwrap.indent(inspect.getdoc(method), '    ')}\n")
        parser.exit()


def _lmms_eval(options: argparse.Namespace) -> int:
    from lmms_eval.cli.dispatch import main as lmms_eval

    from focuslib.methods.settings import make_method
    from focuslib.models import MODELS

    # lmms-eval reports a mistake in these with a traceback and exit status 0
    given = dict(pair.partition("=")[::2] for pair in _option(options.rest, "--model_args").split(",") if pair)
    if _option(options.rest, "--model") == "focuslib":
        pick(MODELS, given.pop("model", "tiny_onevision"), "model")
        own = ("pretrained", "device", "dtype", "batch_size", "max_batch_size")
        settings = {name: value for name, value in given.items() if name not in (*own, "method")}
        make_method(given.get("method", "dense"), settings)
    sys.argv = ["lmms-eval", *options.rest]
    return lmms_eval() or 0


def _option(arguments: list[str], name: str) -> str:
    """The value of an option, written `--name value` or `--name=value`; empty if it is not given."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return ""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _run(options: argparse.Namespace) -> int:
    from focuslib.experiments.cell import make_cell
    from focuslib.experiments.runner import run_cells
    from focuslib.report.tables import comparison_table

    if options.trace_dir and options.method != "focus":
        raise UserError(f"--trace-dir: {options.method} has no traces; the simulator's are of --method focus")
    settings = dict(_assignment(text, "--set") for text in options.set)
    cells = [
        make_cell(kind, dataset=options.task, method=options.method, settings=settings, **_common(options))
        for kind in (["accuracy", "trace"] if options.trace_dir else ["accuracy"])
    ]
    outcome = run_cells("run", cells, options.out, options.trace_dir, options.workers)
    print(outcome.summary())
    table = comparison_table(outcome.results)
    if not table.empty:
        print(table.round(2).to_string(index=False))
    unreadable = any(result.unreadable for result in outcome.results)
    return 1 if outcome.failed or unreadable else 0


def _tune(options: argparse.Namespace) -> int:
    from focuslib.experiments.tune import best_row, bisect_sparsity, grid_search

    common = _common(options)
    if options.grid:
        if options.set:
            raise UserError("--set goes with --bisect; with --grid give the value as a grid of one")
        grid = {name: values.split(",") for name, values in (_assignment(text, "--grid") for text in options.grid)}
        table = grid_search(options.method, grid, options.task, common, options.out, options.workers)
        best = best_row(table, options.tolerance)
        said = (
            f"sparsest within {options.tolerance} points of dense"
            if best["Difference"] >= -options.tolerance
            else "best"
        )
    else:
        if options.target_sparsity is None:
            raise UserError("--bisect needs --target-sparsity, such as --target-sparsity 70")
        name, bounds = _assignment(options.bisect, "--bisect")
        try:
            low, high = map(float, bounds.split(","))
        except ValueError:
            raise UserError(f"--bisect {options.bisect}: write NAME=LOW,HIGH with two numbers") from None
        fixed = dict(_assignment(text, "--set") for text in options.set)
        table = bisect_sparsity(
            options.method, name, low, high, options.target_sparsity, fixed, options.task, common, options.out,
            workers=options.workers,
        )  # fmt: skip
        best, said = table.iloc[0], f"closest to {options.target_sparsity} %"
    print(table.to_string(index=False, float_format="%.4g"))
    print(f"{said}: " + ", ".join(f"{name} {value}" for name, value in best.items()))
    return 0


def _common(options: argparse.Namespace) -> dict:
    """The arguments of make_cell that `run` and `tune` share."""
    return {name: getattr(options, name) for name in ("model", "checkpoint", "limit", "device", "dtype", "seed")}


def _assignment(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{option} {text}: write NAME=VALUE, such as similarity_threshold=0.9")
    return name, value


def _reproduce(options: argparse.Namespace) -> int:
    from focuslib.experiments.reproduce import reproduce

    return 0 if reproduce(options.profile, options.only) else 1


def _verify(options: argparse.Namespace) -> int:
    from focuslib.experiments.paper import expected_folder, results_folder
    from focuslib.experiments.reproduce import reproduce
    from focuslib.experiments.verify import compare_folder, expected_tables

    expected, fresh = expected_tables(expected_folder(options.profile)), options.fresh
    if fresh is None:
        fresh = results_folder("verify")
        if not options.resume:
            shutil.rmtree(fresh, ignore_errors=True)
        if not reproduce(options.profile, changes={"results": fresh.name}):
            return 1
    differences = compare_folder(expected, fresh)
    print("\n".join(differences) or f"the {len(expected)} tables of {fresh} are as expected within the tolerances")
    return 1 if differences else 0


def _report(options: argparse.Namespace) -> int:
    from focuslib.experiments.paper import results_folder
    from focuslib.report.html import write_report

    print(write_report(results_folder(options.profile)))
    return 0


def _export(options: argparse.Namespace) -> int:
    from focuslib.prefill.trace import Trace

    Trace.load(options.trace).save_pth(options.pth)
    print(f"{options.pth}: {options.pth.stat().st_size / 2**20:.1f} MiB")
    return 0


def _check(options: argparse.Namespace) -> int:
    from focuslib.experiments.check import check_profile, cost, table

    pairs = check_profile(options.profile)
    print(table(pairs).to_string(index=False))
    print(f"\n{cost(pairs)}")
    missing = list(dict.fromkeys(line for pair in pairs for line in pair.missing))
    print("\n".join(f"missing: {line}" for line in missing) or "nothing is missing")
    return 1 if missing else 0


def _fetch(options: argparse.Namespace) -> int:
    from focuslib.experiments.check import fetch

    for name in options.name:
        print(fetch(name))
    return 0


if __name__ == "__main__":
    main()
