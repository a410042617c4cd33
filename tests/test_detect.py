"""The choice of devices, from records; and the whole of detection on the machine of the test."""

import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.detect import DeviceRequest, choose_cluster, detect, parse_devices
from autotune.detect.nvidia import NvidiaDevice, NvidiaInventory
from autotune.detect.torch_build import TorchBuild, read_torch_build
from autotune.errors import NoUsableDeviceError, UsageError
from autotune.hardware import Cluster, Host
from autotune.intake import require_usable
from autotune.units import GIB

CUDA_TORCH = TorchBuild(version="2.13.0+cu130", cuda_version="13.0")
CPU_TORCH = TorchBuild(version="2.13.0+cpu", cuda_version=None)
NO_GPU = NvidiaInventory(devices=(), absence="NVML lists no GPU")


def make_host(sockets: int = 1, physical_cores: int = 8, usable_cores: int = 16) -> Host:
    return Host(
        cpu_name="Example CPU",
        sockets=sockets,
        physical_cores=physical_cores,
        usable_cores=usable_cores,
        memory_bytes=64 * GIB,
        memory_source="/proc/meminfo MemTotal",
        available_bytes=40 * GIB,
    )


def make_gpu(
    index: int, free_gib: int | None = 79, name: str = "A100", total_bytes: int = 80 * GIB
) -> NvidiaDevice:
    return NvidiaDevice(
        index=index,
        uuid=f"GPU-{index}",
        name=name,
        memory_total_bytes=total_bytes,
        memory_free_bytes=None if free_gib is None else free_gib * GIB,
        compute_capability=(8, 0),
    )


def choose(
    devices: str,
    *gpus: NvidiaDevice,
    host: Host | None = None,
    torch_build: TorchBuild = CUDA_TORCH,
    device_memory_bytes: int | None = None,
) -> Cluster:
    inventory = NvidiaInventory(devices=gpus) if gpus else NO_GPU
    return choose_cluster(
        parse_devices(devices), host or make_host(), inventory, torch_build, device_memory_bytes
    )


@pytest.mark.parametrize(
    ("text", "on_cpu", "count"),
    [("auto", False, None), ("cpu", True, None), ("cpu:3", True, 3), ("8", False, 8)],
)
def test_devices_are_asked_for_in_four_forms(text: str, *, on_cpu: bool, count: int | None) -> None:
    assert parse_devices(text) == DeviceRequest(on_cpu=on_cpu, count=count)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("gpu:0", ("0",)),
        ("gpu:2,0", ("2", "0")),
        ("0,1", ("0", "1")),
        ("GPU-8932f937", ("GPU-8932f937",)),
        ("GPU-1,MIG-2", ("GPU-1", "MIG-2")),
        ("gpu:GPU-1, 3", ("GPU-1", "3")),
    ],
)
def test_gpus_can_be_named(text: str, entries: tuple[str, ...]) -> None:
    assert parse_devices(text) == DeviceRequest(on_cpu=False, count=len(entries), entries=entries)


@pytest.mark.parametrize("text", ["gpu:", "gpu:0,", "0,x", "gpu:-1", "gpu:cpu", "cpu,0", ","])
def test_a_list_with_something_else_in_it_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="gpu:0,2"):
        parse_devices(text)


@pytest.mark.parametrize(
    "text", ["", "0", "cpu:0", "-1", "cpu:", "cpu:-2", "gpu", "1.5", "2 ", "cuda:1", "9" * 5000]
)
def test_any_other_form_is_an_error_that_names_them(text: str) -> None:
    with pytest.raises(UsageError, match=r"auto, cpu, cpu:N for N ranks on the CPU, or N for N"):
        parse_devices(text)


@given(st.sampled_from(["", "cpu:"]), st.integers(1, 999_999))
def test_a_count_is_read_as_it_is_written(place: str, count: int) -> None:
    expected = DeviceRequest(on_cpu=bool(place), count=count)
    assert parse_devices(f"{place}{count}") == expected


def test_all_visible_gpus_are_used() -> None:
    cluster = choose("auto", make_gpu(0), make_gpu(1, free_gib=50))
    assert (cluster.kind, cluster.device_name, cluster.num_devices) == ("cuda", "A100", 2)
    others = 80 * GIB * 98 // 100 - 50 * GIB
    assert cluster.device_memory_bytes == 50 * GIB - int(others * 0.1)
    assert cluster.headroom_bytes == int(others * 0.1)
    assert cluster.device_memory_source == (
        "50.0 GiB free of the GPU less a headroom of 2.84 GiB, as others use 28.4 GiB"
    )
    assert cluster.compute_capability == (8, 0)
    assert cluster.visible_devices == ("GPU-0", "GPU-1")
    assert cluster.threads_per_rank == 4
    assert cluster.notes == ()


