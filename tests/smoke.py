"""Run the notebooks of the profiles paper and modern on tiny replicas, offline, and check what they write.

python tests/smoke.py [experiment …] (make smoke, ONLY=experiment; modern is the second profile's comparison); results
in results/paper-replica and results/modern-replica.
"""

import os
import shutil
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

PROFILE, MODERN = "paper-replica", "modern-replica"
VIDEO = list(product(("llava_vid", "llava_onevision", "minicpm_v"), ("videomme", "mlvu", "mvbench")))
IMAGE = list(product(("llava_onevision", "qwen2_5_vl"), ("vqav2", "mme", "mmbench")))
MODELS = ("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct", "InternVL3_5-8B-HF")  # of the modern profile
USUAL = ["main", "baselines", "image", "modern"]  # INT8 and the design space take the same models and data again
# table → its rows' (model, data set) pairs, by experiment
ROWS = {
    "accuracy.csv": {"main": VIDEO, "baselines": VIDEO, "image": IMAGE, "int8": VIDEO},
    "meta_data.csv": {"main": VIDEO, "image": IMAGE},
    "adaptiv_sparsity.csv": {"baselines": VIDEO, "image": IMAGE},
    "cmc_sparsity.csv": {"baselines": VIDEO},
}
# columns of accuracy.csv, by experiment
COLUMNS = {
    "main": {"Dense", "Focus"},
    "baselines": {"Dense", "FF", "Adaptiv", "CMC", "Focus"},
    "image": {"Dense", "Adaptiv", "Focus"},
    "int8": {"Dense", "Focus", "INT8_Dense", "INT8_Focus"},
}
BLOCKS = [f"{t}x{s}x{s}" for t, s in product((1, 2, 3), repeat=2)]
# the simulator's files, by experiment
TRACES = {
    "main": [f"focus_main/{model}_{dataset}" for model, dataset in VIDEO],
    "image": [f"focus_main/{model}_{dataset}" for model, dataset in IMAGE],
    "int8": [f"focus_int8/{model}_{dataset}" for model, dataset in VIDEO],
    "dse": [
        *(f"m_tile_size_dse/llava_vid_videomme_{tile}" for tile in (-1, 4096, 2048, 1024, 512, 128, 32)),
        *(f"vector_size_dse/llava_vid_mlvu_{size}" for size in (4096, 2048, 512, 128, 32, 8)),
        *(f"block_size_dse/llava_vid_videomme_{block}" for block in BLOCKS),
    ],
}
DSE_ROWS = {"dse_a_m_tile_accuracy.csv": 7, "dse_b_vector_accuracy.csv": 6, "dse_c_block_accuracy.csv": 9}


def main(experiments: list[str]) -> None:
    start = time.time()
    with TemporaryDirectory() as folder:
        hf_home = Path(folder) / "hf"
        os.environ |= {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"}  # before any hub client is imported
        os.environ |= {"OMP_NUM_THREADS": "1"}  # the models are tiny: more threads only wait for each other
        import replicas  # beside this file

        from focuslib.experiments.notebooks import execute
        from focuslib.experiments.paper import results_folder
        from focuslib.experiments.store import read_status

        results = results_folder(PROFILE)
        shutil.rmtree(results, ignore_errors=True)
        replicas.write_datasets(hf_home)
        checkpoints = replicas.write_checkpoints(Path(folder) / "checkpoints")
        models = {"checkpoints": checkpoints, "device": "cpu", "dtype": "float32", "workers": 2}
        for experiment in (name for name in experiments if name != "modern"):
            began = time.time()
            changes = {} if experiment == "hardware" else models  # it runs none
            execute(experiment, "paper", {"results": PROFILE, **changes})
            status = read_status(results, experiment)
            print(f"{experiment}: {status['text']} ({time.time() - began:.0f} s)")
            assert status["complete"], experiment
        check_files(results, [name for name in experiments if name != "modern"])
        if "modern" in experiments:
            modern(results_folder(MODERN), Path(folder) / "modern")
    print(f"every file has its rows; {time.time() - start:.0f} s in all")


def modern(results: Path, folder: Path) -> None:
    """The comparison of the modern profile: every pair has a score of every method, and no question failed."""
    import pandas as pd
    import replicas

    from focuslib.experiments.notebooks import execute
    from focuslib.experiments.store import read_status

    began = time.time()
    shutil.rmtree(results, ignore_errors=True)
    changes = {"checkpoints": replicas.write_modern(folder), "device": "cpu", "dtype": "float32", "workers": 2}
    execute("baselines", "modern", {"results": MODERN, "frames": 8, **changes})
    status = read_status(results, "baselines")
    print(f"modern: {status['text']} ({time.time() - began:.0f} s)")
    assert status["complete"], "modern"
    table = pd.read_csv(results / "accuracy.csv").set_index(["Models", "Dataset"])
    assert sorted(table.index) == sorted(product(MODELS, ("videomme", "mlvu", "mvbench")))
    assert not table[sorted(COLUMNS["baselines"])].isna().any(axis=None)


def check_files(results: Path, experiments: list[str]) -> None:
    """Every table of the experiments has exactly its rows, every row its numbers, and every trace loads."""
    import pandas as pd
    import torch

    for name, pairs_of in ROWS.items():
        wanted = {pair for experiment in experiments for pair in pairs_of.get(experiment, ())}
        if not wanted:
            continue
        table = pd.read_csv(results / name).rename(columns={"Models": "Model"}).set_index(["Model", "Dataset"])
        assert sorted(table.index) == sorted(wanted), f"{name}: {sorted(table.index)}"
        if name != "accuracy.csv":
            assert not table.isna().any(axis=None), name
            continue
        for experiment in set(experiments) & set(COLUMNS):
            rows = table.loc[pairs_of[experiment], sorted(COLUMNS[experiment])]
            assert not rows.isna().any(axis=None), f"{name}: {experiment}"
    for name, count in DSE_ROWS.items() if "dse" in experiments else ():
        table = pd.read_csv(results / name)
        assert list(table) == ["m_tile_size", "block_size", "vector_size", "accuracy"] and len(table) == count, name
    for name in (name for experiment in experiments for name in TRACES.get(experiment, ())):
        trace = torch.load(results / f"{name}.pth", weights_only=True)
        masks = trace["mask_zero"]["q_proj"], trace["mask_similar"]["q_proj"], trace["group_idx"]["q_proj"]
        assert masks[0].shape == masks[1].shape == masks[2].shape and masks[0].shape[:2] == (28, 1), name


if __name__ == "__main__":
    main(sys.argv[1:] or USUAL)
