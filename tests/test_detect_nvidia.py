"""What is read of GPUs, and CUDA_VISIBLE_DEVICES; through the real binding: test_nvml_scenarios."""

# ruff: noqa: N802 - the stand-in has the names of NVML

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.detect.masks import apply_mask
from autotune.detect.nvidia import NvidiaDevice, NvidiaInventory, read_nvidia, select_visible
from autotune.units import GIB

_T = TypeVar("_T")


class FakeNvmlError(Exception):
    pass


@dataclass
class FakeMemory:
    total: int
    free: int


@dataclass
class FakeGpu:
    uuid: str
    name: str = "NVIDIA A100-SXM4-80GB"
    memory: FakeMemory | None = field(default_factory=lambda: FakeMemory(80 * GIB, 79 * GIB))
    capability: tuple[int, int] | None = (8, 0)
    instances: "list[FakeGpu] | None" = None
    closed: bool = False


class FakeNvml:
    """NVML with these GPUs; what a GPU has not raises NVML's error, as the real one does."""

    NVMLError = FakeNvmlError

    def __init__(self, gpus: Sequence[FakeGpu] = (), fault: str | None = None) -> None:
        self.gpus = gpus
        self.fault = fault
        self.running = False

    def nvmlInit(self) -> None:
        if self.fault is not None:
            raise FakeNvmlError(self.fault)
        self.running = True

    def nvmlShutdown(self) -> None:
        self.running = False

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if self.gpus[index].closed:
            raise FakeNvmlError
        return self.gpus[index]

    def nvmlDeviceGetName(self, handle: object) -> str:
        return _gpu(handle).name

    def nvmlDeviceGetUUID(self, handle: object) -> str:
        return _gpu(handle).uuid

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> FakeMemory:
        return _supported(_gpu(handle).memory)

    def nvmlDeviceGetCudaComputeCapability(self, handle: object) -> tuple[int, int]:
        return _supported(_gpu(handle).capability)

    def nvmlDeviceGetMigMode(self, handle: object) -> list[int]:
        _supported(_gpu(handle).instances)
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object) -> int:
        _supported(_gpu(handle).instances)
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int) -> FakeGpu:
        instances = _supported(_gpu(handle).instances)
        if index >= len(instances):
            raise FakeNvmlError
        return instances[index]


def _gpu(handle: object) -> FakeGpu:
    assert isinstance(handle, FakeGpu)
    return handle


def _supported(value: _T | None) -> _T:
    if value is None:
        raise FakeNvmlError
    return value


def device(index: int, uuid: str | None = None, name: str = "A100") -> NvidiaDevice:
    return NvidiaDevice(
        index=index,
        uuid=uuid or f"GPU-{index:08x}",
        name=name,
        memory_total_bytes=80 * GIB,
        memory_free_bytes=79 * GIB,
        compute_capability=(8, 0),
    )


def indices(devices: Sequence[NvidiaDevice]) -> list[int]:
    return [device.index for device in devices]


def test_a_gpu_is_described_by_what_nvml_tells() -> None:
    nvml = FakeNvml([FakeGpu("GPU-aa")])
    found = read_nvidia(nvml, environ={})
    assert found.devices == (
        NvidiaDevice(
            index=0,
            uuid="GPU-aa",
            name="NVIDIA A100-SXM4-80GB",
            memory_total_bytes=80 * GIB,
            memory_free_bytes=79 * GIB,
            compute_capability=(8, 0),
        ),
    )
    assert (found.absence, found.notes, nvml.running) == (None, (), False)


@pytest.mark.parametrize("fault", ["Driver/library version mismatch", "Unknown Error"])
def test_an_nvml_that_does_not_start_means_no_gpu_and_its_reason(fault: str) -> None:
    found = read_nvidia(FakeNvml([FakeGpu("GPU-aa")], fault=fault), environ={})
    assert found == NvidiaInventory(devices=(), absence=f"NVML fails with '{fault}'")


def test_an_nvml_without_gpus_says_so() -> None:
    assert read_nvidia(FakeNvml(), environ={}).absence == "NVML lists no GPU"


def test_what_a_gpu_does_not_support_is_unknown() -> None:
    found = read_nvidia(FakeNvml([FakeGpu("GPU-aa", memory=None, capability=None)]), environ={})
    (gpu,) = found.devices
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes) == (None, None)
    assert gpu.compute_capability is None
    assert gpu.uuid == "GPU-aa"


def test_gpus_closed_to_this_process_are_not_numbered() -> None:
    nvml = FakeNvml([FakeGpu("GPU-aa", closed=True), FakeGpu("GPU-bb"), FakeGpu("GPU-cc")])
    found = read_nvidia(nvml, environ={"CUDA_VISIBLE_DEVICES": "1"})
    assert [gpu.uuid for gpu in found.devices] == ["GPU-cc"]


def test_a_gpu_cut_into_instances_gives_its_first_alone() -> None:
    parts = [FakeGpu("MIG-1", capability=None), FakeGpu("MIG-2", capability=None)]
    nvml = FakeNvml([FakeGpu("GPU-aa", instances=parts), FakeGpu("GPU-bb")])
    found = read_nvidia(nvml, environ={})
    assert [(gpu.uuid, gpu.compute_capability) for gpu in found.devices] == [("MIG-1", (8, 0))]
    assert found.notes == ("CUDA opens one MIG instance a process, so MIG-1 is used alone",)


