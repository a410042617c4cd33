"""The question that the project began with: does ChatGLM3-6B fit, and how does it grow?"""

from pathlib import Path

import numpy as np
import pytest
from records import make_job

from autotune.devices import named_cluster, parse_gpus
from autotune.hardware import Cluster
from autotune.memory import MemoryEstimate, estimate_memory
from autotune.profile import child
from autotune.profile.request import TraceRequest
from autotune.space import Space, enumerate_space
from autotune.units import GIB
from autotune.workload import ModelProfile

PRESET = Path(__file__).parent.parent / "configs" / "models" / "chatglm3-6b"

pytestmark = pytest.mark.usefixtures("server")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> ModelProfile:
    request = TraceRequest(
        model_dir=str(PRESET),
        trust_remote_code=False,
        attention="sdpa",
        precision="bf16",
        device_kind="cuda",
        padded=False,
        checkpointing=("full",),
    )
    # In a process of its own: torch knows no further device once it has run a backward pass.
    log = tmp_path_factory.mktemp("trace") / "trace.log"
    return child.profile_from_json(child.traced(request, log))


def on(gpus: str) -> Cluster:
    return named_cluster([parse_gpus(gpus)])


def estimate(
    profile: ModelProfile, cluster: Cluster, length: int = 3256
) -> tuple[Space, MemoryEstimate]:
    space = enumerate_space(cluster, 8, checkpointing_modes=("full",))
    return space, estimate_memory(space, profile, make_job(), cluster, length)


def test_it_has_the_parameters_of_the_published_model(profile: ModelProfile) -> None:
    assert profile.parameters == 6_243_584_000


def test_one_a100_has_no_room_for_its_states(profile: ModelProfile) -> None:
    cluster = on("1xA100-80GB")
    space, memory = estimate(profile, cluster)
    on_device = space.column("offload_optimizer") == "none"
    states = memory.weights_bytes + memory.optimizer_bytes
    # Weights, fp32 weights and two moments; the gradients make it 93 GiB.
    assert states[on_device].min() == pytest.approx(14 * profile.parameters, rel=1e-3)
    assert 16 * profile.parameters / GIB == pytest.approx(93, abs=0.1)
    assert memory.allocated_bytes[on_device].min() > 93 * GIB > cluster.device_memory_bytes
    assert (memory.device_bytes[~on_device] < cluster.device_memory_bytes).any()


def test_eight_3090s_have_room_with_zero_3(profile: ModelProfile) -> None:
    cluster = on("8xRTX3090-24GB")
    space, memory = estimate(profile, cluster)
    fits = memory.device_bytes <= cluster.device_memory_bytes
    assert set(space.column("zero_stage")[fits].tolist()) == {2, 3}
    without_offload = fits & (space.column("offload_optimizer") == "none")
    assert set(space.column("zero_stage")[without_offload].tolist()) == {3}


def test_memory_grows_linearly_in_length(profile: ModelProfile) -> None:
    lengths = (1280, 3584, 5888, 8192)
    grown = np.array(
        [estimate(profile, on("8xA100-80GB"), length)[1].allocated_bytes for length in lengths]
    )
    steps = np.diff(np.rint(grown), axis=0)
    assert (steps >= 0).all()
    # Where rows are short, building the engine or the update can be the peak instead.
    growing = steps[1] > 0
    assert growing.mean() > 0.5
    assert steps[2][growing] == pytest.approx(steps[1][growing], rel=0.02)
