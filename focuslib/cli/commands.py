"""The commands and their help."""

# A command imports what it needs when it runs, here alone in the package: so `focus --help` and the shell's completion
# answer at once, and a command works without the extras that only others need.

import math
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

import focuslib
from focuslib.cli import options as of
from focuslib.cli.group import Commands, UsageError
from focuslib.errors import UserError, needs_extra
from focuslib.paths import params_folder

_ONE, _ALL, _HARDWARE = "Score a method", "The paper's experiments", "Hardware"  # panels of `focus --help`
_FREE = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    cls=Commands, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    epilog="Examples:\n\nfocus run --task tinyvideo_motion --limit 20\n\nfocus reproduce --profile laptop\n\n"
    "focus --install-completion",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        print(f"focus {focuslib.__version__}")
        raise typer.Exit()


@app.callback()
def focus(
    context: typer.Context,
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Say the version, and end.")
    ] = False,
) -> None:
    """Token concentration for vision-language models."""
    if context.invoked_subcommand not in ("fetch", "lmms-eval"):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a run reads what is on this disk; `focus fetch` downloads


@app.command(
    rich_help_panel=_ONE,
    epilog="Examples:\n\nfocus run --task tinyvideo_motion --method focus --limit 50\n\n"
    "focus run --task tinyvideo_motion --set similarity_threshold=0.85 --set selected_layers=2,4,6 "
    "--set retention=.4,.2,.1\n\nfocus run --list-settings",
)
def run(
    task: of.Task,
    model: of.Model = "tiny_onevision",
    checkpoint: of.Checkpoint = None,
    frames: of.Frames = None,
    fps: of.Fps = None,
    device: of.Device = "cpu",
    dtype: of.Dtype = "auto",
    method: of.Method = "focus",
    settings: of.Settings = None,
    list_settings: of.ListSettings = False,
    limit: of.Limit = None,
    seed: of.Seed = 0,
    workers: of.Workers = 1,
    engine: of.Engine = None,
    address: of.Address = None,
    shard: of.Shard = None,
    out: of.Out = Path("results/run"),
    trace_dir: Annotated[
        Path | None,
        Option(help="Also write the median question's trace here (.pth).", rich_help_panel=of.RESULTS),
    ] = None,
) -> int:
    """Score one method on one data set, and record its trace.

    The questions are asked through lmms-eval. Those answered are kept: a run that was stopped goes on where it was.
    Hyper-parameters come from params/methods.yaml; --set replaces them.
    """
    from focuslib.experiments.cell import make_cell
    from focuslib.experiments.runner import Workers, run_cells
    from focuslib.report.tables import comparison_table

    _check_engine(engine, address)
    if trace_dir and method != "focus":
        raise UserError(f"--trace-dir: {method} has no traces; the simulator's are of --method focus")
    chosen = dict(_assignment(text, "--set") for text in settings or [])
    cells = [
        make_cell(
            kind, model=model, checkpoint=checkpoint, dataset=task, method=method, settings=chosen, limit=limit,
            device=device, dtype=dtype, seed=seed, frames=frames, fps=fps,
        )
        for kind in (["accuracy", "trace"] if trace_dir else ["accuracy"])
    ]  # fmt: skip
    outcome = run_cells("run", cells, out, trace_dir, Workers(workers, engine or "local", address, shard))
    print(outcome.summary())
    table = comparison_table(outcome.results)
    if not table.empty:
        print(table.round(2).to_string(index=False))
    unreadable = any(result.unreadable for result in outcome.results)
    return 1 if outcome.failed or unreadable else 0


def _check_engine(engine: str | None, address: str | None) -> None:
    if engine not in (None, "local", "ray"):
        raise UsageError(f"--engine {engine}: write local or ray")
    if address and engine != "ray":
        raise UsageError(f"--address {address}: is of a Ray cluster; add --engine ray")
    if engine == "ray" and find_spec("ray") is None:
        raise needs_extra("--engine ray", "cluster")


