"""The configurations of `training/accelerate/` start, and the number of processes changes neither losses nor captions."""

import json
import sys
from itertools import chain
from unittest import mock

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from tests.conftest import REPO, tiny_config
from tests.stages import process
from tests.training import processes
from training.lib.distributed import once_each, share


CONFIGURATIONS = REPO / "training" / "accelerate"


@pytest.mark.parametrize("length", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_every_item_goes_to_one_process(length, number):
    items = list(range(length))
    parts = [items[share(length, process, number)] for process in range(number)]
    assert list(chain(*parts)) == items and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_takes_all():
    assert once_each(lambda items: [2 * item for item in items], range(5)) == [0, 2, 4, 6, 8]


def test_the_layers_that_are_sharded_are_those_of_the_model():
    config = yaml.safe_load((CONFIGURATIONS / "fsdp.yaml").read_text())["fsdp_config"]
    model = BlipRBMForConditionalGeneration(tiny_config())
    wrapped = config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=wrapped
    )
    plugin.set_auto_wrap_policy(model)  # raises where the model has no such class
    names = {type(module).__name__ for module in model.modules()}
    assert set(wrapped) <= names and set(wrapped) <= set(model._no_split_modules)


@pytest.mark.parametrize("file", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_knows_every_key(file):
    """By Accelerate's own readers: of the file, which refuses what it does not know, and of `accelerate launch`, whose flags the settings of
    a kind of sharding become."""
    config, flags = load_config_from_file(str(file)), {action.dest for action in launch_command_parser()._actions}
    for settings, kind in ((config.fsdp_config, "FSDP"), (config.deepspeed_config, "DEEPSPEED")):
        assert bool(settings) == (config.distributed_type == kind)
        assert set(settings or {}) <= flags


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_CPU"), ("fsdp", "FSDP"), ("zero2", "DEEPSPEED")])
def test_two_processes_give_the_losses_and_captions_of_one(name, kind, tmp_path):
    if name == "zero2":
        pytest.importorskip("deepspeed")
    with mock.patch.object(sys, "argv", ["processes", str(tmp_path / "one.json")]):
        processes.main()
    AcceleratorState._reset_state(True)
    launch = ["--config_file", str(CONFIGURATIONS / f"{name}.yaml"), "--num_processes", "2"]
    launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    result = process("tests.training.processes", tmp_path / "two.json", cwd=tmp_path, launcher=launch)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and kind in two["kind"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and one["losses"][0] != one["losses"][-1]
    numbers = [results["captions"].pop("numbers") for results in (one, two)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
    assert two["captions"] == one["captions"] and one["captions"]["seen"] == [4, 3, 3, 3, 3, 3, 3]
