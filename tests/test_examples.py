"""The files of examples/ do what they say, so far as that can be tried without a cluster."""

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
STUB = (
    '#!/bin/sh\necho "$(basename "$0") $*" >> "$CALLS"\n[ "$(basename "$0") $1" != "focus plan" ] || exit "$LACKING"\n'
)


@pytest.mark.parametrize(("nodes", "lacking"), [(1, 0), (3, 0), (3, 1)])
def test_the_slurm_script_makes_a_cluster_and_runs(tmp_path, nodes, lacking):
    for name in ("srun", "focus"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hostname").write_text('#!/bin/sh\n[ -n "$1" ] && echo "10.0.0.1 10.1.0.1" || echo node1\n')
    (tmp_path / "hostname").chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "LACKING": str(lacking), "HEAD_SECONDS": "0.3",
        "SLURM_JOB_ID": "12345", "SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip
    script = subprocess.run(["bash", EXAMPLES / "slurm.sh", "--only", "main"], env=environment, timeout=60)
    assert script.returncode == lacking
    made = calls.read_text().splitlines()
    assert "ray start --head --node-ip-address=10.0.0.1 --port=22345" in made[0] and "--nodelist=node1" in made[0]
    if nodes > 1:
        assert "--nodes=2 --ntasks=2 --exclude=node1 ray start --address=10.0.0.1:22345" in made[1]
    run = f"focus reproduce --profile paper --engine ray --address 10.0.0.1:22345 --workers {4 * nodes} --only main"
    assert (made[-1] == run) == (not lacking)  # what is missing on a node ends it before it runs


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_the_slurm_script_is_clean():
    subprocess.run(["shellcheck", EXAMPLES / "slurm.sh"], check=True)


def test_the_cloud_file_has_rays_schema():
    spec = find_spec("ray")
    if spec is None or spec.origin is None:
        pytest.skip("ray is not installed: pip install 'focuslib[cluster]'")
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    content = yaml.safe_load((EXAMPLES / "ray-cluster.yaml").read_text())
    jsonschema.validate(content, schema)
    starts = [*content["head_start_ray_commands"], *content["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