@app.command(
    rich_help_panel=_ONE,
    epilog="Examples:\n\nfocus tune --task tinyvideo_motion_tune --grid similarity_threshold=.8,.9 "
    "--grid retention=.5:.4:.3:.2:.1,.4:.3:.2:.15:.1\n\n"
    "focus tune --task tinyvideo_motion_tune --method cmc --bisect linear_threshold=0.1,2 --target-sparsity 70",
)
def tune(
    task: of.Tasks,
    model: of.Model = "tiny_onevision",
    checkpoint: of.Checkpoint = None,
    frames: of.Frames = None,
    fps: of.Fps = None,
    device: of.Device = "cpu",
    dtype: of.Dtype = "auto",
    method: of.Method = "focus",
    settings: of.Settings = None,
    list_settings: of.ListSettings = False,
    grid: Annotated[
        list[str] | None,
        Option(metavar="NAME=A,B,C", help="Values to try; lists are written 1:3:5.", rich_help_panel="Search"),
    ] = None,
    bisect: Annotated[
        str | None, Option(metavar="NAME=LOW,HIGH", help="One setting to bisect.", rich_help_panel="Search")
    ] = None,
    target_sparsity: Annotated[
        float | None, Option(help="Computation sparsity in percent, with --bisect.", rich_help_panel="Search")
    ] = None,
    tolerance: Annotated[float, Option(help="Points that may be lost to dense.", rich_help_panel="Search")] = 2.0,
    limit: of.Limit = None,
    seed: of.Seed = 0,
    workers: of.Workers = 1,
    out: of.Out = Path("results/tune"),
) -> int:
    """Choose a method's settings on a tune split.

    Score a grid of settings (--grid), or bisect one setting to a target computation sparsity (--bisect).
    """
    if bool(grid) == bool(bisect):
        raise UsageError("give either --grid NAME=A,B,C or --bisect NAME=LOW,HIGH")
    from focuslib.experiments.tune import best_row, bisect_sparsity, grid_search

    common = {
        "model": model, "checkpoint": checkpoint, "limit": limit, "device": device, "dtype": dtype, "seed": seed,
        "frames": frames, "fps": fps,
    }  # fmt: skip
    if grid:
        if settings:
            raise UserError("--set goes with --bisect; with --grid give the value as a grid of one")
        values = {name: text.split(",") for name, text in (_assignment(text, "--grid") for text in grid)}
        table = grid_search(method, values, task, common, out, workers)
        best = best_row(table, tolerance).to_dict()
        said = f"sparsest within {tolerance} points of dense" if best["Difference"] >= -tolerance else "best"
    else:
        if target_sparsity is None:
            raise UserError("--bisect needs --target-sparsity, such as --target-sparsity 70")
        name, low, high = _bounds(str(bisect))
        fixed = dict(_assignment(text, "--set") for text in settings or [])
        table = bisect_sparsity(method, name, low, high, target_sparsity, fixed, task, common, out, workers=workers)
        best, said = table.iloc[0].to_dict(), f"closest to {target_sparsity} %"
    print(table.to_string(index=False, float_format="%.4g"))
    print(f"{said}: " + ", ".join(f"{name} {value}" for name, value in best.items()))
    return 0


@app.command(rich_help_panel=_ALL, epilog="Example:\n\nfocus tuning --profile laptop")
def tuning(profile: of.Profile = "laptop") -> int:
    """Run the searches behind a profile's settings again.

    The grids and bisections of params/<profile>/tuning.yaml; tables of each, and what they choose, in
    results/<profile>/tuning.
    """
    from focuslib.experiments.paper import results_folder
    from focuslib.experiments.tuning import run_tuning

    print(run_tuning(profile, results_folder(profile)).to_string(index=False))
    return 0


@app.command(
    rich_help_panel=_ONE,
    epilog="Examples:\n\nfocus compare --task tinyvideo_motion --methods all --sparsity 0.75 --limit 60\n\n"
    "focus compare --task tinyvideo_motion --methods fastv --methods vidcom2+focus --sparsity 0.5 --sparsity 0.75",
)
def compare(
    task: of.Tasks,
    model: of.Model = "tiny_onevision",
    checkpoint: of.Checkpoint = None,
    frames: of.Frames = None,
    fps: of.Fps = None,
    device: of.Device = "cpu",
    dtype: of.Dtype = "auto",
    methods: Annotated[
        list[str] | None, Option(help="Give several; all by default.", autocompletion=of.method_names)
    ] = None,
    sparsity: Annotated[
        list[float] | None, Option(help="Counted sparsity to meet, 0 to 1; give several. 0.75 by default.")
    ] = None,
    limit: of.Limit = None,
    seed: of.Seed = 0,
    workers: of.Workers = 1,
    out: of.Out = Path("results/compare"),
) -> int:
    """Compare methods and controls at equal counted sparsity.

    Dense, then every method that can meet the sparsity, on the same questions; the others at their own settings. Writes
    one HTML page with differences to dense and to random tokens, measured prefills, and what each keeps of one clip.
    """
    from focuslib.experiments.compare import compared_cells
    from focuslib.experiments.runner import run_cells
    from focuslib.report.methods import (
        comparison_summary,
        methods_average,
        methods_table,
        write_methods,
        write_page,
    )

    common = {
        "model": model, "checkpoint": checkpoint, "device": device, "dtype": dtype, "seed": seed,
        "frames": frames, "fps": fps,
    }  # fmt: skip
    pairs = [{"dataset": dataset, **common} for dataset in task]
    cells = compared_cells(pairs, methods or ["all"], sparsity or [0.75], limit)
    outcome = run_cells("compare", cells, out, workers=workers)
    print(comparison_summary(outcome))
    table = methods_average(methods_table(outcome.results, outcome.failed))
    print(table.round(2).to_string(index=False, na_rep=""))
    write_methods(outcome)
    print(write_page(outcome, out / "compare.html", f"{model}: {', '.join(task)}"))
    return 0 if outcome.results else 1


