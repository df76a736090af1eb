"""The published formats end to end: tiny replicas of the models and data sets under the unmodified lmms-eval tasks."""

import io
import shutil
import time

import pandas as pd
import pytest
import replicas
import torch
from datasets import Dataset as Table
from PIL import Image

from focuslib import cli
from focuslib.errors import UserError
from focuslib.evaluation import evaluate, lmms
from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.sources import sources
from focuslib.experiments.cell import make_cell
from focuslib.experiments.runner import run_cells
from focuslib.methods import Dense, Focus, FrameFusion
from focuslib.models import MODELS, load_vlm
from focuslib.paths import project_root
from focuslib.report import notebook as report

COMMON = {"device": "cpu", "dtype": "float32", "seed": 0}
# each model, each data set and each method at least once; `make smoke` runs all that the paper pairs
PAIRS = [
    ("llava_vid", "videomme", "focus"),
    ("minicpm_v", "mlvu", "cmc"),
    ("minicpm_v", "mlvu", "framefusion"),
    ("llava_onevision", "mvbench", "dense"),
    ("llava_onevision", "vqav2", "focus"),
    ("qwen2_5_vl", "mme", "adaptiv"),
    ("qwen2_5_vl", "mmbench", "focus"),
]
STOCK = ("videomme", "mlvu", "mvbench", "vqav2", "mme", "mmbench")


@pytest.fixture(scope="module", autouse=True)
def hf_home(tmp_path_factory):
    """The data sets, as the only ones on this machine."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        patch.delenv("HF_DATASETS_CACHE", raising=False)
        patch.delenv("LMMS_EVAL_DATASETS_CACHE", raising=False)
        replicas.write_datasets(folder)
        lmms.load_tasks.cache_clear()
        yield folder
        lmms.load_tasks.cache_clear()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return replicas.write_checkpoints(tmp_path_factory.mktemp("checkpoints") / "all")


@pytest.fixture(scope="module")
def vlm(checkpoints):
    """A function: model name → the loaded replica."""
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = load_vlm(name, checkpoints[name], device="cpu", dtype="float32")
        return loaded[name]

    return load


@pytest.fixture
def spoilt(tmp_path):
    """A function that removes a file or folder, which is put back after the test; returns where it is meanwhile."""
    moved = []

    def remove(path):
        aside = tmp_path / f"aside{len(moved)}"
        moved.append((shutil.move(path, aside), path))
        return aside

    yield remove
    for aside, path in moved:
        path.unlink(missing_ok=True)
        shutil.move(aside, path)


def test_cells_and_tables(checkpoints, tmp_path):
    make = lambda kind, model, dataset, method, limit: make_cell(  # noqa: E731
        kind, model=model, dataset=dataset, method=method, limit=limit, checkpoint=checkpoints[model], **COMMON
    )
    cells = [make("accuracy", *pair, None) for pair in PAIRS]
    cells += [make("trace", *pair, 1) for pair in PAIRS if pair[2] == "focus"]
    cells += [make("sparsity", *pair, 1) for pair in PAIRS if pair[2] in ("cmc", "adaptiv")]
    outcome = run_cells("main", cells, tmp_path, tmp_path / "focus_main")
    assert outcome.failed == {} and not any(result.failures for result in outcome.results)
    assert [len(result.samples) for result in outcome.results[: len(PAIRS)]] == [3, 2, 2, 20, 2, 4, 6]
    report.write_tables(tmp_path)

    def keys(name: str, model: str = "Model") -> list[tuple[str, str]]:
        return list(pd.read_csv(tmp_path / name)[[model, "Dataset"]].itertuples(index=False, name=None))

    assert sorted(keys("accuracy.csv", "Models")) == sorted({pair[:2] for pair in PAIRS})
    assert sorted(keys("meta_data.csv")) == sorted(pair[:2] for pair in PAIRS if pair[2] == "focus")
    assert keys("adaptiv_sparsity.csv") == [("qwen2_5_vl", "mme")]
    assert keys("cmc_sparsity.csv") == [("minicpm_v", "mlvu")]
    trace = torch.load(tmp_path / "focus_main" / "qwen2_5_vl_mmbench.pth", weights_only=True)
    assert trace["mask_zero"]["q_proj"].shape[:2] == (28, 1)
    assert not (project_root() / "submissions").exists()  # mmbench writes its sheets into the working directory


RIGHT = {
    "videomme": ("answer", 100),
    "mlvu": ("answer", 200 / 7),  # the mean over seven kinds of questions, of which the replica has two
    "mvbench": ("B", 100),
    "vqav2": ("y", 100),
    "mme": ("answer", 400),  # two categories of at most 200 each
    "mmbench": ("answer", 100),
}


@pytest.mark.parametrize("dataset", STOCK)
@pytest.mark.parametrize("right", [True, False])
def test_scores(dataset, right, vlm, monkeypatch):
    """Right and wrong answers give the best and the worst score, whatever the task calls it."""
    answer, best = RIGHT[dataset]

    def know(self, run, context, generation, to_visual, doc_id, task, split):
        doc = self.task_dict[task][split][doc_id]
        return {"answer": str(doc.get(answer, answer)) if right else "D" if dataset == "mmbench" else "?"}

    monkeypatch.setattr(lmms.FocusLmms, "_answer", know)
    result = evaluate.evaluate(vlm("llava_onevision"), Dense(), DATASETS[dataset])
    assert result.score == pytest.approx(best if right else 0)
    assert {sample["score"] for sample in result.samples} == {float(right)}


def test_a_limit_keeps_pairs_together(vlm):
    """MME scores two questions of an image as one; the task itself refuses half a pair."""
    assert len(evaluate.evaluate(vlm("qwen2_5_vl"), Dense(), DATASETS["mme"], limit=1).samples) == 2


def test_the_judge_is_not_called_without_a_key(vlm, monkeypatch):
    """An answer without a letter gets the task's random one at once, instead of 45 s of failing calls."""
    monkeypatch.setattr(lmms.FocusLmms, "_answer", lambda *arguments: {"answer": "a nice picture"})
    start = time.perf_counter()
    result = evaluate.evaluate(vlm("qwen2_5_vl"), Dense(), DATASETS["mmbench"])
    assert time.perf_counter() - start < 10
    assert {sample["score"] for sample in result.samples} == {0.0}


