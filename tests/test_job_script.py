"""The job script of docs/cluster.md, with stand-ins for SLURM's commands."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.test_cli import QUIET, fit_args
from tests.test_lost_processes import RARE
from tests.test_signals import wait_for


@pytest.mark.slow
def test_a_job_whose_time_is_up_asks_to_be_queued_again_and_goes_on(tmp_path: Path, repository: Path) -> None:
    found = re.search(r"```bash\n(#!/bin/bash.*?)```", (repository / "docs" / "cluster.md").read_text(), re.DOTALL)
    assert found is not None
    script = tmp_path / "job.sh"
    script.write_text(found[1])
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    run_dir = tmp_path / "run"

    def submit(steps: int) -> subprocess.Popen[bytes]:
        args = fit_args(run_dir, *QUIET, *RARE, max_steps=steps)
        srun = '[ "$1 $2 $3 $4" = \'python -m diffusion_lit fit\' ] && [ "${@: -1}" = last ] || exit 1\n'
        run = shlex.join([sys.executable, "-m", "diffusion_lit", *args, "--ckpt_path", "last"])
        (stand_ins / "srun").write_text(f"#!/bin/bash\n{srun}echo $$ > {tmp_path}/pid\nexec {run}\n")
        (stand_ins / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
        for command in stand_ins.iterdir():
            command.chmod(0o755)
        environment = {**os.environ, "PATH": f"{stand_ins}:{os.environ['PATH']}", "PYTHONPATH": str(repository)}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        return subprocess.Popen(["bash", str(script)], env=environment, cwd=tmp_path)

    job = submit(100_000)
    wait_for(run_dir / "checkpoints" / "previous.ckpt")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    assert job.wait(60) == 75
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    step = tiny.load(tiny.last(run_dir))["global_step"]
    assert submit(step + 3).wait(60) == 0
    assert tiny.load(tiny.last(run_dir))["global_step"] == step + 3
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
