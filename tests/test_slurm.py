"""docs/slurm.sh with stand-ins for SLURM's commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.test_train import events, root, settings

__all__ = ["root"]  # a fixture
ROOT = Path(__file__).parents[1]
STAND_INS = {
    "srun": 'exec "$@"',
    "torchrun": "set -- $(echo $@ | sed s/max-restarts=3/max-restarts=0/)\n"
    f"exec {sys.executable} -m torch.distributed.run $@",
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi',
}


def test_a_job_goes_back_into_the_queue_until_its_run_is_done(root, tmp_path):
    content = settings(root, tmp_path, "training.max_steps=4", "validation.untrained=false").plain()
    content["run"] |= {"name": "", "folder": "runs"}
    (tmp_path / "runs" / "long-other").mkdir(parents=True)
    (tmp_path / "runs" / "long-other" / "log.jsonl").touch()
    (tmp_path / "job.yaml").write_text(json.dumps(content))
    for name, line in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1"}
    for hours, gpus, status in (("1e-9", "2", 1), ("1", "1", 0)):
        done = subprocess.run(
            ["bash", ROOT / "docs" / "slurm.sh", "job.yaml", "run.name=long"],
            env=environment | {"MAX_HOURS": hours, "SLURM_GPUS_ON_NODE": gpus},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == status, done.stderr
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert events(tmp_path / "runs" / "long", "end")


def test_a_task_of_an_array_looks_into_its_own_run(tmp_path):
    stand_ins = {**STAND_INS, "torchrun": "exit 1"}
    for name, line in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    for task, reason in ((3, "its time is up"), (4, "signal SIGTERM")):
        log = tmp_path / "runs" / f"job_task{task}" / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text(json.dumps({"event": "stop", "reason": reason, "status": 75}) + "\n")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "1"}
    for task in (3, 4):
        about = {"SLURM_JOB_ID": str(10 + task), "SLURM_ARRAY_TASK_ID": str(task)}
        command = ["bash", ROOT / "docs" / "slurm.sh", "job.yaml"]
        about |= environment | {"SLURM_JOB_NODELIST": "n1"}
        assert subprocess.run(command, env=about, cwd=tmp_path, timeout=60).returncode == 1
    assert (tmp_path / "requeued").read_text() == "requeue 13\n"
