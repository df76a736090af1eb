"""The parameter files: one model a notebook says what its file may hold; checked before anything runs."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from focuslib.errors import UserError, brief, unknown
from focuslib.paths import params_folder, read_yaml, shown
from focuslib.validation import Strict, validate

Count = Annotated[int, Field(ge=1)]
Names = Annotated[list[str], Field(min_length=1)]


def _folder_name(name: str) -> str:
    if not name.strip(".") or any(part in name for part in "/\\"):
        raise ValueError(f"is {brief(name)}; it must be the name of a folder in results/, such as dev")
    return name


def _tile(tokens: int) -> int:
    if tokens != -1 and tokens < 1:
        raise ValueError(f"is {tokens}; it must be at least 1, or -1 for one tile")
    return tokens


def _sweep(value: Any) -> Any:
    names = set(value) - {"settings"} if isinstance(value, dict) else set()
    if names != {"dataset", "values"} or not isinstance(value["values"], list):
        raise ValueError("must hold dataset and values (a list), and may hold settings")
    return value


def _two(values: list) -> list:
    if len(values) < 2:
        raise ValueError(f"is {brief(values)}; a curve needs at least 2")
    return values


def _point(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"is {brief(value)}; it must be int or str")
    return value


class Results(Strict):
    """What every notebook takes. results: folder of results/ to write to, None for the profile's own."""

    results: Annotated[str, AfterValidator(_folder_name)] | None = None


class Experiment(Results):
    """What every notebook with cells takes.

    models, datasets, methods: names; a model may be a checkpoint (owner/name, or a folder). checkpoints: model → folder
    or hub id, instead of the published one, or of a name of your own. frames, fps: the most frames of a video that are
    seen, and how many a second, None for the model's own rule.
    limit: questions a data set, None for all. trace_samples: questions of which the median one's trace is kept.
    device, dtype, seed: how the models run. workers, engine, address, shard: what shares the cells, as runner.Workers.
    """

    models: Names
    checkpoints: dict[str, str] | None = None
    datasets: Names
    frames: Count | None = None
    fps: Annotated[float, Field(gt=0)] | None = None
    limit: Count | None
    trace_samples: Count
    device: str
    workers: Count = 1
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    shard: Count | None = None
    dtype: str
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]  # what numpy's generators take


class Main(Experiment):
    """Focus against the dense model.

    write_pth: also write the traces as the simulator's .pth. grey: also ask the dense model on grey pictures.
    """

    methods: Names
    write_pth: bool = True
    grey: bool = False


class Image(Main):
    """Single images: as the main experiment."""


class Baselines(Experiment):
    """All methods on the same questions.

    matched: method → entries as in params/methods.yaml, for a second comparison at equal sparsity. matched_limit:
    questions a data set of that comparison, None for all.
    """

    methods: Names
    matched: dict[str, list[dict[str, Any]]] | None = None
    matched_limit: Count | None = None

    @model_validator(mode="after")
    def _limited(self):
        if self.matched and "matched_limit" not in self.model_fields_set:
            raise ValueError("matched_limit is missing; matched needs it (null: all questions)")
        return self


Targets = Annotated[list[Annotated[float, Field(gt=0, lt=1)]], AfterValidator(_two)]


class Methods(Experiment):
    """Methods and controls at equal counted sparsity.

    methods: names, or all. targets: counted sparsities, 0 … 1. settings: method → settings beside the target's.
    """

    methods: Names
    targets: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]
    settings: dict[str, dict[str, Any]] | None = None


class Curve(Strict):
    """One curve: a method from mild to hard settings.

    method: None for the curve's own name. family: of methods that share a row of the figure. settings: of all points.
    points: the settings of each. targets: counted sparsities, 0 … 1, instead; without either, those of all curves.
    """

    method: str | None = None
    family: str = "methods"
    settings: dict[str, Any] = Field(default_factory=dict)
    points: Annotated[list[dict[str, Any]], AfterValidator(_two)] | None = None
    targets: Targets | None = None

    @model_validator(mode="after")
    def _either(self):
        if self.points and self.targets:
            raise ValueError("has points and targets; give one of them")
        return self