def test_a_mask_chooses_the_instance() -> None:
    parts = [FakeGpu("MIG-1"), FakeGpu("MIG-2")]
    nvml = FakeNvml([FakeGpu("GPU-aa", instances=parts)])
    found = read_nvidia(nvml, environ={"CUDA_VISIBLE_DEVICES": "MIG-2"})
    assert [gpu.uuid for gpu in found.devices] == ["MIG-2"]
    assert found.notes == ()


def test_a_gpu_in_mig_mode_without_an_instance_gives_nothing() -> None:
    assert read_nvidia(FakeNvml([FakeGpu("GPU-aa", instances=[])]), environ={}).devices == ()


FOUR = [device(0, "GPU-8932f937"), device(1, "GPU-8a11aaaa"), device(2), device(3)]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        pytest.param("2,0", [2, 0], id="numbers in the order given"),
        pytest.param(" 1 , 3", [1, 3], id="blanks"),
        pytest.param("GPU-8932f937", [0], id="uuid"),
        pytest.param("GPU-893,GPU-8a", [0, 1], id="unique prefixes"),
        pytest.param("GPU-8", [], id="prefix of two"),
        pytest.param("GPU-ffff", [], id="unknown uuid"),
        pytest.param("", [], id="empty"),
        pytest.param("-1", [], id="minus one"),
        pytest.param("NoDevFiles", [], id="word"),
        pytest.param("0,-1,1", [0], id="minus one ends the list"),
        pytest.param("0,7,1", [0], id="number of no GPU ends the list"),
        pytest.param("0,,1", [0], id="nothing between commas ends the list"),
        pytest.param("0,1,0", [], id="twice the same hides all"),
        pytest.param("0,GPU-8932f937", [], id="twice the same under two names hides all"),
        pytest.param("1gpu2,02", [1, 2], id="digits count as far as they go"),
        pytest.param("\N{SUPERSCRIPT TWO}", [], id="no ASCII digit"),
        pytest.param("9" * 5000, [], id="a number too long to convert"),
    ],
)
def test_a_mask_is_read_as_cuda_reads_it(mask: str, expected: list[int]) -> None:
    assert indices(apply_mask(mask, FOUR)) == expected


entries = st.one_of(
    st.integers(-2, 9).map(str),
    st.sampled_from(["GPU-", "GPU-0000", "GPU-00000001", "GPU-00000002", "MIG-1", " 3", "x"]),
    st.text(alphabet="0123456789GPUMIG-+, x\N{SUPERSCRIPT TWO}", max_size=4),
)
masks = st.lists(entries, max_size=6).map(",".join)
gpus = st.integers(0, 5).map(lambda count: [device(index) for index in range(count)])


@given(masks, gpus)
def test_a_mask_of_any_text_leaves_distinct_devices_of_those_present(
    mask: str, present: list[NvidiaDevice]
) -> None:
    chosen = apply_mask(mask, present)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(present)
    assert len(chosen) <= mask.count(",") + 1


@given(masks, gpus, masks)
def test_nothing_after_an_invalid_entry_counts(
    mask: str, present: list[NvidiaDevice], rest: str
) -> None:
    assert apply_mask(f"{mask},-1,{rest}", present) == apply_mask(f"{mask},-1", present)


@given(order=st.permutations(range(5)), count=st.integers(1, 5), by_uuid=st.booleans())
def test_valid_entries_are_all_kept_in_their_order(
    order: list[int], count: int, *, by_uuid: bool
) -> None:
    present = [device(index) for index in range(5)]
    wanted = [present[index] for index in order[:count]]
    mask = ",".join(gpu.uuid or "" if by_uuid else str(gpu.index) for gpu in wanted)
    assert apply_mask(mask, present) == tuple(wanted)


def test_without_a_mask_all_are_visible() -> None:
    assert select_visible(FOUR, {}) == NvidiaInventory(devices=tuple(FOUR))


def test_a_mask_that_hides_all_is_the_reason_for_none() -> None:
    found = select_visible(FOUR, {"CUDA_VISIBLE_DEVICES": ""})
    assert found == NvidiaInventory(
        devices=(), absence="CUDA_VISIBLE_DEVICES='' leaves none of 4 visible"
    )


def test_a_list_cut_short_is_noted_with_the_entry_at_fault() -> None:
    found = select_visible(FOUR, {"CUDA_VISIBLE_DEVICES": "0,9,1"})
    assert indices(found.devices) == [0]
    assert found.notes == (
        "CUDA_VISIBLE_DEVICES='0,9,1': entry 2 is not valid, so CUDA ends the list there",
    )


@pytest.mark.parametrize(
    ("mask", "order", "noted"),
    [("0", {}, True), ("0", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, False), ("GPU-aa", {}, False)],
)
def test_numbers_among_unlike_gpus_are_noted_unless_their_order_is_fixed(
    mask: str, order: dict[str, str], *, noted: bool
) -> None:
    unlike = [device(0, "GPU-aa", "T4"), device(1, "GPU-bb", "A100")]
    found = select_visible(unlike, {"CUDA_VISIBLE_DEVICES": mask, **order})
    assert ["PCI bus" in note for note in found.notes] == [True] * noted