def test_a_number_takes_the_first_gpus_and_only_they_must_be_alike() -> None:
    cluster = choose("1", make_gpu(0), make_gpu(1, name="T4"))
    assert cluster.visible_devices == ("GPU-0",)
    assert cluster.device_memory_bytes == 80 * GIB * 98 // 100
    assert cluster.device_memory_source == "all of the GPU, which nobody else uses"


def test_more_gpus_than_there_are_is_an_error_that_counts_them() -> None:
    with pytest.raises(UsageError, match=r"--devices 3 asks for more GPUs than the 2 visible"):
        choose("3", make_gpu(0), make_gpu(1))


def test_the_reason_for_few_gpus_is_told_when_more_are_asked_for() -> None:
    gpus = NvidiaInventory(devices=(make_gpu(0),), notes=("entry 2 is not valid",))
    with pytest.raises(UsageError, match=r"the 1 visible \(entry 2 is not valid\)"):
        choose_cluster(parse_devices("2"), make_host(), gpus, CUDA_TORCH, None)


@pytest.mark.parametrize(
    "other", [make_gpu(1, name="T4"), make_gpu(1, total_bytes=40 * GIB)], ids=["name", "memory"]
)
def test_unlike_gpus_are_refused_with_their_names_and_a_mask(other: NvidiaDevice) -> None:
    with pytest.raises(NoUsableDeviceError) as caught:
        choose("auto", make_gpu(0), other, make_gpu(2))
    text = str(caught.value)
    assert f"GPU 0 A100 80.0 GiB, GPU 1 {other.name}" in text
    assert text.endswith("CUDA_VISIBLE_DEVICES=0,2")


def test_a_few_retired_pages_do_not_make_gpus_unlike() -> None:
    cluster = choose("auto", make_gpu(0), make_gpu(1, total_bytes=80 * GIB - 2**20))
    assert cluster.num_devices == 2


def test_gpus_that_torch_cannot_use_can_be_planned_for_and_say_so() -> None:
    cluster = choose("auto", make_gpu(0), torch_build=CPU_TORCH)
    assert (cluster.kind, cluster.num_devices) == ("cuda", 1)
    assert cluster.unusable == (
        "GPU 0 A100 80.0 GiB cannot be used because torch 2.13.0+cpu is built without CUDA:"
        " install a CUDA build of torch, or pass --devices cpu"
    )
    with pytest.raises(NoUsableDeviceError, match="built without CUDA") as caught:
        require_usable(cluster)
    assert caught.value.exit_code == 69
    assert choose("auto", make_gpu(0)).unusable is None


def test_the_cpu_is_used_beside_gpus_when_asked_for() -> None:
    cluster = choose("cpu", make_gpu(0), torch_build=CPU_TORCH)
    assert (cluster.kind, cluster.device_name) == ("cpu", "Example CPU")
    (note,) = cluster.notes
    assert note == (
        "runs on the CPU with 2 ranks (one a socket, at least 2, at most the 16 usable cores),"
        " because --devices says so"
    )


def test_gpus_without_uuids_are_named_by_number() -> None:
    gpu = NvidiaDevice(
        index=3,
        uuid=None,
        name=None,
        memory_total_bytes=None,
        memory_free_bytes=None,
        compute_capability=None,
    )
    cluster = choose("auto", gpu, device_memory_bytes=GIB)
    assert (cluster.visible_devices, cluster.device_name) == (("3",), "NVIDIA GPU")


def test_unknown_gpu_memory_has_to_be_told() -> None:
    with pytest.raises(NoUsableDeviceError, match=r"GPU 0 A100.*--device-memory 16GiB"):
        choose("auto", make_gpu(0, free_gib=None))


def test_unknown_gpu_memory_is_believed_when_told() -> None:
    cluster = choose("auto", make_gpu(0, free_gib=None), device_memory_bytes=16 * GIB)
    assert cluster.device_memory_bytes == 16 * GIB
    assert cluster.notes == (
        "NVML does not tell the free memory, so --device-memory is believed as it stands",
    )


@pytest.mark.parametrize("devices", ["auto", "cpu"])
def test_device_memory_is_a_cap_on_any_device(devices: str) -> None:
    cluster = choose(devices, make_gpu(0), device_memory_bytes=2 * GIB)
    assert cluster.device_memory_bytes == 2 * GIB
    assert cluster.device_memory_source == "--device-memory"


@pytest.mark.parametrize(("devices", "kept"), [("auto", "78.4 GiB"), ("cpu:1", "36.0 GiB")])
def test_device_memory_above_what_there_is_keeps_the_smaller_with_a_note(
    devices: str, kept: str
) -> None:
    cluster = choose(devices, make_gpu(0), device_memory_bytes=100 * GIB)
    assert cluster.device_memory_bytes < 80 * GIB
    assert cluster.device_memory_source != "--device-memory"
    assert f"--device-memory 100 GiB is more than there is, so {kept} is kept" in cluster.notes[-1]


