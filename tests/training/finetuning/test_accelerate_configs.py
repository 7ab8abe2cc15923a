"""The configurations in configs/accelerate, as accelerate itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[3] / "configs" / "accelerate"
EXPECTED = {
    "ddp": (DistributedType.MULTI_GPU, 1, 8),
    "ddp-machines": (DistributedType.MULTI_GPU, 16, 128),
    "fsdp": (DistributedType.FSDP, 1, 8),
    "cpu": (DistributedType.MULTI_GPU, 1, 2),  # with MULTI_CPU, accelerate starts a single process unless there is MPI
}


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # unknown keys raise
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_machines, config.num_processes) == EXPECTED[name]
    assert config.use_cpu == (name == "cpu")


@pytest.mark.parametrize("name", EXPECTED)
def test_the_command_of_the_file_is_understood(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    comment = " ".join(
        line.removeprefix("#").strip().removesuffix("\\") for line in text.splitlines() if line.startswith("#")
    )
    command = comment[comment.index("accelerate launch") :].split()
    placed = [{"RANK": "3", "FIRST_MACHINE": "10.0.0.7"}.get(word, word) for word in command[2:]]
    placed[1] = str(FOLDER / f"{name}.yaml")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(placed))
    assert args.module and args.training_script == "latentdiff"
    assert args.training_script_args[0] == "finetune"
    assert (args.use_fsdp if name == "fsdp" else args.multi_gpu) and args.num_processes == EXPECTED[name][2]
    if name == "ddp-machines":
        assert (args.machine_rank, args.main_process_ip) == (3, "10.0.0.7")