class Curves(Experiment):
    """Accuracy of every method over its counted sparsity.

    curves: name → its points. targets: those of curves that have neither points nor targets.
    upto: the sparsity (percent) up to which areas are taken. near: the one (percent) at which methods are compared,
    broken down and looked at, each at its nearest point. within: how near (points) one must be to be compared as equal.
    looks: clips of each kind of question that are shown.
    """

    curves: Annotated[dict[str, Curve], Field(min_length=1)]
    targets: Targets
    upto: Annotated[float, Field(gt=0, lt=100)]
    near: Annotated[float, Field(gt=0, lt=100)]
    within: Annotated[float, Field(gt=0, lt=100)] = 2.0
    looks: Annotated[int, Field(ge=0)] = 0
    trace_samples: Count = 1


class Sweep(Strict):
    """One sweep of the design space: the values of one setting, on one data set. settings: others, at every point."""

    dataset: str
    values: Annotated[list[Annotated[Any, AfterValidator(_point)]], Field(min_length=1)]
    settings: dict[str, Any] = Field(default_factory=dict)


class Dse(Experiment):
    """The design space of Focus. sweeps: name → its points. ablation_limit: questions a data set of the ablation."""

    sweeps: dict[str, Annotated[Sweep, BeforeValidator(_sweep)]]
    ablation_limit: Count | None
    write_pth: bool = True


class Int8(Experiment):
    """Dense and Focus in 8 bit. write_pth: as in Main.

    quantization: int8, every linear layer but the output head as published, or int8_llm, the language model alone.
    """

    quantization: Literal["int8", "int8_llm"] = "int8"
    write_pth: bool = True


class Hardware(Results):
    """The hardware models. accelerators: None for all that there are numbers of.

    m_tile, vector_size, scatter: Focus's design point, None as published.
    """

    accelerators: Names | None = None
    m_tile: Annotated[int, AfterValidator(_tile)] | None = None
    vector_size: Count | None = None
    scatter: Count | None = None


class Speed(Results):
    """Time, measured. On the first question of each data set, with every method.

    models, checkpoints, datasets, methods, device, dtype: as in Experiment. repeats: turns of every method.
    threads: of the processor, None for torch's own choice.
    """

    models: Names
    checkpoints: dict[str, str] | None = None
    datasets: Names
    methods: Names
    repeats: Count = 5
    threads: Count | None = None
    device: str
    dtype: str


# notebook → what its parameter files may hold, in the order in which they run
EXPERIMENTS: dict[str, type[Results]] = {
    "main": Main,
    "baselines": Baselines,
    "methods": Methods,
    "curves": Curves,
    "image": Image,
    "dse": Dse,
    "int8": Int8,
    "hardware": Hardware,
    "speed": Speed,
}


def read_params(path: str | Path) -> dict[str, Any]:
    """The parameters in a file that has its notebook's name, checked, with defaults filled in.

    Raises
    ------
    UserError
        In one line that names the file, the parameter and the fix.
    """
    path = Path(path)
    if path.stem not in EXPERIMENTS:
        raise UserError(f"{path}: {unknown(path.stem, EXPERIMENTS, 'notebook')}")
    return validate(EXPERIMENTS[path.stem], read_yaml(path), str(path))


def experiment_params(experiment: str, profile: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of params/<profile>/<experiment>.yaml; results: the profile's name if the file names none.

    changes: values that replace those of the file.
    """
    path = params_folder() / profile / f"{experiment}.yaml"
    params = read_params(path)
    if changes:
        if not isinstance(changes, dict):
            raise UserError(f"changes is {brief(changes)}; write a mapping, such as {{'limit': 40}}")
        params = validate(EXPERIMENTS[experiment], params | changes, f"changes of {shown(path)}")
    return params | {"results": params["results"] or profile}