@pytest.mark.parametrize(
    ("dataset", "video", "failed"),
    [
        ("videomme", "videomme/data/first.mp4", ("videomme", 0)),  # the task calls sys.exit
        ("mlvu", "mlvu/plotQA/1.mp4", ("mlvu_dev", 1)),  # so does this one
        ("mvbench", "mvbench_video/vlnqa/egocentric_navigation.mp4", ("mvbench_egocentric_navigation", 0)),
    ],
)
def test_a_missing_video_is_one_recorded_failure(vlm, spoilt, hf_home, dataset, video, failed):
    spoilt(hf_home / video)
    result = evaluate.evaluate(vlm("llava_vid"), Dense(), DATASETS[dataset])
    assert [(failure["task"], failure["doc_id"]) for failure in result.failures] == [failed]
    assert video in result.failures[0]["error"]
    assert len(result.samples) == {"videomme": 3, "mlvu": 2, "mvbench": 20}[dataset]


def test_a_corrupt_video_is_one_recorded_failure(vlm, spoilt, hf_home):
    video = hf_home / "videomme/data/first.mp4"
    video.write_bytes(spoilt(video).read_bytes()[:600])
    result = evaluate.evaluate(vlm("minicpm_v"), Dense(), DATASETS["videomme"])
    (failure,) = result.failures
    assert failure["doc_id"] == 0 and "first.mp4" in failure["error"]


@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_a_corrupt_image_is_one_recorded_failure(vlm, share, monkeypatch):
    """Images lie in the data set itself and are decoded when the question is asked."""
    (task,) = lmms.load_tasks(DATASETS["vqav2"], "llava_onevision")[1]
    split = task.config.test_split
    rows = [dict(row) for row in task.dataset[split].with_format("arrow").to_pandas().to_dict("records")]
    content = io.BytesIO()
    Image.effect_noise((64, 48), 80).save(content, "JPEG")
    rows[1]["image"] = {"bytes": content.getvalue()[: int(share * len(content.getvalue()))], "path": None}
    table = Table.from_list(
        [{**row, "answers": list(row["answers"])} for row in rows], features=task.dataset[split].features
    )
    monkeypatch.setitem(task.dataset, split, table)
    result = evaluate.evaluate(vlm("llava_onevision"), Dense(), DATASETS["vqav2"])
    (failure,) = result.failures
    assert failure["doc_id"] == 1 and failure["error"].startswith("vqav2_val 1: not a readable image")
    assert "computation_sparsity" in result.samples[0]