@pytest.mark.parametrize(
    ("sockets", "physical", "usable", "ranks", "threads"),
    [
        pytest.param(1, 8, 16, 2, 4, id="two ranks share one socket"),
        pytest.param(4, 64, 128, 4, 16, id="a rank a socket"),
        pytest.param(4, 64, 3, 3, 1, id="no more ranks than usable cores"),
        pytest.param(1, 8, 1, 1, 1, id="one usable core"),
        pytest.param(1, 1, 2, 2, 1, id="two threads of one core"),
    ],
)
def test_cpu_ranks_follow_sockets_and_cores(
    sockets: int, physical: int, usable: int, ranks: int, threads: int
) -> None:
    cluster = choose("auto", host=make_host(sockets, physical, usable))
    assert (cluster.num_devices, cluster.threads_per_rank) == (ranks, threads)
    assert cluster.visible_devices == ("cpu",) * ranks
    assert cluster.compute_capability is None


def test_ranks_on_a_cpu_share_nine_tenths_of_what_is_available() -> None:
    cluster = choose("cpu:4")
    assert cluster.device_memory_bytes == 9 * GIB
    assert cluster.device_memory_source == (
        "nine tenths of the host's available memory, shared by 4 ranks"
    )


def test_one_sentence_says_why_the_cpu_was_chosen() -> None:
    (note,) = choose("auto", torch_build=CPU_TORCH).notes
    assert note == (
        "runs on the CPU with 2 ranks (one a socket, at least 2, at most the 16 usable cores),"
        " because no NVIDIA GPU is usable: NVML lists no GPU"
    )


def test_a_number_without_gpus_means_ranks_on_the_cpu() -> None:
    cluster = choose("3")
    assert (cluster.kind, cluster.num_devices) == ("cpu", 3)
    assert cluster.notes[0].startswith("runs on the CPU with 3 ranks (as asked), because no NVIDIA")


def test_more_ranks_than_cores_are_allowed_with_a_note() -> None:
    cluster = choose("cpu:3", host=make_host(usable_cores=2))
    assert (cluster.num_devices, cluster.threads_per_rank) == (3, 1)
    assert cluster.notes == (
        "3 ranks share 2 usable cores: they take turns and every step slows down",
    )


def test_a_torch_that_is_missing_is_noted() -> None:
    build = TorchBuild(version=None, cuda_version=None, note="torch is not installed")
    assert choose("cpu:2", torch_build=build).notes == ("torch is not installed",)


def finder(folder: Path) -> Callable[[str], ModuleSpec | None]:
    return lambda name: PathFinder.find_spec(name, [str(folder)])


def make_torch(folder: Path, version_py: str) -> Callable[[str], ModuleSpec | None]:
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    if version_py:
        (package / "version.py").write_text(version_py)
    return finder(folder)


def test_a_cuda_build_of_torch_is_known_without_importing_it(tmp_path: Path) -> None:
    find = make_torch(tmp_path, "__version__ = '2.13.0+cu130'\ncuda = '13.0'\nhip = None\n")
    assert read_torch_build(find) == CUDA_TORCH


def test_a_cpu_build_of_torch_has_no_cuda_version(tmp_path: Path) -> None:
    find = make_torch(tmp_path, "__version__ = '2.13.0+cpu'\ncuda = None\nhip = None\n")
    assert read_torch_build(find) == CPU_TORCH


def test_a_rocm_build_of_torch_is_no_cuda_build(tmp_path: Path) -> None:
    find = make_torch(tmp_path, "__version__ = '2.13.0'\ncuda = None\nhip = '7.1'\n")
    build = read_torch_build(find)
    assert build.cuda_version is None
    assert build.note == "torch 2.13.0 is built for ROCm 7.1, which is not used"


def test_a_torch_without_its_version_file_is_noted(tmp_path: Path) -> None:
    build = read_torch_build(make_torch(tmp_path, ""))
    assert build.cuda_version is None
    assert build.note is not None
    assert "version.py is missing" in build.note


def test_no_torch_is_noted(tmp_path: Path) -> None:
    build = read_torch_build(finder(tmp_path))
    assert (build.cuda_version, build.note) == (None, "torch is not installed")


def test_detection_on_the_cpu_imports_neither_torch_nor_nvml() -> None:
    code = (
        "import sys; from autotune.detect import detect; print(detect('cpu:1').kind,"
        " sorted({'torch', 'pynvml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "cpu []\n"


def test_this_machine_has_a_cpu_to_run_on() -> None:
    cluster = detect("cpu:2", device_memory_bytes=2**20)
    assert (cluster.kind, cluster.num_devices) == ("cpu", 2)
    assert cluster.device_memory_bytes == 2**20
    assert cluster.host is not None
    assert cluster.device_name == cluster.host.cpu_name


def test_with_all_gpus_hidden_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cluster = detect()
    assert (cluster.kind, cluster.compute_capability) == ("cpu", None)
    assert cluster.notes[0].startswith("runs on the CPU with")
