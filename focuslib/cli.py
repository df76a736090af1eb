"""The `focus` command: a thin layer on experiments and evaluate."""

import argparse
import os
import sys
from pathlib import Path

from focuslib.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; a user's mistake is one line on stderr and exit status 1."""
    options = _parser().parse_args(arguments)
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

    run = commands.add_parser(
        "run",
        help="score one method on one data set, and record its trace",
        description="Score one method on one data set through lmms-eval. Answered questions are kept: a run that was "
        "stopped goes on where it was. Hyper-parameters come from params/methods.yaml; --set replaces them.",
        epilog="example: focus run --model tiny_onevision --task tinyvideo_motion --method focus --limit 50 "
        "--set similarity_threshold=0.85 --set selected_layers=2,4,6 --set retention=.4,.2,.1",
    )
    run.add_argument("--model", default="tiny_onevision", help="adapter name (default %(default)s)")
    run.add_argument("--checkpoint", help="checkpoint folder or hub id (default: the adapter's published one)")
    run.add_argument("--task", required=True, help="data set, such as tinyvideo_motion or videomme")
    run.add_argument("--method", default="focus", help="dense, focus, … (default %(default)s)")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter of the method")
    run.add_argument("--limit", type=_positive, help="only the first so many questions of each task")
    run.add_argument("--trace-dir", type=Path, help="also write the median question's trace here (.pth)")
    run.add_argument("--out", type=Path, default=Path("results/run"), help="folder of results (default %(default)s)")
    run.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default %(default)s)")
    run.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto (default)")
    run.add_argument("--seed", type=int, default=0)
    run.set_defaults(run=_run)

    reproduce = commands.add_parser(
        "reproduce",
        help="run the experiment notebooks",
        description="Execute the notebooks with a profile's parameters. Cells with a result are not run again.",
    )
    reproduce.add_argument("--profile", default="laptop", help="folder of params/ (default %(default)s)")
    reproduce.add_argument("--only", help="one notebook, such as main")
    reproduce.set_defaults(run=_reproduce)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _run(options: argparse.Namespace) -> int:
    from focuslib.experiments import make_cell, run_cells
    from focuslib.report import comparison_table

    settings = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write NAME=VALUE, such as similarity_threshold=0.9")
        settings[name] = value
    cells = [
        make_cell(
            kind,
            options.model,
            options.task,
            options.method,
            limit=options.limit,
            device=options.device,
            dtype=options.dtype,
            seed=options.seed,
            checkpoint=options.checkpoint,
            settings=settings,
        )
        for kind in (["accuracy", "trace"] if options.trace_dir else ["accuracy"])
    ]
    outcome = run_cells("run", cells, options.out, options.trace_dir)
    print(outcome.summary())
    table = comparison_table(outcome.results)
    if not table.empty:
        print(table.round(2).to_string(index=False))
    unreadable = any(result.failures for result in outcome.results)
    return 1 if outcome.failed or unreadable else 0


def _reproduce(options: argparse.Namespace) -> int:
    from focuslib.experiments import read_status
    from focuslib.notebooks import EXPERIMENTS, execute

    if options.only and options.only not in EXPERIMENTS:
        raise UserError(f"unknown notebook {options.only!r}; one of {', '.join(EXPERIMENTS)}")
    if options.profile == "laptop":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs ships with the package
    status = 0
    for experiment in [options.only] if options.only else EXPERIMENTS:
        notebook = execute(experiment, options.profile)
        summary = read_status(notebook.parent, experiment)
        print(f"{experiment}: {summary['text']}\n{experiment}: tables and figures in {notebook}")
        status = status or int(not summary["complete"])
    return status


if __name__ == "__main__":
    main()