def test_a_video_too_short_for_a_method_is_one_recorded_failure(vlm, spoilt, hf_home):
    expected = evaluate.evaluate(vlm("llava_vid"), FrameFusion(), DATASETS["videomme"]).samples
    video = hf_home / "videomme/data/first.mp4"
    spoilt(video)
    replicas.write_video(video, count=1)
    result = evaluate.evaluate(vlm("llava_vid"), FrameFusion(), DATASETS["videomme"])
    assert [failure["doc_id"] for failure in result.failures] == [0]
    assert "one frame" in result.failures[0]["error"]
    for before, after in zip(expected[1:], result.samples[1:], strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_settings_that_fit_no_sample_fail_the_cell(vlm):
    with pytest.raises(UserError, match="selected layer 40 does not exist"):
        evaluate.evaluate(vlm("llava_vid"), Focus(selected_layers=(40,), retention=(0.1,)), DATASETS["mlvu"])


@pytest.mark.parametrize("dataset", STOCK)
def test_a_missing_data_set_is_one_line_at_once(vlm, spoilt, dataset):
    source = next(sources(DATASETS[dataset]))
    spoilt(source.cache())
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        evaluate.evaluate(vlm("llava_onevision"), Dense(), DATASETS[dataset])
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert source.repository in message and f"focus fetch {dataset}" in message and "\n" not in message


def test_a_missing_data_set_does_not_stop_the_other_cells(checkpoints, tmp_path, spoilt):
    spoilt(next(sources(DATASETS["mlvu"])).cache())
    common = {"method": "dense", "limit": 1, "checkpoint": checkpoints["llava_vid"], "model": "llava_vid", **COMMON}
    cells = [make_cell("accuracy", dataset=dataset, **common) for dataset in ("mlvu", "videomme")]
    outcome = run_cells("main", cells, tmp_path / "results")
    assert [result.cell.dataset for result in outcome.results] == ["videomme"]
    (reason,) = outcome.failed.values()
    assert "no data set sy1998/MLVU_dev" in reason and "\n" not in reason


def test_missing_videos_are_one_line_at_once(vlm, spoilt, hf_home):
    spoilt(hf_home / "mlvu")
    with pytest.raises(UserError, match=f"mlvu: no videos in {hf_home / 'mlvu'}; .*focus fetch mlvu"):
        evaluate.evaluate(vlm("llava_vid"), Dense(), DATASETS["mlvu"])


@pytest.fixture
def project(tmp_path, checkpoints, monkeypatch):
    """A project whose profile `small` takes the replicas."""
    shutil.copytree(project_root() / "params", tmp_path / "params")
    folder = tmp_path / "params" / "small"
    folder.mkdir()
    (folder / "image.yaml").write_text(f"""
models: [qwen2_5_vl]
datasets: [mme]
methods: [dense]
limit: 10
trace_samples: 2
checkpoints: {{qwen2_5_vl: {checkpoints["qwen2_5_vl"]}}}
device: cpu
dtype: float32
seed: 0
""")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(capsys, profile: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--profile", profile])
    return ended.value.code, capsys.readouterr().out


def test_check_of_a_whole_profile(project, capsys):
    status, said = check(capsys, "small")
    assert status == 0 and "nothing is missing" in said and "not published" in said


def test_check_names_what_is_missing(project, capsys, spoilt, hf_home):
    spoilt(next(sources(DATASETS["mlvu"])).cache())
    spoilt(hf_home / "videomme/data/second.mp4")
    status, said = check(capsys, "paper")
    lines = [line for line in said.splitlines() if line.startswith("missing: ")]
    assert status == 1
    for name in ("llava_vid", "llava_onevision", "minicpm_v", "qwen2_5_vl"):
        hub = MODELS[name].checkpoint
        assert any(f"hf download {hub}" in line for line in lines), name
    assert any("mlvu: no data set sy1998/MLVU_dev" in line and "focus fetch mlvu" in line for line in lines)
    assert any("videomme: 1 of 2 videos missing, such as" in line and "second.mp4" in line for line in lines)
    assert not any("mvbench" in line or "vqav2" in line for line in lines)
    if not torch.cuda.is_available():
        assert any("no CUDA GPU" in line for line in lines)
    row = next(line for line in said.splitlines() if line.split()[:2] == ["llava_vid", "videomme"])
    assert "dense 5.3" in row and "cmc 41.0" in row and "int8 focus" in row


def test_check_of_a_half_downloaded_checkpoint(project, capsys, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["qwen2_5_vl"], tmp_path / "half")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    profile = project / "params" / "small" / "image.yaml"
    profile.write_text(profile.read_text().replace(checkpoints["qwen2_5_vl"], str(folder)))
    status, said = check(capsys, "small")
    assert status == 1 and f"missing: {weights}: " in said and "download it again" in said


def test_fetching_an_unknown_name_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fetch", "videome"])
    assert ended.value.code == 1
    assert "unknown model or data set 'videome'; did you mean videomme?" in capsys.readouterr().err