def _assignment(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{option} {text}: write NAME=VALUE, such as similarity_threshold=0.9")
    return name, value


def _bounds(text: str) -> tuple[str, float, float]:
    name, bounds = _assignment(text, "--bisect")
    try:
        low, high = map(float, bounds.split(","))
    except ValueError:
        raise UserError(f"--bisect {text}: write NAME=LOW,HIGH with two numbers") from None
    return name, low, high


@app.command("lmms-eval", rich_help_panel=_ONE, add_help_option=False, context_settings=_FREE)
def lmms_eval(context: typer.Context) -> int:
    """The stock lmms-eval command, also where torchvision lacks its compiled part."""
    from lmms_eval.cli.dispatch import main as stock

    from focuslib.methods.settings import typed_settings
    from focuslib.models.registry import named

    # lmms-eval reports a mistake in these with a traceback and exit status 0
    pairs = [pair.partition("=") for pair in _value(context.args, "--model_args").split(",") if pair]
    given = {name: value for name, _, value in pairs}
    if _value(context.args, "--model") == "focuslib":
        named(given.pop("model", "tiny_onevision"), given.get("pretrained"))
        own = ("pretrained", "device", "dtype", "batch_size", "max_batch_size", "frames", "fps")
        settings = {name: value for name, value in given.items() if name not in (*own, "method")}
        typed_settings(given.get("method", "dense"), settings)
    sys.argv = ["lmms-eval", *context.args]
    return stock() or 0


def _value(arguments: list[str], name: str) -> str:
    """The value of an option, written `--name value` or `--name=value`; empty if it is not given."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):  # there may be none
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return ""


@app.command(
    rich_help_panel=_ALL,
    epilog="Examples:\n\nfocus reproduce --profile laptop --only main\n\n"
    "focus reproduce --profile paper --engine ray --address auto --workers 64",
)
def reproduce(
    profile: of.Profile = "laptop",
    only: Annotated[str | None, Option(help="One notebook, such as main.")] = None,
    workers: Annotated[int | None, Option(min=1, help="Instead of the parameter files' workers.")] = None,
    engine: of.Engine = None,
    address: of.Address = None,
    shard: of.Shard = None,
) -> int:
    """Run the experiment notebooks.

    Their cells are run with a profile's parameters, and each notebook is executed once its cells have their results.
    Cells with a result are not run again, and without --only a notebook that would be made again as it is stays.
    """
    from focuslib.experiments.reproduce import reproduce

    _check_engine(engine, address)
    given = {"workers": workers, "engine": engine, "address": address, "shard": shard}
    chosen = {name: value for name, value in given.items() if value is not None}
    return 0 if reproduce(profile, only, workers=chosen) else 1


@app.command(
    rich_help_panel=_ALL, epilog="Examples:\n\nfocus verify\n\nfocus verify --fresh results/laptop (compares at once)"
)
def verify(
    profile: of.Profile = "laptop",
    resume: Annotated[bool, Option("--resume", help="Go on with a verification that was stopped.")] = False,
    fresh: Annotated[Path | None, Option(help="Compare this results folder and run nothing.")] = None,
) -> int:
    """Run the experiments anew and compare their tables with the expected ones.

    A profile's notebooks run into results/verify; the tables are compared with those committed in
    results/expected/<profile>, within the tolerances of focuslib/experiments/verify.py. Exit status 1 on a difference.
    """
    from focuslib.experiments.paper import expected_folder, results_folder
    from focuslib.experiments.reproduce import reproduce
    from focuslib.experiments.verify import compare_folder, expected_tables

    expected = expected_tables(expected_folder(profile))
    if fresh is None:
        fresh = results_folder("verify")
        if not resume:
            shutil.rmtree(fresh, ignore_errors=True)
        if not reproduce(profile, changes={"results": fresh.name}):
            return 1
    differences = compare_folder(expected, fresh)
    print("\n".join(differences) or f"the {len(expected)} tables of {fresh} are as expected within the tolerances")
    return 1 if differences else 0


@app.command(rich_help_panel=_ALL)
def report(profile: of.Profile = "laptop") -> int:
    """Write the executed notebooks as one self-contained HTML page."""
    from focuslib.experiments.paper import results_folder
    from focuslib.report.html import write_report

    print(write_report(results_folder(profile)))
    return 0


@app.command(rich_help_panel=_ALL)
def check(profile: of.Profile = "paper") -> int:
    """Say what a profile lacks before it starts.

    Weights, data sets, videos, GPU and the published hours of a profile's cells. Makes no network call; exit status 1
    if anything is missing.
    """
    from focuslib.experiments.check import check_profile, cost, table

    pairs = check_profile(profile)
    print(table(pairs).to_string(index=False))
    print(f"\n{cost(pairs)}")
    missing = list(dict.fromkeys(line for pair in pairs for line in pair.missing))
    print("\n".join(f"missing: {line}" for line in missing) or "nothing is missing")
    return 1 if missing else 0


@app.command(
    rich_help_panel=_ALL,
    epilog="Examples:\n\nfocus plan --price 2.5\n\nfocus plan --profile laptop --probe 3\n\n"
    "focus plan --address auto (also what is missing on which node)",
)
def plan(
    profile: of.Profile = "paper",
    price: Annotated[float | None, Option(min=0, help="Of a GPU for an hour, for what the run costs.")] = None,
    probe: Annotated[
        int | None, Option(min=1, help="Questions to ask here of every method, instead of published seconds.")
    ] = None,
    shard: of.Shard = None,
    address: of.Address = None,
) -> int:
    """Say what a profile will take before it starts.

    Shards, expected hours and cost on 1 to 64 GPUs, by simulating how an engine gives the shards out. Makes no network
    call but to the nodes of --address; exit status 1 if anything is missing on one of these.
    """
    from focuslib.experiments.forecast import forecast, sizes

    found = forecast(profile, shard, probe)
    where = "measured here" if probe else "published for one 80 GB GPU"
    print(f"{len(found.shards)} shards, {found.seconds / 3600:.0f} GPU hours ({where}): {sizes(found)}")
    print(found.table(price).round(2).to_string(index=False))
    assumed = "" if probe else ", assumed"
    print(f"longest chain: {found.chain() / 3600:.2f} h, with {found.loading:.0f} s to load a model{assumed}")
    for name, cells in found.unknown.items():
        print(f"not counted, for no time is published: {len(cells)} cells of {name}; measure with --probe")
    if address is None:
        return 0
    from focuslib.experiments.cluster import missing_on_nodes

    missing = missing_on_nodes(address, found.cells)
    print("\n".join(missing) or "nothing is missing on any node")
    return 1 if missing else 0


def _fetchable(incomplete: str) -> list[str]:
    return [*of.model_names(incomplete), *of.task_names(incomplete)]


@app.command(rich_help_panel=_ALL, epilog="Example: focus fetch llava_vid videomme")
def fetch(
    name: Annotated[
        list[str], Argument(help="Model or data set, such as llava_vid or videomme.", autocompletion=_fetchable)
    ],
) -> int:
    """Download models and data sets: what `focus check` misses, into the hub's cache."""
    from focuslib.experiments.check import fetch

    for each in name:
        print(fetch(each))
    return 0


@app.command(
    rich_help_panel=_ONE,
    epilog="Examples:\n\nfocus measure --method dense --method focus\n\n"
    "focus measure --model shape:qwen2-7b --layers 4 --frames 16 --method dense --method cmc --out speed.json",
)
def measure(
    model: Annotated[str, Option(help="Adapter, or shape:qwen2-7b with random weights.")] = "tiny_onevision",
    checkpoint: of.Checkpoint = None,
    method: Annotated[list[str] | None, Option(help="Give several; dense and focus by default.")] = None,
    clip: Annotated[
        Path | None, Option(help="A video or an image; a shape makes up its own, of --frames frames.")
    ] = None,
    frames: Annotated[
        int | None, Option(min=1, help="The most frames of a video; of a shape's made-up clip, 16 by default.")
    ] = None,
    fps: of.Fps = None,
    layers: Annotated[int | None, Option(min=1, help="Layers of a shape.")] = None,
    repeats: Annotated[int, Option(min=1, help="Turns of every method.")] = 5,
    device: of.Device = "cpu",
    dtype: of.Dtype = "auto",
    out: Annotated[Path | None, Option(help="Also write the record as JSON here.")] = None,
) -> int:
    """Measure time and memory of a prompt under each method, in turns.

    Methods that drop tokens save time here; those made for an accelerator are emulated, which costs time.
    """
    from focuslib.evaluation.speed import explain, load_measured, measure_speed, methods_for

    sampling = {"frames": frames, "fps": fps}
    vlm = load_measured(model, checkpoint=checkpoint, layers=layers, device=device, dtype=dtype, **sampling)
    methods = methods_for(vlm, method or ["dense", "focus"])
    media = None if clip is None else str(clip)
    for row in measure_speed(vlm, methods, clip=media, frames=frames or 16, repeats=repeats, out=out):
        print(
            f"{row['method']}: prefill {row['prefill_ms']:.1f} ms ({row['over_dense'] or float('nan'):.2f} of dense), "
            f"{row['memory_mib']:.0f} MiB, counted sparsity {100 * row['sparsity']:.1f} %; {explain(row)}"
        )
    return 0


@app.command(rich_help_panel=_HARDWARE)
def export(
    trace: Annotated[Path, Argument(help="Native trace, such as results/laptop/cells/trace_….trace.")],
    pth: Annotated[Path, Argument(help="File to write.")],
) -> int:
    """Write the architecture simulator's .pth of a native trace."""
    from focuslib.prefill.trace import Trace

    Trace.load(trace).save_pth(pth)
    print(f"{pth}: {pth.stat().st_size / 2**20:.1f} MiB")
    return 0


@app.command(
    rich_help_panel=_HARDWARE,
    epilog="Examples:\n\nfocus hardware (the published inputs, without weights or data)\n\n"
    "focus hardware results/laptop --out results/laptop/hardware\n\n"
    "focus hardware sample.pth --model llava_vid --accelerator focus --m-tile 512 --m-tile 1024",
)
def hardware(
    source: Annotated[
        Path | None,
        Argument(help="Results folder, .trace or .pth; without it, the published inputs.", show_default=False),
    ] = None,
    accelerator: Annotated[
        list[str] | None,
        Option(
            help="dense, adaptiv, cmc, focus or focus_sec_only; repeatable. Without it, all that the source has the "
            "numbers of."
        ),
    ] = None,
    m_tile: Annotated[
        list[int] | None, Option(help="Tokens a tile, -1 for one tile; repeatable.", rich_help_panel="Design of Focus")
    ] = None,
    vector_size: Annotated[
        list[int] | None, Option(help="Channels a vector; repeatable.", rich_help_panel="Design of Focus")
    ] = None,
    scatter: Annotated[
        list[int] | None, Option(help="Scatter accumulators; repeatable.", rich_help_panel="Design of Focus")
    ] = None,
    corrected: Annotated[
        bool, Option("--corrected", help="Without the published defect of attention's DRAM bytes.")
    ] = False,
    model: Annotated[
        str | None, Option(help="Model of a single trace, if its name does not say it.", autocompletion=of.model_names)
    ] = None,
    out: Annotated[Path | None, Option(help="Folder to write the simulator's CSV files to.")] = None,
) -> int:
    """Cycles, memory traffic and energy on the paper's accelerators."""
    from focuslib.hardware.study import missing_lines, run_hardware
    from focuslib.hardware.tables import BUFFER_NOTE, brief

    source = source or params_folder() / "published" / "hardware"
    table = run_hardware(
        source, out, accelerators=accelerator or None, m_tile=m_tile or None, vector_size=vector_size or None,
        scatter=scatter or None, corrected=corrected, model=model,
    )  # fmt: skip
    print(brief(table).to_string(index=False, na_rep=""))
    if any(math.isnan(energy) for energy in table["total_energy"]):
        print(f"note: {BUFFER_NOTE}")
    for line in [] if accelerator else missing_lines(source, model=model):
        print(line)
    if out:
        print(f"the simulator's tables are in {out}")
    return 0
